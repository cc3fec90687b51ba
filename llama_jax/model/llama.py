"""Llama 3 as Flax NNX modules: plain math, independent of any mesh.

The same modules run in two places. In a notebook, `Llama.from_pretrained(path)(tokens)` computes
logits for every position on one device. In the ring, each rank builds `DecoderLayer` around its
share of the weights (`ring.stage`). Head counts follow from the shapes of the weights, so a rank
with a quarter of the heads computes a quarter of the attention, and `reduce` sums the partial
results of the ranks. On one device, `reduce` is the identity.

Values of interest pass through `tap`, so that they can be captured and patched
(`llama_jax.interpret`). To change the model, write a subclass: `DecoderLayer` names the classes of
its attention and MLP, `Llama` the class of its layers and its sampler, and the ring uses them.

The matrices that multiply the same input are one parameter, row after row: `wqkv`, `w_gate_up`.
A matrix of a layer is an array or, if it is quantized, a named tuple of arrays
(`llama_jax.quantization`); only `linear` distinguishes them.
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
from llama_jax.model.cpu_product import cpu_product, on_cpu, sum_dtype
from llama_jax.model.rope import attention_factor, check_length, inverse_frequencies, rotate
from llama_jax.model.sampling import Sampler
from llama_jax.model.tap import TappedModule
from llama_jax.quantization import Quantized
from llama_jax.weights.table import EMBEDDING, LAYER_PARAMETERS, LM_HEAD
from llama_jax.weights.unfused import Unfused
from sharding.errors import UserError
from sharding.settings import default_promotion

Reduce = Callable[[jax.Array], jax.Array]

_INIT_STD = 0.02  # of random matrices, as `initializer_range` in Hugging Face configs
_PARAMETERS = {**LAYER_PARAMETERS, "embedding": (EMBEDDING,), "lm_head": (LM_HEAD,)}


def linear(
    x: jax.Array, weight: jax.Array | Quantized | Unfused, dtype: jnp.dtype | None = None
) -> jax.Array:
    """Multiplies x [..., in] by the transpose of a weight [out, in]: [..., out].

    The result has this dtype, or else that of `x`.
    """
    if isinstance(weight, Unfused):
        return jnp.concatenate([linear(x, each, dtype) for each in weight.weights], axis=-1)
    if isinstance(weight, tuple):
        product = weight.linear(x)
    elif on_cpu():
        return cpu_product(x, weight, jnp.result_type(x, weight) if dtype is None else dtype)
    else:
        product = jnp.einsum("...i,oi->...o", x, weight)
    return product if dtype is None else product.astype(dtype)


def swiglu(gate: jax.Array, up: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """SwiGLU (https://arxiv.org/abs/2002.05202): silu(gate) · up, in this dtype."""
    if on_cpu():
        # XLA:CPU computes in float32 in any case. Rounding each step to bfloat16 would take longer.
        wide = jnp.promote_types(gate.dtype, jnp.float32)
        gate, up = gate.astype(wide), up.astype(wide)
    return (jax.nn.silu(gate) * up).astype(dtype)


def _param(config: LlamaConfig, name: str, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.Param:
    (rows, *columns), *others = (weight.shape(config) for weight in _PARAMETERS[name])
    shape = (rows + sum(shape[0] for shape in others), *columns)
    noise = _INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32)
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
    """Grouped-query attention (https://arxiv.org/abs/2305.13245).

    Head counts follow from the shapes of the weights. The rows of `wqkv` are those of the query
    heads, then those of the key heads, then those of the value heads.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.wqkv = _param(config, "attention.wqkv", rngs, dtype)
        self.wo = _param(config, "attention.wo", rngs, dtype)
        self.config = config

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """Attends.

        Args:
          x: `[..., D]`, normalized.
          positions: `[...]` int32, in the sequence.
          attend: computes attention from queries, keys and values.

        Returns:
          `[..., D]`, this rank's partial sum.
        """
        with jax.named_scope("qkv"):
            q, k, v = self.split(linear(x, self.wqkv.get_value(), sum_dtype(x)))
        frequencies, factor = inverse_frequencies(self.config), attention_factor(self.config)
        q = self.tap("query", rotate(q, positions, frequencies, factor).astype(x.dtype))
        k = self.tap("key", rotate(k, positions, frequencies, factor).astype(x.dtype))
        v = self.tap("value", v.astype(x.dtype))
        out = self.tap("heads", attend(q, k, v, score_mod=self.score_mod, tap=self.tap))
        return linear(out.reshape(*x.shape[:-1], -1), self.wo.get_value())

    def split(self, qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Product with `wqkv` [..., (H + 2K) h] -> q [..., H, h], k and v [..., K, h]."""
        heads = qkv.reshape(*qkv.shape[:-1], -1, self.config.head_dim)
        group = self.config.num_heads // self.config.num_kv_heads
        # If there are more ranks than KV heads, each has one, and a part of its query heads.
        num_kv_heads = max(1, heads.shape[-2] // (group + 2))
        num_heads = heads.shape[-2] - 2 * num_kv_heads
        q, k, v = jnp.split(heads, [num_heads, num_heads + num_kv_heads], axis=-2)
        return q, k, v

    def score_mod(
        self,
        scores: jax.Array,
        head: jax.Array,
        query_position: jax.Array,
        key_position: jax.Array,
    ) -> jax.Array:
        """Changes the scores before the softmax; subclasses may override it.

        The causal mask is applied afterwards in any case. To mask more keys, set their scores to
        `attention.MASKED`, but leave each query at least one key.

        Args:
          scores: float32, already divided by the square root of h. The shape depends on the
            backend; the other arguments broadcast against it.
          head: int32, the index of the query head in the whole model.
          query_position, key_position: int32, positions in the sequence.

        Returns:
          Scores of the same shape, which go on as float32; another shape is an error.
        """
        return scores


class MLP(TappedModule):
    """SwiGLU (https://arxiv.org/abs/2002.05202).

    The rows of `w_gate_up` are those of the gate, then those of the up projection.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.w_gate_up = _param(config, "mlp.w_gate_up", rngs, dtype)
        self.w_down = _param(config, "mlp.w_down", rngs, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D], normalized -> this rank's partial sum [..., D]."""
        with jax.named_scope("mlp"):
            both = linear(x, self.w_gate_up.get_value(), sum_dtype(x))
            gate, up = jnp.split(both, 2, axis=-1)
            neurons = self.tap("neurons", swiglu(gate, up, x.dtype))
            return linear(neurons, self.w_down.get_value())


class DecoderLayer(TappedModule):
    """Attention and MLP, each with a norm before it and a residual connection around it."""

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
        """Applies the layer.

        Args:
          x: `[..., D]`, the residual stream.
          positions: `[...]` int32, in the sequence.
          attend: computes attention from queries, keys and values.
          reduce: sums partial results over the tensor-parallel ranks.

        Returns:
          `[..., D]`.
        """
        attended = reduce(self.attention(self.attention_norm(x), positions, attend))
        x = self.tap("middle", x + self.attention.tap("output", attended))
        transformed = reduce(self.mlp(self.mlp_norm(x)))
        return self.tap("residual", x + self.mlp.tap("output", transformed))


class Llama(TappedModule):
    """The whole model on one device.

    Args:
      config: the architecture.
      rngs: for the random initial weights, which are not quantized; `Llama.from_pretrained` loads
        those of a checkpoint instead.
      dtype: of the weights and activations; norms, softmax and logits are computed in float32.
    """

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer
    sampler: ClassVar[Sampler] = Sampler()
    # Whether programs of the ring with a chunk round the inputs of fp8 matrices to fp8 as well.
    fp8_activations: ClassVar[bool] = False

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.embedding = _param(config, "embedding", rngs, dtype)
        self.layers = nnx.List(
            [self.layer_class(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)]
        )
        self.final_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        if not config.tie_embeddings:
            self.lm_head = _param(config, "lm_head", rngs, dtype)

    @default_promotion()
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] int32 in [0, V) -> logits [B, T, V] float32.

        Raises:
          ValueError: a token is out of range, which JAX would silently clamp, or the sequence is
            too long for dynamic rope scaling. Inside `jax.jit`, where the values of the tokens are
            unknown, they are not checked.
        """
        check_tokens(tokens, self.config.vocab_size)
        tokens = jnp.asarray(tokens)
        check_length(self.config, tokens.shape[1])
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x = self.tap("embedding", self.embedding[...][tokens])
        for layer in self.layers:
            x = layer(x, positions, causal_attention)
        return self.tap("logits", self.unembed(x))

    @default_promotion()
    def unembed(self, x: jax.Array) -> jax.Array:
        """Output of a layer [..., D] -> logits [..., V] float32: final norm and LM head."""
        head = self.embedding if self.config.tie_embeddings else self.lm_head
        return head_logits(self.final_norm(x), head[...])

    @classmethod
    def from_pretrained(cls, path: str, dtype: str = "auto") -> Self:
        """Loads a checkpoint (Hugging Face or Orbax layout, or GGUF) to the default device.

        Parameters that a subclass adds, such as adapters, start as its constructor makes them.

        Args:
          path: the directory, or the GGUF file.
          dtype: "auto" (float32 on CPU, else the checkpoint's own), "float32" or "bfloat16".

        Raises:
          CheckpointError, ConfigError: the checkpoint cannot be read.
          UserError: `dtype` has another value, or a module of a subclass has an array as a plain
            attribute.
        """
        # Imported here, so that importing the model does not load the readers.
        from llama_jax.checkpoint import open_checkpoint
        from llama_jax.checkpoint.load import choose_dtype, load_whole

        with closing(open_checkpoint(path)) as reader:
            reader.declared.report_unknown()
            kind = choose_dtype(dtype, reader.config, jax.default_backend())
            # eval_shape: no random weights are computed only to be replaced.
            model = nnx.eval_shape(lambda: cls(reader.config, rngs=nnx.Rngs(0), dtype=kind))
            check_attributes(model)
            params = load_whole(reader, kind)
        model.embedding.set_value(params.embedding)
        model.final_norm.scale.set_value(params.final_norm)
        if params.lm_head is not None:
            model.lm_head.set_value(params.lm_head)
        for layer, weights in zip(model.layers, params.layers, strict=True):
            set_weights(layer, weights)
        _initialize_others(model, kind)
        return model


def check_attributes(module: nnx.Module) -> None:
    """Checks that no module, made by `nnx.eval_shape`, has an array as, or in, a plain attribute.

    Its value would not outlive `nnx.eval_shape`, and JAX would tell of tracers.

    Raises:
      UserError: one has.
    """
    for _, each in nnx.iter_modules(module):
        for name, value in vars(each).items():
            held = jax.tree.leaves(value, is_leaf=lambda x: not isinstance(x, list | tuple | dict))
            if any(isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for x in held):
                raise UserError(
                    f"{type(each).__name__} has an array as its attribute {name}: make it an "
                    "nnx.Variable, which is not trained, an nnx.Param, which is, or a constant "
                    "outside the class."
                )


def _initialize_others(model: Llama, dtype: jnp.dtype) -> None:
    """Gives parameters that a subclass adds, and no checkpoint has, their initial values."""
    added = [
        path
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if isinstance(variable.get_value(), jax.ShapeDtypeStruct)
    ]

    @jax.jit  # so that XLA leaves out the random values of all others
    def initial() -> list[nnx.Variable]:
        random = type(model)(model.config, rngs=nnx.Rngs(0), dtype=dtype)
        values = dict(nnx.to_flat_state(nnx.state(random)))
        return [values[path] for path in added]

    if added:
        nnx.update(model, nnx.from_flat_state(zip(added, initial(), strict=True)))


def head_logits(x: jax.Array, head: jax.Array) -> jax.Array:
    """Normalized activations [..., D] and LM head [V, D] -> logits [..., V] float32."""
    with jax.named_scope("head"):
        if on_cpu():
            return cpu_product(x, head, jnp.float32)
        return jnp.einsum("...d,vd->...v", x, head, preferred_element_type=jnp.float32)


def weight_of(module: nnx.Module, name: str) -> nnx.Param:
    """The parameter of a module with this name in the weight table, such as "attention.wqkv".

    Raises:
      UserError: something else has been assigned to it.
    """
    for attribute in name.split("."):
        module = getattr(module, attribute)
    if not isinstance(module, nnx.Param):
        raise UserError(
            f"{name} must be an nnx.Param, not {type(module).__name__}: to change its value, write "
            f"{name}[...] = array."
        )
    return module


def set_weights(module: nnx.Module, weights: Mapping[str, Any]) -> None:
    """Sets parameters of a module by name, as arrays or as named tuples of arrays (quantized)."""
    for name, value in weights.items():
        weight_of(module, name).set_value(value)


def check_tokens(tokens: Any, vocab_size: int) -> None:
    """Checks that tokens are integers `[B, T]` in [0, V), and at least one.

    Inside `jax.jit`, where their values are unknown, nothing is checked.

    Raises:
      ValueError: they are not.
    """
    if isinstance(tokens, jax.core.Tracer):
        return
    try:
        values = np.asarray(tokens)
    except ValueError:  # of rows of different lengths
        raise ValueError(
            "tokens must be integers of shape [B, T], but the rows differ in length: pad the ends "
            "with any token, which changes nothing before the padding."
        ) from None
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
