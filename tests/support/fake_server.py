"""The real server process over the engine of fake_engine.py: `python -m tests.support.fake_server`.

The name of the checkpoint directory says what the engine does; see fake_engine.py.
"""

import sys

from llama_jax.serve.launch import main
from tests.support.processes import FAKE

if __name__ == "__main__":
    sys.exit(main(engine_command=FAKE))
