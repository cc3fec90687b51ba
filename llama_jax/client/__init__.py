"""Clients of an engine: they send requests and receive tokens. Imports no JAX."""
