"""Reads settings of a quantization_config: what is known of each key, and typed values.

Each key of a tool's settings is read, known to be harmless, or restricted to one value. Any other
is unknown: it is named in a warning. Null counts as absent. Imports no JAX.
"""

from typing import Any

from llama_jax.config.errors import ConfigError

# Settings of GPTQ, AWQ and AutoRound for calibration, for kernels and for their own records, which
# do not change how weights are stored. `sym` and `zero_point` change only the zero points, which
# are stored in any case; `lm_head` and lists of modules show in the stored tensors.
CALIBRATION = """
    act_bits act_data_type act_dynamic act_group_aware act_group_size act_sym amp auto_gc
    autoround_version backend batch_size block_name_to_quantize cache_block_outputs calibration
    damp_auto_increment damp_percent dataset disable_exllama do_fuse enable_minmax_tuning
    enable_norm_bias_tuning enable_quanted_input exllama_config fallback failsafe fuse_max_seq_len
    gradient_accumulate_steps hessian iters lm_head low_cpu_mem_usage low_gpu_mem_usage lr
    max_input_length meta method minmax_lr model_file_base_name model_name_or_path model_seqlen
    module_name_preceding_first_block modules_in_block_to_quantize modules_to_fuse
    modules_to_not_convert mse nblocks nsamples offload_to_disk offload_to_disk_path pad_token_id
    preprocessing process provider quantizer scale_dtype seed seqlen static_groups super_bits
    super_group_size sym to_quant_block_names tokenizer train_bs true_sequential use_cuda_fp16
    use_exllama vram_strategy wait_for_submodule_finalizers zero_point
    """
DEFAULT_LAYOUT: dict[str, Any] = {  # every matrix packed in int32, as it is
    "adapter": {},
    "is_marlin_format": False,
    "pack_dtype": "int32",
    "rotation": "",
    "rotation_config": {},
}


def unknown_keys(
    given: dict[str, Any],
    what: str,
    *,
    read: str,
    harmless: str = "",
    only: dict[str, Any] | None = None,
) -> list[str]:
    """Refuses settings that are not supported, and returns the unknown keys.

    Args:
      given: the settings.
      what: they belong to, for messages.
      read: names of the keys that the caller reads, separated by spaces.
      harmless: names of the keys that do not matter.
      only: keys that must have one value, and that value. If it is falsy, so may the setting be.

    Raises:
      ConfigError: a key of `only` has another value.
    """
    only = only or {}
    for key, value in only.items():
        if given.get(key, value) != value and (given[key] or value):
            raise unsupported(f"with {what} and {key} = {quoted(given[key])}")
    return sorted(given.keys() - {*read.split(), *harmless.split(), *only})


def unsupported(how: str) -> ConfigError:
    """The error for a quantization that this package cannot compute."""
    return ConfigError(
        f"The checkpoint is quantized {how}, which is not supported: use the original one in "
        "bfloat16, and convert it with --quantize if you need a smaller one."
    )


def get_object(given: dict[str, Any], key: str) -> dict[str, Any]:
    """An object among the settings, without its nulls; empty if there is none."""
    return present(given.get(key, {}), key)


def present(given: Any, what: str) -> dict[str, Any]:
    """An object without the keys that are null; `what` names it in messages."""
    if not isinstance(given, dict):
        raise ConfigError(
            f"{what} in the quantization settings must be an object, got {quoted(given)}."
        )
    return {key: value for key, value in given.items() if value is not None}


def is_size(value: Any) -> bool:
    """Whether a setting is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def quoted(value: Any) -> str:
    """A value as it is shown in a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
