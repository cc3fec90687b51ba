"""Reads how the weights of a Hugging Face checkpoint are quantized.

Lists of modules that a tool did not quantize are not read: the stored tensors show it
(`checkpoint.foreign`). Neither are settings for activations and for the KV cache: this package
quantizes neither, and the weights do not depend on them. Layouts that this package cannot compute
are refused by name.

Descriptions of the formats:
  compressed-tensors: https://github.com/neuralmagic/compressed-tensors, quant_config.py and
    quant_args.py in quantization/.
  fbgemm_fp8: https://huggingface.co/docs/transformers/quantization/fbgemm_fp8.
  fp8: https://github.com/neuralmagic/AutoFP8, the predecessor of compressed-tensors; in blocks:
    https://huggingface.co/docs/transformers/quantization/finegrained_fp8.
  modelopt: https://nvidia.github.io/Model-Optimizer/deployment/3_unified_hf.html.
  gptq: https://github.com/ModelCloud/GPTQModel, quantization/config.py.
  awq: https://github.com/casper-hansen/AutoAWQ, models/_config.py.
  auto-round: https://github.com/intel/auto-round, export/export_to_autoround/export.py.

Imports no JAX.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.config.errors import ConfigError
from llama_jax.config.llama_config import QUANT_METHOD, Quantization
from llama_jax.config.quantization_settings import (
    CALIBRATION,
    DEFAULT_LAYOUT,
    get_object,
    is_size,
    present,
    quoted,
    unknown_keys,
    unsupported,
)

MODELOPT_FILE = "hf_quant_config.json"  # written by modelopt, often instead of config.json's entry
PLAIN = "plain"  # no weight is quantized, but something else is, such as the KV cache


class StoredQuantization(NamedTuple):
    """How the matrices of a checkpoint are stored.

    Attributes:
      method: the tool that quantized them (`quant_method`); `QUANT_METHOD` for this package.
      layout: a name from `checkpoint.foreign.LAYOUTS`, `QUANT_METHOD`, or `PLAIN`.
      quantization: the format of the layers' matrices once they are loaded, as far as the settings
        say. A reader also knows which matrices are not quantized, and whether GPTQ's columns are in
        act-order. None for `PLAIN`.
      block_rows: output channels that share their scales.
      unknown: keys that this package does not know, as paths.
    """

    method: str
    layout: str
    quantization: Quantization | None
    block_rows: int = 1
    unknown: tuple[str, ...] = ()


class _Parsed(NamedTuple):
    """As `StoredQuantization`, without the method."""

    layout: str
    quantization: Quantization | None
    unknown: list[str]
    block_rows: int = 1


def parse_quantization(config: dict[str, Any]) -> StoredQuantization | None:
    """Parses the quantization entry of a config.json; None if there is none.

    Raises:
      ConfigError: the quantization is not supported.
    """
    for name in ("quantization_config", "compression_config"):
        given = config.get(name)
        if given is not None:
            break
    else:
        return None
    given = present(given, name)
    method = str(given.pop("quant_method", "an unnamed method"))
    if method not in _METHODS:
        raise unsupported(f"with {quoted(_DESCRIPTIONS.get(method, method))}")
    parsed = _METHODS[method](given)
    unknown = tuple(f"{name}.{key}" for key in parsed.unknown)
    return StoredQuantization(
        method, parsed.layout, parsed.quantization, parsed.block_rows, unknown
    )


def modelopt_quantization(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """Turns the contents of modelopt's hf_quant_config.json into a quantization_config.

    Raises:
      ConfigError: they have no object named quantization.
    """
    quantization = content.get("quantization")
    if not isinstance(quantization, dict):
        raise ConfigError(f"{file} must have an object named quantization.")
    return {"quant_method": "modelopt", **quantization}


def _own(given: dict[str, Any]) -> _Parsed:
    if not {"format"} <= given.keys() <= {"format", "group_size", "plain"}:
        raise ConfigError(
            f"The quantization_config of {QUANT_METHOD} must have format and may have group_size "
            f"and plain, got {quoted(', '.join(sorted(given)) or 'nothing')}."
        )
    if not isinstance(given.get("plain", []), list):
        raise ConfigError(f"plain must be a list of modules, got {quoted(given['plain'])}.")
    given = given | {"plain": tuple(given.get("plain", ()))}
    return _Parsed(QUANT_METHOD, Quantization(**given), [])


def _compressed_tensors(given: dict[str, Any]) -> _Parsed:
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
    parsed = []
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
        parsed.append(_compressed_weights(layout, weights))
        unknown += [f"config_groups.{name}.weights.{key}" for key in parsed[-1].unknown]
    if not parsed:
        return _Parsed(PLAIN, None, unknown)
    if any(other[:2] != parsed[0][:2] or other[3] != parsed[0][3] for other in parsed):
        raise unsupported(f"with {what} in {len(parsed)} config_groups of different formats")
    return parsed[0]._replace(unknown=unknown)


def _compressed_weights(layout: Any, weights: dict[str, Any]) -> _Parsed:
    """Parses the `weights` of one of the config_groups."""
    what = "compressed-tensors"
    unknown = unknown_keys(
        weights,
        f"{what} weights",
        read="num_bits type strategy symmetric group_size block_structure actorder",
        harmless="observer observer_kwargs scale_dtype zp_dtype",
        only={"dynamic": False},
    )
    kind = (layout, weights.get("type", "int"), weights.get("num_bits", 8))
    strategy, symmetric = _strategy(weights), weights.get("symmetric", True)
    by_row = strategy in ("channel", "tensor")
    group_size = weights.get("group_size") if strategy == "group" else -1
    # "group" and its alias "dynamic" store the group of each column.
    ordered = weights.get("actorder") in ("group", "dynamic", True)
    if kind in (("float-quantized", "float", 8), ("naive-quantized", "float", 8)):
        if symmetric is True and not ordered:
            if by_row:
                return _Parsed("fp8", Quantization(format="fp8"), unknown)
            if strategy == "group":
                return _Parsed("fp8_blocks", _grouped("fp8_grouped", group_size), unknown)
            if strategy == "block":
                block = _block(weights.get("block_structure"))
                return _Parsed("fp8_blocks", _grouped("fp8_grouped", block[1]), unknown, block[0])
    if kind in (("int-quantized", "int", 8), ("naive-quantized", "int", 8)) and not ordered:
        if by_row and symmetric is True:
            return _Parsed("int8", Quantization(format="int8"), unknown)
        if strategy in ("channel", "group") and isinstance(symmetric, bool):
            layout = "int8_groups" if symmetric else "int8_groups_asymmetric"
            return _Parsed(layout, _grouped("int8_grouped", group_size), unknown)
    if kind[:2] == ("pack-quantized", "int") and strategy in ("channel", "group"):
        if kind[2] == 8 and strategy == "channel" and symmetric is True and not ordered:
            return _Parsed("packed_rows", Quantization(format="int8"), unknown)
        if kind[2] in (4, 8) and isinstance(symmetric, bool):
            layout = f"packed{kind[2]}" + ("" if symmetric else "_asymmetric")
            format = "int4" if kind[2] == 4 else "int8_grouped"
            layout += "_ordered" if ordered else ""
            return _Parsed(layout, _grouped(format, group_size), unknown)
    details = ", ".join(f"{key} {quoted(value)}" for key, value in sorted(weights.items()))
    raise unsupported(f"with {what} {quoted(layout)}: {details}")


def _strategy(weights: dict[str, Any]) -> Any:
    """The strategy, which follows from the group size if it is not given."""
    by_default = {None: "tensor", -1: "channel"}
    group_size = weights.get("group_size")
    size = group_size if isinstance(group_size, int) else None
    return weights.get("strategy", by_default.get(size, "group"))


def _block(given: Any) -> tuple[int, int]:
    """The rows and columns of a block, given as [128, 128] or, by old versions, as "128x128"."""
    if isinstance(given, str):
        given = [int(part) if part.isdecimal() else 0 for part in given[:20].split("x")]
    if isinstance(given, list) and len(given) == 2 and all(map(is_size, given)):
        return given[0], given[1]
    raise ConfigError(f"The blocks of a quantization must be [rows, columns], got {quoted(given)}.")


def _fbgemm_fp8(given: dict[str, Any]) -> _Parsed:
    harmless = "activation_scale_ub dequantize modules_to_not_convert"
    unknown = unknown_keys(given, "fbgemm_fp8", read="", harmless=harmless)
    return _Parsed("fp8", Quantization(format="fp8"), unknown)


def _fp8(given: dict[str, Any]) -> _Parsed:
    unknown = unknown_keys(
        given,
        "fp8",
        read="weight_block_size",
        harmless="activation_scheme dequantize expert_dtype ignored_layers kv_cache_scheme "
        "modules_to_convert modules_to_not_convert scale_fmt",
        only={"fmt": "e4m3"},
    )
    if "weight_block_size" not in given:
        return _Parsed("fp8", Quantization(format="fp8"), unknown)
    block = _block(given["weight_block_size"])
    return _Parsed("fp8_blocks", _grouped("fp8_grouped", block[1]), unknown, block[0])


def _modelopt(given: dict[str, Any]) -> _Parsed:
    unknown = unknown_keys(
        given,
        "modelopt",
        read="quant_algo",
        # config_groups repeats `quant_algo` in the terms of compressed-tensors.
        harmless="config_groups exclude_modules ignore kv_cache_quant_algo kv_cache_scheme "
        "producer",
    )
    algorithm = given.get("quant_algo")
    if algorithm is None:
        return _Parsed(PLAIN, None, unknown)
    if algorithm != "FP8":
        raise unsupported(f"with modelopt {quoted(algorithm)}")
    return _Parsed("fp8", Quantization(format="fp8"), unknown)


def _gptq(given: dict[str, Any]) -> _Parsed:
    layout = given.get("checkpoint_format", given.get("format", "gptq"))
    bits = _bits(given.get("bits"))
    if bits is None or layout not in ("gptq", "gptq_v2"):
        raise unsupported(
            f"with {quoted(given.get('bits'))}-bit GPTQ, checkpoint_format {quoted(layout)}"
        )
    read = "bits group_size checkpoint_format format desc_act dynamic"
    unknown = unknown_keys(given, "gptq", read=read, harmless=CALIBRATION, only=DEFAULT_LAYOUT)
    # "-:" before a pattern excludes modules, which the stored tensors show.
    overrides = {
        pattern: override
        for pattern, override in get_object(given, "dynamic").items()
        if not pattern.startswith("-")
    }
    _refuse_other_bits(given, "gptq", "dynamic", overrides)
    # With act-order (desc_act), the columns of a group are not adjacent: `g_idx` lists them.
    ordered = "_ordered" if given.get("desc_act", False) else ""
    return _Parsed(f"gptq{bits}{layout[4:]}{ordered}", _in_groups("gptq", bits, given), unknown)


def _awq(given: dict[str, Any]) -> _Parsed:
    bits = given.get("bits", given.get("w_bit"))
    version = given.get("version", given.get("checkpoint_format", given.get("format", "gemm")))
    if bits != 4 or str(version).lower() != "gemm":
        raise unsupported(f"with {quoted(bits)}-bit AWQ, version {quoted(version)}")
    read = "bits w_bit group_size q_group_size version checkpoint_format format dynamic"
    only = DEFAULT_LAYOUT | {"desc_act": False}
    unknown = unknown_keys(given, "awq", read=read, harmless=CALIBRATION, only=only)
    overrides = {
        pattern: override
        for pattern, override in get_object(given, "dynamic").items()
        if not pattern.startswith("-")
    }
    _refuse_other_bits(given | {"bits": bits}, "awq", "dynamic", overrides)
    return _Parsed("awq", _in_groups("awq", 4, given), unknown)


def _auto_round(given: dict[str, Any]) -> _Parsed:
    packing = given.get("packing_format", "auto_round:auto_gptq")
    bits = _bits(given.get("bits"))
    details = f"with auto-round, {quoted(given.get('bits'))} bits, packing_format {quoted(packing)}"
    if not isinstance(packing, str) or bits is None or given.get("data_type", "int") != "int":
        raise unsupported(f"{details}, data_type {quoted(given.get('data_type', 'int'))}")
    read = "bits group_size packing_format data_type extra_config"
    unknown = unknown_keys(
        given, "auto-round", read=read, harmless=CALIBRATION, only=DEFAULT_LAYOUT
    )
    _refuse_other_bits(given, "auto-round", "extra_config", get_object(given, "extra_config"))
    quantization = _in_groups("auto-round", bits, given)
    if packing == "auto_round:auto_awq" and bits == 4:
        return _Parsed("awq", quantization, unknown)
    # Only this packing stores zero points minus one.
    if packing == "auto_round:auto_gptq":
        return _Parsed(f"gptq{bits}", quantization, unknown)
    if packing in ("auto_round", "auto_round:gptqmodel", "auto_round:exllamav2"):
        return _Parsed(f"gptq{bits}_v2", quantization, unknown)
    raise unsupported(details)


_METHODS: dict[str, Callable[[dict[str, Any]], _Parsed]] = {
    QUANT_METHOD: _own,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
}
_DESCRIPTIONS = {"bitsandbytes": "bitsandbytes (NF4, FP4 or LLM.int8)"}


def _bits(given: Any) -> int | None:
    """The bits of a packed integer, if they are supported."""
    return given if is_size(given) and given in (4, 8) else None


def _in_groups(what: str, bits: int, given: dict[str, Any]) -> Quantization:
    group_size: Any = given.get("group_size", given.get("q_group_size"))
    if group_size is None:
        raise ConfigError(f"The quantization with {what} has no group_size.")
    return _grouped("int4" if bits == 4 else "int8_grouped", group_size)


def _grouped(format: str, group_size: Any) -> Quantization:
    return Quantization(format=format, group_size=group_size)


def _refuse_other_bits(
    given: dict[str, Any], what: str, key: str, overrides: dict[str, Any]
) -> None:
    """Refuses settings of single modules that change how these are stored.

    16 bits or more mean that a module is not quantized, which the stored tensors show.
    """
    for pattern, override in overrides.items():
        settings = present(override, f"{key}.{pattern}")
        bits = settings.get("bits", given.get("bits"))
        if isinstance(bits, int) and bits >= 16:
            continue
        for name in ("bits", "group_size", "data_type", "desc_act", "format"):
            if name in settings and settings[name] != given.get(name, settings[name]):
                raise unsupported(
                    f"with {what} and {name} {quoted(settings[name])} for {quoted(pattern)}"
                )
