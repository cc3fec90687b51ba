"""Every weight, declared once, and where it lies on the mesh."""
