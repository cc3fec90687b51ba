"""What the dtype of the KV cache costs and saves: `python -m bench kv-cache-dtype`.

For each dtype: the predictions of the demo checkpoint, teacher-forced, against transformers in
float64, on dialogues that it was not trained on and on a text unlike them; the tokens that fit into
the memory of the 70B deployment; and the time of a decode tick on this CPU, in turns. And for keys
and values of Llama's shape with outliers, the error of attention, also with float8 without scales,
which is why there are scales.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

from bench.result import Plot, Result, Row, Target
from convert.sample import TEXT
from demo.batches import encode
from demo.corpus import Corpus
from llama_jax import ShardedLlama
from llama_jax.config import LlamaConfig
from llama_jax.engine.core import configure_jax
from llama_jax.engine.executor import Executor
from llama_jax.model.kv_storage import choose_kv_dtype
from llama_jax.ring.kv_cache import page_bytes
from llama_jax.ring.packet import encode_packet
from llama_jax.ring.sizes import Bucket, RingSizes
from sharding.mesh import make_mesh

CHECKPOINT = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"
NAMES = ("auto", "bf16", "int8", "fp8")
DIALOGUES, LENGTH = 16, 256  # and the tokens that each row is padded to
POOL = 20_000_000_000  # bytes on each GPU of the 70B deployment
BATCH, CONTEXT, TICKS = 8, 896, 30  # of the decode ticks that are timed
PAGE_SIZE = 16
LIMIT = 0.01  # nats per token between a cache in 8 bits and float64
PREDICTED = {
    "dtype": "activations",
    "kv_cache_dtype": "cache",
    "text": "text",
    "tokens": "tokens",
    "kl_mean": "KL divergence",
    "kl_largest": "largest KL divergence",
    "same_first_choice": "unchanged best token",
    "perplexity": "perplexity",
    "perplexity_float64": "perplexity in float64",
}
UNITS = {
    "error of attention": "",
    "page": "bytes",
    "tokens of 70B in 20 GB": "",
    "tick, median": "ms",
    "tick, least": "ms",
    "tokens": "",
    "KL divergence": "nats per token",
    "largest KL divergence": "nats",
    "unchanged best token": "",
    "perplexity": "",
    "perplexity in float64": "",
}

Figures = dict[str, dict[str, float]]  # of each kind: its figures


def texts() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Token ids `[rows, LENGTH]`, and for each text which of them are to be predicted.

    The dialogues are like the training text, but not in it; of them, the assistant's words count.
    The sample text of `convert --check` is unlike it.
    """
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    corpus = Corpus("kv cache")
    rows = []
    while len(rows) < DIALOGUES:
        ids, said = encode(tokenizer, corpus.dialogue(max_turns=6))
        if LENGTH // 2 <= len(ids) <= LENGTH:
            rows.append((ids, said, [False] * len(ids)))
    sample = tokenizer.encode(TEXT, add_special_tokens=False).ids
    for start in range(0, len(sample), LENGTH):
        part = sample[start : start + LENGTH]
        rows.append((part, [False] * len(part), [True] * len(part)))
    tokens, spoken, counted = (
        np.zeros((len(rows), LENGTH), kind) for kind in (np.int32, bool, bool)
    )
    for row, parts in enumerate(rows):
        for array, part in zip((tokens, spoken, counted), parts, strict=True):
            array[row, : len(part)] = part
    return tokens, {"dialogues": spoken, "sample": counted}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def reference(tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities `[rows, LENGTH, V]` by transformers in float64."""
    model = transformers.LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float64).eval()
    with torch.inference_mode():
        return log_softmax(model(torch.from_numpy(tokens).long()).logits.numpy())


def predictions() -> list[dict[str, Any]]:
    """Compares every dtype of activations and cache with the reference, on both texts."""
    tokens, wanted = texts()
    expected = reference(tokens)
    rows = []
    for dtype in ("float32", "bfloat16"):
        for name in NAMES:
            model = ShardedLlama.from_pretrained(str(CHECKPOINT), dtype=dtype, kv_cache_dtype=name)
            found = log_softmax(np.asarray(model(tokens), np.float64))
            for text, counted in wanted.items():
                # The distribution at a position is that of the next token.
                next_counts = counted[:, 1:]
                p, q = expected[:, :-1][next_counts], found[:, :-1][next_counts]
                row = {"dtype": dtype, "kv_cache_dtype": name, "text": text}
                row |= compare(p, q, tokens[:, 1:][next_counts])
                print(
                    f"{dtype:>8} {name:>4} {text:>9}: KL {row['kl_mean']:.2e} nats a token "
                    f"(largest {row['kl_largest']:.2e}), same first choice "
                    f"{row['same_first_choice']:.4f}, perplexity {row['perplexity']:.5g} (float64 "
                    f"{row['perplexity_float64']:.5g})",
                    flush=True,
                )
                rows.append(row)
    return rows


def compare(expected: np.ndarray, found: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Compares log-probabilities `[N, V]`, given the tokens that came, `[N]`."""
    kl = (np.exp(expected) * (expected - found)).sum(axis=1)
    losses = [-np.take_along_axis(logs, targets[:, None], axis=1) for logs in (expected, found)]
    return {
        "tokens": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_largest": float(kl.max()),
        "same_first_choice": float((expected.argmax(1) == found.argmax(1)).mean()),
        "perplexity": float(np.exp(losses[1].mean())),
        "perplexity_float64": float(np.exp(losses[0].mean())),
    }


def memory() -> dict[str, dict[str, float]]:
    """Llama-3-70B on 4 x 2: bytes of a page on each device, and the tokens of the pool."""
    config, mesh = LlamaConfig.llama3_70b(), make_mesh("4x2")
    rows = {}
    for name in NAMES[1:]:
        dtype = choose_kv_dtype(name, np.dtype(np.float32))
        each = page_bytes(config, mesh, PAGE_SIZE, dtype)
        rows[name] = {"page_bytes": each, "tokens": POOL // each * PAGE_SIZE}
        print(f"{name:>4}: {each:,} bytes a page, {rows[name]['tokens']:,} tokens", flush=True)
    return rows


def tick_times() -> dict[str, dict[str, float]]:
    """Milliseconds of a decode tick of the demo checkpoint; the dtypes take turns tick by tick."""
    pages_each = CONTEXT // PAGE_SIZE
    sizes = RingSizes(
        num_slots=BATCH, num_pages=BATCH * pages_each, page_size=PAGE_SIZE,
        pages_per_sequence=pages_each, row_buckets=(BATCH,), chunk_buckets=(0,), tile=64,
    )  # fmt: skip
    tables = np.arange(sizes.num_pages, dtype=np.int32).reshape(BATCH, pages_each)
    bucket = Bucket(BATCH, 0)
    packed = encode_packet(sizes, bucket, tables, range(BATCH), [CONTEXT - 1] * BATCH, [])
    executors = {}
    for dtype in ("float32", "bfloat16"):
        model = ShardedLlama.from_pretrained(str(CHECKPOINT), dtype=dtype)
        for name in NAMES if dtype == "float32" else ("auto", "int8", "fp8"):
            kind = choose_kv_dtype(name, model.dtype)
            executors[f"{dtype} {name}"] = Executor(
                model.config, model.mesh, sizes, model.params, model.dtype, cache_dtype=kind
            )
    times: dict[str, list[float]] = {name: [] for name in executors}
    for number in range(1 + TICKS):
        for name, executor in executors.items():
            start = time.perf_counter()
            executor.run(bucket, packed).tokens.block_until_ready()
            if number:  # the first one compiles
                times[name].append(1000 * (time.perf_counter() - start))
    found = {
        name: {"median": statistics.median(each), "least": min(each)}
        for name, each in times.items()
    }
    for name, row in found.items():
        print(f"{name:>13}: {row['median']:.1f} ms a tick, least {row['least']:.1f}", flush=True)
    return found


def attention_errors() -> dict[str, dict[str, float]]:
    """‖out − exact‖ / ‖exact‖ of attention in float64 over 1,024 rounded keys and values, h 128."""

    def scaled(limit: float, to: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
        def through(x: np.ndarray) -> np.ndarray:
            scale = np.abs(x).max(axis=-1, keepdims=True) / limit
            return to(x / scale) * scale

        return through

    def float8(x: np.ndarray) -> np.ndarray:
        return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)

    formats = {
        "bf16": lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float64),
        "int8": scaled(127, np.rint),
        "fp8": scaled(448, float8),
        "fp8 without scales": float8,
    }

    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        weights: np.ndarray = np.exp(log_softmax(q @ k.T / np.sqrt(q.shape[1]))) @ v
        return weights

    rng = np.random.default_rng(0)
    rows = {}
    # Magnitude of four channels of the keys, of all values, and of eight tokens' values.
    for key, value, token in ((1, 1, 1), (10, 1, 1), (300, 1, 1), (1, 1e-3, 1), (1, 1, 50)):
        k, v = rng.normal(size=(1024, 128)), rng.normal(size=(1024, 128)) * value
        k[:, rng.choice(128, 4, False)] *= key
        v[rng.choice(1024, 8, False)] *= token
        q = rng.normal(size=(64, 128)) * min(1, 6 / key)
        exact = attend(q, k, v)
        name = f"4 key channels x {key}, values x {value}, 8 tokens' values x {token}"
        rows[name] = {
            kind: float(np.linalg.norm(attend(q, to(k), to(v)) - exact) / np.linalg.norm(exact))
            for kind, to in formats.items()
        }
        print(f"{name}: " + ", ".join(f"{k} {e:.4f}" for k, e in rows[name].items()), flush=True)
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(args: argparse.Namespace) -> Result:
    """Measures errors, memory and time of every dtype of the cache."""
    configure_jax()  # before the first mesh
    return as_result(attention_errors(), memory(), tick_times(), predictions(), vars(args))


def as_result(
    attention: Figures, tokens: Figures, ticks: Figures, predicted: list[Row], args: dict[str, Any]
) -> Result:
    """Collects what the functions above return."""
    rows: list[Row] = [
        {"keys and values": kind, "cache": cache, "error of attention": error}
        for kind, errors in attention.items()
        for cache, error in errors.items()
    ]
    rows += [
        {"cache": cache, "page": each["page_bytes"], "tokens of 70B in 20 GB": each["tokens"]}
        for cache, each in tokens.items()
    ]
    rows += [
        {"activations, cache": name, "tick, median": each["median"], "tick, least": each["least"]}
        for name, each in ticks.items()
    ]
    rows += [{PREDICTED[key]: value for key, value in row.items()} for row in predicted]
    return Result.measured(
        "kv-cache-dtype",
        "the KV cache in each dtype: its error, the tokens it holds, and the time of a tick (batch "
        f"{BATCH}, context {CONTEXT})",
        args=args,
        packages=("jax", "numpy", "torch", "transformers"),
        units=UNITS,
        rows=rows,
        targets=[
            Target(
                "KL divergence from float64, the largest mean",
                max(float(row["kl_mean"]) for row in predicted),
                LIMIT,
                "max",
                "nats per token",
            )
        ],
        plots=[
            Plot(
                "Error of attention by dtype of the cache",
                "keys and values",
                ("error of attention",),
                by=("cache",),
                kind="bar",
            )
        ],
    )
