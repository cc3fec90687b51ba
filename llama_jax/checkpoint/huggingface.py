"""Reads a checkpoint in Hugging Face layout: config.json and one or more safetensors files.

Matrices quantized by another tool are translated as they are read.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.foreign import (
    OF_ACTIVATIONS,
    Dequantized,
    Described,
    Translated,
    layout_of,
    translate,
)
from llama_jax.checkpoint.foreign.layout import OF_KV_CACHE, ContentError
from llama_jax.checkpoint.huggingface_files import StoredTensor, open_files
from llama_jax.checkpoint.reader import (
    CheckpointError,
    TensorInfo,
    check_tensors,
    refuse,
    with_stored_dtype,
)
from llama_jax.config import LlamaConfig
from llama_jax.config.huggingface import read_checkpoint_config
from llama_jax.config.llama_config import DTYPES
from llama_jax.weights.table import EMBEDDING, LM_HEAD

_ROTARY = "rotary_emb."  # buffers of old versions of transformers; they follow from the config
_BIAS = ".bias"
_QUANTIZED = (
    ".qweight",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".absmax",
    ".SCB",
    "._data",
)
_BLOCK_BYTES = 1 << 26  # compared at a time


class HuggingFaceReader:
    """A `CheckpointReader`.

    It ignores tensors that do not change the model: rotary frequencies, biases that are zero,
    scales of activations or the KV cache, and, with tied embeddings, an `lm_head.weight` that
    equals the embedding table bit for bit. If a tied model stores only `lm_head.weight`, as
    `save_model` of safetensors does, that is the table. An LM head that a tool quantized is
    dequantized to float32 as it is read.
    """

    def __init__(self, path: Path):
        """Opens the directory and checks the tensors without reading them.

        Only biases, GPTQ's `g_idx`, and a stored head that is tied are read.

        Raises:
          ConfigError, CheckpointError: anything is missing or wrong.
        """
        self.path = path
        self.declared = read_checkpoint_config(path)
        config = self.declared.config

        def optional(name: str) -> bool:
            return _ROTARY in name or (config.tie_embeddings and name == LM_HEAD.hf_name)

        files, found = open_files(path, optional)
        self.files = tuple(file.path for file in files)
        self._stored = {name: tensor for name, tensor in found.items() if _ROTARY not in name}
        self._kv_cache_scales = {
            name: tensor for name, tensor in self._stored.items() if name.endswith(OF_KV_CACHE)
        }
        self._drop_zero_biases()
        if config.tie_embeddings:
            self._resolve_tied_head()
        infos = {name: tensor.info for name, tensor in self._stored.items()}
        config, self._translated = self._translate(config, infos)
        self.tensors: dict[str, TensorInfo] = {
            **{name: infos[name] for name in self._stored},
            **{name: tensor.info for name, tensor in self._translated.items()},
        }
        check_tensors(path, self.tensors, config)
        stored = {n: i for n, i in self.tensors.items() if n not in self._translated}
        self.config = with_stored_dtype(config, stored)

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a slice, translated if another tool quantized the matrix."""
        if name not in self._translated:
            self._stored[name].read_into(index, out)
            return
        try:
            self._translated[name].read_into(index, out)
        except ContentError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}.") from None

    def kv_cache_scales(self) -> dict[str, list[float]]:
        """Reads the scales with which a tool would quantize the KV cache, by tensor name.

        Raises:
          CheckpointError: one is not finite, or of a dtype that cannot be read.
        """
        scales = {}
        for name, tensor in self._kv_cache_scales.items():
            if not tensor.is_readable:
                raise CheckpointError(
                    f"{self.path}: {name} is stored as {tensor.info.dtype}, which is no dtype of a "
                    "scale of the KV cache: delete it, or store it as float32."
                )
            values = tensor.mapped().astype(np.float32)
            if not np.isfinite(values).all():
                raise CheckpointError(
                    f"{self.path}: {name} contains NaN or infinity: the checkpoint is damaged, "
                    "download it again."
                )
            scales[name] = values.ravel().tolist()
        return scales

    def close(self) -> None:
        """Releases the files; one that is mapped is unmapped with its last view."""
        self._stored.clear()
        self._kv_cache_scales.clear()
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
                    "no quantization_config: get the matching config.json, or the original model."
                )
        layout = quantization and layout_of(quantization.layers)
        if quantization is None or layout is None:
            for name in infos:
                if name.endswith(OF_ACTIVATIONS):
                    del self._stored[name]
            return config, {}
        layers = head = Described(layout, config)
        if quantization.head is not None and (head_layout := layout_of(quantization.head)):
            head_config = replace(config, quantization=quantization.head.quantization)
            head = Described(head_layout, head_config)
        config, translated, used = translate(self.path, infos, self._mapped, layers, head)
        for name in used:
            del self._stored[name]
        return config, translated

    def _mapped(self, name: str) -> np.ndarray:
        return self._stored[name].mapped()

    def _drop_zero_biases(self) -> None:
        """Refuses other biases: Llama 3 has none, but some tools write zeros for them."""
        biases = [name for name in self._stored if name.endswith(_BIAS)]
        wrong = [name for name in biases if not _is_zero(self._stored[name])]
        refuse(f"{self.path} has biases that are not zero, which Llama 3 does not have", wrong)
        for name in biases:
            del self._stored[name]

    def _resolve_tied_head(self) -> None:
        head, table = (self._stored.get(weight.hf_name) for weight in (LM_HEAD, EMBEDDING))
        if head is None:
            return
        if table is None:
            self._stored[EMBEDDING.hf_name] = head
        elif not _same_bytes(head, table):
            raise CheckpointError(
                f"The config.json of {self.path} ties the embeddings, but lm_head.weight differs "
                "from model.embed_tokens.weight: set tie_word_embeddings to false, or delete the "
                "wrong tensor."
            )
        del self._stored[LM_HEAD.hf_name]


def _is_zero(tensor: StoredTensor) -> bool:
    return tensor.info.dtype in DTYPES and not np.count_nonzero(tensor.mapped())


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    if one.info != other.info or one.info.dtype not in DTYPES:
        return False
    a, b = (tensor.mapped().reshape(-1).view(np.uint8) for tensor in (one, other))
    return all(
        np.array_equal(a[at : at + _BLOCK_BYTES], b[at : at + _BLOCK_BYTES])
        for at in range(0, a.size, _BLOCK_BYTES)
    )
