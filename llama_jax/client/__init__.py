"""Who asks: requests go in and streams of tokens come out. Imports no JAX."""
