"""`python -m llama_jax.serve`; its options are in `llama_jax.serve.command_line.arguments`."""

import os
import signal
import sys
from typing import Any


def main(**options: Any) -> int:
    """Serves until SIGTERM or SIGINT; arguments and exit code are those of `launch.main`."""
    try:
        from llama_jax.serve import launch  # takes a second or two, in which Ctrl-C may come
        from llama_jax.serve.monitoring.logs import num_stuck

        code = launch.main(**options)
        if num_stuck():
            os._exit(code)  # the interpreter would wait for a reader of stderr that has stopped
        return code
    except KeyboardInterrupt:
        print("Interrupted before the server was ready.", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
