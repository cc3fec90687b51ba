"""The known keys of config.json and generation_config.json.

Each is read (`..._READ`), cannot change the answers (`..._HARMLESS`), or changes the computation
unless it has one of a few values (`..._ONLY_VALUE`); other values are refused. Keys in none of
these lists are unknown: they are ignored, and a warning names them. Imports no JAX.
"""

from typing import Any

from llama_jax.config.errors import ConfigError
from llama_jax.config.json_values import Object, quoted

CONFIG_READ = frozenset(
    """
    architectures dtype eos_token_id head_dim hidden_size intermediate_size
    max_position_embeddings model_type num_attention_heads num_hidden_layers num_key_value_heads
    compression_config original_max_position_embeddings quantization_config rms_norm_eps
    rope_parameters rope_scaling rope_theta tie_word_embeddings torch_dtype vocab_size
    """.split()
)
# Training, output formats and bookkeeping; the tokenizer adds BOS. `pretraining_tp` > 1 only splits
# the same matrix products into pieces; transformers ignores it, too. Biases must be zero, which the
# stored tensors show.
CONFIG_HARMLESS = frozenset(
    """
    __version__ _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _commit_hash _experts_implementation _flash_attn_2_enabled _model_name_or_path _name_or_path
    attention_bias attention_dropout attn_implementation attn_pdrop chunk_size_feed_forward
    cls_token_id embd_pdrop finetuning_task gradient_checkpointing hidden_dropout id2label
    initializer_range is_decoder is_llama_config keys_to_ignore_at_inference label2id license
    mask_token_id max_sequence_length max_window_layers mlp_bias model_max_length model_name
    name_or_path num_labels output_attentions output_hidden_states padding_side prefix
    pretraining_tp problem_type
    resid_pdrop return_dict sep_token_id seq_length task_specific_params tf_legacy_loss
    tie_last_hidden_states tokenizer_class tokenizer_model_max_length tokenizer_padding_side
    torchscript transformers.js_config transformers_version unk_token_id unsloth_fixed
    unsloth_version use_bfloat16 use_flash_attn use_flash_attention_2
    """.split()
)
# Settings of other architectures, with the values that describe a Llama.
CONFIG_ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "position_embedding_type": ("rope", "rotary"),
    **dict.fromkeys(
        "add_cross_attention alibi is_encoder_decoder parallel_attn qk_layernorm "
        "qk_norm qkv_bias rope_interleaved tie_encoder_decoder use_alibi use_bias "
        "use_bidirectional_attention use_dynamic_ntk use_logn_attn use_mrope "
        "use_parallel_residual use_qk_norm use_sliding_window".split(),
        (False,),
    ),
    **dict.fromkeys(
        "embedding_multiplier embedding_scale lm_head_multiplier logit_scale logits_scaling "
        "partial_rotary_factor residual_multiplier rope_condense_ratio rope_ratio rotary_pct "
        "rotary_percent scale_emb".split(),
        (1.0,),
    ),
    **dict.fromkeys("n_routed_experts num_experts num_local_experts".split(), (0, 1)),
    **dict.fromkeys("no_rope_layers per_layer_config pruned_heads".split(), ({}, [])),
    **dict.fromkeys(
        "attention_multiplier attn_logit_softcapping block_configs clip_qkv "
        "cross_attention_hidden_size final_logit_softcapping logit_softcap no_rope_layer_interval "
        "query_pre_attn_scalar scale_depth".split(),
        (),
    ),
}
GENERATION_READ = frozenset(
    "do_sample eos_token_id min_p repetition_penalty temperature top_k top_p typical_p".split()
)
# Length limits, which each request sets itself; options of beam search, which is refused;
# assistant models, which only make generation faster; caches, output formats and bookkeeping.
GENERATION_HARMLESS = frozenset(
    """
    _commit_hash _from_model_config _name_or_path assistant_confidence_threshold
    assistant_early_exit assistant_ensemble_weight assistant_lookbehind bos_token_id cache_config
    cache_implementation compile_config continuous_batching_config decoder_start_token_id
    disable_compile diversity_penalty early_stopping generation_kwargs is_assistant length_penalty
    low_memory max_cache_len max_length max_matching_ngram_size max_new_tokens max_time
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_return_sequences
    output_attentions output_hidden_states output_logits output_scores pad_token_id
    prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits
    return_dict_in_generate return_legacy_cache speculation_type target_lookbehind
    transformers_version trust_remote_code unk_token_id use_cache use_mtp
    """.split()
)
# Ways to choose tokens that the sampler does not support.
GENERATION_ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        "encoder_repetition_penalty guidance_scale num_beams".split(),
        (1.0,),
    ),
    **dict.fromkeys(
        "encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff min_length min_new_tokens "
        "no_repeat_ngram_size penalty_alpha token_healing".split(),
        (0,),
    ),
    **dict.fromkeys(
        "bad_words_ids begin_suppress_tokens constraints dola_layers "
        "exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_decoder_ids "
        "forced_eos_token_id sequence_bias stop_strings suppress_tokens top_h "
        "watermarking_config".split(),
        ([], {}),
    ),
}
# Entries of `auto_map` other than a model's own code, which is not run here.
_NO_MODEL = ("AutoConfig", "AutoTokenizer", "AutoProcessor")
_GENERATION = GENERATION_READ | GENERATION_HARMLESS | GENERATION_ONLY_VALUE.keys()


