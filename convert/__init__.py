"""Checkpoint conversion, a command-line tool: `python -m convert --help`."""
