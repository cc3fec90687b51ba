"""The commands, each of which returns its outcome."""

import argparse
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from convert.adapter import with_adapter
from convert.arguments import conversion_options
from convert.conversion import Report, convert
from convert.destination import explain
from convert.gguf import open_gguf
from convert.hub import local_directory
from convert.inspection import Inspection, inspect, stored_bytes
from convert.meta.source import open_meta
from convert.sample import sample_windows
from convert.source import Source, open_source
from convert.verification import check_checksums, compare
from llama_jax.checkpoint import CheckpointError, CheckpointReader, open_checkpoint
from llama_jax.checkpoint.directory import GGUF, META, find_layout

if TYPE_CHECKING:
    from convert.divergence import Divergence

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Converted:
    """The outcome of hf, meta, gguf, quantize or export.

    Attributes:
      source: as given by the user.
      adapter: as given by the user; None if none was merged.
      destination: the directory written.
      source_bytes: size of the source's weights.
      report: of the conversion itself.
      divergence: of the predictions of the two models; None without --check.
    """

    source: str
    adapter: str | None
    destination: Path
    source_bytes: int
    report: Report
    divergence: "Divergence | None"


@dataclass(frozen=True)
class Verified:
    """The outcome of verify.

    Attributes:
      source: as given by the user.
      adapter: as given by the user; None if none was merged into the source.
      destination: the directory compared with it.
      differences: one sentence for each.
      seconds: duration.
    """

    source: str
    adapter: str | None
    destination: Path
    differences: list[str]
    seconds: float


def run_conversion(arguments: argparse.Namespace, progress: Progress) -> Converted:
    """Runs hf, meta, gguf, quantize or export."""
    source = _merged(_open_source(arguments, progress), arguments, progress)
    with closing(source.reader) as reader:
        _check_companions(source)
        windows = None if arguments.check is None else _check_windows(source, arguments.check)
        report = convert(source, arguments.destination, conversion_options(arguments), progress)
        found = None
        if windows is not None:
            found = _diverge(reader, arguments.destination, windows, progress)
        return Converted(
            source=arguments.source,
            adapter=arguments.adapter,
            destination=arguments.destination,
            source_bytes=sum(stored_bytes(reader).values()),
            report=report,
            divergence=found,
        )


def _open_source(arguments: argparse.Namespace, progress: Progress) -> Source:
    name = arguments.source
    if arguments.command == "meta":
        return open_meta(local_directory(name, "meta", progress))
    if arguments.command == "gguf":
        return open_gguf(Path(name), arguments.strict_config)
    return open_any(local_directory(name, "hf", progress), arguments.strict_config)


def _merged(source: Source, arguments: argparse.Namespace, progress: Progress) -> Source:
    if arguments.adapter is None:
        return source
    adapter = local_directory(arguments.adapter, "adapter", progress)
    return with_adapter(source, adapter, getattr(arguments, "strict_config", False))


def _check_companions(source: Source) -> None:
    """Writes the small files to see that they can be, before the weights are converted."""
    with TemporaryDirectory() as folder:
        try:
            source.write_companions(Path(folder), source.reader.config)
        except OSError as error:  # such as a full disk, whose error names no file
            raise explain(error, Path(folder)) from None


def _check_windows(source: Source, text: Path | Literal[True]) -> list[list[int]]:
    """Tokenizes the text for --check before the conversion, so that errors come first."""
    if source.reader.config.quantization is not None:
        raise CheckpointError(
            f"{source.reader.path} is already quantized, so --check has no original to compare "
            "with: omit it."
        )
    return sample_windows(source, None if text is True else text)


def _diverge(
    source: CheckpointReader, destination: Path, windows: list[list[int]], progress: Progress
) -> "Divergence":
    # Keeps JAX from reserving the memory of an accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from convert.divergence import divergence  # imports JAX

    with closing(open_checkpoint(destination)) as quantized:
        return divergence(source, quantized, windows, partial(progress, "Checking"))


def run_verify(arguments: argparse.Namespace, progress: Progress) -> Verified:
    """Compares two checkpoints, and verifies the checksums of the second."""
    start = time.monotonic()
    path = local_directory(arguments.source, "hf", progress)
    with (
        closing(_merged(open_any(path), arguments, progress).reader) as source,
        closing(open_any(arguments.destination).reader) as written,
    ):
        differences = check_checksums(written.path, partial(progress, "Checksums"))
        workers = os.cpu_count() or 1
        differences += compare(source, written, workers, partial(progress, "Verifying"))
    seconds = time.monotonic() - start
    return Verified(
        arguments.source, arguments.adapter, arguments.destination, differences, seconds
    )


def run_inspect(arguments: argparse.Namespace, progress: Progress) -> Inspection:
    """Describes a checkpoint without reading its weights."""
    with closing(open_any(arguments.path).reader) as reader:
        return inspect(reader, arguments.mesh)


def open_any(path: Path, strict_config: bool = False) -> Source:
    """Opens a checkpoint in any layout.

    Args:
      path: the directory, or a GGUF file.
      strict_config: as for `open_source`.

    Raises:
      ConfigError, CheckpointError, GgufError: it is incomplete, damaged or not supported.
    """
    layout = find_layout(path)
    if layout == META:
        return open_meta(path)
    return (open_gguf if layout == GGUF else open_source)(path, strict_config)
