"""`python -m convert`: converts checkpoints between layouts."""

import argparse
import functools
import logging
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

DESCRIPTION = """\
Converts a Llama 3 checkpoint to the Orbax layout of this project.

  python -m convert hf SRC DST

SRC  a directory in Hugging Face layout: config.json, model.safetensors (or shards with
     model.safetensors.index.json), tokenizer files
DST  a new or empty directory, on a disk with room for the weights once more

The weights are neither changed nor cast: DST holds the same bits, one array for each weight and
layer, in chunks that any mesh can read its own part of. Serve it like the source:

  python -m llama_jax.serve DST
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, or 1 after a one-line error."""
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m convert hf SRC DST",
    )
    parser.add_argument("layout", choices=["hf"], help="layout of SRC: hf is Hugging Face")
    parser.add_argument("source", metavar="SRC", type=Path, help="directory to read")
    parser.add_argument("destination", metavar="DST", type=Path, help="directory to write")
    options = parser.parse_args(arguments)

    console = Console(stderr=True)
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    start = time.monotonic()
    columns = (
        TextColumn("writing weights"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # Orbax starts JAX, which would take an accelerator's memory for nothing.
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        from convert.huggingface_to_orbax import convert  # slow; --help need not wait for it

        logging.getLogger("absl").setLevel(logging.ERROR)
        visible = console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=not visible) as bar:
            task = bar.add_task("weights", total=None)
            size = convert(
                options.source,
                options.destination,
                lambda done, total: bar.update(task, completed=done, total=total),
            )
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"Interrupted before {options.destination} was whole.")
        return 130
    seconds = time.monotonic() - start
    say(f"Wrote {size / 1e9:.2f} GB of weights to {options.destination} in {seconds:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
