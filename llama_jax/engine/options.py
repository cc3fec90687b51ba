"""The options of an engine. Imports no JAX: the HTTP process creates them, too."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The checkpoint to serve, and how.

    Attributes:
      path: a checkpoint directory, in Hugging Face format or in this project's Orbax format.
      mesh: "stages x tensor-parallel ranks", such as "4x2".
      dtype: "auto" (float32 on CPU, the checkpoint's dtype on a GPU), "float32" or "bfloat16".
      max_model_len: maximum tokens of prompt and answer together; None for the model's own limit,
        or less if the KV cache holds less.
      max_num_seqs: maximum sequences in flight; other requests wait in the queue.
      max_queue: maximum requests in the queue; further requests are refused.
      page_size: tokens per KV-cache page.
      kv_cache_memory: bytes of KV cache per device; None to choose by platform.
      max_chunk: maximum prompt tokens per tick, rounded up to a multiple of 64.
      results_late: ticks dispatched ahead of the oldest unread result; None to choose by platform
        (0 on CPU, where only one program may be in flight).
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
