"""Published measurements against the planner's arithmetic: `python -m bench published`.

Nothing is measured here. Each figure was measured by others on their own software, and is set
beside what `llama_jax.costs` expects on the same GPUs: low, expected and high. The error is that of
the expected figure. "roofline" is what is expected without measured kernels, and "limit" what the
data sheet of the device allows.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from bench.result import Plot, Result, Row, Target
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.costs.closed_loop import closed_loop
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.figure import Band
from llama_jax.costs.gpus import find_gpu
from llama_jax.costs.latency import decode_rate, saturated_rate, time_per_token
from llama_jax.costs.memory import kv_bytes_per_token, weight_bytes
from llama_jax.costs.products import RankProducts
from llama_jax.costs.tick_time import TickModel, Times
from llama_jax.costs.work import Work

LLAMA_2_7B = replace(
    LlamaConfig.llama3_8b(),
    vocab_size=32000,
    num_kv_heads=32,
    mlp_dim=11008,
    max_position_embeddings=4096,
    eos_token_ids=(2,),
)
LLAMA_70B, LLAMA_8B = LlamaConfig.llama3_70b(), LlamaConfig.llama3_8b()
MEGAKERNEL = 0.78 * 3.35e12 / 2.4716e9  # tokens/s: 78 % of the bandwidth, over the weights
MEMORY_SHARE = 0.9  # of a GPU, for weights and cache, as TensorRT-LLM has it by default
MAX_BATCH = 2048
MAX_TOKENS = 8192  # of a tick, likewise
COLUMNS = ("published", "low", "expected", "high", "roofline", "limit")
UNITS = {"s": "", "tokens/s": " rate", "requests/s": " load"}


@dataclass(frozen=True)
class Published:
    """A figure, and how the planner comes to it.

    Attributes:
      what: the system, the model and the setting.
      figure: what was measured.
      value: of it, in `unit`.
      unit: one of `UNITS`.
      deployment: what it was measured on.
      plan: model of the ticks → the planner's figure, in `unit`.
      source: where it was published.
      limit: the largest relative error that is allowed; None to print it only.
    """

    what: str
    figure: str
    value: float
    unit: str
    deployment: Deployment
    plan: Callable[[TickModel], Band]
    source: str
    limit: float | None = None


def deployment(
    config: LlamaConfig,
    gpu: str,
    ranks: int = 1,
    weights: str | None = None,
    kv: str = "bf16",
    fp8_activations: bool = False,
) -> Deployment:
    """One stage on GPUs of this name."""
    if weights is not None:
        config = replace(config, quantization=Quantization(format=weights))
    return Deployment(config, find_gpu(gpu), Layout(1, ranks), kv, fp8_activations)


def measurements() -> list[Published]:
    """The published figures."""
    return [*nim(), *single_stream(), *vllm(), *tensorrt_llm()]


def nim() -> list[Published]:
    """NIM: closed loop, prompts of 5,000 tokens prefilled whole, answers of 500."""
    two = deployment(LLAMA_70B, "h100-sxm", 2, "fp8", "fp8", True)
    source = "NVIDIA NIM for LLMs, performance tables"
    found = []
    for users, ttft, itl in ((1, 0.407, 0.0186), (25, 0.689, 0.0388)):
        name = f"NIM, 70B fp8, 2 x H100, {users} x 5000/500"

        def latency(model: TickModel, which: str, users: int) -> Band:
            return getattr(closed_loop(model, users, 5000, 500, 5056), which)

        for figure, value, which in (("TTFT", ttft, "ttft"), ("ITL", itl, "tpot")):
            plan = partial(latency, which=which, users=users)
            found.append(Published(name, figure, value, "s", two, plan, source, 0.15))
    return found


def single_stream() -> list[Published]:
    """Decoding of few sequences, by batch and context."""
    cases = (
        ("TensorRT-LLM, 70B fp8, one H200, batch 1", 51.1, 1, 1000, 0.20,
         deployment(LLAMA_70B, "h200", 1, "fp8", "fp8", True), "NVIDIA developer blog"),
        ("SGLang + torch.compile, 8B bf16, one H100, batch 1", 155.7, 1, 512, None,
         deployment(LLAMA_8B, "h100-sxm"), "sglang issue 1008"),
        ("megakernel, Llama-3.2-1B bf16, one H100, batch 1", MEGAKERNEL, 1, 128, None,
         deployment(LlamaConfig.llama3_2_1b(), "h100-sxm"), "Hazy Research, 78 % of bandwidth"),
        ("gpt-fast, Llama-2-7B bf16, one A100 80 GB, batch 1", 104.9, 1, 128, None,
         deployment(LLAMA_2_7B, "a100-80"), "gpt-fast README"),
        ("gpt-fast, Llama-2-7B int8, one A100 80 GB, batch 1", 155.6, 1, 128, None,
         deployment(LLAMA_2_7B, "a100-80", 1, "int8"), "gpt-fast README"),
        ("jax-llm-examples, 70B int8, 16 x TPU v5e, batch 8", 8 * 159.0, 8, 512, None,
         deployment(LLAMA_70B, "tpu-v5e", 16, "int8"), "jax-llm-examples README"),
    )  # fmt: skip
    return [
        Published(
            what, "decoding", value, "tokens/s", where,
            partial(decode_rate, rows=rows, context=context), source, limit,
        )
        for what, value, rows, context, limit, where, source in cases
    ]  # fmt: skip


def vllm() -> list[Published]:
    """vLLM at 2 requests/s: 20 to 22 ms a token, so that 8 sequences are alive."""
    four = deployment(LLAMA_70B, "h100-sxm", 4)
    return [
        Published(
            "vLLM 0.6, 70B bf16, 4 x H100, 2 requests/s of 202/179", "TPOT", 0.021, "s", four,
            lambda model: closed_loop(model, 8, 202, 179, 512).tpot, "vLLM blog, a chart",
        ),
        Published(
            "vLLM 0.6, 70B bf16, 4 x H100, 8 sequences of 292 tokens", "TPOT without prompts",
            0.021, "s", four, partial(time_per_token, rows=8, context=292),
            "vLLM blog, a chart",
        ),
        *(
            Published(
                f"vLLM 0.6, 70B bf16, 4 x H100, {prompt}/{output}", "most requests", rate,
                "requests/s", four,
                partial(saturated_rate, prompt=prompt, output=output, chunk=MAX_TOKENS, rows=256),
                "vLLM blog, a chart",
            )
            for prompt, output, rate in ((202, 179, 17.3), (462, 256, 15.4))
        ),
    ]  # fmt: skip


def tensorrt_llm() -> list[Published]:
    """TensorRT-LLM with more requests than it can do."""
    found = []
    for name, fp8, rates in (
        ("FP16", False, ((2048, 128, 10.07), (1000, 1000, 5.96), (128, 128, 82.8))),
        ("FP8", True, ((2048, 128, 15.6), (1000, 1000, 10.7), (128, 128, 121.0))),
    ):
        kv = "fp8" if fp8 else "bf16"
        where = deployment(LLAMA_70B, "h100-sxm", 8, "fp8" if fp8 else None, kv, fp8)
        for prompt, output, rate in rates:
            rows = batch(where, prompt + output)
            found.append(
                Published(
                    f"TensorRT-LLM 0.14, 70B {name}, 8 x H100, {prompt}/{output}",
                    "most requests", rate, "requests/s", where,
                    partial(saturated_rate, prompt=prompt, output=output, chunk=MAX_TOKENS,
                            rows=rows),
                    "TensorRT-LLM perf-overview.md",
                )
            )  # fmt: skip
    return found


def batch(where: Deployment, tokens: int) -> int:
    """The sequences of this many tokens that fit into memory."""
    room = where.gpu.memory_bytes * MEMORY_SHARE - sum(weight_bytes(where).values())
    return min(MAX_BATCH, int(room / (kv_bytes_per_token(where) * tokens)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no options."""


