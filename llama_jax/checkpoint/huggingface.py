"""Reads a checkpoint in Hugging Face layout: config.json beside one or more safetensors files.

Where it is quantised by another tool, its matrices are translated as they are read.
"""

import json
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.foreign import LAYOUTS, Translated, translate
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
_QUANTISED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB")
_COMPARED_AT_ONCE = 1 << 26  # bytes


class HuggingFaceReader:
    """A `CheckpointReader` over mapped files.

    Two kinds of tensor may be there beside those of the model: rotary frequencies that old versions
    of transformers saved, which the config determines, and in a checkpoint with tied embeddings a
    `lm_head.weight` that is byte for byte the embedding table.
    """

    def __init__(self, path: Path):
        """Opens the directory; tensors are checked, not read, but for GPTQ's `g_idx` and `bias`.

        Raises:
          ConfigError, CheckpointError: if anything in it is missing or wrong.
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
        self._translated = self._translate(config, infos)
        self.tensors: dict[str, TensorInfo] = {
            **{name: infos[name] for name in self._files},
            **{name: tensor.info for name, tensor in self._translated.items()},
        }
        check_tensors(path, self.tensors, config)
        self.config = with_stored_dtype(config, self.tensors)

    def view(self, name: str) -> np.ndarray:
        """The whole tensor, a read-only view of the mapped file: nothing is read before use.

        Raises:
          KeyError: it is not stored as it is, but translated from another tool's layout.
        """
        return self._files[name].array(name)

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """See `CheckpointReader.read_into`."""
        if name not in self._translated:
            self._files[name].read_into(name, index, out)
            return
        try:
            self._translated[name].read_into(index, out)
        except ContentError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}.") from None

    def map(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray | None:
        """See `CheckpointReader.map`; other tools may write to such files in place."""
        return None

    def close(self) -> None:
        """See `CheckpointReader.close`; a file is unmapped when its last view is gone."""
        self._files.clear()
        self._translated.clear()

    def _translate(
        self, config: LlamaConfig, infos: dict[str, TensorInfo]
    ) -> dict[str, Translated]:
        """The parts of matrices that another tool has quantised; drops what they come from."""
        quantization = self.declared.quantization
        if quantization is None:
            unannounced = next((name for name in infos if name.endswith(_QUANTISED)), None)
            if unannounced:
                raise CheckpointError(
                    f"{self.path} holds {unannounced}, so it is quantised, but its config.json has "
                    "no quantization_config: get the config.json that belongs to it."
                )
        if quantization is None or quantization.layout not in LAYOUTS:
            return {}
        layout = LAYOUTS[quantization.layout]
        translated, used = translate(self.path, layout, infos, self.view, config)
        for name in used:
            del self._files[name]
        return translated

    def _drop_tied_head(self) -> None:
        head, table = (self._files.get(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
        if head is None or table is None:
            return
        if not _same_bytes(head, "lm_head.weight", table, "model.embed_tokens.weight"):
            raise CheckpointError(
                f"{self.path} says in config.json that the embeddings are tied, but its "
                "lm_head.weight differs from model.embed_tokens.weight: set tie_word_embeddings to "
                "false, or delete the tensor that is wrong."
            )
        del self._files["lm_head.weight"]


def _same_bytes(one: SafetensorsFile, name: str, other: SafetensorsFile, other_name: str) -> bool:
    if one.tensors[name] != other.tensors[other_name]:
        return False
    a, b = (f.array(n).reshape(-1).view(np.uint8) for f, n in ((one, name), (other, other_name)))
    return all(
        np.array_equal(a[at : at + _COMPARED_AT_ONCE], b[at : at + _COMPARED_AT_ONCE])
        for at in range(0, a.size, _COMPARED_AT_ONCE)
    )


def _open_files(path: Path) -> list[SafetensorsFile]:
    """The files with the weights, no tensor in two of them, and each where the index says."""
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
    refuse(f"{path / INDEX} names files that are not there", missing)
    files = [SafetensorsFile(path / name) for name in names]
    held = {(name, file.path.name) for file in files for name in file.tensors}
    problems = [
        *(f"{name} is not in {file}" for name, file in sorted(weight_map.items() - held)),
        *(f"{file} also holds {name}" for name, file in sorted(held - weight_map.items())),
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
            f"{file} is not an index: a JSON object whose weight_map gives each tensor's file."
        ) from None
    outside = sorted(name for name in set(weight_map.values()) if Path(name).name != name)
    refuse(f"{file} names files outside its directory", outside)
    return weight_map


def _no_weights(path: Path) -> str:
    found = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".gguf"))
    if found:
        return (
            f"{path} holds {found[0]} but no {SINGLE} or {INDEX}: convert it to safetensors first, "
            "for example with transformers' save_pretrained."
        )
    return f"{path} holds no weights: neither {SINGLE} nor {INDEX} is there."
