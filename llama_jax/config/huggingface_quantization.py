"""Reads how a Hugging Face checkpoint says that its weights are quantised, or refuses it by name.

As in `hf_config`, a key is read, or known to be harmless, or allowed one value, or refused; a key
that is null counts as absent. Which modules a tool says to have left alone is among the harmless,
because the tensors tell, and a checkpoint must hold every matrix of the layers quantised and
nothing else (`checkpoint.foreign`). What is said of activations and of the KV cache is harmless as
well: neither is quantised here, so that the weights alone are what the tool made them.

Where the formats are described:
  compressed-tensors: https://github.com/neuralmagic/compressed-tensors, quant_config.py and
    quant_args.py in quantization/.
  fbgemm_fp8: https://huggingface.co/docs/transformers/quantization/fbgemm_fp8.
  fp8: https://github.com/neuralmagic/AutoFP8, the forerunner of compressed-tensors.
  modelopt: https://nvidia.github.io/Model-Optimizer/deployment/3_unified_hf.html.
  gptq: https://github.com/ModelCloud/GPTQModel, quantization/config.py.
  awq: https://github.com/casper-hansen/AutoAWQ, models/_config.py.

Imports no JAX.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.config.errors import ConfigError

QUANT_METHOD = "llama_jax"  # of the layouts in `llama_jax.quantization`, stored as they are
SIDE_FILE = "hf_quant_config.json"  # where modelopt says it, and not always in config.json too


class Stored(NamedTuple):
    """How the matrices of the layers are stored.

    Attributes:
      layout: a name from `checkpoint.foreign.LAYOUTS`, or `QUANT_METHOD`.
      fields: of the `Quantization` that they have when they have been read.
    """

    layout: str
    fields: dict[str, Any]


def stored_quantization(config: dict[str, Any]) -> Stored | None:
    """What the contents of a config.json say, or None where they say nothing.

    Raises:
      ConfigError: what is said cannot be read; the message names it and says what to do.
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
        raise _cannot_be_read(f"with {_DESCRIPTIONS.get(method, method)}")
    return _METHODS[method](given)


