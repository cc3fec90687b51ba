"""Checks what a server would run, without weights, devices or a socket: `--dry-run`.

Loads no JAX: the memory is counted by the arithmetic of `llama_jax.costs`.
"""

import argparse
import contextlib
import math
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

from llama_jax.checkpoint import open_checkpoint
from llama_jax.config.huggingface import read_checkpoint_config
from llama_jax.config.llama_config import LlamaConfig
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import CPU, GPUS, Gpu, find_gpu, gpu_of_device
from llama_jax.costs.memory import page_bytes
from llama_jax.engine.latency_targets import choose_chunks, find_tick_model
from llama_jax.engine.memory_check import Served, check_memory, check_weights, cpu_memory
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.sizing import (
    CPU_CACHE_BYTES,
    GPU_MEMORY_SHARE,
    SizingError,
    check_options,
    check_platform,
    check_stages,
    choose_page_size,
    choose_sizes,
    gpu_cache_bytes,
)
from llama_jax.ring.sizes import RingSizes
from llama_jax.serve.command_line.arguments import engine_options
from llama_jax.serve.setup import find_checkpoint, prepare
from llama_jax.terminal.units import bytes_text, count_text
from sharding.errors import UserError
from sharding.mesh_name import parse_mesh

_DRIVER = Path("/proc/driver/nvidia/gpus")
_WITHOUT_WEIGHTS = re.compile(r".*\.(json|jinja|txt|md|model)|\..*")
_FP8_CAPABILITY = "9.0"  # of every GPU in the table that multiplies in fp8, or more


def dry_run(arguments: argparse.Namespace) -> list[str]:
    """Checks a command line.

    Args:
      arguments: of the server, parsed.

    Returns:
      What would run, in lines.

    Raises:
      UserError: the server could not start; one sentence says why.
    """
    path = Path() if arguments.path is None else arguments.path.expanduser()
    if arguments.path is not None and _is_config_alone(path):
        name, has_weights = path.resolve().name, False
    else:
        path, name = find_checkpoint(arguments.path)
        has_weights = True
    with socket.socket() as unbound:  # a server may run at the address already
        setup = prepare(arguments, path, name, unbound)
    if has_weights:
        setup.load_tokenizer()
        open_checkpoint(path).close()  # reads the names and shapes of the weights
    options = engine_options(arguments, path)
    gpu = _gpu(arguments.dry_run_gpu, parse_mesh(options.mesh))
    lines = describe(setup.names[0], options, read_checkpoint_config(path).config, gpu)
    if not has_weights:
        lines.append(f"not checked: weights and tokenizer, of which {path} has none")
    return lines


