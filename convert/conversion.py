"""One conversion from start to end: check, write, verify, and write the manifest."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from convert import huggingface_layout, orbax_layout
from convert.destination import (
    check_destination,
    check_space,
    delete_parts,
    explain,
    find_finished,
    list_files,
    sync_all,
)
from convert.journal import Journal, identify
from convert.source import Source
from convert.task import WORKER_BYTES, Task, TaskResult, run_task
from convert.transform import Loss, target_config, transforms
from convert.verification import compare
from llama_jax.checkpoint import CheckpointReader
from llama_jax.checkpoint.huggingface import HuggingFaceReader
from llama_jax.checkpoint.manifest import JOURNAL, Manifest, write_manifest
from llama_jax.checkpoint.orbax import OrbaxReader
from llama_jax.checkpoint.reader import CheckpointError, refuse
from llama_jax.config import LlamaConfig
from llama_jax.terminal.interrupts import held_interrupts, wait_for

LAYOUTS: dict[str, tuple[Any, Callable[[Path], CheckpointReader]]] = {
    "orbax": (orbax_layout, OrbaxReader),
    "huggingface": (huggingface_layout, HuggingFaceReader),
}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to convert a checkpoint.

    Attributes:
      layout: of the destination, a key of `LAYOUTS`.
      dtype: of the unquantized weights; None keeps each weight's own.
      quantize: a name from `quantization.QUANTIZERS`, "plain" to dequantize, or None for no change.
      max_memory: maximum memory of the conversion in bytes, beyond the program itself.
      resume: whether to continue an interrupted conversion.
      verify: whether to compare the result with the source.
    """

    layout: str = "orbax"
    dtype: str | None = None
    quantize: str | None = None
    max_memory: int = 1 << 30
    resume: bool = False
    verify: bool = True


@dataclass(frozen=True)
class Report:
    """The outcome of a conversion.

    Attributes:
      config: of the destination.
      bytes: size of the destination's weights.
      resumed: bytes of these written by an earlier run.
      seconds: until everything was on disk.
      verify_seconds: duration of the comparison; None if there was none.
      quantization_error: as in `Manifest`.
    """

    config: LlamaConfig
    bytes: int
    resumed: int
    seconds: float
    verify_seconds: float | None
    quantization_error: dict[str, float] = field(default_factory=dict)


def convert(
    source: Source,
    destination: Path,
    options: Options,
    progress: Progress = lambda phase, done, total: None,
) -> Report:
    """Writes `source` to `destination`.

    An interrupted run leaves a directory without a manifest, which cannot be opened.

    Args:
      source: the checkpoint to convert.
      destination: a new or empty directory, or an interrupted conversion to be resumed.
      options: how to convert it.
      progress: called with the phase ("Writing" or "Verifying"), the bytes done, and their total.

    Raises:
      CheckpointError: the source cannot be converted this way, or the destination cannot be
        written.
      KeyboardInterrupt: the destination can be resumed.
    """
    start = time.monotonic()
    workers = _workers(options.max_memory)
    reader = source.reader
    config = target_config(reader.config, options.dtype, options.quantize)
    layout, reader_of = LAYOUTS[options.layout]
    weights = transforms(reader, config, options.dtype)
    tasks = _in_file_order(layout.plan(weights), reader)
    total = sum(task.num_bytes for task in tasks)
    try:
        plan = identify(
            source,
            {
                "dtype": options.dtype,
                "quantize": options.quantize,
                "files": [task.files for task in tasks],
            },
        )
        if options.resume and (finished := find_finished(destination, plan)):
            return Report(config, total, total, 0.0, None, dict(finished.quantization_error))
        check_destination(reader.path, destination, options.resume)
        if not (destination / JOURNAL).is_file():
            check_space(destination, total)
        destination.mkdir(parents=True, exist_ok=True)
        with closing(Journal(destination, plan)) as journal:
            delete_parts(destination)
            resumed = sum(task.num_bytes for task in tasks if task.name in journal.done)
            check_space(destination, total - resumed)
            results = _run(tasks, destination, journal, workers, progress)
            layout.finish(destination, weights)
            sync_all(destination)  # before config.json: without it, no program opens the directory
            source.write_companions(destination, config)
            sync_all(destination)
            files = list_files(destination, results)
            seconds = time.monotonic() - start
            verify_seconds = None
            if options.verify:
                _verify(reader, reader_of(destination), workers, progress)
                verify_seconds = time.monotonic() - start - seconds
            lost = _relative_error(results)
            write_manifest(destination, Manifest(options.layout, plan, files, lost))
            journal.remove()
    except OSError as error:
        raise explain(error, destination) from None
    return Report(config, total, resumed, seconds, verify_seconds, lost)


def _in_file_order(tasks: list[Task], reader: CheckpointReader) -> list[Task]:
    """Sorts tasks by the position of their first tensor in the source's files."""
    place = {name: number for number, name in enumerate(reader.tensors)}
    return sorted(tasks, key=lambda task: place[task.blocks[0].transform.source])


def _workers(max_memory: int) -> int:
    if max_memory < WORKER_BYTES:
        raise CheckpointError(
            f"A conversion needs at least {WORKER_BYTES >> 20} MiB: increase --max-memory."
        )
    return min(max_memory // WORKER_BYTES, os.cpu_count() or 1)


def _run(
    tasks: Sequence[Task],
    destination: Path,
    journal: Journal,
    workers: int,
    progress: Progress,
) -> list[TaskResult]:
    """Runs the tasks that are not done yet; the first error, or Ctrl-C, stops the rest."""
    results = [journal.done[task.name] for task in tasks if task.name in journal.done]
    total = sum(task.num_bytes for task in tasks)
    written = sum(task.num_bytes for task in tasks if task.name in journal.done)
    lock = threading.Lock()
    progress("Writing", written, total)

    def advance(count: int) -> None:
        nonlocal written
        with lock:
            written += count
            progress("Writing", written, total)

    with held_interrupts() as interrupted:
        failed = threading.Event()

        def run(task: Task) -> None:
            result = run_task(task, destination, advance, lambda: failed.is_set() or interrupted())
            with lock:
                journal.add(result)
                results.append(result)

        pool = ThreadPoolExecutor(workers)
        try:
            futures = [pool.submit(run, task) for task in tasks if task.name not in journal.done]
            for future in wait_for(futures):
                future.result()
        finally:
            failed.set()
            pool.shutdown(cancel_futures=True)
    return sorted(results, key=lambda result: result.name)


def _verify(
    source: CheckpointReader, written: CheckpointReader, workers: int, progress: Progress
) -> None:
    """Compares the destination with the source.

    Raises:
      CheckpointError: they differ; config.json is deleted so that no program opens the destination.
    """
    with closing(written):
        problems = compare(source, written, workers, partial(progress, "Verifying"))
    if problems:
        (written.path / "config.json").unlink()
    refuse(
        f"{written.path} differs from its source: delete it and convert again",
        [problem.rstrip(".") for problem in problems],
    )


def _relative_error(results: Sequence[TaskResult]) -> dict[str, float]:
    """Returns the relative root-mean-square quantization error by kind of weight."""
    sums: dict[str, Loss] = {}
    for result in results:
        for kind, loss in result.losses.items():
            sums[kind] = Loss(*map(sum, zip(sums.get(kind, Loss()), loss, strict=True)))
    return {kind: (loss.changed / loss.of) ** 0.5 for kind, loss in sorted(sums.items())}
