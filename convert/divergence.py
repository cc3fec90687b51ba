"""Compares the predictions of a quantized model with those of its source on a text.

Both models run side by side in float32 on the CPU, one layer at a time, and the head in blocks of
rows. So a model can be compared on a machine whose memory cannot hold it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.checkpoint import CheckpointReader
from llama_jax.checkpoint.load import load_array
from llama_jax.config import LlamaConfig
from llama_jax.model import DecoderLayer, RMSNorm
from llama_jax.model.attention import causal_attention
from llama_jax.model.llama import head_logits, set_weights
from llama_jax.weights.placement import Placement, unsharded_placements

_BLOCK_BYTES = 64 << 20  # of head rows, and of float64 logits, processed at a time
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Divergence:
    """The difference between the next-token distributions of two models on a text.

    Attributes:
      tokens: number of tokens in the text.
      mean: Kullback-Leibler divergence from the source's distribution in nats, mean over tokens.
      largest: the maximum over tokens.
      agreement: fraction of tokens after which both models rank the same token first.
    """

    tokens: int
    mean: float
    largest: float
    agreement: float


def divergence(
    source: CheckpointReader,
    quantized: CheckpointReader,
    windows: list[list[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Divergence:
    """Compares the predictions of two models.

    Args:
      source: the original.
      quantized: the quantized model.
      windows: token ids; each window is a separate sequence.
      progress: called with the bytes of weights read, and their total.

    Raises:
      CheckpointError: one of the two cannot be read.
    """
    passes = [_Pass(reader, windows) for reader in (source, quantized)]
    done, total = 0, sum(one.bytes for one in passes)
    progress(done, total)
    for layer in range(source.config.num_layers):
        for one in passes:
            done += one.run_layer(layer)
            progress(done, total)
    tally = _Tally(sum(map(len, windows)))
    for expected, found in zip(*(one.logits() for one in passes), strict=True):
        tally.add(expected, found)
        done += expected.shape[1] * sum(one.head_row_bytes for one in passes)
        progress(done, total)
    progress(total, total)
    return tally.result()


class _Pass:
    """One model's forward pass over the text.

    Attributes:
      bytes: of all weights that it reads.
      head_row_bytes: of one row of the head.
    """

    def __init__(self, reader: CheckpointReader, windows: list[list[int]]):
        self._reader = reader
        self._places = unsharded_placements(reader.config)
        self._head = self._places.lm_head or self._places.embedding
        self._x = [self._embed(window) for window in windows]
        self.head_row_bytes = self._bytes(self._head) // reader.config.vocab_size
        self.bytes = self._bytes((self._places.layers, self._places.final_norm, self._head))

    def run_layer(self, layer: int) -> int:
        """Runs a layer and returns the bytes of its weights."""
        places = self._places.layers[layer]
        weights = jax.tree.map(self._load, places)
        self._x = [_run_layer(self._reader.config, weights, x) for x in self._x]
        jax.block_until_ready(self._x)
        return self._bytes(places)

    def logits(self) -> Iterator[np.ndarray]:
        """Yields the logits of all N tokens for one block of the vocabulary, [N, rows] float32."""
        config = self._reader.config
        norm = nnx.eval_shape(lambda: RMSNorm(config.embed_dim, config.norm_eps))
        norm.scale.set_value(self._load(self._places.final_norm))
        x = norm(jnp.concatenate(self._x))
        step = max(1, _BLOCK_BYTES // (8 * max(x.shape)))
        for start in range(0, config.vocab_size, step):
            rows = slice(start, min(start + step, config.vocab_size))
            yield np.asarray(head_logits(x, jnp.asarray(self._rows(self._head, rows))))

    def _embed(self, window: list[int]) -> jax.Array:
        rows = [self._rows(self._places.embedding, slice(id, id + 1)) for id in window]
        return jnp.asarray(np.concatenate(rows))

    def _load(self, place: Placement) -> jax.Array:
        return load_array(self._reader, place, _FLOAT32)

    def _rows(self, place: Placement, rows: slice) -> np.ndarray:
        tensor = place.sources[0].tensor
        width = tensor.shape[1]
        out = np.empty((rows.stop - rows.start, width), _FLOAT32)
        self._reader.read_into(tensor.hf_name, (rows, slice(0, width)), out)
        return out

    def _bytes(self, places: Any) -> int:
        """Returns the bytes of the tensors in a tree of placements."""
        tensors = self._reader.tensors
        return sum(
            tensors[source.tensor.hf_name].nbytes
            for place in jax.tree.leaves(places)
            for source in place.sources
        )


@partial(jax.jit, static_argnums=0)
def _run_layer(config: LlamaConfig, weights: dict[str, Any], x: jax.Array) -> jax.Array:
    """Runs a layer on a whole sequence: x [T, D] → [T, D]."""
    layer = nnx.eval_shape(lambda: DecoderLayer(config, rngs=nnx.Rngs(0)))
    set_weights(layer, weights)
    positions = jnp.arange(len(x))[None]
    return layer(x[None], positions, causal_attention)[0]


class _Tally:
    """Computes the divergence of two distributions for N tokens from blocks of their logits.

    With p and q the softmax of logits a and b, KL = sum p (a - b) - log sum exp a + log sum exp b.
    As in an online softmax (https://arxiv.org/abs/1805.02867), the sums are over exp(a - m), where
    m is the largest logit so far, and are rescaled when a block contains a larger one.
    """

    def __init__(self, num_tokens: int):
        self._expected = _Softmax(num_tokens)
        self._found = _Softmax(num_tokens)
        self._weighted = np.zeros(num_tokens)  # sum of exp(a - m) (a - b)

    def add(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Adds two blocks of logits [N, rows] for the same part of the vocabulary."""
        a, b = expected.astype(np.float64), found.astype(np.float64)
        scale, terms = self._expected.add(a)
        self._found.add(b)
        self._weighted = scale * self._weighted + (terms * (a - b)).sum(axis=1)

    def result(self) -> Divergence:
        """Returns the divergence, after the last block."""
        p, q = self._expected, self._found
        kl = self._weighted / p.sum - (p.max + np.log(p.sum)) + (q.max + np.log(q.sum))
        kl = np.maximum(kl, 0)  # rounding can make it slightly negative
        return Divergence(
            tokens=len(kl),
            mean=float(kl.mean()),
            largest=float(kl.max()),
            agreement=float((p.likeliest == q.likeliest).mean()),
        )


class _Softmax:
    """The running state of N softmax distributions.

    Attributes:
      max: the largest logit so far.
      likeliest: its index in the vocabulary.
      sum: of exp(logit - max).
    """

    def __init__(self, num_tokens: int):
        self.max = np.full(num_tokens, -np.inf)
        self.likeliest = np.zeros(num_tokens, np.int64)
        self.sum = np.zeros(num_tokens)
        self._seen = 0

    def add(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adds a block of logits [N, rows].

        Returns:
          The factor by which earlier sums must be multiplied, [N], and exp(logit - max), [N, rows].
        """
        place = logits.argmax(axis=1)
        best = np.take_along_axis(logits, place[:, None], axis=1)[:, 0]
        self.likeliest = np.where(best > self.max, self._seen + place, self.likeliest)
        new_max = np.maximum(self.max, best)
        scale = np.exp(self.max - new_max)
        terms = np.exp(logits - new_max[:, None])
        self.max, self.sum = new_max, scale * self.sum + terms.sum(axis=1)
        self._seen += logits.shape[1]
        return scale, terms
