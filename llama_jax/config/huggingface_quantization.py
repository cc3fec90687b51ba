"""Reads how the weights of a Hugging Face checkpoint are quantized.

Lists of modules that a tool did not quantize are not read: the stored tensors show it
(`checkpoint.foreign`). Neither are settings for activations and for the KV cache: those are options
of the engine, and the weights do not depend on them. Layouts that this package cannot compute are
refused by name.

Descriptions of the formats:
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

from llama_jax.config.compressed_tensors import parse_compressed_tensors
from llama_jax.config.errors import ConfigError
from llama_jax.config.json_values import get_object, quoted
from llama_jax.config.llama_config import QUANT_METHOD, Quantization
from llama_jax.config.quantization_settings import (
    CALIBRATION,
    DEFAULT_LAYOUT,
    is_size,
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

MODELOPT_FILE = "hf_quant_config.json"  # written by modelopt, often instead of config.json's entry


class StoredQuantization(NamedTuple):
    """How the matrices of a checkpoint are stored.

    Attributes:
      method: the tool that quantized them (`quant_method`); `QUANT_METHOD` for this package.
      layers: how those of the layers are stored.
      head: how the LM head is stored if it is quantized otherwise than the layers; None if not.
      unknown: keys that this package does not know, as paths.
    """

    method: str
    layers: StoredMatrices
    head: StoredMatrices | None = None
    unknown: tuple[str, ...] = ()

    @property
    def quantization(self) -> Quantization | None:
        """The quantization of the layers."""
        return self.layers.quantization


_AWQ_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}  # of old versions


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
    return StoredQuantization(method, parsed.layers, parsed.head, unknown)


def modelopt_quantization(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """Turns the contents of modelopt's hf_quant_config.json into a quantization_config.

    Raises:
      ConfigError: they have no object named quantization.
    """
    quantization = content.get("quantization")
    if not isinstance(quantization, dict):
        raise ConfigError(f"{file} must have an object named quantization.")
    return {"quant_method": "modelopt", **quantization}


def _own(given: dict[str, Any]) -> Parsed:
    if not {"format"} <= given.keys() <= {"format", "group_size", "plain"}:
        raise ConfigError(
            f"The quantization_config of {QUANT_METHOD} must have format and may have group_size "
            f"and plain, got {quoted(', '.join(sorted(given)) or 'nothing')}."
        )
    if not isinstance(given.get("plain", []), list):
        raise ConfigError(f"plain must be a list of modules, got {quoted(given['plain'])}.")
    given = given | {"plain": tuple(given.get("plain", ()))}
    return Parsed(StoredMatrices(QUANT_METHOD, Quantization(**given)), [])


def _fbgemm_fp8(given: dict[str, Any]) -> Parsed:
    harmless = "activation_scale_ub dequantize modules_to_not_convert"
    unknown = unknown_keys(given, "fbgemm_fp8", read="", harmless=harmless)
    return Parsed(FP8_ROWS, unknown)


def _fp8(given: dict[str, Any]) -> Parsed:
    unknown = unknown_keys(
        given,
        "fp8",
        read="weight_block_size",
        harmless="activation_scheme dequantize expert_dtype ignored_layers kv_cache_scheme "
        "modules_to_convert modules_to_not_convert scale_fmt",
        only={"fmt": "e4m3"},
    )
    if "weight_block_size" not in given:
        return Parsed(FP8_ROWS, unknown)
    return Parsed(fp8_blocks(given["weight_block_size"]), unknown)


def _modelopt(given: dict[str, Any]) -> Parsed:
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
        return Parsed(StoredMatrices(PLAIN, None), unknown)
    if algorithm != "FP8":
        raise unsupported(f"with modelopt {quoted(algorithm)}")
    return Parsed(FP8_ROWS, unknown)


def _gptq(given: dict[str, Any]) -> Parsed:
    read = "bits group_size checkpoint_format format desc_act dynamic"
    unknown = unknown_keys(given, "gptq", read=read, harmless=CALIBRATION, only=DEFAULT_LAYOUT)
    head = _overrides(given, "gptq", "dynamic", _gptq_matrices)
    return Parsed(_gptq_matrices(given), unknown, head)


def _gptq_matrices(given: dict[str, Any]) -> StoredMatrices:
    layout = given.get("checkpoint_format", given.get("format", "gptq"))
    bits = given.get("bits")
    if not _is_packed(bits) or layout not in ("gptq", "gptq_v2"):
        raise unsupported(f"with {quoted(bits)}-bit GPTQ, checkpoint_format {quoted(layout)}")
    # With act-order (desc_act), the columns of a group are not adjacent: `g_idx` lists them.
    ordered = "_ordered" if given.get("desc_act", False) else ""
    version = layout.removeprefix("gptq")
    return StoredMatrices(f"gptq{bits}{version}{ordered}", _in_groups("gptq", given))


def _awq(given: dict[str, Any]) -> Parsed:
    given = {_AWQ_NAMES.get(key, key): value for key, value in given.items()}
    version = given.get("version", given.get("checkpoint_format", given.get("format", "gemm")))
    if str(version).lower() != "gemm":
        raise unsupported(f"with AWQ, version {quoted(version)}")
    read = "bits group_size version checkpoint_format format dynamic"
    only = DEFAULT_LAYOUT | {"desc_act": False}
    unknown = unknown_keys(given, "awq", read=read, harmless=CALIBRATION, only=only)
    head = _overrides(given, "awq", "dynamic", _awq_matrices)
    return Parsed(_awq_matrices(given), unknown, head)


def _awq_matrices(given: dict[str, Any]) -> StoredMatrices:
    if given.get("bits") != 4:
        raise unsupported(f"with {quoted(given.get('bits'))}-bit AWQ")
    return StoredMatrices("awq", _in_groups("awq", given))


def _auto_round(given: dict[str, Any]) -> Parsed:
    read = "bits group_size packing_format data_type extra_config activation_scheme"
    only = {key: value for key, value in DEFAULT_LAYOUT.items() if key not in read.split()}
    unknown = unknown_keys(
        given, "auto-round", read=read, harmless=CALIBRATION, only=only | {"fmt": "e4m3"}
    )
    head = _overrides(given, "auto-round", "extra_config", _auto_round_matrices)
    return Parsed(_auto_round_matrices(given), unknown, head)


def _auto_round_matrices(given: dict[str, Any]) -> StoredMatrices:
    packing = given.get("packing_format", "auto_round:auto_gptq")
    bits, data_type = given.get("bits"), given.get("data_type", "int")
    if packing == "auto_round:fp8_static" and (bits, data_type) == (8, "fp"):
        return FP8_ROWS
    if packing == "auto_round:auto_awq" and data_type == "int":
        return _awq_matrices(given)
    # Only "auto_gptq" stores zero points minus one.
    versions = {"auto_round:auto_gptq": ""} | dict.fromkeys(
        ("auto_round", "auto_round:gptqmodel", "auto_round:exllamav2"), "_v2"
    )
    known = isinstance(packing, str) and packing in versions and data_type == "int"
    if not known or not _is_packed(bits):
        raise unsupported(
            f"with auto-round, {quoted(bits)} bits of data_type {quoted(data_type)}, "
            f"packing_format {quoted(packing)}"
        )
    return StoredMatrices(f"gptq{bits}{versions[packing]}", _in_groups("auto-round", given))


_METHODS: dict[str, Callable[[dict[str, Any]], Parsed]] = {
    QUANT_METHOD: _own,
    "compressed-tensors": parse_compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
}
_DESCRIPTIONS = {"bitsandbytes": "bitsandbytes (NF4, FP4 or LLM.int8)"}


def _is_packed(bits: Any) -> bool:
    """Whether integers of so many bits are supported."""
    return is_size(bits) and bits in (4, 8)


def _in_groups(what: str, given: dict[str, Any]) -> Quantization:
    if "group_size" not in given:
        raise ConfigError(f"The quantization with {what} has no group_size.")
    return grouped("int4" if given["bits"] == 4 else "int8_grouped", given["group_size"])


def _overrides(
    given: dict[str, Any],
    what: str,
    key: str,
    parse: Callable[[dict[str, Any]], StoredMatrices],
) -> StoredMatrices | None:
    """Reads the settings of single modules; returns those of the LM head, if there are any.

    Raises:
      ConfigError: modules of the layers are quantized otherwise than the others.
    """
    head = None
    for pattern, override in get_object(given, key).items():
        if pattern.startswith("-"):  # excluded modules, which the stored tensors show
            continue
        settings = present(override, f"{key}.{pattern}")
        bits = settings.get("bits", given.get("bits"))
        if isinstance(bits, int) and bits >= 16:  # not quantized
            continue
        stored = parse(given | settings)
        if HEAD in pattern:
            head = stored
        elif stored != parse(given):
            raise unsupported(f"with {what} and {quoted(settings)} for {quoted(pattern)}")
    return head