def describe(name: str, options: EngineOptions, config: LlamaConfig, gpu: Gpu) -> list[str]:
    """Sizes an engine as it would size itself, and says in lines what would run.

    Raises:
      UserError: it could not start.
    """
    check_options(options, config)
    mesh = parse_mesh(options.mesh)
    check_stages(mesh[0], config)
    platform = gpu.platform
    check_platform(options, platform, _FP8_CAPABILITY if "fp8" in gpu.flops else "")
    dtype = options.dtype
    if dtype == "auto":
        dtype = Deployment(config, gpu, Layout(*mesh)).dtype
    deployment = Served(
        config, gpu, Layout(*mesh), options.kv_cache_dtype, options.fp8_activations, dtype
    )
    share = _memory_share(options) if platform != "cpu" else 1.0
    allowed = int(gpu.memory_bytes * share)
    weights = check_weights(deployment, options, allowed)
    if options.kv_cache_memory is not None:
        cache = options.kv_cache_memory
    elif platform == "cpu":
        cache = CPU_CACHE_BYTES // deployment.layout.gpus
    else:
        cache = gpu_cache_bytes([allowed], weights)
    tick_model = find_tick_model(
        options, config, gpu.device_kinds[0] if gpu.device_kinds else "", mesh, dtype
    )
    page = page_bytes(deployment, choose_page_size(options, platform))
    sizes, longest = choose_sizes(options, config, mesh[0], page, cache, platform, tick_model)
    needed = check_memory(deployment, options, sizes, allowed)
    targets = {"TPOT": options.tpot_slo, "TTFT": options.ttft_slo}
    shown = [f"{key} {1000 * value:g} ms" for key, value in targets.items() if value is not None]
    limit = f" of {bytes_text(allowed)} ({100 * share:g}%)" if platform != "cpu" else ""
    chunks = choose_chunks(options, sizes, platform, tick_model)
    running = mesh[0] * chunks.most_rows(mesh[0], longest / 2) if tick_model else sizes.num_slots
    fewer = ""
    if running < sizes.num_slots:
        fewer = (
            f"; TPOT lets {count_text(running, 'sequence')} of {longest // 2:,} tokens run at once"
        )
    return [
        f"{name} on the mesh {options.mesh} of {gpu.name}: {count_text(mesh[0], 'stage')} x "
        f"{count_text(mesh[1], 'rank')}, {dtype}",
        f"sequences: {sizes.num_slots:,} at once, max_model_len {longest:,} tokens",
        f"KV cache: {sizes.num_pages * sizes.page_size:,} tokens in {deployment.kv_dtype}, "
        f"{count_text(sizes.num_pages, 'page')} of {sizes.page_size}",
        f"programs: {_programs(sizes)}",
        f"each device: weights {bytes_text(needed.weights)} + KV cache "
        f"{bytes_text(needed.cache)} + ring and temporaries, about {bytes_text(needed.ring)} = "
        f"{bytes_text(sum(needed))}{limit}",
        f"latency targets: {', '.join(shown) or 'none'}{fewer}",
    ]


def _programs(sizes: RingSizes) -> str:
    rows = ", ".join(map(str, sizes.row_buckets))
    chunks = ", ".join(map(str, sizes.chunk_buckets))
    return f"{len(sizes.buckets())} (rows {rows}; chunks {chunks})"


def _memory_share(options: EngineOptions) -> float:
    if options.gpu_memory_utilization is not None:
        return options.gpu_memory_utilization
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
    name = next((name for name in names if name in os.environ), None)
    if name is None:
        return GPU_MEMORY_SHARE
    with contextlib.suppress(ValueError):
        if 0 < (share := float(os.environ[name])) < math.inf:
            return share
    raise SizingError(
        f"The environment variable {name} is {os.environ[name]!r}, which is no share of a GPU's "
        f"memory: set it to a number such as {GPU_MEMORY_SHARE}, or unset it."
    )


def _gpu(name: str | None, mesh: tuple[int, int]) -> Gpu:
    """The GPU of this name, or else the one in this machine, or else the CPU."""
    if name is not None:
        named = find_gpu(name)
        return named if named.platform != "cpu" else _own_cpu(mesh)
    kinds = [_model_line(file) for file in sorted(_DRIVER.glob("*/information"))]
    if not kinds:
        return _own_cpu(mesh)
    if len(kinds) < mesh[0] * mesh[1]:
        raise SizingError(
            f"The mesh {mesh[0]}x{mesh[1]} needs {mesh[0] * mesh[1]} GPUs, and this machine has "
            f"{len(kinds)}: use a smaller mesh, or name another machine's with --dry-run-gpu."
        )
    gpu = gpu_of_device(kinds[0])
    if gpu is None:
        raise UserError(
            f"The table of GPUs has no {kinds[0]}: name a similar one with --dry-run-gpu, of "
            f"{', '.join(GPUS)}."
        )
    return gpu


def _own_cpu(mesh: tuple[int, int]) -> Gpu:
    """A CPU device of this machine, whose devices share its memory."""
    return replace(CPU, memory_bytes=cpu_memory(mesh[0] * mesh[1]))


def _model_line(file: Path) -> str:
    found = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(), re.MULTILINE)
    return found[1] if found else "GPU of unknown model"


def _is_config_alone(path: Path) -> bool:
    """Whether a directory has a config, and nothing that could be weights."""
    return (path / "config.json").is_file() and all(
        _WITHOUT_WEIGHTS.fullmatch(entry.name) and not entry.name.endswith(".index.json")
        for entry in path.iterdir()
    )
