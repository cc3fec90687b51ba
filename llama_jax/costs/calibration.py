"""What was measured on the machine that is planned for: the calibration file. Imports no JAX.

`python -m llama_jax.plan --calibrate` writes it on the machine itself, and `python -m bench
calibrate` from committed results. `TickModel` then uses its figures in place of the measured
kernels of others. The file is JSON; units are in the names of its keys:

    {
     "format": "llama_jax calibration 1",
     "device": "NVIDIA H200", "mesh": "4x2",
     "model": {"vocab_size": 128256, "embed_dim": 8192, ...},
     "weights": "bfloat16", "kv_cache_dtype": "bf16", "fp8_activations": false,
     "with_collectives": true,
     "ticks": [{"rows": 8, "context": 2048, "chunk": 256, "prefix": 0, "seconds": 0.0061}, ...],
     "host_seconds_per_tick": 0.0004,
     "host_seconds_per_token": 5e-6, "host_seconds_per_request": 0.0003,
     "front_seconds": 0.004, "host_source": "what these four include, and how they were found",
     "streams": [{"streams": 8, "prompt_tokens": 32, "output_tokens": 48,
                  "first_token_seconds": 0.08, "token_seconds": 0.012}, ...],
     "copy_bytes_per_second": 4.13e12,
     "matrix_flops_per_second": {"bfloat16": 6.9e14},
     "collectives": [{"kind": "all_reduce", "ranks": 2, "bytes": 16384, "seconds": 5e-6}, ...],
     "versions": {"jax": "0.11.2"}, "source": "the command or the files that it was made from"
    }

A figure that was not measured is null, and a list without measurements is empty.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import Deployment
from llama_jax.costs.gpus import gpu_of_device
from llama_jax.costs.work import Work
from sharding.errors import UserError

FORMAT = "llama_jax calibration 1"
_EXTREME = 1e18  # no figure is larger, and but for 0 none is smaller than its inverse
COLLECTIVES = ("all_reduce", "ppermute")
# The fields of `LlamaConfig` on which the time of a tick depends.
MODEL_SIZES = (
    "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
)  # fmt: skip


class BadCalibration(UserError):
    """A file that is no calibration, or that holds for something else than what is planned."""


@dataclass(frozen=True)
class MeasuredTick:
    """The time of one tick: `rows@context + chunk@prefix`.

    Attributes:
      rows: decode rows, each with `context` keys.
      context: keys that each row attends to.
      chunk: prompt tokens of one prompt; 0 for none.
      prefix: tokens of that prompt before the chunk.
      seconds: from one tick to the next, with the devices kept busy: the median of many.
    """

    rows: int
    context: int
    chunk: int
    prefix: int
    seconds: float

    @property
    def work(self) -> Work:
        """What a stage computes in this tick."""
        return Work.of(self.rows, self.context, self.chunk, self.prefix)

    def __str__(self) -> str:
        chunk = f" + {self.chunk}@{self.prefix}" if self.chunk else ""
        return f"{self.rows}@{self.context}{chunk}"


@dataclass(frozen=True)
class MeasuredCollective:
    """The time of one collective.

    Attributes:
      kind: one of `COLLECTIVES`.
      ranks: in each of its groups.
      bytes: of each rank's array.
      seconds: of one.
    """

    kind: str
    ranks: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class MeasuredStreams:
    """Requests that were sent to the real server over HTTP, all at once.

    Attributes:
      streams: how many.
      prompt_tokens, output_tokens: of each.
      first_token_seconds: from sending one to its first token, the median.
      token_seconds: per token after the first, the median.
    """

    streams: int
    prompt_tokens: int
    output_tokens: int
    first_token_seconds: float
    token_seconds: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The content of a calibration file.

    Attributes:
      device: what JAX calls the device, such as "NVIDIA H200" or "cpu".
      mesh: "stages x ranks", such as "4x2".
      model: the fields `MODEL_SIZES` of the model's config.
      weights: the format of the layers' matrices: "bfloat16", "float32", or a name from
        `quantization.FORMATS`.
      kv_cache_dtype: "bf16", "fp8", "int8", or "fp32".
      fp8_activations: whether products multiplied fp8 by fp8, as in `Deployment`; a file that does
        not say so is of a time when none did.
      with_collectives: whether the ticks ran on the mesh; False for those of one rank alone, to
        which the time of the collectives must be added.
      ticks: measured ticks.
      host_seconds_per_tick: that the host works for one tick, whatever it holds.
      host_seconds_per_token: for each token that the tick gives, in addition.
      host_seconds_per_request: for each request that has arrived since the tick before.
      front_seconds: on a request's way to the engine, and on the way back to its client.
      host_source: what these four include, and how they were found.
      streams: over HTTP, from which they were found; empty if they are those of the engine alone.
      copy_bytes_per_second: read and written, of a copy in device memory.
      matrix_flops_per_second: of a large square product, by the dtype of its inputs.
      collectives: measured collectives.
      versions: of Python and of the packages that matter.
      source: the command that measured, or the files that the figures are from.
    """

    device: str
    mesh: str
    model: Mapping[str, int]
    weights: str
    kv_cache_dtype: str
    fp8_activations: bool = False
    with_collectives: bool = True
    ticks: tuple[MeasuredTick, ...] = ()
    host_seconds_per_tick: float | None = None
    host_seconds_per_token: float | None = None
    host_seconds_per_request: float | None = None
    front_seconds: float | None = None
    host_source: str = ""
    streams: tuple[MeasuredStreams, ...] = ()
    copy_bytes_per_second: float | None = None
    matrix_flops_per_second: Mapping[str, float] = field(default_factory=dict)
    collectives: tuple[MeasuredCollective, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def mismatch(self, deployment: Deployment) -> str | None:
        """What keeps these figures from holding for a deployment; None if they hold."""
        planned = {
            "model": model_sizes(deployment.config),
            "mesh": deployment.layout.mesh,
            "weights": deployment.weights,
            "KV cache": deployment.kv_dtype,
            "fp8 activations": _switch(deployment.fp8_activations),
        }
        measured = {
            "model": dict(self.model),
            "mesh": self.mesh,
            "weights": self.weights,
            "KV cache": self.kv_cache_dtype,
            "fp8 activations": _switch(self.fp8_activations),
        }
        gpu = gpu_of_device(self.device)
        if gpu is None or gpu.name != deployment.gpu.name:
            return f"it was measured on {self.device}, and not on {deployment.gpu.name}"
        for what, value in planned.items():
            if measured[what] != value:
                return f"it was measured with the {what} {measured[what]}, and not {value}"
        return None

    def check(self, deployment: Deployment) -> None:
        """Checks that the figures hold for a deployment.

        Raises:
          BadCalibration: they do not.
        """
        if problem := self.mismatch(deployment):
            raise BadCalibration(f"The calibration does not hold for this plan: {problem}.")

    def write(self, path: Path) -> None:
        """Writes the file, and the folder that it lies in if that is missing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        """Reads a file that `write` wrote.

        Raises:
          BadCalibration: it cannot be read, or a key is missing, unknown or has a wrong value.
        """
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise BadCalibration(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise BadCalibration(f"{path} is no calibration, since it is not JSON.") from error
        return cls.from_json(content, str(path))

    @classmethod
    def from_json(cls, content: Any, name: str) -> "Calibration":
        """Parses the content of a file; `name` names it in messages.

        Raises:
          BadCalibration: as `read`.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise BadCalibration(f'{name} is not a calibration: its "format" is not "{FORMAT}".')
        values = {key: value for key, value in content.items() if key != "format"}
        _check_keys(cls, values, name)
        for key, check in _CHECKS.items():
            if key in values and not check(values[key]):
                raise BadCalibration(f'{name}: "{key}" has no valid value; measure it anew.')
        for key, entry in _LISTS.items():
            values[key] = tuple(
                _entry(entry, item, f'{name}: "{key}"[{number}]')
                for number, item in enumerate(values.get(key, ()))
            )
        return cls(**values)


def model_sizes(config: LlamaConfig) -> dict[str, int]:
    """The `model` of a calibration for this config."""
    return {name: getattr(config, name) for name in MODEL_SIZES}


def _switch(on: bool) -> str:
    return "on" if on else "off"


def _check_keys(kind: Any, values: dict[str, Any], where: str) -> None:
    """Raises BadCalibration for a key that is no field of a dataclass, and for a missing one."""
    known = {entry.name: entry for entry in fields(kind)}
    if unknown := sorted(values.keys() - known.keys()):
        raise BadCalibration(f'{where} has the unknown key "{unknown[0]}".')
    required = _required(kind)
    if missing := sorted(required - values.keys()):
        raise BadCalibration(f'{where} lacks the key "{missing[0]}".')


def _required(kind: Any) -> set[str]:
    """The fields of a dataclass that have no default."""
    return {
        entry.name
        for entry in fields(kind)
        if entry.default is MISSING and entry.default_factory is MISSING
    }


def _entry(kind: Any, values: Any, where: str) -> Any:
    """An entry of one of the lists in `_LISTS`."""
    if not isinstance(values, dict):
        raise BadCalibration(f"{where} is not an object.")
    _check_keys(kind, values, where)
    for key, value in values.items():
        valid = value in COLLECTIVES if key == "kind" else _is_number(value)
        if valid and key in _POSITIVE:
            valid = value > 0
        if not valid or (key not in _NOT_WHOLE and not isinstance(value, int)):
            raise BadCalibration(f'{where}: "{key}" has no valid value.')
    if kind is MeasuredTick and values["rows"] + values["chunk"] == 0:
        raise BadCalibration(f"{where} has neither rows nor a chunk.")
    return kind(**values)


def _is_number(value: Any) -> bool:
    """Whether it is a number, not negative, that arithmetic does not overflow with."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (value == 0 or 1 / _EXTREME <= value <= _EXTREME)


def _is_rate(value: Any) -> bool:
    return value is None or (_is_number(value) and value > 0)


def _is_mesh(value: Any) -> bool:
    parts = value.split("x") if isinstance(value, str) else []
    return len(parts) == 2 and all(part.isdecimal() and int(part) > 0 for part in parts)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_time(value: Any) -> bool:
    return value is None or _is_number(value)


_LISTS: dict[str, Any] = {
    "ticks": MeasuredTick,
    "collectives": MeasuredCollective,
    "streams": MeasuredStreams,
}
_NOT_WHOLE = ("seconds", "first_token_seconds", "token_seconds", "kind")
_POSITIVE = (*_NOT_WHOLE[:3], "ranks", "bytes", "streams", "prompt_tokens", "output_tokens")
_CHECKS = {
    "device": _is_text,
    "mesh": _is_mesh,
    "model": lambda value: (
        _is_table(value)
        and value.keys() == set(MODEL_SIZES)
        and all(isinstance(size, int) and size > 0 for size in value.values())
    ),
    "weights": _is_text,
    "kv_cache_dtype": _is_text,
    "fp8_activations": lambda value: isinstance(value, bool),
    "with_collectives": lambda value: isinstance(value, bool),
    "ticks": lambda value: isinstance(value, list),
    "collectives": lambda value: isinstance(value, list),
    "streams": lambda value: isinstance(value, list),
    "host_seconds_per_tick": _is_time,
    "host_seconds_per_token": _is_time,
    "host_seconds_per_request": _is_time,
    "front_seconds": _is_time,
    "host_source": _is_text,
    "copy_bytes_per_second": _is_rate,
    "matrix_flops_per_second": lambda value: (
        _is_table(value) and all(_is_number(rate) and rate > 0 for rate in value.values())
    ),
    "versions": lambda value: _is_table(value) and all(map(_is_text, value.values())),
    "source": _is_text,
}
