"""The server with the engine of fake_engine.py: `python -m tests.support.fake_server`.

The name of the checkpoint directory is the mode of the engine.
"""

import sys

from llama_jax.serve.__main__ import main
from tests.support.processes import FAKE

if __name__ == "__main__":
    sys.exit(main(engine_command=FAKE))
