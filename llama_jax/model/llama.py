"""Llama 3 as Flax NNX modules: plain maths, no mesh in sight.

The same modules run in two places. In a notebook, `Llama.from_pretrained(path)(tokens)` gives
logits for every position on one device. In the ring, each rank rebuilds `DecoderLayer` around its
own share of the weights (`sharding/`): head counts are read off the weights' shapes, so a rank that
holds a quarter of the heads computes a quarter of the attention, and `reduce` sums the ranks'
partial results. Without a mesh `reduce` is the identity.

Values worth a name go through `tap`, so that they can be captured and patched
(`llama_jax.interpret`). To change the model, subclass: `DecoderLayer` names the classes of its
attention and MLP, `Llama` those of its layers and of its sampler, and the ring takes them over.

A matrix of a layer is an array, or, quantised, a named tuple of arrays (`llama_jax.quantization`);
`linear` is the only place that tells the two apart.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.config import LlamaConfig
from llama_jax.model.attention import Attend, causal_attention
from llama_jax.model.rope import inverse_frequencies, rotate
from llama_jax.model.sampling import Sampler
from llama_jax.model.tap import TappedModule
from llama_jax.quantization import Quantized
from llama_jax.weights.table import (
    EMBEDDING,
    INIT_STD,
    LAYER_WEIGHTS,
    LM_HEAD,
    Weight,
)
from sharding.errors import UserError

Reduce = Callable[[jax.Array], jax.Array]

_BY_NAME = {weight.name: weight for weight in (*LAYER_WEIGHTS, EMBEDDING, LM_HEAD)}


def linear(x: jax.Array, weight: jax.Array | Quantized) -> jax.Array:
    """x [..., in] times weight [out, in], transposed: [..., out], in the dtype of `x`."""
    if isinstance(weight, tuple):
        return weight.linear(x)
    return jnp.einsum("...i,oi->...o", x, weight)


def _param(config: LlamaConfig, name: str, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.Param:
    weight: Weight = _BY_NAME[name]
    noise = INIT_STD * jax.random.normal(rngs.params(), weight.shape(config), jnp.float32)
    return nnx.Param(noise.astype(dtype))


class RMSNorm(TappedModule):
    """Root-mean-square norm (https://arxiv.org/abs/1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float, dtype: jnp.dtype = jnp.float32):
        self.scale = nnx.Param(jnp.ones(dim, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D], same dtype."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.tap("output", normed.astype(x.dtype) * self.scale[...])


class Attention(TappedModule):
    """Grouped-query attention; head counts come from the shapes of the weights."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.wq = _param(config, "attention.wq", rngs, dtype)
        self.wk = _param(config, "attention.wk", rngs, dtype)
        self.wv = _param(config, "attention.wv", rngs, dtype)
        self.wo = _param(config, "attention.wo", rngs, dtype)
        self.config = config

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """x [..., D], positions [...] int32 -> this rank's partial sum [..., D]."""
        with jax.named_scope("qkv"):
            q, k, v = (
                linear(x, w.get_value()).reshape(*x.shape[:-1], -1, self.config.head_dim)
                for w in (self.wq, self.wk, self.wv)
            )
        frequencies = inverse_frequencies(self.config)
        q = self.tap("query", rotate(q, positions, frequencies))
        k = self.tap("key", rotate(k, positions, frequencies))
        v = self.tap("value", v)
        out = self.tap("heads", attend(q, k, v, score_mod=self.score_mod, tap=self.tap))
        return linear(out.reshape(*x.shape[:-1], -1), self.wo.get_value())

    def score_mod(
        self,
        scores: jax.Array,
        head: jax.Array,
        query_position: jax.Array,
        key_position: jax.Array,
    ) -> jax.Array:
        """Changes the scores before the softmax; for subclasses.

        Keys after the query are left out in any case. To leave out others, put
        `attention.MASKED` in their place, but leave each query one key.

        Args:
          scores: float32, already divided by the square root of h, in whatever shape the backend
            computes them; the other three broadcast against it.
          head: int32, the number of the query head, in the whole model.
          query_position, key_position: int32, in the sequence.

        Returns:
          Scores of the same shape.
        """
        return scores


class MLP(TappedModule):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.w_gate = _param(config, "mlp.w_gate", rngs, dtype)
        self.w_up = _param(config, "mlp.w_up", rngs, dtype)
        self.w_down = _param(config, "mlp.w_down", rngs, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> this rank's partial sum [..., D]."""
        with jax.named_scope("mlp"):
            gate, up = (linear(x, w.get_value()) for w in (self.w_gate, self.w_up))
            neurons = self.tap("neurons", jax.nn.silu(gate) * up)
            return linear(neurons, self.w_down.get_value())


class DecoderLayer(TappedModule):
    """Attention and MLP, each behind a norm and beside a residual connection."""

    attention_class: ClassVar[type[Attention]] = Attention
    mlp_class: ClassVar[type[MLP]] = MLP

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        self.attention = self.attention_class(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        self.mlp = self.mlp_class(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        attend: Attend,
        reduce: Reduce = lambda partial: partial,
    ) -> jax.Array:
        """x [..., D], positions [...] int32 -> [..., D]; `reduce` sums partial results."""
        attended = reduce(self.attention(self.attention_norm(x), positions, attend))
        x = self.tap("middle", x + self.attention.tap("output", attended))
        transformed = reduce(self.mlp(self.mlp_norm(x)))
        return self.tap("residual", x + self.mlp.tap("output", transformed))


class Llama(TappedModule):
    """The whole model on one device.

    Args:
      config: the architecture.
      rngs: for the random initial weights, which are not quantised; `Llama.from_pretrained`
        replaces them with what a checkpoint holds.
      dtype: of the weights and activations; norms, softmax and logits are float32.
    """

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer
    sampler: ClassVar[Sampler] = Sampler()

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.embedding = _param(config, "embedding", rngs, dtype)
        self.layers = nnx.List(
            [self.layer_class(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)]
        )
        self.final_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        if not config.tie_embeddings:
            self.lm_head = _param(config, "lm_head", rngs, dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] int32 in [0, V) -> logits [B, T, V] float32.

        Raises:
          ValueError: if a token is out of range (JAX itself would clamp it in silence). Inside a
            `jax.jit` the tokens' values are not known and are not checked.
        """
        check_tokens(tokens, self.config.vocab_size)
        tokens = jnp.asarray(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.tap("embedding", self.embedding[...][tokens])
        for layer in self.layers:
            x = layer(x, positions, causal_attention)
        return self.tap("logits", self.unembed(x))

    def unembed(self, x: jax.Array) -> jax.Array:
        """Activations of a layer [..., D] -> the logits that they lead to, [..., V] float32."""
        head = self.embedding if self.config.tie_embeddings else self.lm_head
        return head_logits(self.final_norm(x), head[...])

    @classmethod
    def from_pretrained(cls, path: str, dtype: str = "auto") -> Self:
        """Opens a checkpoint directory (Hugging Face or Orbax layout) on the default device.

        Args:
          path: the directory.
          dtype: "auto" (float32 on CPU, the checkpoint's own elsewhere), "float32", "bfloat16".
        """
        # The model needs no reader until it reads a checkpoint.
        from llama_jax.checkpoint import open_checkpoint
        from llama_jax.checkpoint.load import choose_dtype, load_whole

        with closing(open_checkpoint(path)) as reader:
            kind = choose_dtype(dtype, reader.config, jax.default_backend())
            # Its weights are placeholders: none is made that the checkpoint would replace.
            model = nnx.eval_shape(lambda: cls(reader.config, rngs=nnx.Rngs(0), dtype=kind))
            params = load_whole(reader, kind)
        model.embedding.set_value(params.embedding)
        model.final_norm.scale.set_value(params.final_norm)
        if params.lm_head is not None:
            model.lm_head.set_value(params.lm_head)
        for layer, weights in zip(model.layers, params.layers, strict=True):
            set_weights(layer, weights)
        return model


def head_logits(x: jax.Array, head: jax.Array) -> jax.Array:
    """Normed activations [..., D] and head [V, D] -> logits [..., V], float32."""
    with jax.named_scope("head"):
        return jnp.einsum("...d,vd->...v", x, head, preferred_element_type=jnp.float32)


def weight_of(module: nnx.Module, name: str) -> nnx.Param:
    """The parameter of a module with this name from the table of weights: "attention.wq"."""
    for attribute in name.split("."):
        module = getattr(module, attribute)
    assert isinstance(module, nnx.Param)
    return module


def set_weights(module: nnx.Module, weights: Mapping[str, Any]) -> None:
    """Gives a module its weights by their names; a quantised one is a named tuple of arrays."""
    for name, value in weights.items():
        weight_of(module, name).set_value(value)


def check_model_class(model_class: type[Llama]) -> None:
    """Raises UserError unless the ring can run a class as it stands: it takes over the layers and
    the sampler, and would leave out in silence what else the class changes."""
    if not (isinstance(model_class, type) and issubclass(model_class, Llama)):
        raise UserError(f"model_class must be Llama or a subclass of it, got {model_class!r}.")
    for name in ("__call__", "unembed"):
        if getattr(model_class, name) is not getattr(Llama, name):
            raise UserError(
                f"{model_class.__name__} has a {name} of its own, which a model on a mesh does not "
                "run: change the layers (layer_class) or the sampler instead."
            )


def check_tokens(tokens: Any, vocab_size: int) -> None:
    """Raises ValueError unless tokens are integers `[B, T]` in [0, V), one at least, as far as is
    known now: inside a `jax.jit` their values are not."""
    if isinstance(tokens, jax.core.Tracer):
        return
    values = np.asarray(tokens)
    if values.ndim != 2 or (values.size and not np.issubdtype(values.dtype, np.integer)):
        raise ValueError(
            f"tokens must be integers of shape [B, T], got {values.dtype} of shape {values.shape}."
        )
    if not values.size:
        raise ValueError(f"tokens must hold at least one, got shape {values.shape}.")
    if not (0 <= values.min() and values.max() < vocab_size):
        raise ValueError(
            f"Token ids must be in [0, {vocab_size}), got {values.min()} to {values.max()}."
        )
