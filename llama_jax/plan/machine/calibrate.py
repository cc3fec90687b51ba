"""Times the real ticks of an engine at exact batches: `--calibrate`.

Where `--model` is a checkpoint, its engine is started as a server would start it. Where it is only
a name or a config.json, the engine's programs run with random weights of the full size.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from llama_jax.checkpoint.load import choose_dtype
from llama_jax.costs.calibration import (
    Calibration,
    MeasuredCollective,
    MeasuredTick,
    model_sizes,
)
from llama_jax.engine.core import Engine, configure_jax
from llama_jax.engine.device_memory import choose_mesh_sizes
from llama_jax.engine.executor import Executor
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.programs import Programs
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.sizing import (
    check_options,
    check_platform,
    check_stages,
    choose_results_late,
)
from llama_jax.engine.tick_loop import TickLoop
from llama_jax.model.kv_storage import choose_kv_dtype
from llama_jax.model.llama import Llama
from llama_jax.plan.machine.batches import Batch, grid
from llama_jax.plan.machine.exact_ticks import time_batch
from llama_jax.plan.machine.host import available_memory
from llama_jax.plan.machine.host_time import host_time
from llama_jax.plan.machine.measurement import measure
from llama_jax.plan.machine.random_weights import nbytes, random_params
from llama_jax.plan.model import checkpoint_path, find_model, with_weights
from llama_jax.ring.kernel_check import working_backend
from llama_jax.ring.sizes import RingSizes
from llama_jax.terminal.units import bytes_text
from llama_jax.weights.placement import param_shapes
from sharding.errors import UserError
from sharding.mesh import make_mesh, mesh_shape

CONTEXTS = (128, 512, 2048)  # of the batches that are timed by default
ROUNDS = 3
GPU_SECONDS, CPU_SECONDS = 0.3, 0.1  # of each batch in a round
KV_DTYPES = {"bfloat16": "bf16", "float8_e4m3fn": "fp8", "int8": "int8", "float32": "fp32"}


def calibrate(arguments: argparse.Namespace) -> None:
    """Measures, and writes the file that `--calibrate` names.

    Raises:
      UserError: the file cannot be written, or as `Calibrator`.
    """
    check_file(arguments.calibrate)
    said = sys.stderr if arguments.json else sys.stdout
    planned = arguments.kv_cache_dtype
    options = EngineOptions(
        path=arguments.model,
        mesh="{}x{}".format(*(arguments.layout or (1, 1))),
        kv_cache_dtype="auto" if planned == "bf16" else planned,  # its default: auto of an engine
        max_chunk=arguments.max_chunk,
        fp8_activations=arguments.fp8_activations,
    )
    given = arguments.batches
    choose = default_batches if given is None else lambda sizes: given
    calibrator = Calibrator(options, arguments.weights, choose)
    for number in range(ROUNDS):
        calibrator.time_all()
        timed = f"{len(calibrator.seconds)} batches timed"
        print(f"round {number + 1} of {ROUNDS}: {timed}", file=said)
    for batch, seconds in calibrator.seconds.items():
        print(f"{batch!s:>24}: {1e3 * statistics.median(seconds):9.3f} ms", file=said)
    calibrator.calibration().write(arguments.calibrate)
    print(f"written to {arguments.calibrate}", file=said)


def check_file(path: Path) -> None:
    """Checks that a file can be written, before minutes are spent on its content.

    Raises:
      UserError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--calibrate cannot write {path}: {error.strerror}.") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--calibrate cannot write {path}: give a file in a folder of yours.")


def default_batches(sizes: RingSizes) -> list[Batch]:
    """Every program at some contexts."""
    return grid(sizes, CONTEXTS)


