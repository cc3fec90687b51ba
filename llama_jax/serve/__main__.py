"""`python -m llama_jax.serve`; its options are in `llama_jax.serve.command_line.arguments`."""

import signal
import sys
from typing import Any


def main(**options: Any) -> int:
    """Serves until SIGTERM or SIGINT; arguments and exit code are those of `launch.main`."""
    try:
        from llama_jax.serve import launch  # takes a second or two, in which Ctrl-C may come

        return launch.main(**options)
    except KeyboardInterrupt:
        print("Interrupted before the server was ready.", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
