"""What the command lines and progress displays share. Imports no JAX."""
