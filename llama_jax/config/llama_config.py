"""The architecture of a Llama 3 model: `LlamaConfig` and its presets. Imports no JAX."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from llama_jax.config.errors import ConfigError
from llama_jax.config.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    rope_type,
)
from llama_jax.config.unknown_keys import report_unknown
from llama_jax.quantization import FORMATS

DTYPES = ("bfloat16", "float16", "float32")  # of stored weights that are not quantized
QUANT_METHOD = "llama_jax"  # `quant_method` of the formats in `llama_jax.quantization`
_MAX_POSITIONS = 2**31 - 1  # int32 on the device
MAX_EOS_TOKEN_IDS = 64  # `min_tokens` bans each of them
_MAX_LAYERS = 1000  # an absurd config.json must not fill the memory with tensor names


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the matrices of the layers are quantized. No other weight is.

    Attributes:
      format: a name from `quantization.FORMATS`.
      group_size: input columns that share a scale, in formats with groups; even, or -1 for one
        scale per row. Groups are smaller in a matrix where they would straddle the boundary between
        two KV heads' columns, so that up to K ranks can split it. Act-order formats keep theirs.
      plain: the modules whose matrix is not quantized, such as "model.layers.0.mlp.up_proj".

    Raises:
      ConfigError: the format is unknown, the group size is neither -1 nor an even positive integer,
        or `plain` is not a tuple of strings.
    """

    format: str
    group_size: int = 128
    plain: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.format, str) or self.format not in FORMATS:
            raise ConfigError(
                f"Quantization {self.format!r} is not supported, only {', '.join(FORMATS)}."
            )
        if not isinstance(self.group_size, int):
            raise ConfigError(f"group_size must be an integer, got {self.group_size!r}.")
        if self.group_size != -1 and (self.group_size < 2 or self.group_size % 2):
            raise ConfigError(f"group_size must be even and positive, got {self.group_size}.")
        # A list would be found out only where a config is the key of a compiled program.
        names = self.plain if isinstance(self.plain, tuple) else (None,)
        if not all(isinstance(module, str) for module in names):
            raise ConfigError(
                "plain must be a tuple of names of modules, a list in config.json, got "
                f"{self.plain!r}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The contents of a quantization_config that `parse_quantization` reads back."""
        plain = {"plain": list(self.plain)} if self.plain else {}
        own = {"quant_method": QUANT_METHOD, "format": self.format, "group_size": self.group_size}
        return own | plain


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The architecture of one checkpoint. Hashable, so that compiled programs can be cached by it.

    Attributes:
      vocab_size: V, rows of the embedding table and of the LM head.
      embed_dim: D, width of the residual stream.
      num_layers: L.
      num_heads: H, query heads.
      num_kv_heads: K, key and value heads; divides H.
      head_dim: h, even; H × h need not be D.
      mlp_dim: F, width of the MLP.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: None for unscaled frequencies.
      norm_eps: epsilon of every RMS norm.
      tie_embeddings: whether the embedding table also serves as the LM head.
      max_position_embeddings: the context length in config.json, in tokens; see `max_context`.
      dtype: of the stored weights that are not quantized, one of `DTYPES`.
      quantization: of the stored matrices of the layers; None if they are not quantized.
      eos_token_ids: every id that ends an answer.

    Raises:
      ConfigError: a size is not positive, or the sizes do not fit together.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    norm_eps: float
    tie_embeddings: bool = False
    max_position_embeddings: int
    dtype: str = "float32"
    quantization: Quantization | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # Types, not strings: this module does not postpone the evaluation of annotations.
            if field.type in (int, float) and not value > 0:
                raise ConfigError(f"{field.name} must be positive, got {value}.")
        if self.num_layers > _MAX_LAYERS:
            raise ConfigError(
                f"num_layers is {self.num_layers}: at most {_MAX_LAYERS} are supported."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key/value "
                "heads: the number of attention heads must be a multiple of the other."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim must be even, got {self.head_dim}: rotary embeddings rotate pairs."
            )
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise ConfigError(f"YaRN needs a rope_theta greater than 1, got {self.rope_theta}.")
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"Weights of dtype {self.dtype!r} are not supported, only {', '.join(DTYPES)}."
            )
        if len(self.eos_token_ids) > MAX_EOS_TOKEN_IDS:
            raise ConfigError(
                f"There are {len(self.eos_token_ids)} EOS token ids: at most {MAX_EOS_TOKEN_IDS} "
                "are supported."
            )
        outside = [token for token in self.eos_token_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ConfigError(
                f"The EOS ids include {outside[0]}, which is not in the vocabulary "
                f"(0 to {self.vocab_size - 1})."
            )

    @classmethod
    def from_dict(
        cls, config: dict[str, Any], generation_config: dict[str, Any] | None = None
    ) -> "LlamaConfig":
        """Parses the contents of config.json and generation_config.json.

        Rope parameters may be spelled as in transformers 4 (`rope_theta`, `rope_scaling`) or 5
        (`rope_parameters`). As in transformers, `num_key_value_heads` defaults to H, `head_dim` to
        D / H, `tie_word_embeddings` and the biases to false, and the dtype to float32. The EOS ids
        are those of both files together. Unknown keys are ignored, with a warning that names them.

        Raises:
          ConfigError: the model is not a Llama that this package computes exactly.
        """
        from llama_jax.config.huggingface import parse_config  # which needs this module

        parsed = parse_config(config, generation_config or {})
        report_unknown("The configuration", {"config.json": parsed.unknown})
        return parsed.config

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "LlamaConfig":
        """Reads the configuration of a checkpoint directory or a GGUF file.

        Raises:
          ConfigError: as `from_dict`, or config.json cannot be read.
        """
        from llama_jax.config.huggingface import read_checkpoint_config

        declared = read_checkpoint_config(path)
        declared.report_unknown()
        return declared.config

    @property
    def max_context(self) -> int:
        """The longest supported context, in tokens.

        As in vLLM, linear scaling extends `max_position_embeddings`, and YaRN its own original
        length. Dynamic scaling does not: see `DynamicScaling`.
        """
        match self.rope_scaling:
            case LinearScaling(factor=factor):
                return int(min(self.max_position_embeddings * factor, _MAX_POSITIONS))
            case YarnScaling(factor=factor, original_max_position_embeddings=original):
                return int(min(original * factor, _MAX_POSITIONS))
        return self.max_position_embeddings

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json that `from_dict` reads back.

        Rope parameters are spelled as in transformers 4, which transformers 5 reads as well.
        """
        eos = list(self.eos_token_ids)
        quantization = self.quantization and {"quantization_config": self.quantization.to_dict()}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.embed_dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp_dim,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling
            and {"rope_type": rope_type(self.rope_scaling), **asdict(self.rope_scaling)},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": self.dtype,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            **(quantization or {}),
        }

    @classmethod
    def llama3_8b(cls) -> Self:
        """Llama 3 8B Instruct."""
        return cls(**_SIZE_8B, **_LLAMA_3)

    @classmethod
    def llama3_70b(cls) -> Self:
        """Llama 3 70B Instruct."""
        return cls(**_SIZE_70B, **_LLAMA_3)

    @classmethod
    def llama3_1_8b(cls) -> Self:
        """Llama 3.1 8B Instruct."""
        return cls(**_SIZE_8B, **_extended(_LLAMA_3, factor=8.0))

    @classmethod
    def llama3_1_70b(cls) -> Self:
        """Llama 3.1 70B Instruct."""
        return cls(**_SIZE_70B, **_extended(_LLAMA_3, factor=8.0))

    @classmethod
    def llama3_1_405b(cls) -> Self:
        """Llama 3.1 405B Instruct."""
        return cls(**_SIZE_405B, **_extended(_LLAMA_3, factor=8.0))

    @classmethod
    def llama3_2_1b(cls) -> Self:
        """Llama 3.2 1B Instruct."""
        return cls(**_SIZE_1B, **_extended(_LLAMA_3, factor=32.0), tie_embeddings=True)

    @classmethod
    def llama3_2_3b(cls) -> Self:
        """Llama 3.2 3B Instruct."""
        return cls(**_SIZE_3B, **_extended(_LLAMA_3, factor=32.0), tie_embeddings=True)

    @classmethod
    def llama3_3_70b(cls) -> Self:
        """Llama 3.3 70B Instruct, whose architecture is that of 3.1."""
        return cls.llama3_1_70b()


def _size(layers: int, width: int, heads: int, head_dim: int, mlp: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "embed_dim": width,
        "num_heads": heads,
        "num_kv_heads": 8,
        "head_dim": head_dim,
        "mlp_dim": mlp,
    }


def _extended(base: dict[str, Any], factor: float) -> dict[str, Any]:
    """A Llama 3 with the longer context of 3.1, and the EOS id that 3.1 adds for tool calls."""
    original = base["max_position_embeddings"]
    scaling = Llama3Scaling(
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=original,
    )
    return base | {
        "max_position_embeddings": 16 * original,
        "rope_scaling": scaling,
        "eos_token_ids": (128001, 128008, 128009),
    }


_SIZE_1B = _size(16, 2048, 32, 64, 8192)
_SIZE_3B = _size(28, 3072, 24, 128, 8192)
_SIZE_8B = _size(32, 4096, 32, 128, 14336)
_SIZE_70B = _size(80, 8192, 64, 128, 28672)
_SIZE_405B = _size(126, 16384, 128, 128, 53248)
_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
    "eos_token_ids": (128001, 128009),
}
