"""The names of the two mesh axes. Imports no JAX."""

STAGE = "stage"  # pipeline stages
MODEL = "model"  # tensor-parallel ranks
AXES = (STAGE, MODEL)
