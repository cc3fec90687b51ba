"""The table of the weights, and their placement on the mesh."""
