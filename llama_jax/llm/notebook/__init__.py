"""What `LLM` shows in IPython front ends: Jupyter, VS Code, Colab. Needs no widgets.

Imports no JAX, and IPython only where it already runs.
"""