def from_side_file(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """The quantization_config that the contents of modelopt's hf_quant_config.json stand for.

    Raises:
      ConfigError: it has none; the message names the file.
    """
    quantization = content.get("quantization")
    if not isinstance(quantization, dict):
        raise ConfigError(f"{file} must have an object named quantization.")
    return {"quant_method": "modelopt", **quantization}


def _own(given: dict[str, Any]) -> Stored:
    if not {"format"} <= given.keys() <= {"format", "group_size"}:
        raise ConfigError(
            f"quantization_config of {QUANT_METHOD} has format and group_size, not "
            f"{', '.join(sorted(given)) or 'nothing'}."
        )
    return Stored(QUANT_METHOD, given)


def _compressed_tensors(given: dict[str, Any]) -> Stored:
    what = "compressed-tensors"
    # A pruned model that is stored whole, zeros included.
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
        raise _cannot_be_read(f"with {what} in {len(groups)} ways at once")
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
    if weights.get("actorder", False) in (False, "weight", "static"):  # columns are in their order
        for strategy in ("channel", "tensor"):
            if kind == ("float-quantized", "float", 8, strategy) and symmetric is True:
                return Stored("fp8", {"format": "fp8"})
            if kind == ("int-quantized", "int", 8, strategy) and symmetric is True:
                return Stored("int8", {"format": "int8"})
        if kind == ("pack-quantized", "int", 4, "group") and isinstance(symmetric, bool):
            layout = "packed" if symmetric else "packed_asymmetric"
            return Stored(layout, _int4(what, weights))
    details = ", ".join(f"{key} {value!r}" for key, value in sorted(weights.items()))
    raise _cannot_be_read(f"with {what} {layout}: {details}")


def _fbgemm_fp8(given: dict[str, Any]) -> Stored:
    _check(given, "fbgemm_fp8", read="", harmless="activation_scale_ub modules_to_not_convert")
    return Stored("fp8", {"format": "fp8"})


def _fp8(given: dict[str, Any]) -> Stored:
    if "weight_block_size" in given:
        raise _cannot_be_read("with fp8 as Hugging Face has it, in blocks")
    harmless = "activation_scheme ignored_layers modules_to_not_convert"
    _check(given, "fp8 of AutoFP8", read="", harmless=harmless)
    return Stored("fp8", {"format": "fp8"})


def _modelopt(given: dict[str, Any]) -> Stored:
    algorithm = given.get("quant_algo")
    if algorithm != "FP8":
        raise _cannot_be_read(f"with modelopt {algorithm}")
    _check(
        given,
        "modelopt",
        read="quant_algo",
        # The groups say in the words of compressed-tensors what `quant_algo` says.
        harmless="config_groups exclude_modules ignore kv_cache_quant_algo kv_cache_scheme "
        "producer",
    )
    return Stored("fp8", {"format": "fp8"})


# Of calibration and of kernels, in the words of either tool.
_CALIBRATION = """
    act_group_aware auto_gc backend batch_size block_name_to_quantize cache_block_outputs
    damp_auto_increment damp_percent dataset disable_exllama do_fuse exllama_config
    fuse_max_seq_len max_input_length meta method model_file_base_name model_name_or_path
    model_seqlen module_name_preceding_first_block modules_in_block_to_quantize modules_to_fuse
    modules_to_not_convert mse offload_to_disk offload_to_disk_path pad_token_id quantizer
    static_groups sym tokenizer true_sequential use_cuda_fp16 use_exllama
    """
_PLAIN: dict[str, Any] = {  # of a matrix like any other, in words of 32 bits
    "adapter": {},
    "dynamic": {},
    "is_marlin_format": False,
    "lm_head": False,
    "pack_dtype": "int32",
    "rotation": "",
}


def _gptq(given: dict[str, Any]) -> Stored:
    layout = given.get("checkpoint_format", given.get("format", "gptq"))
    if given.get("bits") != 4 or layout not in ("gptq", "gptq_v2"):
        raise _cannot_be_read(f"with {given.get('bits')}-bit GPTQ, checkpoint_format {layout}")
    read = "bits group_size checkpoint_format format desc_act"
    _check(given, "gptq", read=read, harmless=_CALIBRATION, only=_PLAIN)
    ordered = "_ordered" if given.get("desc_act", False) else ""
    return Stored(layout + ordered, _int4("gptq", given))


def _awq(given: dict[str, Any]) -> Stored:
    bits = given.get("bits", given.get("w_bit"))
    version = str(given.get("version", given.get("format", "gemm"))).lower()
    if (bits, version, given.get("zero_point", True)) != (4, "gemm", True):
        raise _cannot_be_read(
            f"with {bits}-bit AWQ, version {version}, zero_point {given.get('zero_point', True)}"
        )
    read = "bits w_bit group_size q_group_size version format zero_point"
    _check(given, "awq", read=read, harmless=_CALIBRATION, only=_PLAIN | {"desc_act": False})
    return Stored("awq", _int4("awq", given))


_METHODS: dict[str, Callable[[dict[str, Any]], Stored]] = {
    QUANT_METHOD: _own,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
}
_DESCRIPTIONS = {"bitsandbytes": "bitsandbytes, in 4 bits or LLM.int8"}


def _int4(what: str, given: dict[str, Any]) -> dict[str, Any]:
    group_size = given.get("group_size", given.get("q_group_size"))
    if group_size == -1:
        raise _cannot_be_read(f"with {what} and group_size -1, one scale for all input columns")
    return {"format": "int4", "group_size": group_size}


def _check(
    given: dict[str, Any],
    what: str,
    *,
    read: str,
    harmless: str,
    only: dict[str, Any] | None = None,
) -> None:
    """That there is no key but these, each list in one string, and `only` what those may say.

    Whatever is empty or false says as much as the empty value that `only` gives.
    """
    only = only or {}
    for key, value in only.items():
        if given.get(key, value) != value and (given[key] or value):
            raise _cannot_be_read(f"with {what} and {key} = {given[key]!r}")
    unknown = sorted(given.keys() - {*read.split(), *harmless.split(), *only})
    if unknown:
        raise ConfigError(
            f"Not known here in the quantisation with {what}, so possibly a change of the maths: "
            f"{', '.join(unknown)}; delete what you know to be harmless."
        )


def _cannot_be_read(how: str) -> ConfigError:
    return ConfigError(
        f"The checkpoint is quantised {how}, which cannot be read here: take the original one in "
        "bfloat16, and convert it with --quantize if need be."
    )


def _object(given: dict[str, Any], key: str) -> dict[str, Any]:
    value = given.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{key} of the quantisation must be an object, got {value!r}.")
    return value


def _present(given: Any) -> dict[str, Any]:
    """Without the keys that are null."""
    if not isinstance(given, dict):
        raise ConfigError(f"A group of the quantisation must be an object, got {given!r}.")
    return {key: value for key, value in given.items() if value is not None}
