"""The arguments that say which model is served: its path, names, template and defaults."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from llama_jax.config.errors import ConfigError, SamplingError
from llama_jax.config.huggingface import CheckpointConfig, read_generation_config
from llama_jax.config.huggingface_generation import parse_generation_config
from llama_jax.config.sampling_params import SamplingParams

# Fields of generation_config.json that --override-generation-config may set.
OVERRIDES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the model."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        type=Path,
        help="checkpoint directory, in Hugging Face layout or as written by `python -m convert`, "
        "or a GGUF file (default: the demo checkpoint of the repository)",
    )
    model.add_argument(
        "--model", "--model-path", dest="model", metavar="PATH", type=Path, help="the same"
    )
    model.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="model name that requests use; if given several times, any of them, and responses "
        "have the first (default: the name of PATH)",
    )
    model.add_argument(
        "--quantization",
        "-q",
        metavar="METHOD",
        help="refuse a checkpoint that is not quantized with this method, such as fp8 or "
        "compressed-tensors; `python -m convert quantize` quantizes one",
    )
    model.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="a Jinja template to use instead of the checkpoint's own",
    )
    model.add_argument(
        "--generation-config",
        default="auto",
        metavar="auto|none|DIR",
        help="where the default sampling parameters come from: the checkpoint (auto), nowhere "
        "(none; also vllm), or another directory (default: %(default)s)",
    )
    model.add_argument(
        "--override-generation-config",
        type=_overrides,
        default={},
        metavar="JSON",
        help="other default sampling parameters, such as '{\"temperature\": 0.6}'; may set "
        + ", ".join(OVERRIDES),
    )


def check_path(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Joins PATH and --model; ends the program with one sentence if both are given."""
    if arguments.model is not None:
        if arguments.path is not None:
            parser.error("PATH and --model both name the checkpoint: give one of them")
        arguments.path = arguments.model


def check_quantization(declared: CheckpointConfig, method: str | None) -> None:
    """Checks that the checkpoint is quantized as --quantization says.

    Raises:
      ConfigError: it is not.
    """
    if method is None:
        return
    stored = declared.quantization
    own = None if stored is None else stored.method
    if method.replace("-", "_").lower() != (own or "").replace("-", "_").lower():
        state = "not quantized" if own is None else f"quantized with {own}"
        raise ConfigError(
            f"--quantization is {method}, but {declared.path} is {state}: leave the flag out, or "
            "quantize the checkpoint with `python -m convert quantize`."
        )


def default_params(declared: CheckpointConfig, arguments: argparse.Namespace) -> SamplingParams:
    """The sampling parameters for requests that set none.

    Raises:
      ConfigError: generation_config.json has settings that are not supported, or an override is
        out of range.
    """
    source = arguments.generation_config
    if source == "auto":
        params = declared.generation_defaults()
    elif source in ("none", "vllm"):
        params = SamplingParams()
    else:
        file, content = read_generation_config(Path(source))
        params = parse_generation_config(content, file)
    try:
        params = replace(params, **arguments.override_generation_config)
        params.check()
    except SamplingError as error:
        raise ConfigError(f"--override-generation-config: {error}") from None
    return params


def _overrides(text: str) -> dict[str, float]:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    for name, value in given.items():
        if name not in OVERRIDES:
            raise argparse.ArgumentTypeError(f"it may set {', '.join(OVERRIDES)}, not {name!r}")
        number = int if name == "top_k" else int | float
        if isinstance(value, bool) or not isinstance(value, number):
            raise argparse.ArgumentTypeError(f"{name} must be a number, not {value!r}")
    return given
