"""The accuracy of each quantized format on the demo checkpoint: `python -m bench quantization`.

For each format: bytes of the weights, their relative error by kind of matrix, the KL divergence of
the predictions from the unquantized model's on the sample text of `convert --check`, and, through
the engine on a 2x2 mesh, the fraction of held-out sums that get the unquantized model's answer and
the fraction that get the right one.
"""

import argparse
import tempfile
from contextlib import closing
from pathlib import Path

from bench.result import Plot, Result, Row, Target
from convert.conversion import Options, convert
from convert.divergence import divergence
from convert.sample import sample_windows
from convert.source import open_source
from demo.corpus import held_out_pairs, sum_answer
from llama_jax import LLM, SamplingParams
from llama_jax.checkpoint import open_checkpoint
from llama_jax.quantization import QUANTIZERS

CHECKPOINT = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"
MESH = "2x2"
UNITS = {
    "right answers": "",
    "unchanged answers": "",
    "size": "bytes",
    "KL divergence": "nats per token",
    "largest KL divergence": "nats",
    "unchanged best token": "",
    "relative error": "",
}
PHRASINGS = ("What is {a} + {b}?", "{a}+{b}", "Can you add {a} and {b}?", "{a} plus {b}")
TARGET = 0.95  # for int8 and fp8: minimum fraction of answers like the unquantized model's


def ask(path: Path) -> list[str]:
    """Greedy answers to every held-out sum."""
    questions = [
        PHRASINGS[i % len(PHRASINGS)].format(a=a, b=b) for i, (a, b) in enumerate(held_out_pairs())
    ]
    with LLM(path, mesh=MESH) as llm:
        chats = [[{"role": "user", "content": question}] for question in questions]
        completions = llm.chat(chats, SamplingParams(temperature=0, max_tokens=64))
    return [completion.text for completion in completions]


def agreement(answers: list[str], expected: list[str]) -> float:
    """The fraction of answers that are as expected."""
    return sum(a == b for a, b in zip(answers, expected, strict=True)) / len(answers)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(args: argparse.Namespace) -> Result:
    """Quantizes the demo checkpoint in every format, and asks it every sum."""
    right = [sum_answer(*pair) for pair in held_out_pairs()]
    plain = ask(CHECKPOINT)
    source = open_source(CHECKPOINT)
    windows = sample_windows(source, None)
    rows: list[Row] = [{"weights": "unquantized", "right answers": agreement(plain, right)}]
    errors: list[Row] = []
    for quantize in QUANTIZERS:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / quantize
            report = convert(source, path, Options(quantize=quantize))
            with closing(open_checkpoint(path)) as quantized:
                predictions = divergence(source.reader, quantized, windows)
            found = ask(path)
        rows.append(
            {
                "weights": quantize,
                "right answers": agreement(found, right),
                "unchanged answers": agreement(found, plain),
                "size": report.bytes,
                "KL divergence": predictions.mean,
                "largest KL divergence": predictions.largest,
                "unchanged best token": predictions.agreement,
            }
        )
        errors += [
            {"weights": quantize, "matrix": matrix, "relative error": error}
            for matrix, error in report.quantization_error.items()
        ]
        print(f"{quantize}: {rows[-1]}", flush=True)
    return Result.measured(
        "quantization",
        f"the demo checkpoint on {MESH}: answers to {len(right):,} held-out sums, and predictions "
        "of the sample text of convert --check",
        args=vars(args),
        packages=("jax", "numpy"),
        units=UNITS,
        rows=[*rows, *errors],
        targets=[
            Target(f"unchanged answers, {row['weights']}", row["unchanged answers"], TARGET, "min")
            for row in rows
            if row["weights"] in ("int8", "fp8")
        ],
        plots=[
            Plot(
                "Relative error of the weights",
                "matrix",
                ("relative error",),
                by=("weights",),
                kind="bar",
            )
        ],
    )
