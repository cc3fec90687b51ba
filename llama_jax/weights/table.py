"""The table of the weights; everything else derives from it.

Each row gives a weight's name, its name in a Hugging Face checkpoint, its logical axes and the
parameter of the model that holds it. Shapes and partition specs follow from the axes
(`weights.axes`). Loading transforms no weight: matrices stay `[out, in]`, as Hugging Face stores
them, which is also the layout that XLA:CPU multiplies fastest.

Matrices that multiply the same input share one parameter, row after row: a layer then has four
products instead of seven. XLA would merge the products in any case, and through cuBLAS it would
join the weights anew in every tick (84 MB for q, k and v of a layer of Llama-3-70B on one of two
ranks).

A checkpoint stores a weight as one tensor, or, if it is quantized, as the tensors of its format
(`stored_tree`).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.quantization import ACT_ORDER, FORMATS, Part
from llama_jax.weights.axes import axis_sizes


@dataclass(frozen=True)
class Weight:
    """One row of the table.

    Attributes:
      name: its name in this project.
      hf_name: its name in a Hugging Face checkpoint; `{layer}` stands for the layer's number.
      axes: its logical axes.
      parameter: the path of the parameter that holds it: in `DecoderLayer`, or in `Llama` for a
        weight outside the layers.
    """

    name: str
    hf_name: str
    axes: tuple[str, ...]
    parameter: str

    def shape(self, config: LlamaConfig) -> tuple[int, ...]:
        """The weight's global shape, without padding."""
        sizes = axis_sizes(config)
        return tuple(sizes[axis] for axis in self.axes)


def _in_layer(name: str, hf_name: str, axes: tuple[str, ...], parameter: str = "") -> Weight:
    return Weight(name, f"model.layers.{{layer}}.{hf_name}.weight", axes, parameter or name)


_QKV, _GATE_UP = "attention.wqkv", "mlp.w_gate_up"


LAYER_WEIGHTS = (
    _in_layer("attention_norm.scale", "input_layernorm", ("embed",)),
    _in_layer("attention.wq", "self_attn.q_proj", ("heads", "embed"), _QKV),
    _in_layer("attention.wk", "self_attn.k_proj", ("kv_heads", "embed"), _QKV),
    _in_layer("attention.wv", "self_attn.v_proj", ("kv_heads", "embed"), _QKV),
    _in_layer("attention.wo", "self_attn.o_proj", ("embed", "heads")),
    _in_layer("mlp_norm.scale", "post_attention_layernorm", ("embed",)),
    _in_layer("mlp.w_gate", "mlp.gate_proj", ("mlp", "embed"), _GATE_UP),
    _in_layer("mlp.w_up", "mlp.up_proj", ("mlp", "embed"), _GATE_UP),
    _in_layer("mlp.w_down", "mlp.down_proj", ("embed", "mlp")),
)
EMBEDDING = Weight("embedding", "model.embed_tokens.weight", ("vocab", "embed"), "embedding")
FINAL_NORM = Weight("final_norm.scale", "model.norm.weight", ("embed",), "final_norm.scale")
LM_HEAD = Weight("lm_head", "lm_head.weight", ("vocab", "embed"), "lm_head")

# The parameters of a layer → the weights whose rows they hold, in order.
LAYER_PARAMETERS: dict[str, tuple[Weight, ...]] = {
    name: tuple(weights)
    for name, weights in itertools.groupby(LAYER_WEIGHTS, key=lambda weight: weight.parameter)
}


def non_layer_weights(config: LlamaConfig) -> tuple[Weight, ...]:
    """The weights outside the layers. There is no `LM_HEAD` if the embeddings are tied."""
    head = () if config.tie_embeddings else (LM_HEAD,)
    return (EMBEDDING, FINAL_NORM, *head)


def each_weight(config: LlamaConfig) -> Iterator[tuple[Weight, int]]:
    """Every weight with the number of its layer, in order; 0 for those outside the layers."""
    yield from ((weight, 0) for weight in non_layer_weights(config))
    yield from ((weight, layer) for layer in range(config.num_layers) for weight in LAYER_WEIGHTS)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
      hf_name: its name; `{layer}` stands for the layer's number.
      axes: its logical axes.
      shape: its global shape, without padding.
      dtype: its NumPy name if it is part of a quantized matrix; None for any other tensor, which
        may have any of `config.llama_config.DTYPES`.
      by_row: whether its first axis is that of the weight, so that rows of the weight are rows of
        the tensor.
    """

    hf_name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str | None
    by_row: bool = True


def stored_tree(weight: Weight, config: LlamaConfig, layer: int) -> Any:
    """The tensors of a checkpoint that make up a weight of one layer, as a pytree.

    Returns:
      A `StoredTensor`, or the named tuple of a quantized format with one in place of each array;
      their names still contain `{layer}`.
    """
    if not is_quantized(weight, config, layer):
        return StoredTensor(weight.hf_name, weight.axes, weight.shape(config), None)
    return quantized_tree(weight, config)


def quantized_tree(weight: Weight, config: LlamaConfig) -> Any:
    """As `stored_tree`, for a matrix that is quantized as `config.quantization` says."""
    assert config.quantization is not None
    kind = FORMATS[config.quantization.format]

    def tensor(part: Part) -> StoredTensor:
        axes = tuple("groups" if axis is None else weight.axes[axis] for axis in part.axes)
        name = weight.hf_name + part.suffix
        return StoredTensor(name, axes, part.shape, part.dtype, part.axes[0] == 0)

    num_out, num_in = weight.shape(config)
    parts: Any = kind.parts((num_out, num_in), group_columns(weight, config))
    return type(parts)(*map(tensor, parts))


def stored_tensors(weight: Weight, config: LlamaConfig, layer: int) -> tuple[StoredTensor, ...]:
    """The tensors of a checkpoint that make up a weight of one layer, with their full names."""
    parts = stored_tree(weight, config, layer)
    tensors = (parts,) if isinstance(parts, StoredTensor) else parts
    return tuple(replace(tensor, hf_name=tensor.hf_name.format(layer=layer)) for tensor in tensors)


def is_quantized(weight: Weight, config: LlamaConfig, layer: int) -> bool:
    """Whether a checkpoint with this config stores a weight of a layer quantized."""
    quantization = config.quantization
    if quantization is None or len(weight.axes) != 2 or weight not in LAYER_WEIGHTS:
        return False
    return module_name(weight, layer) not in quantization.plain


def module_name(weight: Weight, layer: int) -> str:
    """The module that a weight belongs to, such as "model.layers.0.mlp.up_proj"."""
    return weight.hf_name.format(layer=layer).removesuffix(".weight")


def group_columns(weight: Weight, config: LlamaConfig) -> int:
    """Input columns of a matrix that share a scale, in formats with groups."""
    assert config.quantization is not None
    columns = weight.shape(config)[1]
    group = config.quantization.group_size
    group = columns if group == -1 else group
    if config.quantization.format in ACT_ORDER.values():
        return group
    # A mesh with up to as many ranks as KV heads splits the columns at the boundaries between KV
    # heads, so no group may straddle one. With more ranks, or if the columns of a head are odd or
    # uneven, a group may straddle a split; `placements` refuses the meshes where it does.
    even = columns % (2 * config.num_kv_heads) == 0
    piece = columns // config.num_kv_heads if even else columns
    return math.gcd(group, piece)


def checkpoint_tensors(config: LlamaConfig) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint with this config, by name, in order."""
    return {
        tensor.hf_name: tensor
        for weight, layer in each_weight(config)
        for tensor in stored_tensors(weight, config, layer)
    }
