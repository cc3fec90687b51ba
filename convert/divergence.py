"""How far a quantised model is from its source: the divergence of what they predict for a text.

Both models go through their layers side by side, one layer in memory at a time, in float32 on the
CPU; and through the vocabulary in blocks of rows. So a model of any size can be compared on a
machine that could never hold it.
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

_BLOCK_BYTES = 64 << 20  # of head rows, and of float64 logits, that are worked on at once
_FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Divergence:
    """How what two models predict after each token of a text differs.

    Attributes:
      tokens: of the text.
      mean: Kullback-Leibler divergence from the source's distribution, in nats, over all tokens.
      largest: the same, of the token where it is largest.
      agreement: the share of tokens after which both find the same token the most likely.
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
    """Compares what two models predict.

    Args:
      source: the original.
      quantized: what was made of it.
      windows: token ids; each window is a text of its own.
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
    """One model on its way through the text.

    Attributes:
      bytes: of the weights that it reads.
      head_row_bytes: of these, those of a row of the head.
    """

    def __init__(self, reader: CheckpointReader, windows: list[list[int]]):
        self._reader = reader
        self._places = unsharded_placements(reader.config)
        self._head = self._places.lm_head or self._places.embedding
        self._x = [self._embed(window) for window in windows]
        self.head_row_bytes = self._bytes(self._head) // reader.config.vocab_size
        self.bytes = self._bytes((self._places.layers, self._places.final_norm, self._head))

    def run_layer(self, layer: int) -> int:
        """Runs a layer, and returns how many bytes of weights that took."""
        places = self._places.layers[layer]
        weights = jax.tree.map(self._load, places)
        self._x = [_run_layer(self._reader.config, weights, x) for x in self._x]
        jax.block_until_ready(self._x)
        return self._bytes(places)

    def logits(self) -> Iterator[np.ndarray]:
        """Runs the head: logits of all tokens for a run of the vocabulary, [N, rows] float32."""
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
        width = place.tensor.shape[1]
        out = np.empty((rows.stop - rows.start, width), _FLOAT32)
        self._reader.read_into(place.tensor.hf_name, (rows, slice(0, width)), out)
        return out

    def _bytes(self, places: Any) -> int:
        """Of the tensors that a tree of placements stands for."""
        tensors = self._reader.tensors
        return sum(tensors[place.tensor.hf_name].nbytes for place in jax.tree.leaves(places))


@partial(jax.jit, static_argnums=0)
def _run_layer(config: LlamaConfig, weights: dict[str, Any], x: jax.Array) -> jax.Array:
    """x [T, D] -> [T, D], the tokens being a whole text."""
    layer = nnx.eval_shape(lambda: DecoderLayer(config, rngs=nnx.Rngs(0)))
    set_weights(layer, weights)
    positions = jnp.arange(len(x))[None]
    return layer(x[None], positions, causal_attention)[0]


class _Tally:
    """The divergence of two distributions for each of N tokens, from blocks of their logits.

    With p and q the softmax of logits a and b, KL = sum p (a - b) - log sum exp a + log sum exp b.
    As in a running softmax (https://arxiv.org/abs/1805.02867), the sums are of exp(a - m), m being
    the largest logit so far, and are scaled anew whenever a block holds a larger one.
    """

    def __init__(self, num_tokens: int):
        self._expected = _Softmax(num_tokens)
        self._found = _Softmax(num_tokens)
        self._weighted = np.zeros(num_tokens)  # sum of exp(a - m) (a - b)

    def add(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Two blocks of logits [N, rows], for the same run of the vocabulary."""
        a, b = expected.astype(np.float64), found.astype(np.float64)
        scale, terms = self._expected.add(a)
        self._found.add(b)
        self._weighted = scale * self._weighted + (terms * (a - b)).sum(axis=1)

    def result(self) -> Divergence:
        """After the last block."""
        p, q = self._expected, self._found
        kl = self._weighted / p.sum - (p.most + np.log(p.sum)) + (q.most + np.log(q.sum))
        kl = np.maximum(kl, 0)  # a rounding error below, where the two are as good as equal
        return Divergence(
            tokens=len(kl),
            mean=float(kl.mean()),
            largest=float(kl.max()),
            agreement=float((p.likeliest == q.likeliest).mean()),
        )


class _Softmax:
    """What is known of N distributions after some blocks of their logits.

    Attributes:
      most: the largest logit.
      likeliest: its place in the vocabulary.
      sum: of exp(logit - most).
    """

    def __init__(self, num_tokens: int):
        self.most = np.full(num_tokens, -np.inf)
        self.likeliest = np.zeros(num_tokens, np.int64)
        self.sum = np.zeros(num_tokens)
        self._seen = 0

    def add(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes in a block [N, rows].

        Returns:
          By what sums so far are to be multiplied, [N]; and exp(logit - most), [N, rows].
        """
        place = logits.argmax(axis=1)
        best = np.take_along_axis(logits, place[:, None], axis=1)[:, 0]
        self.likeliest = np.where(best > self.most, self._seen + place, self.likeliest)
        most = np.maximum(self.most, best)
        scale = np.exp(self.most - most)
        terms = np.exp(logits - most[:, None])
        self.most, self.sum = most, scale * self.sum + terms.sum(axis=1)
        self._seen += logits.shape[1]
        return scale, terms
