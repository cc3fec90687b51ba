"""Chooses the sizes of an engine from its options and the memory of its devices. Imports no JAX."""

from collections.abc import Sequence

from llama_jax.config import LlamaConfig
from llama_jax.costs.tick_time import TickModel
from llama_jax.engine.latency_targets import largest_chunk
from llama_jax.engine.options import EngineOptions
from llama_jax.ring.sizes import TILE, RingSizes
from sharding.errors import UserError

GPU_MEMORY_SHARE = 0.85  # of a GPU's memory, for weights, cache and temporaries together
GPU_TEMPORARIES = 1 << 30  # bytes that a running step needs beside weights and cache
CPU_CACHE_BYTES = 1 << 30  # default maximum for the caches of all CPU devices together
FP8_CAPABILITY = (8, 9)  # the least CUDA compute capability of GPUs that multiply in fp8
GPU_RESULTS_LATE = 2  # ticks: enough to keep the devices busy while the host works

CPU_SEQUENCES = 32
GPU_SEQUENCES = 256  # default maximum; Llama-3-70B on 4x2 H100 needs them for 10 requests/s
TOKENS_EACH = 1024  # of the KV cache for each sequence, if that leaves fewer sequences
CPU_CHUNK = 128
CPU_PAGE = 16
GPU_PAGE = 64  # tokens that the attention kernel reads per step: it then starts one copy, not four
GPU_CHUNK = 256  # an H100 computes as many while it reads the weights; 512 would double a tick


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


def choose_page_size(options: EngineOptions, platform: str) -> int:
    """Returns the tokens of a page of the KV cache."""
    return options.page_size or (CPU_PAGE if platform == "cpu" else GPU_PAGE)


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
    platform: str = "cpu",
    tick_model: TickModel | None = None,
) -> tuple[RingSizes, int]:
    """Chooses the sizes of the ring.

    Args:
      options: checked options.
      config: the model.
      num_stages: P, the pipeline stages.
      page_bytes: the bytes of one page, of `choose_page_size` tokens, on each device.
      cache_bytes: the bytes that the KV cache may take on each device.
      platform: of the devices, which the defaults fit.
      tick_model: the times of ticks on them, if they are known, for the latency targets.

    Returns:
      The sizes, and the maximum tokens of a sequence.

    Raises:
      SizingError: the cache cannot hold a sequence of `options.max_model_len`.
    """
    page_size = choose_page_size(options, platform)
    longest = options.max_model_len or config.max_context
    affordable = cache_bytes // page_bytes
    num_seqs = options.max_num_seqs
    if num_seqs is None:
        num_seqs = _default_sequences(platform, affordable * page_size, longest)
    useful_pages = num_seqs * -(-longest // page_size)
    num_pages = min(affordable, useful_pages)
    needed = longest if options.max_model_len else 2
    if num_pages * page_size < needed:
        remedy = (
            f"raise kv_cache_memory to {-(-longest // page_size) * page_bytes} or lower "
            "max_model_len"
        )
        if needed * page_bytes <= cache_bytes * page_size:  # it would hold them in smaller pages
            remedy = f"lower page_size, now {page_size}"
        raise SizingError(
            f"The KV cache has {cache_bytes} bytes on each device, which hold "
            f"{num_pages * page_size} tokens, but max_model_len is {longest}: {remedy}."
        )
    longest = min(longest, num_pages * page_size)
    max_chunk = options.max_chunk or (CPU_CHUNK if platform == "cpu" else GPU_CHUNK)
    if options.max_chunk is None and options.tpot_slo is not None and tick_model is not None:
        allowed = largest_chunk(tick_model, num_stages, options.tpot_slo, TILE)
        # A target for first tokens may need more than that.
        max_chunk = allowed if options.ttft_slo is None else max(allowed, max_chunk)
    sizes = RingSizes(
        num_slots=num_seqs,
        num_pages=num_pages,
        page_size=page_size,
        pages_per_sequence=-(-longest // page_size),
        row_buckets=_row_buckets(-(-num_seqs // num_stages), platform),
        chunk_buckets=(0, *(tiles * TILE for tiles in _doubling(-(-max_chunk // TILE)))),
        tile=TILE,
    )
    return sizes, longest


def _default_sequences(platform: str, tokens: int, longest: int) -> int:
    """The default of `max_num_seqs`: as many as gain throughput, unless the cache is too small.

    Args:
      platform: of the devices.
      tokens: that the KV cache holds.
      longest: maximum tokens of a sequence.
    """
    if platform == "cpu":
        return CPU_SEQUENCES
    fitting = tokens // min(longest, TOKENS_EACH)
    return max(1, min(GPU_SEQUENCES, 1 << max(fitting, 1).bit_length() - 1))


def _row_buckets(last: int, platform: str) -> tuple[int, ...]:
    """The numbers of decode rows to compile programs for.

    A GPU's matrix units take 8 rows in the time of 2: compiled for an H100, the tick of 8 rows
    moves 2 % more bytes than that of one, and launches 29 % fewer kernels.
    """
    sizes = _doubling(last)
    return sizes if platform == "cpu" else tuple(s for s in sizes if s not in (2, 4) or s == last)


def _doubling(last: int) -> tuple[int, ...]:
    """1, 2, 4 and so on, and `last`: no more than half of a size is ever unused."""
    return (*(1 << i for i in range((last - 1).bit_length())), last)
