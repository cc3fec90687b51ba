"""Inputs for the tests of pictures: an engine's info, tokens, attention weights, a recorded run."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

from llama_jax import pictures
from llama_jax.engine.interface import DeviceInfo, EngineInfo
from llama_jax.engine.recording import Recording, record
from tests.engine.test_tick_loop import make_loop, make_requests, run

WORDS = ["<|begin_of_text|>", "The", " ring", " never", " $drains", "\n", "你", "_{x}^2"]
ROWS, COLUMNS = P("stage", "model", None), P("stage", None, "model")


def make_info(stages: int = 4, ranks: int = 2) -> EngineInfo:
    """20 layers per stage; each stage has 0.1 GB more weights than the one before."""
    devices = [
        DeviceInfo(
            name=f"cuda:{stage * ranks + rank}",
            stage=stage,
            rank=rank,
            layers=list(range(20 * stage, 20 * stage + 20)),
            weight_bytes=17_639_000_000 + 100_000_000 * stage,
            kv_bytes=20_000_000_000,
        )
        for stage in range(stages)
        for rank in range(ranks)
    ]
    return EngineInfo(
        model="Meta-Llama-3-70B-Instruct",
        mesh=f"{stages}x{ranks}",
        platform="gpu",
        dtype="bfloat16",
        kv_cache_dtype="bfloat16",
        vocab_size=128256,
        max_model_len=4096,
        max_num_seqs=256,
        page_size=16,
        num_pages=30517,
        devices=devices,
        num_programs=16,
        load_seconds=1.0,
        compile_seconds=1.0,
    )


class Words:
    """A tokenizer whose token ids index WORDS; ids past its end have no text."""

    def decode(self, ids):
        return "".join(WORDS[i] for i in ids if i < len(WORDS))


def softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values - values.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention_weights(num_heads: int, queries: int, keys: int) -> np.ndarray:
    """`[H, T, S]` with a causal mask; the queries are the last T positions."""
    scores = np.random.default_rng(0).normal(size=(num_heads, queries, keys)) * 2
    future = np.arange(keys) > np.arange(keys - queries, keys)[:, None]
    return softmax(np.where(future, -np.inf, scores))


def stacked(mesh: Mesh, spec: P) -> jax.ShapeDtypeStruct:
    """The weights of four stages, `[4, 28672, 8192]`, as a shape with a sharding."""
    return jax.ShapeDtypeStruct((4, 28672, 8192), jnp.bfloat16, sharding=NamedSharding(mesh, spec))


def heads(count: int, **more) -> Figure:
    """`count` heat maps of five layers and eight heads, from -9 to 0."""
    values = np.arange(count * 40).reshape(count, 5, 8) / 79 * 9 - 9
    names = [f"token {i}" for i in range(count)]
    return pictures.heat_map(
        values, "What ablating a head changes", names=names,
        label="change (nats)", xlabel="head", ylabel="layer", **more,
    )  # fmt: skip


def losses(**more) -> Figure:
    """Two curves over 8, 16 and 64, one of which begins with a gap."""
    values = {"with sink": [1.0, 2.0, 4.0], "without": [np.nan, 3.0, 6.0]}
    return pictures.curves(
        [8, 16, 64], values, "Loss by window", xlabel="window (tokens)", ylabel="loss (nats)",
        log="x", **more,
    )  # fmt: skip


def recorded_run() -> Recording:
    """25 requests through four stages and a pool of 60 pages."""
    loop = make_loop(4, 0)
    with record(loop) as recording:
        run(loop, make_requests(25, seed=3))
    return recording
