"""Mesh, partition specs and the pipeline: generic, they know nothing about Llama."""
