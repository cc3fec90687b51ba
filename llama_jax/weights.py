"""Every weight of the model, declared once; everything else derives from this table.

A row gives the weight's name here, its name in a Hugging Face checkpoint, its logical axes and how
it is initialised. Shapes follow from the axes and the configuration (`axis_sizes`), partition specs
from the axes and `sharding.partition`, and no weight is transformed on the way in: matrices stay
`[out, in]`, as Hugging Face stores them, which XLA:CPU also multiplies fastest.
"""

from dataclasses import dataclass
from typing import Literal

from llama_jax.config import LlamaConfig


@dataclass(frozen=True)
class Weight:
    """One row of the table. `{layer}` in `hf_name` stands for the layer's number."""

    name: str
    hf_name: str
    axes: tuple[str, ...]
    init: Literal["ones", "normal"]

    def shape(self, config: LlamaConfig) -> tuple[int, ...]:
        """The weight's full shape, before any padding or sharding."""
        sizes = axis_sizes(config)
        return tuple(sizes[axis] for axis in self.axes)


def _in_layer(
    name: str, hf_name: str, axes: tuple[str, ...], init: Literal["ones", "normal"] = "normal"
) -> Weight:
    return Weight(name, f"model.layers.{{layer}}.{hf_name}.weight", axes, init)


LAYER_WEIGHTS = (
    _in_layer("attention_norm.scale", "input_layernorm", ("embed",), "ones"),
    _in_layer("attention.wq", "self_attn.q_proj", ("heads", "embed")),
    _in_layer("attention.wk", "self_attn.k_proj", ("kv_heads", "embed")),
    _in_layer("attention.wv", "self_attn.v_proj", ("kv_heads", "embed")),
    _in_layer("attention.wo", "self_attn.o_proj", ("embed", "heads")),
    _in_layer("mlp_norm.scale", "post_attention_layernorm", ("embed",), "ones"),
    _in_layer("mlp.w_gate", "mlp.gate_proj", ("mlp", "embed")),
    _in_layer("mlp.w_up", "mlp.up_proj", ("mlp", "embed")),
    _in_layer("mlp.w_down", "mlp.down_proj", ("embed", "mlp")),
)
EMBEDDING = Weight("embedding", "model.embed_tokens.weight", ("vocab", "embed"), "normal")
FINAL_NORM = Weight("final_norm.scale", "model.norm.weight", ("embed",), "ones")
LM_HEAD = Weight("lm_head", "lm_head.weight", ("vocab", "embed"), "normal")

INIT_STD = 0.02  # of weights that start "normal", as in the Hugging Face configs


def axis_sizes(config: LlamaConfig) -> dict[str, int]:
    """The length of each logical axis that the table names."""
    return {
        "embed": config.embed_dim,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "mlp": config.mlp_dim,
        "vocab": config.vocab_size,
    }


def outer_weights(config: LlamaConfig) -> tuple[Weight, ...]:
    """The weights that belong to no layer. Tied embeddings serve as the head, too."""
    head = () if config.tie_embeddings else (LM_HEAD,)
    return (EMBEDDING, FINAL_NORM, *head)


def checkpoint_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name → shape of every tensor that a checkpoint of this config holds."""
    shapes = {weight.hf_name: weight.shape(config) for weight in outer_weights(config)}
    for layer in range(config.num_layers):
        for weight in LAYER_WEIGHTS:
            shapes[weight.hf_name.format(layer=layer)] = weight.shape(config)
    return shapes
