"""Reads a checkpoint in Hugging Face layout: config.json and one or more safetensors files.

Matrices quantized by another tool are translated as they are read.
"""

import json
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.foreign import (
    OF_ACTIVATIONS,
    Dequantized,
    Translated,
    layout_of,
    translate,
)
from llama_jax.checkpoint.foreign.layout import ContentError
from llama_jax.checkpoint.reader import (
    CheckpointError,
    TensorInfo,
    check_tensors,
    refuse,
    with_stored_dtype,
)
from llama_jax.checkpoint.safetensors_file import SafetensorsFile
from llama_jax.config import LlamaConfig
from llama_jax.config.huggingface import read_checkpoint_config

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LEGACY = "rotary_emb.inv_freq"  # a buffer that old versions saved; it follows from the config
_QUANTIZED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB")
_BLOCK_BYTES = 1 << 26  # compared at a time


class HuggingFaceReader:
    """A `CheckpointReader`.

    It ignores three kinds of extra tensors: rotary frequencies that old versions of transformers
    saved; with tied embeddings, a `lm_head.weight` that equals the embedding table bit for bit; and
    the scales with which a tool quantizes activations or the KV cache. An LM head that a tool
    quantized is dequantized, to float32, as it is read.
    """

    def __init__(self, path: Path):
        """Opens the directory and checks the tensors without reading them.

        Only GPTQ's `g_idx` and `bias` and a stored head that is tied are read.

        Raises:
          ConfigError, CheckpointError: anything is missing or wrong.
        """
        self.path = path
        self.declared = read_checkpoint_config(path)
        config = self.declared.config
        self._files: dict[str, SafetensorsFile] = {}
        for file in _open_files(path):
            for name in file.tensors:
                if not name.endswith(_LEGACY):
                    self._files[name] = file
        if config.tie_embeddings:
            self._drop_tied_head()
        infos = {name: file.tensors[name] for name, file in self._files.items()}
        config, self._translated = self._translate(config, infos)
        self.tensors: dict[str, TensorInfo] = {
            **{name: infos[name] for name in self._files},
            **{name: tensor.info for name, tensor in self._translated.items()},
        }
        check_tensors(path, self.tensors, config)
        stored = {n: i for n, i in self.tensors.items() if n not in self._translated}
        self.config = with_stored_dtype(config, stored)

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a slice, translated if another tool quantized the matrix."""
        if name not in self._translated:
            self._files[name].read_into(name, index, out)
            return
        try:
            self._translated[name].read_into(index, out)
        except ContentError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}.") from None

    def close(self) -> None:
        """Releases the files; one that is mapped is unmapped with its last view."""
        self._files.clear()
        self._translated.clear()

    def _translate(
        self, config: LlamaConfig, infos: dict[str, TensorInfo]
    ) -> tuple[LlamaConfig, dict[str, Translated | Dequantized]]:
        """Translates quantized matrices and drops the stored tensors that they consist of.

        Returns the config that the stored tensors show, and the translated tensors by name.
        """
        quantization = self.declared.quantization
        if quantization is None:
            unannounced = next((name for name in infos if name.endswith(_QUANTIZED)), None)
            if unannounced:
                raise CheckpointError(
                    f"{self.path} holds {unannounced}, so it is quantized, but its config.json has "
                    "no quantization_config: get the matching config.json."
                )
        layout = quantization and layout_of(quantization)
        if layout is None:
            for name in infos:
                if name.endswith(OF_ACTIVATIONS):
                    del self._files[name]
            return config, {}
        config, translated, used = translate(self.path, layout, infos, self._mapped, config)
        for name in used:
            del self._files[name]
        return config, translated

    def _mapped(self, name: str) -> np.ndarray:
        return self._files[name].mapped(name)

    def _drop_tied_head(self) -> None:
        head, table = (self._files.get(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        if head is None or table is None:
            return
        if not _same_bytes(head, "lm_head.weight", table, "model.embed_tokens.weight"):
            raise CheckpointError(
                f"The config.json of {self.path} ties the embeddings, but lm_head.weight differs "
                "from model.embed_tokens.weight: set tie_word_embeddings to false, or delete the "
                "wrong tensor."
            )
        del self._files["lm_head.weight"]


def _same_bytes(one: SafetensorsFile, name: str, other: SafetensorsFile, other_name: str) -> bool:
    if one.tensors[name] != other.tensors[other_name]:
        return False
    a, b = (f.mapped(n).reshape(-1).view(np.uint8) for f, n in ((one, name), (other, other_name)))
    return all(
        np.array_equal(a[at : at + _BLOCK_BYTES], b[at : at + _BLOCK_BYTES])
        for at in range(0, a.size, _BLOCK_BYTES)
    )


def _open_files(path: Path) -> list[SafetensorsFile]:
    """Opens the weight files and checks that they hold the tensors that the index names."""
    if not (path / INDEX).is_file():
        if not (path / SINGLE).is_file():
            raise CheckpointError(_no_weights(path))
        return [SafetensorsFile(path / SINGLE)]
    weight_map = _read_index(path / INDEX)
    names = sorted(set(weight_map.values()))
    if (path / SINGLE).is_file() and SINGLE not in names:
        raise CheckpointError(
            f"{path} holds both {SINGLE} and an index of other files: delete one of the two."
        )
    missing = [name for name in names if not (path / name).is_file()]
    refuse(f"{path / INDEX} names files that do not exist", missing)
    files = [SafetensorsFile(path / name) for name in names]
    stored = {(name, file.path.name) for file in files for name in file.tensors}
    problems = [
        *(f"{name} is not in {file}" for name, file in sorted(weight_map.items() - stored)),
        *(f"{file} also holds {name}" for name, file in sorted(stored - weight_map.items())),
    ]
    refuse(f"{path / INDEX} does not match the files", problems)
    return files


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{file} is not an index: it must be a JSON object whose weight_map names the file of "
            "each tensor."
        ) from None
    outside = sorted(name for name in set(weight_map.values()) if Path(name).name != name)
    refuse(f"{file} names files outside its directory", outside)
    return weight_map


def _no_weights(path: Path) -> str:
    found = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".gguf"))
    if found:
        return (
            f"{path} holds {found[0]}, but neither {SINGLE} nor {INDEX}: convert it to safetensors "
            "first, for example with transformers' save_pretrained."
        )
    return f"{path} holds no weights: there is neither {SINGLE} nor {INDEX}."
