"""Writes a `Llama` that a program has trained or changed as a checkpoint."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from convert.commands import open_any
from convert.conversion import LAYOUTS, Options, convert
from convert.source import Source
from llama_jax.checkpoint.reader import CheckpointError, TensorInfo, check_tensors
from llama_jax.model import Llama
from llama_jax.model.llama import weight_of
from llama_jax.weights.table import LAYER_PARAMETERS, LAYER_WEIGHTS, Weight, each_weight


def save_model(
    model: Llama, destination: str | Path, like: str | Path, layout: str = "huggingface"
) -> None:
    """Writes a model as a checkpoint, which `LLM`, the server and transformers can open.

        model = Llama.from_pretrained("demo/checkpoint")
        ...  # train it, or change its weights
        save_model(model, "changed", like="demo/checkpoint")

    A checkpoint holds weights only. What a subclass or a patch computes otherwise is not in it.

    Args:
      model: unquantized; each weight keeps its dtype.
      destination: a new or empty directory.
      like: the checkpoint that the model came from, whose config, tokenizer and other small files
        are copied.
      layout: "huggingface" or "orbax", which only this project reads.

    Raises:
      CheckpointError: `model` is no `Llama`, or `layout` is unknown; the weights are quantized, not
        finite, or not those of the config; a subclass has added parameters; the config is not that
        of `like`; or the destination cannot be written.
      ConfigError, GgufError: `like` cannot be read.
      UserError: a weight is not an `nnx.Param`.
    """
    if not isinstance(model, Llama):
        raise CheckpointError(
            f"save_model needs a Llama on one device, not {type(model).__name__}: load it with "
            "Llama.from_pretrained."
        )
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    original = open_any(Path(like))
    with closing(original.reader) as reader:
        if model.config != reader.config:
            raise CheckpointError(
                f"The model's config is not that of {like}: give the checkpoint that it came from."
            )
        source = Source(_ModelReader(model, Path(like)), original.write_companions)
        convert(source, Path(destination), Options(layout=layout))


class _ModelReader:
    """A `CheckpointReader` of a model in memory."""

    files: tuple[Path, ...] = ()

    def __init__(self, model: Llama, path: Path):
        if model.config.quantization is not None:
            raise CheckpointError(
                "The model's weights are quantized: change and save the unquantized model, and "
                "quantize the result with `python -m convert quantize`."
            )
        self.path = path
        _check_parameters(model)
        self._arrays = {
            weight.hf_name.format(layer=layer): _rows_of(model, weight, layer)
            for weight, layer in each_weight(model.config)
        }
        self.tensors = {
            name: TensorInfo((rows.stop - rows.start, *array.shape[1:]), str(array.dtype))
            for name, (array, rows) in self._arrays.items()
        }
        check_tensors(path, self.tensors, model.config)
        self.config = replace(model.config, dtype=str(model.embedding.dtype))

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        array, held = self._arrays[name]
        rows, *columns = index
        here = slice(held.start + rows.start, held.start + rows.stop)
        out[...] = np.asarray(array[(here, *columns)])

    def close(self) -> None:
        self._arrays.clear()


def _check_parameters(model: Llama) -> None:
    """Checks that a checkpoint has a place for every parameter, so that none is lost unnoticed."""
    known = {
        f"layers.{layer}.{weight.parameter}" if weight in LAYER_WEIGHTS else weight.parameter
        for weight, layer in each_weight(model.config)
    }
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        if name not in known:
            raise CheckpointError(
                f"The model has a parameter {name}, for which a checkpoint has no place: merge it "
                "into the weights of a Llama, and save that."
            )


def _rows_of(model: Llama, weight: Weight, layer: int) -> tuple[jax.Array, slice]:
    """The parameter that holds a weight, and the weight's rows in it."""
    in_layer = weight in LAYER_WEIGHTS
    if in_layer and layer >= len(model.layers):
        raise CheckpointError(f"The model has no layer {layer}, of which its config tells.")
    parameter = weight_of(model.layers[layer] if in_layer else model, weight.parameter)[...]
    held = LAYER_PARAMETERS[weight.parameter] if in_layer else (weight,)
    sizes = [each.shape(model.config)[0] for each in held]
    if parameter.shape[0] != sum(sizes):
        raise CheckpointError(
            f"The model's {weight.parameter} has {parameter.shape[0]} rows instead of the "
            f"{sum(sizes)} of its config: only models in the shapes of their config can be saved."
        )
    first = sum(sizes[: held.index(weight)])
    return parameter, slice(first, first + weight.shape(model.config)[0])
