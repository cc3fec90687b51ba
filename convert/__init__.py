"""Checkpoint conversion, a command-line tool: see `python -m convert --help`."""
