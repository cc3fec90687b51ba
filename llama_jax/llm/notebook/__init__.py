"""What `LLM` does for those who use it from IPython: Jupyter, VS Code, Colab. Imports no JAX, and
IPython only where it already runs. Widgets are not needed anywhere."""
