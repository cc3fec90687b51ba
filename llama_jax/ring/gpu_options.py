"""The compiler's options for the programs of the ring on NVIDIA GPUs.

`sharding.compiler_options` adds those that all programs of a mesh get.
"""

from collections.abc import Mapping
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.quantization import GROUPED
from llama_jax.ring.backend import PLAIN
from llama_jax.ring.sizes import Bucket
from llama_jax.ring.static_args import StaticArgs

# Kernels of a CUDA graph that do not need each other, such as those that write keys and values to
# the cache, run at the same time. On an H200, a layer of Llama-3-70B on one of two ranks takes
# 4.2 µs less so with 8 rows, of 257, and 3.6 µs less with 32. Unmeasured on several GPUs, whose
# collectives stay outside of graphs.
CONCURRENT: dict[str, Any] = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
# Triton's products are not split over their inputs. A split one writes float32 partial results to
# memory, and another kernel adds them up; the autotuner times only the first. On an H200 a rank's
# tick of Llama-3-70B with 32 rows takes 5.8 ms so, and 6.0 if it is free to split.
UNSPLIT: dict[str, Any] = {"xla_gpu_experimental_force_split_k": 1}
# For matrices whose columns form groups that share a scale: scales become part of the product. On
# an H200 the products of a layer of Llama-3-70B in int4, for one row, take 247 µs so. If they may
# be split, it is 825, since whole matrices are then written out dequantized.
GROUPED_SCALES: dict[str, Any] = UNSPLIT | {
    "xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True
}


def product_options(config: LlamaConfig, bucket: Bucket) -> Mapping[str, Any]:
    """The compiler's options for a program that multiplies by the matrices of a model's layers.

    On an H200, being free to split products speeds up those with matrices in 8 bits by 25 to 38 %.
    In runs that also differed in the size of a page, ticks of one row took 2 to 5 % less time with
    splits, and the others 1 to 4 % more.
    """
    if config.quantization is not None:
        return GROUPED_SCALES if config.quantization.format in GROUPED else {}
    return {} if bucket == Bucket(1, 0) else UNSPLIT


def graph_options(static: StaticArgs) -> Mapping[str, Any]:
    """The compiler's options for the CUDA graph of a tick.

    Where the attention kernel runs, kernels of a decode tick that do not need each other run at the
    same time. Not so if XLA might convert a quantized matrix apart from its product, as it may for
    more than one row: it would convert those of all layers at once, into 17 GB instead of 0.5 for a
    rank of Llama-3-70B.
    """
    converts = static.config.quantization is not None and static.bucket.rows > 1
    if static.backend.attention == PLAIN or static.bucket.chunk or converts:
        return {}
    return CONCURRENT
