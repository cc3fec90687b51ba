"""A checkpoint with a LoRA adapter merged into its weights, as they are read."""

from dataclasses import replace

import numpy as np

from llama_jax.checkpoint.lora import Adapter
from llama_jax.checkpoint.reader import CheckpointError, CheckpointReader, TensorInfo, refuse
from llama_jax.config import LlamaConfig
from llama_jax.weights.table import EMBEDDING, LM_HEAD, checkpoint_tensors

_BLOCK = 1 << 18  # values that are changed at a time; fits in a core's cache


class MergedReader:
    """A `CheckpointReader`.

    Sums are computed in float32 and rounded once, to the dtype in which they are read. An adapter
    may change the size of the vocabulary. If it changes the embedding and the head of a tied model
    differently, the two are no longer tied.
    """

    def __init__(self, base: CheckpointReader, adapter: Adapter):
        """Checks that the adapter fits the model.

        Raises:
          CheckpointError: it does not, or the model is quantized.
        """
        if base.config.quantization is not None:
            raise CheckpointError(
                f"{base.path} is quantized, and an adapter can be merged into plain weights only: "
                "give the original model, and quantize it in the same command with --quantize."
            )
        self._base, self._adapter = base, adapter
        self.path = base.path
        self.files = (*base.files, adapter.weight_file)
        self.config = _merged_config(base.config, adapter)
        untied = base.config.tie_embeddings and not self.config.tie_embeddings
        self._stored_as = {LM_HEAD.hf_name: EMBEDDING.hf_name} if untied else {}
        self.tensors = {
            name: TensorInfo(tensor.shape, base.tensors[self._stored_as.get(name, name)].dtype)
            for name, tensor in checkpoint_tensors(self.config).items()
        }
        refuse(f"The adapter {adapter.path} does not fit {base.path}", self._problems())

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a slice of the merged weight."""
        change = self._adapter.changes.get(name)
        if change is None:
            self._read_unchanged(name, index, out)
            return
        rows, columns = index
        width = self.tensors[name].shape[1]
        step = max(1, _BLOCK // width)
        for first in range(rows.start, rows.stop, step):
            block = slice(first, min(first + step, rows.stop))
            matrix = np.empty((block.stop - block.start, width), np.float32)
            self._read_unchanged(name, (block, slice(0, width)), matrix)
            change.apply(matrix, block)
            out[first - rows.start : block.stop - rows.start] = matrix[:, columns]

    def close(self) -> None:
        """Releases the files of the model; those of the adapter go with their last view."""
        self._base.close()

    def _read_unchanged(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        replaced = self._adapter.replaced.get(name)
        if replaced is None:
            self._base.read_into(self._stored_as.get(name, name), index, out)
        else:
            out[...] = replaced[index]

    def _problems(self) -> list[str]:
        """One for each tensor of the merged model that has no content of its shape."""
        changes, replaced = self._adapter.changes, self._adapter.replaced
        # A tied head that changes as the embedding does needs no tensor of its own.
        tied = {LM_HEAD.hf_name} if self.config.tie_embeddings else set()
        problems = [
            f"it changes {name}, which is not a weight of the model"
            for name in sorted({*changes, *replaced} - {*self.tensors, *tied})
        ]
        for name, info in self.tensors.items():
            stored = self._base.tensors[self._stored_as.get(name, name)].shape
            have = replaced[name].shape if name in replaced else stored
            if have != info.shape:
                problems.append(f"{name} has shape {list(have)} instead of {list(info.shape)}")
            elif name in changes and (shape := changes[name].shape) != info.shape:
                problems.append(
                    f"the change of {name} has shape {list(shape)} instead of {list(info.shape)}"
                )
        return problems


def _merged_config(config: LlamaConfig, adapter: Adapter) -> LlamaConfig:
    table = adapter.replaced.get(EMBEDDING.hf_name)
    if table is not None and table.shape[:1] > (0,):
        config = replace(config, vocab_size=len(table))
    if config.tie_embeddings and not _same_change(adapter, EMBEDDING.hf_name, LM_HEAD.hf_name):
        config = replace(config, tie_embeddings=False)
    return config


def _same_change(adapter: Adapter, one: str, other: str) -> bool:
    """Whether an adapter makes equal weights of two equal weights."""
    if any((one in found) != (other in found) for found in (adapter.changes, adapter.replaced)):
        return False
    if one in adapter.replaced and not np.array_equal(
        adapter.replaced[one], adapter.replaced[other]
    ):
        return False
    if one not in adapter.changes:
        return True
    a, b = adapter.changes[one], adapter.changes[other]
    return a.scale == b.scale and np.array_equal(a.up, b.up) and np.array_equal(a.down, b.down)
