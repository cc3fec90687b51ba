"""Times the real ticks of an engine at exact batches: `--calibrate`.

Where `--model` is a checkpoint, its engine is started as a server would start it. Where it is only
a name, the engine's programs run with random weights of the full size.
"""

import argparse
import os
from collections.abc import Callable, Sequence

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
from llama_jax.engine.sizing import check_options, check_stages, choose_results_late
from llama_jax.engine.tick_loop import TickLoop
from llama_jax.model.kv_storage import choose_kv_dtype
from llama_jax.plan.machine.batches import Batch, grid
from llama_jax.plan.machine.exact_ticks import time_batch
from llama_jax.plan.machine.host_time import host_seconds
from llama_jax.plan.machine.measurement import measure
from llama_jax.plan.machine.random_weights import random_params
from llama_jax.plan.model import find_model, with_weights
from llama_jax.weights.placement import param_shapes
from sharding.mesh import make_mesh, mesh_shape

CONTEXTS = (128, 512, 2048)  # of the batches that are timed by default
GPU_SECONDS, CPU_SECONDS = 0.5, 0.25  # of each batch
KV_DTYPES = {"bfloat16": "bf16", "float8_e4m3fn": "fp8", "int8": "int8", "float32": "fp32"}


def calibrate(arguments: argparse.Namespace) -> None:
    """Measures, and writes the file that `--calibrate` names."""
    mesh = "{}x{}".format(*(arguments.layout or (1, 1)))
    planned = arguments.kv_cache_dtype
    options = EngineOptions(
        path=arguments.model,
        mesh=mesh,
        kv_cache_dtype="auto" if planned == "bf16" else planned,  # its default: auto of an engine
        max_chunk=arguments.max_chunk,
        wait_for_programs=True,
    )
    found = measure_ticks(options, arguments.weights, arguments.batches, progress=print)
    found.write(arguments.calibrate)
    print(f"{len(found.ticks)} ticks, written to {arguments.calibrate}")


def measure_ticks(
    options: EngineOptions,
    weights: str | None = None,
    batches: Sequence[Batch] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Times the ticks of an engine with these options.

    Args:
      options: of the engine. Its `path` is a checkpoint, or a name that `find_model` knows.
      weights: the format of random weights, as in `with_weights`.
      batches: what to time; None for every program at some contexts.
      progress: called with a line for each batch.

    Raises:
      UserError: the engine cannot start, or cannot hold a batch.
    """
    stored = os.path.exists(options.path)
    loop = Engine(options).loop if stored else random_loop(options, weights)
    executor = loop.executor
    programs, sizes = executor.programs, executor.sizes
    cpu = executor.mesh.devices.flat[0].platform == "cpu"
    chosen = grid(sizes, CONTEXTS) if batches is None else list(batches)
    for batch in chosen:
        batch.bucket(sizes)  # raises before anything is timed
    ticks = []
    for batch in chosen:
        timing = time_batch(executor, batch, CPU_SECONDS if cpu else GPU_SECONDS)
        ticks.append(MeasuredTick(*batch, seconds=timing.median))
        progress(f"{batch}: {1e3 * timing.median:.3f} ms")
    executor.reset()
    host = host_seconds(loop)
    seen = measure(options.mesh)
    quantization = programs.config.quantization
    return Calibration(
        device=seen.devices[0],
        mesh=options.mesh,
        model=model_sizes(programs.config),
        weights=str(np.dtype(programs.dtype)) if quantization is None else quantization.format,
        kv_cache_dtype=KV_DTYPES[str(np.dtype(programs.cache_dtype))],
        ticks=tuple(ticks),
        host_seconds_per_tick=host,
        copy_bytes_per_second=min(seen.copy_rates),
        matrix_flops_per_second={"float32" if cpu else "bfloat16": min(seen.matrix_rates)},
        collectives=tuple(MeasuredCollective(**entry) for entry in seen.collectives),
        versions=seen.versions,
        source=f"python -m llama_jax.plan --calibrate; {'checkpoint' if stored else 'random'} "
        f"weights; {os.cpu_count()} CPU cores",
    )


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
    platform = mesh.devices.flat[0].platform
    dtype = choose_dtype(options.dtype, config, platform)
    sizes, _ = choose_mesh_sizes(options, config, mesh, dtype)
    cache_dtype = choose_kv_dtype(options.kv_cache_dtype, dtype)
    programs = Programs(
        config, mesh, sizes, dtype, cache_dtype=cache_dtype,
        attention_backend=options.attention_backend,
    )  # fmt: skip
    params = random_params(param_shapes(config, mesh, dtype))
    jax.block_until_ready(params)
    scheduler = Scheduler(sizes, mesh_shape(mesh)[0], prefix_caching=False)
    return TickLoop(scheduler, Executor(programs, params), choose_results_late(options, platform))
