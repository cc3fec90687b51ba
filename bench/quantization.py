"""The accuracy of each quantized format on the demo checkpoint: `python -m bench.quantization`.

For each format: bytes of the weights, their relative error by kind of matrix, the KL divergence of
the predictions from the unquantized model's on the sample text of `convert --check`, and, through
the engine on a 2x2 mesh, the fraction of held-out sums that get the unquantized model's answer and
the fraction that get the right one.
"""

import argparse
import json
import sys
import tempfile
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from bench.machine import describe
from convert.conversion import Options, convert
from convert.divergence import divergence
from convert.sample import sample_windows
from convert.source import open_source
from demo.corpus import held_out_pairs, sum_answer
from llama_jax import LLM, SamplingParams
from llama_jax.checkpoint import open_checkpoint
from llama_jax.quantization import QUANTIZERS

RESULT = Path(__file__).parent / "results" / "quantization.json"
CHECKPOINT = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"
MESH = "2x2"
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


def main() -> int:
    """Prints and writes the results. Returns the exit status: 1 if a target is missed."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    right = [sum_answer(*pair) for pair in held_out_pairs()]
    plain = ask(CHECKPOINT)
    source = open_source(CHECKPOINT)
    windows = sample_windows(source, None)
    rows = {"plain": {"right": agreement(plain, right)}}
    for quantize in QUANTIZERS:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / quantize
            report = convert(source, path, Options(quantize=quantize))
            with closing(open_checkpoint(path)) as quantized:
                predictions = divergence(source.reader, quantized, windows)
            found = ask(path)
        row = {
            "bytes": report.bytes,
            "relative_error": report.quantization_error,
            "divergence": asdict(predictions),
            "same_answers": agreement(found, plain),
            "right": agreement(found, right),
        }
        rows[quantize] = row
        errors = report.quantization_error.values()
        print(
            f"{quantize}: {report.bytes / 1e6:.2f} MB, relative error {min(errors):.4f} to "
            f"{max(errors):.4f}, KL {predictions.mean:.2e} nats per token, same answers "
            f"{row['same_answers']:.3f}, right {row['right']:.3f} (unquantized "
            f"{rows['plain']['right']:.3f})",
            flush=True,
        )
    met = all(rows[quantize]["same_answers"] >= TARGET for quantize in ("int8", "fp8"))
    verdict = "met" if met else "MISSED"
    print(f"int8 and fp8 keep at least {TARGET} of the unquantized answers: {verdict}")
    result = {"questions": len(right), "mesh": MESH, "target": TARGET, "met": met, "rows": rows}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({**describe("jax", "numpy"), **result}, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
