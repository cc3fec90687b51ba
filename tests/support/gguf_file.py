"""Small GGUF files, written with the writer of the `gguf` package."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from tokenizers import Regex, Tokenizer, pre_tokenizers

from demo.tokenizer import PRE_TOKENIZER, train_tokenizer
from llama_jax.config import LlamaConfig
from tests.support.tiny_checkpoint import SIZES
from tests.support.tiny_tokenizer import TEXT

# Rows of a multiple of 256 elements, as the K types need.
WIDE = SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
# Where the float16 scales of a block lie; random bits there could be NaN.
_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def tiny_model(**config: Any) -> transformers.LlamaForCausalLM:
    """A random model in float32."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | config))).eval()


def stored(values: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """A matrix in a type of GGUF; the K types, which `gguf` cannot quantize to, get random bits."""
    number = GGMLQuantizationType[kind]
    if kind not in _SCALES:
        return gguf.quants.quantize(values, number)
    block, size = GGML_QUANT_SIZES[number]
    random = np.random.default_rng(seed)
    blocks = random.integers(
        0, 256, (*values.shape[:-1], values.shape[-1] // block, size), np.uint8
    )
    for at in _SCALES[kind]:
        scale = random.uniform(1e-4, 1e-3, blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows in llama.cpp (`LlamaModel.permute` in its convert_hf_to_gguf.py)."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def write_gguf(
    path: Path,
    model: transformers.LlamaForCausalLM,
    kind: str = "F32",
    *,
    tokenizer: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    architecture: str = "llama",
    split: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model as llama.cpp's converter does.

    Args:
      path: of the file, or of the first of several.
      model: whose weights and config are written.
      kind: the type of the matrices; vectors are F32.
      tokenizer: its metadata (`gpt2_metadata`).
      metadata: more keys; None for a value removes the key.
      architecture: prefix of the architecture's keys.
      split: the largest number of tensors in a file; 0 for one file.
      changes: tensors to add or replace, by name: an array in F32, or (bytes, type); None leaves
        a tensor out.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    for key, value in (_metadata(model.config) | (metadata or {}) | (tokenizer or {})).items():
        if value is not None:
            _add(writer, key.format(arch=architecture), value)
    tensors = {name: (values, number) for name, values, number in _tensors(model, kind)}
    for name, tensor in (tensors | dict(changes or {})).items():
        if tensor is not None:
            values, number = tensor if isinstance(tensor, tuple) else (tensor, "F32")
            writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType[number])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rope_factors(config: LlamaConfig) -> np.ndarray:
    """The factors that llama.cpp stores for a scaling of type "llama3", in float32.

    Follows `generate_extra_tensors` in its convert_hf_to_gguf.py.
    """
    scaling = config.rope_scaling
    frequencies = 1.0 / (
        config.rope_theta
        ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    )
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    factors = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        if wavelength < context / high:
            factors.append(1)
        elif wavelength > context / low:
            factors.append(scaling.factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def tiny_backend() -> Tokenizer:
    """A small tokenizer that cuts text into words as Llama 3 does."""
    return Tokenizer.from_str(_trained())


@functools.cache
def _trained() -> str:
    tokenizer = train_tokenizer(TEXT * 3, vocabulary=300)
    words = PRE_TOKENIZER.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.model.ignore_merges = True
    return tokenizer.to_str()


def gpt2_metadata(
    backend: Tokenizer, pre: str, *, bos: str | None = None, eos: str | None = None, **more: Any
) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer of the `tokenizers` library."""
    content = json.loads(backend.to_str())
    vocabulary = {
        index: token for token, index in backend.get_vocab(with_added_tokens=True).items()
    }
    tokens = [vocabulary[index] for index in range(len(vocabulary))]
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    normal, control, user = (
        gguf.TokenType.NORMAL,
        gguf.TokenType.CONTROL,
        gguf.TokenType.USER_DEFINED,
    )
    types = [
        int(control if added[i] else user) if i in added else int(normal)
        for i in range(len(tokens))
    ]
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.{key}": value for key, value in more.items()},
    }
    for name, token in (("bos", bos), ("eos", eos)):
        if token is not None:
            metadata[f"tokenizer.ggml.{name}_token_id"] = tokens.index(token)
    return metadata


def _metadata(config: transformers.LlamaConfig) -> dict[str, Any]:
    return {
        "{arch}.block_count": config.num_hidden_layers,
        "{arch}.context_length": config.max_position_embeddings,
        "{arch}.embedding_length": config.hidden_size,
        "{arch}.feed_forward_length": config.intermediate_size,
        "{arch}.attention.head_count": config.num_attention_heads,
        "{arch}.attention.head_count_kv": config.num_key_value_heads,
        "{arch}.attention.key_length": config.head_dim,
        "{arch}.attention.value_length": config.head_dim,
        "{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "{arch}.rope.dimension_count": config.head_dim,
        "{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "{arch}.vocab_size": config.vocab_size,
        "general.file_type": 0,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def _tensors(model: transformers.LlamaForCausalLM, kind: str) -> Any:
    """(name, values, type) of every tensor, in llama.cpp's names and row order."""
    config = model.config
    layers = range(config.num_hidden_layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(layers))
    for hf_name, tensor in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if hf_name.endswith("q_proj.weight"):
            values = permuted(values, config.num_attention_heads)
        if hf_name.endswith("k_proj.weight"):
            values = permuted(values, config.num_key_value_heads)
        name = names.get_name(hf_name, try_suffixes=(".weight",))
        if values.ndim == 1:
            yield name, values, "F32"
        else:
            yield name, stored(values, kind, seed=sum(map(ord, name))), kind