def run(args: argparse.Namespace) -> Result:
    """Compares; a target is missed if an error is larger than its limit."""
    rows, targets = [], []
    for case in measurements():
        row = compare(case)
        rows.append(row)
        if case.limit is not None:
            error = abs(float(row["error"]))  # type: ignore[arg-type]
            what = f"error of {case.figure}: {case.what}"
            targets.append(Target(what, error, case.limit, "max"))
    units = {f"{name}{suffix}": unit for unit, suffix in UNITS.items() for name in COLUMNS}
    return Result.measured(
        "published",
        "Measurements of others against the planner's arithmetic; nothing was measured here.",
        args=vars(args),
        packages=("llama-jax",),
        units=units | {"error": "", "roofline_error": ""},
        rows=rows,
        targets=targets,
        plots=[
            Plot(
                "Error of the planner, as a share of what was published",
                ("setting", "figure"),
                ("error", "roofline_error"),
                kind="bar",
            )
        ],
    )


class Theirs(TickModel):
    """Ticks of other software, which multiplies fp8 by fp8 in all of them."""

    def products_of(self, work: Work) -> RankProducts:
        """Those of a tick with a chunk."""
        return self.products


class Limit(Theirs):
    """Ticks that take no longer than the data sheet of the device allows."""

    def times(self, work: Work) -> Times:
        """The floor."""
        return (self.floor(work),) * 3


def compare(case: Published) -> Row:
    """One published figure beside the planner's."""
    model = Theirs(case.deployment)
    alone = replace(case.deployment, gpu=replace(case.deployment.gpu, measured_as=None))
    found, roofline = case.plan(model), case.plan(Theirs(alone)).expected
    limit = case.plan(Limit(case.deployment)).expected
    figures = (case.value, found.low, found.expected, found.high, roofline, limit)
    known = model.products.known
    return {
        "setting": case.what,
        "figure": case.figure,
        **{f"{name}{UNITS[case.unit]}": v for name, v in zip(COLUMNS, figures, strict=True)},
        "error": found.expected / case.value - 1,
        "roofline_error": roofline / case.value - 1,
        "products": f"{known.evidence}: {known.source.split(' of ')[0]}",
        "source": case.source,
    }
