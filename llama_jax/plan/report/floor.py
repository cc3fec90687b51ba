"""What no program can beat, and what tokens need of memory and matrix units. Imports no JAX."""

from llama_jax.costs.deployment import Deployment
from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.costs.memory import kv_bytes_per_token, weight_bytes
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work
from llama_jax.weights.axes import kv_replicas

SOURCE = "bytes and FLOP at the peak rates of the data sheet, nothing else"
READ = (
    "matrices",
    "scales",
    "norms",
    "padding",
    "head",
)  # in every tick; the embedding is a gather


def decode_floor(model: TickModel, context: float) -> float:
    """Seconds per token of one sequence alone."""
    return model.deployment.layout.num_stages * model.floor(Work.of(1, context))


def prefill_floor(model: TickModel, prompt_tokens: int) -> float:
    """Seconds to the first token of a prompt alone, in chunks of whatever sizes.

    The first stage computes all of the prompt. What it computes last must then pass each other
    stage, which reads its weights for it.
    """
    whole = Work(rows=0, chunk=prompt_tokens, chunk_pairs=prompt_tokens**2 / 2)
    last = Work.of(1, prompt_tokens)
    return model.floor(whole) + (model.deployment.layout.num_stages - 1) * model.floor(last)


def floor_figure(seconds: float) -> Figure:
    """A physical limit."""
    return Figure(Band.exactly(seconds), "s", Evidence.ARITHMETIC, SOURCE)


def read_bytes(deployment: Deployment, work: Work) -> float:
    """Bytes that a GPU must read in a tick: its weights once, the keys of rows and of the chunk."""
    kinds = weight_bytes(deployment)
    keys = work.row_keys + (work.chunk_pairs / work.chunk if work.chunk else 0)
    return sum(kinds[kind] for kind in READ) + keys * kv_bytes_per_token(deployment)


def flop(deployment: Deployment, tokens: float, pairs: float) -> float:
    """FLOP of a GPU in a tick: products of the layers for all tokens, attention of all pairs."""
    config, layout = deployment.config, deployment.layout
    heads = config.num_heads + config.num_kv_heads * kv_replicas(config, layout.num_ranks)
    matrices = config.embed_dim * (2 * heads * config.head_dim + 3 * config.mlp_dim)
    attention = 4 * config.num_heads * config.head_dim * pairs
    layers = config.num_layers / layout.num_stages
    return layers * (2 * matrices * tokens + attention) / layout.num_ranks


def peak_flops(model: TickModel) -> float:
    """FLOP/s of the products, in the dtype in which they are multiplied."""
    return model.deployment.gpu.flops[model.products.dtype]