class Calibrator:
    """Times the ticks of an engine, in rounds.

    Every round times each batch once, and the median of the rounds counts: if something else
    slows the machine down for a while, it spoils no batch alone.

    Args:
      options: of the engine. Its `path` is a checkpoint, or what else `find_model` knows: a name,
        or a config.json.
      weights: the format of random weights, as in `with_weights`.
      choose: returns the batches to time, by the sizes of the engine.

    Attributes:
      loop: of the engine.
      seconds: of each batch, in every round so far.

    Raises:
      UserError: the engine cannot start, or cannot hold a batch.
    """

    def __init__(
        self,
        options: EngineOptions,
        weights: str | None = None,
        choose: Callable[[RingSizes], Sequence[Batch]] = default_batches,
    ) -> None:
        self._options = options
        self._stored = checkpoint_path(options.path) is not None
        if self._stored:
            check_weights(options.path, weights)
        self.loop = stored_loop(options) if self._stored else random_loop(options, weights)
        sizes = self.loop.sizes
        self.seconds: dict[Batch, list[float]] = {batch: [] for batch in choose(sizes)}
        for batch in self.seconds:
            batch.bucket(sizes)  # raises before anything is timed

    @property
    def _cpu(self) -> bool:
        platform: str = self.loop.executor.mesh.devices.flat[0].platform
        return platform == "cpu"

    def time_all(self) -> None:
        """Times each batch once more."""
        executor = self.loop.executor
        for batch, seconds in self.seconds.items():
            timing = time_batch(executor, batch, CPU_SECONDS if self._cpu else GPU_SECONDS)
            seconds.append(timing.median)
        executor.reset()

    def calibration(self) -> Calibration:
        """What was measured. Measures the time of the host and the rates of the devices, too."""
        host = host_time(self.loop)
        seen = measure(self._options.mesh)
        programs = self.loop.executor.programs
        quantization = programs.config.quantization
        dtype = str(np.dtype(programs.dtype))
        weights = "weights of a checkpoint" if self._stored else "random weights"
        return Calibration(
            device=seen.devices[0],
            mesh=self._options.mesh,
            model=model_sizes(programs.config),
            weights=dtype if quantization is None else quantization.format,
            kv_cache_dtype=KV_DTYPES[str(np.dtype(programs.cache_dtype))],
            fp8_activations=programs.model_class.fp8_activations,
            ticks=tuple(
                MeasuredTick(*batch, seconds=statistics.median(seconds))
                for batch, seconds in self.seconds.items()
            ),
            host_seconds_per_tick=host.per_tick,
            host_seconds_per_token=host.per_token,
            host_seconds_per_request=host.per_request,
            host_source="measured here: the engine alone, without HTTP and clients",
            copy_bytes_per_second=min(seen.copy_rates),
            matrix_flops_per_second={
                "float32" if self._cpu else "bfloat16": min(seen.matrix_rates)
            },
            collectives=tuple(MeasuredCollective(**entry) for entry in seen.collectives),
            versions=seen.versions,
            source=f"python -m llama_jax.plan --calibrate; {weights}; {os.cpu_count()} CPU cores",
        )


def check_weights(path: str, weights: str | None) -> None:
    """Checks that a checkpoint stores the weights that are to be timed.

    Raises:
      UserError: it stores others.
    """
    config = find_model(path)
    if with_weights(config, weights) != config:
        raise UserError(
            f"{path} does not store its matrices in {weights}: leave --weights out, or give its "
            "config.json, for random weights."
        )


def stored_loop(options: EngineOptions) -> TickLoop:
    """The tick loop of an engine with a checkpoint, which compiles nothing in the background."""
    engine = Engine(options)
    engine.warm_up.stop()  # what is timed compiles when it first runs
    engine.warm_up.every_program.exception()  # waits for its end
    return engine.loop


def random_loop(options: EngineOptions, weights: str | None) -> TickLoop:
    """The tick loop of an engine with random weights, in the shapes of a model.

    Raises:
      UserError: there is no such model, or it does not fit.
    """
    config = with_weights(find_model(options.path), weights)
    check_options(options, config)
    check_stages(int(options.mesh.split("x")[0]), config)
    configure_jax(options.gpu_memory_utilization)
    mesh = make_mesh(options.mesh)
    device = mesh.devices.flat[0]
    platform = device.platform
    check_platform(options, platform, getattr(device, "compute_capability", ""))
    model_class: type[Llama] = Llama
    if options.fp8_activations:
        model_class = type(Llama.__name__, (Llama,), {"fp8_activations": True})
    dtype = choose_dtype(options.dtype, config, platform)
    sizes, _ = choose_mesh_sizes(options, config, mesh, dtype)
    cache_dtype = choose_kv_dtype(options.kv_cache_dtype, dtype)
    backend = working_backend(
        options.attention_backend, config, mesh, sizes, dtype, cache_dtype, model_class
    )
    programs = Programs(config, mesh, sizes, dtype, model_class, cache_dtype, backend)
    shapes = param_shapes(config, mesh, dtype)
    if platform == "cpu":
        check_host_memory(nbytes(shapes), options.path)
    params = random_params(shapes)
    jax.block_until_ready(params)
    scheduler = Scheduler(sizes, mesh_shape(mesh)[0], prefix_caching=False)
    return TickLoop(scheduler, Executor(programs, params), choose_results_late(options, platform))


def check_host_memory(needed: int, model: str) -> None:
    """Checks that the weights fit, since the system would end this process without a word.

    Args:
      needed: bytes of the weights, which all devices of a CPU hold together.
      model: its name, for the message.

    Raises:
      UserError: they do not fit.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise UserError(
            f"The weights of {model} take {bytes_text(needed)}, and this machine has "
            f"{bytes_text(free)} free: give a smaller --model."
        )
