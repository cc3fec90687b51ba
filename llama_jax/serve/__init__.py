"""The HTTP server: the OpenAI protocol in front of an engine process. Imports no JAX."""
