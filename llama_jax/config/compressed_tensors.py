"""Reads the settings of compressed-tensors, which llm-compressor writes. Imports no JAX.

https://github.com/neuralmagic/compressed-tensors, quant_config.py and quant_args.py in
quantization/.
"""

from typing import Any

from llama_jax.config.json_values import get_object, quoted
from llama_jax.config.llama_config import Quantization
from llama_jax.config.quantization_settings import (
    present,
    unknown_keys,
    unsupported,
)
from llama_jax.config.stored_matrices import (
    FP8_ROWS,
    HEAD,
    PLAIN,
    Parsed,
    StoredMatrices,
    fp8_blocks,
    grouped,
)


def parse_compressed_tensors(given: dict[str, Any]) -> Parsed:
    """Parses a quantization_config; raises ConfigError if it is not supported."""
    what = "compressed-tensors"
    # A pruned model whose zeros are stored like any other weight.
    if get_object(given, "sparsity_config").get("format") == "dense":
        del given["sparsity_config"]
    unknown = unknown_keys(
        given,
        what,
        read="config_groups format",
        harmless="dequantize global_compression_ratio ignore kv_cache_scheme quantization_status "
        "run_compressed version",
        only={"sparsity_config": {}, "transform_config": {}, "moe_sparsity_config": {}},
    )
    layers: list[StoredMatrices] = []
    head = None
    for name, group in get_object(given, "config_groups").items():
        group = present(group, f"config_groups.{name}")
        layout = group.pop("format", given.get("format"))
        keys = unknown_keys(
            group, what, read="weights", harmless="input_activations output_activations targets"
        )
        unknown += [f"config_groups.{name}.{key}" for key in keys]
        weights = get_object(group, "weights")
        if not weights:  # a group of activations only
            continue
        stored, keys = _compressed_weights(layout, weights)
        unknown += [f"config_groups.{name}.weights.{key}" for key in keys]
        targets = group.get("targets")
        if isinstance(targets, list) and targets and all(HEAD in str(t) for t in targets):
            head = stored
        else:
            layers.append(stored)
    if any(other != layers[0] for other in layers):
        raise unsupported(f"with {what} in {len(layers)} config_groups of different formats")
    if not layers:
        return Parsed(StoredMatrices(PLAIN, None), unknown, head)
    return Parsed(layers[0], unknown, head)


def _compressed_weights(layout: Any, weights: dict[str, Any]) -> tuple[StoredMatrices, list[str]]:
    """Parses the `weights` of one of the config_groups; returns the unknown keys, too."""
    what = "compressed-tensors"
    unknown = unknown_keys(
        weights,
        f"{what} weights",
        read="num_bits type strategy symmetric group_size block_structure actorder",
        harmless="observer observer_kwargs scale_dtype zp_dtype",
        only={"dynamic": False},
    )
    stored = _compressed_matrices(
        layout,
        (weights.get("type", "int"), weights.get("num_bits", 8)),
        _strategy(weights),
        weights.get("symmetric", True),
        weights,
    )
    if stored is None:
        details = ", ".join(f"{key} {quoted(value)}" for key, value in sorted(weights.items()))
        raise unsupported(f"with {what} {quoted(layout)}: {details}")
    return stored, unknown


def _compressed_matrices(
    layout: Any, kind: tuple[Any, Any], strategy: Any, symmetric: Any, weights: dict[str, Any]
) -> StoredMatrices | None:
    """The layout of compressed-tensors for a type and number of bits; None if there is none."""
    if not isinstance(symmetric, bool):
        return None
    group_size = weights.get("group_size") if strategy == "group" else -1
    by_row = strategy in ("channel", "tensor")
    # "group" and its alias "dynamic" store the group of each column.
    ordered = "_ordered" if weights.get("actorder") in ("group", "dynamic", True) else ""
    zeros = "" if symmetric else "_asymmetric"
    if layout == "pack-quantized" and strategy in ("channel", "group"):
        if kind == ("int", 8) and strategy == "channel" and symmetric and not ordered:
            return StoredMatrices("packed_rows", Quantization(format="int8"))
        if kind == ("int", 4):
            return StoredMatrices(f"packed4{zeros}{ordered}", grouped("int4", group_size))
        if kind == ("int", 8):
            return StoredMatrices(f"packed8{zeros}{ordered}", grouped("int8_grouped", group_size))
    if ordered:
        return None
    if layout in ("float-quantized", "naive-quantized") and kind == ("float", 8) and symmetric:
        if by_row:
            return FP8_ROWS
        if strategy == "group":
            return StoredMatrices("fp8_blocks", grouped("fp8_grouped", group_size))
        if strategy == "block":
            return fp8_blocks(weights.get("block_structure"))
    if layout in ("int-quantized", "naive-quantized") and kind == ("int", 8):
        if by_row and symmetric:
            return StoredMatrices("int8", Quantization(format="int8"))
        if strategy in ("channel", "group"):
            return StoredMatrices(f"int8_groups{zeros}", grouped("int8_grouped", group_size))
    return None


def _strategy(weights: dict[str, Any]) -> Any:
    """The strategy, which follows from the group size if it is not given."""
    by_default = {None: "tensor", -1: "channel"}
    group_size = weights.get("group_size")
    size = group_size if isinstance(group_size, int) else None
    return weights.get("strategy", by_default.get(size, "group"))
