"""Command lines and progress displays: what the programs of this project share. Imports no JAX."""
