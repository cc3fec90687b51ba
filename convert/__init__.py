"""Checkpoint conversion: `python -m convert --help`, and `convert.model.save_model` from Python."""
