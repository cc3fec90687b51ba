"""The options of an engine, each declared once. Imports no JAX: the HTTP process uses them too.

The command line of `llama_jax.serve`, the documentation of `LLM`, and every check of an option that
does not depend on the checkpoint derive from the declarations in `EngineOptions`.
"""

import dataclasses
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from sharding.errors import UserError

T = TypeVar("T", bound=Callable[..., Any])


class OptionError(UserError):
    """An option has a wrong type or is out of range, whatever the checkpoint and the machine."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """The declaration of one option.

    Attributes:
      name: the field of `EngineOptions`.
      type: its type; includes None where the engine may choose.
      default: its default.
      help: what it means, without a verb and without its default.
      unset: the meaning of None, if None is allowed.
      unit: what its value is or counts, such as "TOKENS"; "TIME" is in seconds.
      minimum: the least valid number.
      maximum: the greatest valid number, if there is one.
      choices: the valid texts, if they are few.
      flags: other flags of the same meaning on the command line, in the words of other servers.
    """

    name: str
    type: Any
    default: Any
    help: str
    unset: str | None = None
    unit: str = "N"
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] | None = None
    flags: tuple[str, ...] = ()

    @property
    def default_text(self) -> str:
        """The default in words."""
        if self.type is bool:
            return "on" if self.default else "off"
        return str(self.default) if self.unset is None else self.unset

    def check(self, value: object) -> None:
        """Checks one value of this option.

        Raises:
          OptionError: it has the wrong type or is out of range.
        """
        if self.type is bool:
            if not isinstance(value, bool):
                raise OptionError(f"{self.name} must be True or False, got {value!r}.")
            return
        kinds = self.type | int if issubclass(float, self.type) else self.type
        if not isinstance(value, kinds) or isinstance(value, bool):
            names = {int: "an integer", float: "a number"}
            kind = next((name for kind, name in names.items() if issubclass(kind, self.type)), None)
            raise OptionError(f"{self.name} must be {kind or 'a string'}, got {value!r}.")
        if self.choices is not None and value not in self.choices:
            known = ", ".join(self.choices)
            raise OptionError(f"{self.name} must be one of {known}, got {value!r}.")
        if self.minimum is not None and isinstance(value, int | float):
            if not value >= self.minimum:  # not a number is in no range
                raise OptionError(f"{self.name} must be at least {self.minimum}, got {value}.")
            if self.maximum is not None and value > self.maximum:
                raise OptionError(f"{self.name} must be at most {self.maximum:g}, got {value}.")
            if value >= 2**63:
                raise OptionError(f"{self.name} must fit into 64 bits, got {value}.")


def _option(default: Any, help: str, **more: Any) -> Any:
    """A field of `EngineOptions`; the arguments are attributes of `Option`."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The checkpoint that an engine serves, and how.

    Attributes:
      path: a checkpoint directory, in Hugging Face layout or this project's Orbax layout, or a
        GGUF file.
      {options}
    """

    path: str
    mesh: str = _option("1x1", "pipeline stages x tensor-parallel ranks, such as 4x2", unit="SxT")
    dtype: str = _option(
        "auto",
        "dtype of weights and activations; auto is float32 on CPU and the checkpoint's own dtype "
        "on a GPU",
        unit="DTYPE",
        choices=("auto", "float32", "bfloat16"),
    )
    kv_cache_dtype: str = _option(
        "auto",
        "dtype of the KV cache; auto is that of the activations, and fp8 and int8 hold about twice "
        "the tokens of bf16 in the same memory",
        unit="DTYPE",
        choices=("auto", "bf16", "fp8", "int8"),
    )
    max_model_len: int | None = _option(
        None,
        "maximum number of tokens in a sequence, prompt and answer together",
        unset="the model's limit, or less if the KV cache holds less",
        unit="TOKENS",
        minimum=2,
        flags=("--context-length", "--max-seq-len"),
    )
    max_num_seqs: int | None = _option(
        None,
        "maximum number of sequences that are generated at once",
        unset="32 on CPU; 256 on a GPU, or fewer if its KV cache holds less than 1024 tokens for "
        "each",
        minimum=1,
        flags=("--max-running-requests",),
    )
    max_queue: int = _option(
        256,
        "maximum number of requests that wait; more are refused, with HTTP status 429",
        minimum=1,
        flags=("--max-num-queued-reqs", "--max-queued-requests"),
    )
    kv_cache_memory: int | None = _option(
        None,
        "bytes of KV cache on each device",
        unset="the free memory of a GPU; about 1 GB for all devices together on CPU",
        unit="BYTES",
        minimum=1,
        flags=("--kv-cache-memory-bytes",),
    )
    gpu_memory_utilization: float | None = _option(
        None,
        "share of each GPU's memory that weights, KV cache and temporary arrays may take together",
        unset="0.85, or what XLA_CLIENT_MEM_FRACTION says",
        unit="SHARE",
        minimum=0.01,
        maximum=1.0,
    )
    page_size: int | None = _option(
        None,
        "tokens per KV-cache page",
        unset="16 on CPU, 64 on a GPU",
        unit="TOKENS",
        minimum=1,
        flags=("--block-size", "--tokens-per-block"),
    )
    max_chunk: int | None = _option(
        None,
        "maximum number of prompt tokens per tick, rounded up to a multiple of 64; more gives "
        "faster first tokens and slower streams",
        unset="128 on CPU, 256 on a GPU; with tpot_slo, as many as it can allow",
        unit="TOKENS",
        minimum=1,
        flags=("--chunked-prefill-size",),
    )
    tpot_slo: float | None = _option(
        None,
        "target for the mean time per output token: the chunk is the largest one that keeps it",
        unset="none",
        unit="TIME",
        minimum=0.0001,
        maximum=10,
    )
    ttft_slo: float | None = _option(
        None,
        "target for the time to the first token: while a prompt would be late, the chunk grows, if "
        "need be above what tpot_slo allows",
        unset="none",
        unit="TIME",
        minimum=0.001,
        maximum=300,
    )
    calibration: str | None = _option(
        None,
        "file that `python -m llama_jax.plan --calibrate` wrote on this machine, with the times of "
        "ticks from which the latency targets choose; one for another device, mesh or model is "
        "refused",
        unset="none, and the table of GPUs counts",
        unit="FILE",
    )
    results_late: int | None = _option(
        None,
        "ticks between dispatching a tick and reading its result",
        unset="2 on a GPU; 0 on CPU, which runs one program at a time",
        unit="TICKS",
        minimum=0,
    )
    attention_backend: str = _option(
        "auto",
        "attention over the KV cache; hopper is a kernel for Hopper GPUs, plain is compiled by XLA "
        "for any device, and auto is hopper wherever it can run",
        unit="NAME",
        choices=("auto", "plain", "hopper"),
    )
    wait_for_programs: bool = _option(
        False,
        "whether a start waits until all programs are compiled, instead of compiling the smaller "
        "ones while requests run; then the program of a tick, and the rounding of its results, "
        "depends on the requests alone, unless there is a latency target",
    )
    prefix_caching: bool = _option(
        True,
        "whether requests that begin alike share the computed beginning",
        flags=("--enable-prefix-caching",),
    )
    fp8_activations: bool = _option(
        False,
        "round the inputs of fp8 matrices to fp8 as well in ticks with prompt tokens, for faster "
        "prefill with about 1.4 times the error; needs an fp8 checkpoint and GPUs that multiply in "
        "fp8",
    )
    seed: int | None = _option(
        None,
        "seed from which requests without one get theirs, in the order of their arrival",
        unset="random",
        unit="SEED",
        minimum=0,
        flags=("--random-seed",),
    )
    strict_config: bool = _option(
        False,
        "refuse a checkpoint whose config.json or generation_config.json has unknown keys, instead "
        "of warning",
    )

    def check(self) -> None:
        """Checks what can be checked without a checkpoint or a device.

        Raises:
          OptionError: an option has the wrong type or is out of range.
        """
        for option in OPTIONS:
            option.check(getattr(self, option.name))
        if self.calibration is not None and self.tpot_slo is None and self.ttft_slo is None:
            raise OptionError(
                "calibration gives the times of ticks for latency targets: set tpot_slo or "
                "ttft_slo as well, or leave it out."
            )


_TYPES = get_type_hints(EngineOptions)
OPTIONS = tuple(
    Option(
        name=field.name,
        type=_TYPES[field.name],
        default=field.default,
        **field.metadata,
    )
    for field in dataclasses.fields(EngineOptions)
    if field.name != "path"
)


def lists_options(documented: T) -> T:
    """Replaces "{options}" in the docstring of a class or function by a list of all options."""
    doc = documented.__doc__
    if doc is not None:  # python -OO has none
        line = next(line for line in doc.splitlines() if "{options}" in line)
        indent = line[: line.index("{options}")]
        listed = (
            textwrap.fill(
                f"{option.name}: {option.help} (default: {option.default_text}).",
                width=100,
                initial_indent=indent,
                subsequent_indent=indent + "  ",
            )
            for option in OPTIONS
        )
        documented.__doc__ = doc.replace(line, "\n".join(listed))
    return documented


lists_options(EngineOptions)
