"""The real server process over the engine of fake_engine.py: `python fake_server.py ARGUMENTS`.

The name of the checkpoint directory says what the engine does; see fake_engine.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from llama_jax.serve.launch import main

if __name__ == "__main__":
    sys.exit(main(engine_command=(sys.executable, str(Path(__file__).with_name("fake_engine.py")))))
