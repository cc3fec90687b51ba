"""The HTTP server: the OpenAI API in front of an engine process. Imports no JAX."""
