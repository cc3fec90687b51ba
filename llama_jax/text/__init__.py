"""Tokenizing and detokenizing. Imports no JAX."""
