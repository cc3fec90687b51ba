"""The server that a plan proves: its command line, and a manifest for Kubernetes.

    python -m llama_jax.plan --rate 8 --server-command
    python -m llama_jax.plan --rate 8 --kubernetes > llama.yaml

Both are checked by the server's own parser and by the sizes that its engine would choose
(`llama_jax.serve.dry_run`) before they are printed.
"""

import argparse
import json
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from llama_jax.costs.memory import page_bytes, ring_bytes
from llama_jax.engine.options import OPTIONS, EngineOptions
from llama_jax.engine.sizing import choose_sizes
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.model import local_path
from llama_jax.plan.numbers import amount
from llama_jax.plan.plan import Plan, Question
from sharding.errors import UserError
from sharding.stages import round_up

IMAGE = "llama-jax:latest"
MODELS = "/models"  # where a checkpoint is expected
COLUMNS = 76  # of a wrapped command line
SEQUENCE_STEP = 1024  # tokens to which the longest sequence is rounded up


@dataclass(frozen=True)
class Serving:
    """The server of one layout.

    Attributes:
      path: of the checkpoint, where the server runs.
      arguments: the server's flags after it.
      lines: what the server's dry run says of them.
      replicas: servers to start.
      gpus: of each.
      platform: of the GPUs.
      notes: what to do first, in sentences.
      calibration: the file that `arguments` name, if the plan counts on one.
    """

    path: str
    arguments: tuple[str, ...]
    lines: tuple[str, ...]
    replicas: int
    gpus: int
    platform: str
    notes: tuple[str, ...] = ()
    calibration: Path | None = None

    @property
    def command(self) -> str:
        """The command line, for a shell."""
        return shlex.join(["python", "-m", "llama_jax.serve", self.path, *self.arguments])

    @property
    def wrapped(self) -> str:
        """The command line on several lines, for a shell."""
        lines = [shlex.join(["python", "-m", "llama_jax.serve", self.path])]
        for argument in map(shlex.quote, self.arguments):
            if len(lines) > 1 and len(lines[-1]) + len(argument) < COLUMNS:
                lines[-1] += f" {argument}"
            else:
                lines.append(f"    {argument}")
        return " \\\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this mode."""
    add = parser.add_argument_group("server").add_argument
    add("--server-command", action="store_true", help="print the command line of the server")
    add("--kubernetes", action="store_true", help="print a manifest for Kubernetes, in YAML")
    add("--image", default=IMAGE, metavar="NAME", help="container image (%(default)s)")


def run(arguments: argparse.Namespace, plan: Plan) -> int:
    """Prints what the command line asks for; 1 if the plan misses a target, else 0."""
    from llama_jax.plan.kubernetes import checkpoint_note, manifest

    found = serving(plan)
    if arguments.json:
        content: dict[str, object] = {"command": found.command, "checked": list(found.lines)}
        if arguments.kubernetes:
            content["kubernetes"] = manifest(found, plan, arguments.image)
        print(json.dumps(content, indent=1, ensure_ascii=False))
    elif arguments.kubernetes:
        for note in (*found.notes, checkpoint_note(found)):
            print(f"# {note}")
        print(yaml.safe_dump_all(manifest(found, plan, arguments.image), sort_keys=False), end="")
    else:
        print(found.command)
        for line in (*found.lines, *found.notes):
            print(f"# {line}")
    if plan.best.holds:
        return 0
    missed = ", ".join(miss.target for miss in plan.best.missed)
    print(f"No layout keeps every target: the best one misses {missed}.", file=sys.stderr)
    return 1


def serving(plan: Plan) -> Serving:
    """The server of the best layout of a plan.

    Raises:
      UserError: its memory does not hold the model, or the server could not start.
    """
    from llama_jax.serve.command_line.arguments import engine_options, parse_arguments
    from llama_jax.serve.dry_run import describe

    best, question = plan.best, plan.question
    if not best.fits:
        raise UserError(
            f"There is no server to start: {question.gpus} x {question.gpu.name} do not hold "
            f"{question.model} in any layout."
        )
    path = _path(question)
    flags = _flags(plan, best)
    parsed = parse_arguments([path, *flags])
    lines = describe(
        deployed_name(question.model),
        engine_options(parsed, Path(path)),
        question.config,
        question.gpu,
    )
    notes = [_room(best)] if best.holds else []
    if (replicas := best.layout.replicas) > 1:
        notes.append(f"Start {replicas} of these servers, behind a load balancer.")
    if question.stored is None:
        notes.append(f"The checkpoint is expected at {path}.")
    if form := _new_format(question):
        source = "SRC" if question.stored is None else shlex.quote(_stored_path(question))
        target = f"{shlex.quote(path)} --quantize {form}"
        notes.append(f"Quantize it first: python -m convert quantize {source} {target}")
    return Serving(
        path,
        tuple(flags),
        tuple(lines),
        replicas,
        best.layout._replace(replicas=1).gpus,
        question.gpu.platform,
        tuple(notes),
        _calibration(plan, best),
    )


