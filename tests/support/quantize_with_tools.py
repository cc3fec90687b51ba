r"""Quantizes a tiny Llama with the tools that people use, and writes tests/data/quantized.

Each tool needs an environment of its own, on a machine with or without a GPU:

    pip install llmcompressor==0.14.0.1
    python tests/support/quantize_with_tools.py llm-compressor tests/data/quantized
    pip install auto-round==0.15.1
    python tests/support/quantize_with_tools.py auto-round tests/data/quantized
    pip install gptqmodel==7.7.0
    GPTQMODEL_DISABLE_PACK_EXT=1 GPTQMODEL_CPU_WORKERS=2 \
        python tests/support/quantize_with_tools.py gptqmodel tests/data/quantized

For each case it writes config.json and model.safetensors as the tool does, and reference.json: the
versions of the tool, and the SHA-256 of each matrix that the tool itself computes with.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes minutes and changes nothing

import tokenizers
import torch
import transformers

KEPT = ("config.json", "model.safetensors")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GROUP = 32
_Case = Callable[[Path, Path], Any]  # (source, destination) -> what `reference` needs


def write_source(path: Path) -> None:
    """Writes a random Llama, and a tokenizer of one word per token."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters=ROPE,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.save_pretrained(path)
    vocabulary = {f"t{token}": token for token in range(config.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t1", eos_token="t2", unk_token="t0", pad_token="t3"
    ).save_pretrained(path)


def token_ids(count: int, length: int) -> torch.Tensor:
    """Random prompts."""
    return torch.randint(4, 32, (count, length), generator=torch.Generator().manual_seed(1))


def llm_compressor() -> dict[str, _Case]:
    """The cases of llm-compressor."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    def case(recipe: Any, calibrated: bool = False) -> _Case:
        def run(source: Path, destination: Path) -> Any:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
            options: dict[str, Any] = {}
            if calibrated:
                ids = token_ids(16, 32).tolist()
                data = {"input_ids": ids, "attention_mask": [[1] * 32] * 16}
                options = {"dataset": Dataset.from_dict(data), "num_calibration_samples": 16}
            oneshot(model=model, recipe=recipe, processor=tokenizer, **options)
            model.save_pretrained(destination)
            dense = transformers.CompressedTensorsConfig(run_compressed=False)
            return transformers.AutoModelForCausalLM.from_pretrained(
                destination, dtype="auto", quantization_config=dense
            )

        return run

    kv_cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    grouped = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32}
    by_module = {"targets": ["Linear"], "weights": grouped | {"symmetric": False}}
    scheme = QuantizationModifier
    head = ["lm_head"]
    return {
        "llm_compressor_fp8_skipping_down_proj": case(
            scheme(targets="Linear", scheme="FP8_DYNAMIC", ignore=[*head, "re:.*down_proj"])
        ),
        "llm_compressor_fp8_block": case(scheme(targets="Linear", scheme="FP8_BLOCK", ignore=head)),
        "llm_compressor_fp8_kv_cache": case(
            scheme(targets="Linear", scheme="FP8", kv_cache_scheme=kv_cache, ignore=head), True
        ),
        "llm_compressor_w8a8": case(
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=head), True
        ),
        "llm_compressor_w8a16_asymmetric": case(
            scheme(config_groups={"group_0": by_module}, ignore=head)
        ),
        "llm_compressor_w4a16_with_head": case(
            scheme(
                config_groups={
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": grouped | {"num_bits": 4, "symmetric": True},
                    }
                },
                ignore=["re:.*self_attn.*"],
            )
        ),
    }


def auto_round() -> dict[str, _Case]:
    """The cases of AutoRound."""
    from auto_round import AutoRound

    def case(**options: Any) -> _Case:
        def run(source: Path, destination: Path) -> Any:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
            AutoRound(
                model,
                tokenizer,
                iters=0,
                nsamples=8,
                seqlen=32,
                dataset=[ids[None] for ids in token_ids(8, 32)],
                device_map="cpu",
                enable_torch_compile=False,
                group_size=GROUP,
                **options,
            ).quantize_and_save(str(destination), format="auto_round")
            for folder in [path for path in destination.iterdir() if path.is_dir()]:
                shutil.copytree(folder, destination, dirs_exist_ok=True)
                shutil.rmtree(folder)
            return transformers.AutoModelForCausalLM.from_pretrained(destination, device_map="cpu")

        return run

    plain = {"model.layers.0.mlp.down_proj": {"bits": 16}}
    return {
        "auto_round_w4a16_skipping_a_module": case(scheme="W4A16", layer_config=plain),
        "auto_round_w8a16": case(scheme="W8A16"),
    }


def gptqmodel() -> dict[str, _Case]:
    """The cases of GPTQModel."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import FORMAT, AWQConfig, GPTQConfig

    def case(config: Any) -> _Case:
        def run(source: Path, destination: Path) -> Any:
            texts = [" ".join(f"t{token}" for token in ids) for ids in token_ids(32, 64).tolist()]
            model = GPTQModel.load(str(source), config, device="cpu")
            model.quantize(texts, batch_size=1)
            model.save(str(destination))
            backend = BACKEND.TORCH_AWQ if isinstance(config, AWQConfig) else BACKEND.TORCH
            # The scales are float16; another dtype would round them.
            return GPTQModel.load(
                str(destination), device="cpu", backend=backend, dtype=torch.float16
            ).model

        return run

    without_down = {r"-:.*\.down_proj": {}}
    return {
        "gptqmodel_4bit_with_8bit_head": case(
            GPTQConfig(bits=4, group_size=GROUP, desc_act=False, lm_head=True, dynamic=without_down)
        ),
        "gptqmodel_8bit_v2": case(
            GPTQConfig(bits=8, group_size=GROUP, desc_act=False, format=FORMAT.GPTQ_V2)
        ),
        "gptqmodel_4bit_act_order": case(
            GPTQConfig(bits=4, group_size=GROUP, desc_act=True, act_group_aware=False)
        ),
        "gptqmodel_awq": case(AWQConfig(bits=4, group_size=GROUP)),
    }


TOOLS = {
    "llm-compressor": (llm_compressor, ("llmcompressor", "compressed-tensors", "transformers")),
    "auto-round": (auto_round, ("auto-round", "transformers")),
    "gptqmodel": (gptqmodel, ("gptqmodel", "transformers")),
}


def reference(model: Any) -> dict[str, dict[str, str]]:
    """The dtype and the SHA-256 of each matrix: the product of its module with the identity."""
    found = {}
    for name, module in model.named_modules():
        if not name.endswith(("_proj", "lm_head")):
            continue
        if isinstance(module, torch.nn.Linear):
            matrix = module.weight.detach()
        elif hasattr(module, "dequantize_weight"):
            matrix = module.dequantize_weight().T
        else:
            columns = getattr(module, "in_features", None) or module.infeatures
            with torch.no_grad():
                matrix = module(torch.eye(columns, dtype=torch.float16)).T
        matrix = matrix.float().add(0).to(matrix.dtype)  # a product has no negative zeros
        data = matrix.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        dtype = str(matrix.dtype).removeprefix("torch.")
        found[name] = {"dtype": dtype, "sha256": hashlib.sha256(data).hexdigest()}
    return found


def main(tool: str, destination: Path, *only: str) -> None:
    """Runs the cases of a tool."""
    cases, packages = TOOLS[tool]
    versions = {package: importlib.metadata.version(package) for package in packages}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        write_source(source)
        for name, run in cases().items():
            if only and name not in only:
                continue
            written = Path(folder) / name
            matrices = reference(run(source, written))
            (destination / name).mkdir(parents=True, exist_ok=True)
            for file in KEPT:
                shutil.copyfile(written / file, destination / name / file)
            content = {"versions": versions, "matrices": matrices}
            text = json.dumps(content, indent=1) + "\n"
            (destination / name / "reference.json").write_text(text, encoding="utf-8")
            print(f"Wrote {name}.", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
