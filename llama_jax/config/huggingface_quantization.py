"""Reads how the weights of a Hugging Face checkpoint are quantized.

As in `config.huggingface`, each key is read, known to be harmless, restricted to one value, or
refused, and null counts as absent. Lists of modules that a tool did not quantize are harmless: the
stored tensors show it, and a checkpoint must hold every matrix of the layers quantized and nothing
else (`checkpoint.foreign`). Settings for activations and for the KV cache are harmless, too: this
package quantizes neither, and the weights do not depend on them.

Descriptions of the formats:
  compressed-tensors: https://github.com/neuralmagic/compressed-tensors, quant_config.py and
    quant_args.py in quantization/.
  fbgemm_fp8: https://huggingface.co/docs/transformers/quantization/fbgemm_fp8.
  fp8: https://github.com/neuralmagic/AutoFP8, the predecessor of compressed-tensors.
  modelopt: https://nvidia.github.io/Model-Optimizer/deployment/3_unified_hf.html.
  gptq: https://github.com/ModelCloud/GPTQModel, quantization/config.py.
  awq: https://github.com/casper-hansen/AutoAWQ, models/_config.py.

Imports no JAX.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.config.errors import ConfigError
from llama_jax.config.llama_config import QUANT_METHOD, Quantization

MODELOPT_FILE = "hf_quant_config.json"  # written by modelopt, often instead of config.json's entry


class StoredQuantization(NamedTuple):
    """How the matrices of the layers are stored.

    Attributes:
      method: the tool that quantized them (`quant_method`); `QUANT_METHOD` for this package.
      layout: a name from `checkpoint.foreign.LAYOUTS`, or `QUANT_METHOD`.
      quantization: their format once they are loaded.
    """

    method: str
    layout: str
    quantization: Quantization


_Parsed = tuple[str, Quantization]  # layout, and the format once loaded


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
    if not isinstance(given, dict):
        raise ConfigError(f"{name} must be an object, got {given!r}.")
    given = _present(given)
    method = str(given.pop("quant_method", "an unnamed method"))
    if method not in _METHODS:
        raise _unsupported(f"with {_DESCRIPTIONS.get(method, method)}")
    layout, quantization = _METHODS[method](given)
    return StoredQuantization(method, layout, quantization)


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
    if not {"format"} <= given.keys() <= {"format", "group_size"}:
        raise ConfigError(
            f"The quantization_config of {QUANT_METHOD} must have format and may have group_size, "
            f"got {', '.join(sorted(given)) or 'nothing'}."
        )
    return QUANT_METHOD, Quantization(**given)


def _compressed_tensors(given: dict[str, Any]) -> _Parsed:
    what = "compressed-tensors"
    # A pruned model whose zeros are stored like any other weight.
    if _object(given, "sparsity_config").get("format") == "dense":
        del given["sparsity_config"]
    _check(
        given,
        what,
        read="config_groups format",
        harmless="global_compression_ratio ignore kv_cache_scheme quantization_status version",
        only={"sparsity_config": {}, "transform_config": {}, "moe_sparsity_config": {}},
    )
    groups = [_present(group) for group in _object(given, "config_groups").values()]
    if len(groups) != 1:
        raise _unsupported(f"with {what} in {len(groups)} config_groups, not one")
    layout = groups[0].pop("format", given.get("format"))
    _check(
        groups[0],
        f"{what} config_groups",
        read="weights",
        harmless="input_activations output_activations targets",
    )
    weights = _present(_object(groups[0], "weights"))
    _check(
        weights,
        f"{what} weights",
        read="num_bits type strategy symmetric group_size actorder",
        harmless="observer observer_kwargs scale_dtype zp_dtype",
        only={"dynamic": False, "block_structure": []},
    )
    kind = (layout, weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    symmetric = weights.get("symmetric", True)
    if weights.get("actorder", False) in (False, "weight", "static"):  # no column permutation
        for strategy in ("channel", "tensor"):
            if kind == ("float-quantized", "float", 8, strategy) and symmetric is True:
                return "fp8", Quantization(format="fp8")
            if kind == ("int-quantized", "int", 8, strategy) and symmetric is True:
                return "int8", Quantization(format="int8")
        if kind == ("pack-quantized", "int", 4, "group") and isinstance(symmetric, bool):
            layout = "packed" if symmetric else "packed_asymmetric"
            return layout, _int4(what, weights)
    details = ", ".join(f"{key} {value!r}" for key, value in sorted(weights.items()))
    raise _unsupported(f"with {what} {layout}: {details}")


def _fbgemm_fp8(given: dict[str, Any]) -> _Parsed:
    _check(given, "fbgemm_fp8", read="", harmless="activation_scale_ub modules_to_not_convert")
    return "fp8", Quantization(format="fp8")


def _fp8(given: dict[str, Any]) -> _Parsed:
    if "weight_block_size" in given:
        raise _unsupported("with fp8 in blocks (weight_block_size)")
    harmless = "activation_scheme ignored_layers modules_to_not_convert"
    _check(given, "fp8 of AutoFP8", read="", harmless=harmless)
    return "fp8", Quantization(format="fp8")


def _modelopt(given: dict[str, Any]) -> _Parsed:
    algorithm = given.get("quant_algo")
    if algorithm != "FP8":
        raise _unsupported(f"with modelopt {algorithm}")
    _check(
        given,
        "modelopt",
        read="quant_algo",
        # config_groups repeats `quant_algo` in the terms of compressed-tensors.
        harmless="config_groups exclude_modules ignore kv_cache_quant_algo kv_cache_scheme "
        "producer",
    )
    return "fp8", Quantization(format="fp8")


# Settings of GPTQ and AWQ for calibration and kernels, which the stored weights do not depend on.
_CALIBRATION = """
    act_group_aware auto_gc backend batch_size block_name_to_quantize cache_block_outputs
    damp_auto_increment damp_percent dataset disable_exllama do_fuse exllama_config
    fuse_max_seq_len max_input_length meta method model_file_base_name model_name_or_path
    model_seqlen module_name_preceding_first_block modules_in_block_to_quantize modules_to_fuse
    modules_to_not_convert mse offload_to_disk offload_to_disk_path pad_token_id quantizer
    static_groups sym tokenizer true_sequential use_cuda_fp16 use_exllama
    """
_DEFAULT_LAYOUT: dict[str, Any] = {  # every matrix quantized the same way, packed in int32
    "adapter": {},
    "dynamic": {},
    "is_marlin_format": False,
    "lm_head": False,
    "pack_dtype": "int32",
    "rotation": "",
}


def _gptq(given: dict[str, Any]) -> _Parsed:
    layout = given.get("checkpoint_format", given.get("format", "gptq"))
    if given.get("bits") != 4 or layout not in ("gptq", "gptq_v2"):
        raise _unsupported(f"with {given.get('bits')}-bit GPTQ, checkpoint_format {layout}")
    read = "bits group_size checkpoint_format format desc_act"
    _check(given, "gptq", read=read, harmless=_CALIBRATION, only=_DEFAULT_LAYOUT)
    # With act-order (desc_act), the columns of a group are not adjacent: `g_idx` lists them.
    ordered = "_ordered" if given.get("desc_act", False) else ""
    return layout + ordered, _int4("gptq", given)


def _awq(given: dict[str, Any]) -> _Parsed:
    bits = given.get("bits", given.get("w_bit"))
    version = str(given.get("version", given.get("format", "gemm"))).lower()
    if (bits, version, given.get("zero_point", True)) != (4, "gemm", True):
        raise _unsupported(
            f"with {bits}-bit AWQ, version {version}, zero_point {given.get('zero_point', True)}"
        )
    read = "bits w_bit group_size q_group_size version format zero_point"
    _check(
        given, "awq", read=read, harmless=_CALIBRATION, only=_DEFAULT_LAYOUT | {"desc_act": False}
    )
    return "awq", _int4("awq", given)


_METHODS: dict[str, Callable[[dict[str, Any]], _Parsed]] = {
    QUANT_METHOD: _own,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
}
_DESCRIPTIONS = {"bitsandbytes": "bitsandbytes (NF4, FP4 or LLM.int8)"}


def _int4(what: str, given: dict[str, Any]) -> Quantization:
    group_size: Any = given.get("group_size", given.get("q_group_size"))
    if group_size == -1:
        raise _unsupported(f"with {what} and group_size -1 (one group per row)")
    return Quantization(format="int4", group_size=group_size)


def _check(
    given: dict[str, Any],
    what: str,
    *,
    read: str,
    harmless: str,
    only: dict[str, Any] | None = None,
) -> None:
    """Refuses settings that are not supported, and unknown keys.

    Args:
      given: the settings.
      what: they belong to, for messages.
      read: names of the keys that the caller reads, separated by spaces.
      harmless: names of the keys that do not matter.
      only: keys that must have one value, and that value. If it is falsy, so may the setting be.

    Raises:
      ConfigError: a key is unknown, or one of `only` has another value.
    """
    only = only or {}
    for key, value in only.items():
        if given.get(key, value) != value and (given[key] or value):
            raise _unsupported(f"with {what} and {key} = {given[key]!r}")
    unknown = sorted(given.keys() - {*read.split(), *harmless.split(), *only})
    if unknown:
        raise ConfigError(
            f"Unknown keys in the quantization with {what}, which may change the computation: "
            f"{', '.join(unknown)}; delete those that you know to be harmless."
        )


def _unsupported(how: str) -> ConfigError:
    return ConfigError(
        f"The checkpoint is quantized {how}, which is not supported: use the original one in "
        "bfloat16, and convert it with --quantize if you need a smaller one."
    )


def _object(given: dict[str, Any], key: str) -> dict[str, Any]:
    value = given.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{key} in the quantization settings must be an object, got {value!r}.")
    return value


def _present(given: Any) -> dict[str, Any]:
    """The settings without the keys that are null."""
    if not isinstance(given, dict):
        raise ConfigError(f"A quantization group must be an object, got {given!r}.")
    return {key: value for key, value in given.items() if value is not None}