def _flags(plan: Plan, best: Candidate) -> list[str]:
    question = plan.question
    lengths, targets = question.workload, question.targets
    needed = lengths.prompt_tokens + lengths.output_tokens
    longest = min(round_up(needed, SEQUENCE_STEP), question.config.max_context)
    longest = min(longest, best.memory.tokens)
    found = {
        "--mesh": best.layout.mesh,
        "--max-model-len": longest,
        "--max-num-seqs": best.max_num_seqs,
        "--max-chunk": best.max_chunk,
    }
    if _is_narrowed(question):
        found["--dtype"] = "bfloat16"
    if question.kv_cache_dtype != "auto":
        found["--kv-cache-dtype"] = question.kv_cache_dtype
    if question.gpu.platform == "gpu" and targets.memory_share is not None:
        found["--gpu-memory-utilization"] = f"{targets.memory_share:g}"
    if 0 < (left := _cache_beside_ring(best, longest)) < best.memory.cache:
        found["--kv-cache-memory"] = left
    for name, seconds in (("ttft_slo", targets.ttft), ("tpot_slo", targets.tpot)):
        if seconds is not None:
            found[f"--{name.replace('_', '-')}"] = f"{1000 * _known_target(name, seconds):g}ms"
    if (file := _calibration(plan, best)) is not None:
        found["--calibration"] = file
    flags = [f"{flag}={value}" for flag, value in found.items()]
    return [*flags, "--fp8-activations"] if question.fp8_activations else flags


def _is_narrowed(question: Question) -> bool:
    """Whether a GPU is planned to hold in bfloat16 what the checkpoint stores in float32."""
    stored = None if question.stored is None else question.stored.dtype
    return question.gpu.platform != "cpu" and stored == "float32" != question.config.dtype


def _cache_beside_ring(best: Candidate, longest: int) -> int:
    """The bytes that are left for the KV cache where many sequences take more temporaries than the
    server reserves; none or less for a ring that no memory holds."""
    memory, deployment = best.memory, best.deployment
    options = EngineOptions(
        path="",
        max_model_len=longest,
        max_num_seqs=best.max_num_seqs,
        max_chunk=best.max_chunk,
    )
    page = page_bytes(deployment, best.replica.page_size)
    stages, platform = deployment.layout.num_stages, deployment.gpu.platform
    sizes, _ = choose_sizes(options, deployment.config, stages, page, memory.cache, platform)
    left = memory.cache + memory.temporaries - ring_bytes(deployment, sizes)
    return left if sizes.num_pages * page > left else memory.cache


def _known_target(name: str, seconds: float) -> float:
    """A latency target, or the nearest that the server's option of this name takes."""
    option = next(option for option in OPTIONS if option.name == name)
    return max(option.minimum or 0.0, min(seconds, option.maximum or math.inf))


def _room(best: Candidate) -> str:
    """Up to which rate the server has room, which may be less than what the layout can do."""
    seqs, peak = best.max_num_seqs, amount(best.peak_rate, "requests/s")
    each = "" if best.layout.replicas == 1 else " each"
    return f"{seqs:,} sequences at once{each} are enough for up to {peak} within the targets."


def _calibration(plan: Plan, best: Candidate) -> Path | None:
    """The calibration file that the ticks of a layout follow, if its targets use them."""
    measured, targets = best.replica.model.calibration, plan.question.targets
    if measured is None or not measured.ticks or (targets.ttft is None and targets.tpot is None):
        return None
    return plan.question.calibration_file


def _path(question: Question) -> str:
    """The path of the checkpoint as planned, or where one of this name is expected."""
    if question.stored is None:
        path = f"{MODELS}/{deployed_name(question.model)}"
    else:
        path = _stored_path(question)
    form = _new_format(question)
    return f"{os.path.abspath(path).removesuffix('.gguf')}-{form}" if form else path


def _stored_path(question: Question) -> str:
    """The path of the checkpoint that is given by its path."""
    given = local_path(question.model)
    return str(given.parent if given.name == "config.json" else given)


def _new_format(question: Question) -> str:
    """The format that the matrices must be converted to before they are served; "" for none."""
    planned, stored = question.config.quantization, question.stored
    if planned is None or (stored is not None and stored.quantization is not None):
        return ""
    return planned.format


def deployed_name(model: str) -> str:
    """A name that Kubernetes accepts: a label of DNS."""
    path = Path(model)
    path = path.resolve().parent if path.name == "config.json" else path
    plain = re.sub(r"[^a-z0-9]+", "-", path.name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"llama-{plain}").strip("-")[:50].strip("-")
