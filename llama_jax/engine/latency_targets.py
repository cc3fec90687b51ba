"""What the latency targets of an engine follow from: its devices, or a rule of thumb. No JAX."""

from dataclasses import replace
from pathlib import Path

from llama_jax.config import LlamaConfig
from llama_jax.costs.calibration import BadCalibration, Calibration
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import gpu_of_device
from llama_jax.costs.rule_of_thumb import CPU_COST, GPU_COST
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work
from llama_jax.engine.chunk_choice import ChunkChoice
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.tick_times import TickTimes
from llama_jax.ring.sizes import RingSizes

MOST_TOKENS = 2048  # in a chunk that a target chooses: more fill no GPU better


def find_tick_model(
    options: EngineOptions,
    config: LlamaConfig,
    device_kind: str,
    mesh: tuple[int, int],
    dtype: str,
) -> TickModel | None:
    """The times of ticks on these devices; None if nothing is known of them.

    Args:
      options: of the engine. Its `calibration` comes before the table of GPUs.
      config: the model.
      device_kind: the name of the devices, as JAX reports it.
      mesh: stages and ranks.
      dtype: of the activations; the table has no times for float32.

    Raises:
      BadCalibration: the calibration cannot be read, has no ticks, or holds for something else.
    """
    gpu, file = gpu_of_device(device_kind), options.calibration
    if file is None and (gpu is None or gpu.platform == "cpu" or dtype != "bfloat16"):
        return None
    measured = None if file is None else Calibration.read(Path(file).expanduser())
    if measured is not None and not measured.ticks:
        raise BadCalibration(f"{file} has no times of ticks: measure them with --calibrate.")
    if gpu is None or (gpu.platform == "cpu" and dtype != "float32"):
        raise BadCalibration(
            f"The planner knows no ticks of {device_kind} in {dtype}, so no calibration can hold "
            "for them: leave calibration out."
        )
    config = replace(config, dtype=dtype)  # that of the checkpoint may be float16
    layout, kv = Layout(*mesh), options.kv_cache_dtype
    deployment = Deployment(config, gpu, layout, kv, options.fp8_activations)
    if measured is not None and (problem := measured.mismatch(deployment)):
        raise BadCalibration(f"The calibration {file} does not hold for this engine: {problem}.")
    return TickModel(deployment, measured)


def largest_chunk(model: TickModel, num_stages: int, tpot: float, tile: int) -> int:
    """The largest chunk that a target for output tokens can ever allow.

    It counts on one row without context and on the least time that a tick may take, since programs
    are compiled once: what is too slow in fact is not used.

    Args:
      model: of the devices.
      num_stages: P.
      tpot: the target, in seconds.
      tile: tokens in which chunks are counted.

    Returns:
      A multiple of the tile: one at least, `MOST_TOKENS` at most.
    """
    chunk = tile
    while (
        chunk + tile <= MOST_TOKENS
        and num_stages * model.seconds(Work.of(1, chunk=chunk + tile, tile=tile)).low <= tpot
    ):
        chunk += tile
    return chunk


def choose_chunks(
    options: EngineOptions,
    sizes: RingSizes,
    platform: str,
    tick_model: TickModel | None,
) -> ChunkChoice:
    """What chooses the chunks of an engine.

    Without targets it goes by a rule of thumb for the platform, so that the same requests get the
    same chunks on every device of it.

    Args:
      options: of the engine, with its targets.
      sizes: of the ring.
      platform: of the devices.
      tick_model: the times of ticks on these devices, if they are known.
    """
    cost = CPU_COST if platform == "cpu" else GPU_COST
    model = cost.seconds
    if tick_model is not None and (options.tpot_slo or options.ttft_slo):
        model = tick_model.expected
    return ChunkChoice(sizes, TickTimes(model, sizes), options.tpot_slo, options.ttft_slo)
