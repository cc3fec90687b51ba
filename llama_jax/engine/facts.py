"""What an engine says about itself, once it is ready: `Engine.info`."""

import os

import numpy as np

from llama_jax.engine.decisions import Decisions
from llama_jax.engine.device_memory import bytes_by_device
from llama_jax.engine.executor import Executor
from llama_jax.engine.interface import DeviceInfo, EngineInfo
from llama_jax.engine.options import EngineOptions
from sharding.mesh import mesh_shape
from sharding.stages import split_layers


def engine_info(
    options: EngineOptions,
    decided: Decisions,
    executor: Executor,
    programs_at_start: int,
    load_seconds: float,
    compile_seconds: float,
) -> EngineInfo:
    """The facts about an engine that is ready.

    Args:
      options, decided, executor: of the engine.
      programs_at_start: programs that are compiled.
      load_seconds, compile_seconds: how long it loaded weights, and then waited for programs.
    """
    sizes = decided.sizes
    return EngineInfo(
        model=os.path.basename(os.path.normpath(options.path)),
        mesh=options.mesh,
        platform=decided.platform,
        dtype=str(decided.dtype),
        kv_cache_dtype=str(decided.cache_dtype),
        vocab_size=decided.config.vocab_size,
        max_model_len=decided.max_model_len,
        max_num_seqs=sizes.num_slots,
        page_size=sizes.page_size,
        num_pages=sizes.num_pages,
        devices=_device_infos(executor),
        num_programs=len(sizes.buckets()),
        programs_at_start=programs_at_start,
        prefix_caching=options.prefix_caching,
        load_seconds=load_seconds,
        compile_seconds=compile_seconds,
    )


def _device_infos(executor: Executor) -> list[DeviceInfo]:
    mesh, num_layers = executor.mesh, executor.config.num_layers
    weights = bytes_by_device(executor.params, mesh)
    cache = bytes_by_device(executor.state.cache, mesh)
    layers = split_layers(num_layers, mesh_shape(mesh)[0])
    return [
        DeviceInfo(
            name=str(device),
            stage=stage,
            rank=rank,
            layers=[layer for layer in layers[stage] if layer is not None],
            weight_bytes=weights[device],
            kv_bytes=cache[device],
            memory_bytes=(device.memory_stats() or {}).get("bytes_limit"),
        )
        for (stage, rank), device in np.ndenumerate(mesh.devices)
    ]
