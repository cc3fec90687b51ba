"""Chooses the sizes of an engine from its options and the memory of its devices. Imports no JAX."""

from collections.abc import Sequence

from llama_jax.config import LlamaConfig
from llama_jax.engine.options import EngineOptions
from llama_jax.ring.sizes import RingSizes
from sharding.errors import UserError

TILE = 64  # tokens per prompt segment
GPU_MEMORY_SHARE = 0.85  # of a GPU's memory, for weights, cache and temporaries together
GPU_TEMPORARIES = 1 << 30  # bytes that a running step needs beside weights and cache
CPU_CACHE_BYTES = 1 << 30  # default maximum for the caches of all CPU devices together
FP8_CAPABILITY = (8, 9)  # the least CUDA compute capability of GPUs that multiply in fp8
GPU_RESULTS_LATE = 2  # ticks: enough to keep the devices busy while the host works


class SizingError(UserError):
    """The options ask for more than there is; the message says what to change."""


def check_options(options: EngineOptions, config: LlamaConfig) -> None:
    """Checks the options against the checkpoint's config, before any weight is loaded.

    Raises:
      OptionError: an option has the wrong type or is out of range.
      SizingError: an option asks for more than the model has.
    """
    options.check()
    longest = options.max_model_len
    if longest is not None and longest > config.max_context:
        raise SizingError(
            f"max_model_len must be between 2 and the model's {config.max_context}, got {longest}."
        )
    if options.fp8_activations and not (
        config.quantization and config.quantization.format == "fp8"
    ):
        raise SizingError(
            "fp8_activations needs matrices in fp8 with one scale per row, and this checkpoint has "
            "none: leave it out, or quantize with `python -m convert quantize --quantize fp8`."
        )


def check_platform(options: EngineOptions, platform: str, compute_capability: str = "") -> None:
    """Checks the options that only GPUs have.

    Args:
      options: of the engine.
      platform: of the devices.
      compute_capability: of CUDA GPUs, such as "9.0".

    Raises:
      SizingError: one is given elsewhere, where it would do nothing.
    """
    if platform == "cpu" and options.gpu_memory_utilization is not None:
        raise SizingError(
            "gpu_memory_utilization is for GPUs, and there is none: set kv_cache_memory instead."
        )
    major, _, minor = compute_capability.partition(".")
    version = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
    if options.fp8_activations and version < FP8_CAPABILITY:
        raise SizingError(
            "fp8_activations needs GPUs with CUDA compute capability "
            f"{'.'.join(map(str, FP8_CAPABILITY))} or higher, which multiply in fp8: leave it out."
        )


def check_stages(num_stages: int, config: LlamaConfig) -> None:
    """Checks that every stage of a mesh gets a layer.

    Raises:
      SizingError: there are more stages than layers.
    """
    if num_stages > config.num_layers:
        raise SizingError(
            f"The mesh has {num_stages} stages, but the model has only {config.num_layers} layers: "
            "use a mesh with fewer stages."
        )


def gpu_cache_bytes(free: Sequence[int], weights: int) -> int:
    """Returns the bytes that the KV cache may take on each GPU.

    Args:
      free: the free bytes of each GPU, within the share that JAX may use.
      weights: the bytes of weights on each GPU, not loaded yet.
    """
    return max(0, min(free) - weights - GPU_TEMPORARIES)


def choose_results_late(options: EngineOptions, platform: str) -> int:
    """Returns how many ticks may be dispatched ahead of the oldest unread result."""
    if options.results_late is not None:
        return options.results_late
    return 0 if platform == "cpu" else GPU_RESULTS_LATE


def choose_sizes(
    options: EngineOptions,
    config: LlamaConfig,
    num_stages: int,
    page_bytes: int,
    cache_bytes: int,
) -> tuple[RingSizes, int]:
    """Chooses the sizes of the ring.

    Args:
      options: checked options.
      config: the model.
      num_stages: P, the pipeline stages.
      page_bytes: the bytes of one page on each device.
      cache_bytes: the bytes that the KV cache may take on each device.

    Returns:
      The sizes, and the maximum tokens of a sequence.

    Raises:
      SizingError: the cache cannot hold a sequence of `options.max_model_len`.
    """
    page_size = options.page_size
    longest = options.max_model_len or config.max_context
    max_rows = -(-options.max_num_seqs // num_stages)
    useful_pages = options.max_num_seqs * -(-longest // page_size)
    num_pages = min(cache_bytes // page_bytes, useful_pages)
    if num_pages * page_size < (longest if options.max_model_len else 2):
        raise SizingError(
            f"The KV cache has {cache_bytes} bytes on each device, which hold "
            f"{num_pages * page_size} tokens, but max_model_len is {longest}: raise "
            f"kv_cache_memory to {-(-longest // page_size) * page_bytes} or lower max_model_len."
        )
    longest = min(longest, num_pages * page_size)
    max_tiles = -(-options.max_chunk // TILE)
    sizes = RingSizes(
        num_slots=options.max_num_seqs,
        num_pages=num_pages,
        page_size=page_size,
        pages_per_sequence=-(-longest // page_size),
        row_buckets=_bucket_sizes(max_rows),
        chunk_buckets=(0, *(tiles * TILE for tiles in _bucket_sizes(max_tiles))),
        tile=TILE,
    )
    return sizes, longest


def _bucket_sizes(last: int) -> tuple[int, ...]:
    """`last` and up to three smaller sizes, each a quarter of the next."""
    sizes = [last]
    while sizes[-1] >= 4 and len(sizes) < 4:
        sizes.append(sizes[-1] // 4)
    return tuple(reversed(sizes))
