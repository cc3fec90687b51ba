"""The flags of the model, and of the engine, which derive from the options of `EngineOptions`."""

import argparse
from pathlib import Path

from llama_jax.engine.options import OPTIONS, Option
from llama_jax.serve.command_line import values

_EXAMPLES = {"BYTES": ", such as 2GB", "SHARE": ", such as 0.9", "TIME": ", such as 50ms"}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds PATH and the flags of what the checkpoint is and how it is offered."""
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
        "--model",
        "--model-path",
        dest="model_path",
        type=Path,
        metavar="PATH",
        help="the same as PATH",
    )
    model.add_argument(
        "--served-model-name",
        type=values.name,
        nargs="+",
        metavar="NAME",
        help="model names that requests may use; answers have the first (default: the name of "
        "PATH)",
    )
    model.add_argument(
        "--chat-template",
        type=values.path,
        metavar="FILE",
        help="a Jinja template of chats (default: that of the checkpoint)",
    )
    model.add_argument(
        "--generation-config",
        default="auto",
        metavar="SOURCE",
        help="where the sampling parameters of requests that set none come from: auto is the "
        "checkpoint's generation_config.json, vllm is no file, or the path of a directory that has "
        "one (default: %(default)s)",
    )
    model.add_argument(
        "--override-generation-config",
        type=values.json_object,
        default={},
        metavar="JSON",
        help="sampling parameters that override those, such as '{\"temperature\": 0.5}'",
    )
    model.add_argument(
        "--quantization",
        "-q",
        metavar="METHOD",
        help="refuse a checkpoint that is not quantized by this method, such as gptq, awq, fp8 or "
        "compressed-tensors (default: any, and none)",
    )
    model.add_argument(
        "--preflight",
        action="store_true",
        help="check the machine before the engine starts, as python -m llama_jax.plan --validate "
        "does; a failure stops the start, with the exit code of what is wrong",
    )
    model.add_argument(
        "--preflight-gpu",
        default="auto",
        metavar="NAME",
        help="the GPU that was planned for, such as h100-sxm (default: auto, what there is)",
    )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each option of the engine."""
    engine = parser.add_argument_group("engine")
    for option in OPTIONS:
        _add_option(engine, option)
        if option.name == "mesh":
            _add_parallel_sizes(engine)


def _add_parallel_sizes(engine: argparse._ArgumentGroup) -> None:
    engine.add_argument(
        "--pipeline-parallel-size",
        "-pp",
        "--pp-size",
        "--pp",
        type=values.positive,
        metavar="S",
        help="the S of --mesh SxT",
    )
    engine.add_argument(
        "--tensor-parallel-size",
        "-tp",
        "--tp-size",
        "--tp",
        type=values.positive,
        metavar="T",
        help="the T of --mesh SxT",
    )


def _add_option(engine: argparse._ArgumentGroup, option: Option) -> None:
    flag = f"--{option.name.replace('_', '-')}"
    if option.type is bool and option.default:
        engine.add_argument(
            flag,
            *option.flags,
            action=argparse.BooleanOptionalAction,
            dest=option.name,
            default=True,
            help=f"{option.help} (default: {option.default_text})",
        )
        return
    if option.type is bool:
        engine.add_argument(flag, action="store_true", dest=option.name, help=option.help)
        return
    example = _EXAMPLES.get(option.unit, "")
    engine.add_argument(
        flag,
        *option.flags,
        type=values.option_parser(option),
        default=None if option.name == "mesh" else option.default,
        choices=option.choices,
        metavar=None if option.choices else option.unit,
        help=f"{option.help}{example} (default: {option.default_text})",
    )
