"""What an engine is started with. Imports no JAX: the HTTP process builds these too."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What to serve and how.

    Attributes:
      path: a checkpoint directory, Hugging Face layout or this project's Orbax layout.
      mesh: "stages x tensor-parallel ranks", such as "4x2".
      dtype: "auto" (float32 on CPU, the checkpoint's own on a GPU), "float32" or "bfloat16".
      max_model_len: most tokens of prompt and answer together; None for the model's own limit, or
        what the KV cache holds.
      max_num_seqs: most sequences in flight; the rest wait in the queue.
      max_queue: most requests that wait; one more is refused.
      page_size: tokens in a page of the KV cache.
      kv_cache_memory: bytes of KV cache on each device; None to choose by the platform.
      max_chunk: most prompt tokens that enter in one tick, rounded up to a multiple of 64.
      results_late: ticks between a tick's dispatch and the reading of its result; None to choose
        by the platform (0 on CPU, where only one program may be in flight).
    """

    path: str
    mesh: str = "1x1"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_queue: int = 256
    page_size: int = 16
    kv_cache_memory: int | None = None
    max_chunk: int = 128
    results_late: int | None = None
