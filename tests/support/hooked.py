"""Activations of transformers' Llama by name: the reference for `llama_jax.interpret`.

Names and shapes are those of `activation_shapes`. The values come from PyTorch hooks, and those
inside attention from a function that replaces transformers' eager attention.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from unittest import mock

import numpy as np
import torch
import transformers
from transformers.models.llama import modeling_llama

Change = Callable[[torch.Tensor], torch.Tensor]


def hooked(
    model: transformers.LlamaForCausalLM, tokens: np.ndarray, changes: Mapping[str, Change] = {}
) -> dict[str, torch.Tensor]:
    """Runs tokens [B, T] and returns a dict from name to activation, after its change, if any."""
    found: dict[str, torch.Tensor] = {}

    def tap(name: str, value: torch.Tensor) -> torch.Tensor:
        found[name] = changes[name](value) if name in changes else value
        return found[name]

    def output(name: str) -> Callable:
        return lambda module, arguments, out: tap(name, out)

    def attention(module, query, key, value, mask, scaling, **_):
        place = f"layers.{module.layer_idx}.attention"
        query, key, value = (
            tap(f"{place}.{name}", x.transpose(1, 2)).transpose(1, 2)
            for name, x in (("query", query), ("key", key), ("value", value))
        )
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(later, -torch.inf)
        weights = tap(f"{place}.weights", scores.softmax(-1))
        heads = tap(f"{place}.heads", (weights @ value).transpose(1, 2))
        return heads.contiguous(), weights

    with ExitStack() as stack:
        model.set_attn_implementation("eager")
        stack.enter_context(mock.patch.object(modeling_llama, "eager_attention_forward", attention))

        def hook(module: torch.nn.Module, function: Callable) -> None:
            handle = module.register_forward_hook(function)
            stack.callback(handle.remove)

        def pre_hook(module: torch.nn.Module, function: Callable) -> None:
            handle = module.register_forward_pre_hook(function)
            stack.callback(handle.remove)

        hook(model.model.embed_tokens, output("embedding"))
        for number, layer in enumerate(model.model.layers):
            _hook_layer(layer, f"layers.{number}", tap, hook, pre_hook)
        hook(model.model.norm, output("final_norm.output"))
        hook(model.lm_head, output("logits"))
        model(torch.as_tensor(np.asarray(tokens), dtype=torch.long), use_cache=False)
    return found


def _hook_layer(layer, place: str, tap: Callable, hook: Callable, pre_hook: Callable) -> None:
    entered = []

    def enter(module, arguments):
        entered.append(arguments[0])

    def attended(module, arguments, outputs):
        out = tap(f"{place}.attention.output", outputs[0])
        middle = entered[-1] + out
        changed = tap(f"{place}.middle", middle)
        # The layer adds its input to what is returned here, which makes `changed` again.
        return (out if changed is middle else changed - entered[-1], *outputs[1:])

    pre_hook(layer, enter)
    hook(layer.self_attn, attended)
    pre_hook(layer.mlp.down_proj, lambda _, inputs: tap(f"{place}.mlp.neurons", inputs[0]))
    for module, name in (
        (layer.input_layernorm, "attention_norm.output"),
        (layer.post_attention_layernorm, "mlp_norm.output"),
        (layer.mlp, "mlp.output"),
        (layer, "residual"),
    ):
        hook(module, lambda _, inputs, out, name=name: tap(f"{place}.{name}", out))


def assert_close(ours, theirs, tolerance: float = 1e-4) -> None:
    """Compares to within a fraction of the largest expected value."""
    ours = np.asarray(ours)
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
