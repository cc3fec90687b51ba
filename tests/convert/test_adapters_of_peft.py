"""Adapters that PEFT wrote, merged: their logits are those of PEFT's own model."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from convert.__main__ import DONE, main
from llama_jax import Llama
from tests.support.tiny_checkpoint import SIZES, write_checkpoint

pytestmark = pytest.mark.slow

TOKENS = np.arange(2, 34)[None] * 7 % 96
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The options of PEFT's LoraConfig, and the size of the vocabulary if it is not that of the model.
CASES = {
    "all matrices": ({"target_modules": "all-linear", "r": 8, "lora_alpha": 4}, None),
    "rank-stabilized": ({"target_modules": LAYERS, "use_rslora": True, "r": 8}, None),
    "patterns": (
        {
            "target_modules": LAYERS,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"^model.layers.2.self_attn.q_proj": 5, ".*v_proj": 3},
        },
        None,
    ),
    "some layers": ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, None),
    "DoRA": ({"target_modules": LAYERS, "use_dora": True}, None),
    "the embedding": ({"target_modules": ["v_proj", "embed_tokens"]}, None),
    "the head": ({"target_modules": ["v_proj", "lm_head"]}, None),
    "both": ({"target_modules": ["embed_tokens", "lm_head"]}, None),
    "both, tied": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, None),
    "whole weights": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
        None,
    ),
    "new tokens": ({"target_modules": ["q_proj"]}, 104),
    "new tokens, trained": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        104,
    ),
    "new tokens, changed": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, 104),
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    write_checkpoint(path, tie_word_embeddings=request.param)
    return path


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(base, tmp_path, case):
    import peft  # here, since it takes 3 s, and the quick tests import this file, too

    options, vocabulary = CASES[case]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:  # as if it had been trained
            parameter.data += 0.05 * torch.randn_like(parameter)
        if "magnitude" in name:
            parameter.data *= 1 + torch.rand_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    # As users load it, with what the file holds.
    again = transformers.AutoModelForCausalLM.from_pretrained(base)
    if vocabulary:
        again.resize_token_embeddings(vocabulary, mean_resizing=False)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted, theirs = (m(torch.tensor(TOKENS)).logits.numpy() for m in (model, again))
    np.testing.assert_allclose(theirs, wanted, rtol=1e-4, atol=1e-4)
    call = ["hf", str(base), str(tmp_path / "new"), "--adapter", str(tmp_path / "adapter")]
    assert main(call) == DONE
    ours = Llama.from_pretrained(tmp_path / "new")(jnp.array(TOKENS))
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)
    unchanged = Llama.from_pretrained(base)(jnp.array(TOKENS))
    assert wanted.shape[-1] != SIZES["vocab_size"] or np.abs(unchanged - wanted).max() > 1e-3