def refuse_other_models(config: Object) -> None:
    """Checks that a config.json without null values describes a Llama.

    Raises:
      ConfigError: it describes another model, or one that is computed in another way.
    """
    model_type = config.get("model_type")
    if model_type != "llama":
        raise ConfigError(
            f"model_type is {quoted(model_type)}: this package supports only Llama 3 models "
            "('llama')."
        )
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if architectures not in (["LlamaForCausalLM"], ["LLaMAForCausalLM"]):  # the second is older
        raise ConfigError(
            f"architectures is {quoted(architectures)}: only LlamaForCausalLM, a language model "
            "with an LM head, is supported."
        )
    if isinstance(config.get("quantization"), dict):
        raise ConfigError(
            "The checkpoint is quantized by MLX (quantization in its config.json), whose format is "
            "not supported: use the original checkpoint, or what `mlx_lm.convert --dequantize "
            "--hf-path DIR --mlx-path DST` writes to DST."
        )
    for key, values in CONFIG_ONLY_VALUE.items():
        if key in config and config[key] not in values:
            only = f"only {quoted(values[0])} is" if values else "it is not"
            raise ConfigError(f"{key} is {quoted(config[key])}: {only} supported.")
    layer_types = config.get("layer_types", [])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(
            f"layer_types is {quoted(layer_types)}: only full attention is supported."
        )
    if "sliding_window" in config and config.get("use_sliding_window") is not False:
        raise ConfigError(
            f"sliding_window is {quoted(config['sliding_window'])}: only full attention is "
            "supported."
        )


def unknown_config_keys(config: Object) -> list[str]:
    """The unknown keys of a config.json without null values, in order.

    Older versions of transformers also write generation settings to config.json. They have no
    effect: the defaults of requests come from generation_config.json alone.
    """
    known = CONFIG_READ | CONFIG_HARMLESS | CONFIG_ONLY_VALUE.keys() | _GENERATION
    unknown = config.keys() - known - {"auto_map", "layer_types", "sliding_window"}
    auto_map = config.get("auto_map")
    if auto_map is not None and not (
        isinstance(auto_map, dict) and all(key in _NO_MODEL for key in auto_map)
    ):
        unknown.add("auto_map")
    return sorted(unknown)


def unknown_generation_keys(generation_config: Object) -> list[str]:
    """The unknown keys of a generation_config.json, in order. Null values count as absent."""
    given = {key for key, value in generation_config.items() if value is not None}
    return sorted(given - _GENERATION)
