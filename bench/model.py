"""Whole models on one device: Llama-3-8B in bfloat16, and Llama-3-70B in 8 bits (B2, B3, B5).

Weights are random and made on the device. A figure is the tokens per second of ticks in which every
row decodes, at a fixed context. Its floor is the time that the bytes of the weights and of the KV
cache take at the copy rate of this run.

- `b2`: Llama-3-8B, batch 1, context 512
- `b3`: Llama-3-8B, batch 128, context 1,056
- `b5`: Llama-3-70B, batch 1, context 512, in the format of `--quantize`; needs 76 GB of memory
"""

import argparse
import gc
from dataclasses import dataclass, replace

from bench.one_device import OneDevice, Work
from bench.partial import keep
from bench.result import Plot, Result, Row, Target
from bench.roofline import PACKAGES, check_device, copy_rate
from bench.step import toy_config
from bench.timing import UNITS
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.plan.machine.timing import time_calls
from llama_jax.quantization import QUANTIZERS


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
      size: the name of a `LlamaConfig`.
      batch: the decode rows.
      context: the keys that each row attends to.
      quantized: whether the matrices of the layers are quantized.
      share: the goal, as a share of the copy rate.
    """

    size: str
    batch: int
    context: int
    quantized: bool
    share: float


CASES = {
    "b5": Case("llama3_70b", 1, 512, True, 0.75),
    "b2": Case("llama3_8b", 1, 512, False, 0.72),
    # 60 % of the floor at the 4.8 TB/s of an H200's datasheet, of which a copy reaches 4.3.
    "b3": Case("llama3_8b", 128, 1056, False, 0.67),
}
TOY_CONTEXT = 64
SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m bench model`."""
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument(
        "--quantize", choices=QUANTIZERS, default="int8", help="of b5 (default: %(default)s)"
    )
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try it on a CPU")


def run(args: argparse.Namespace) -> Result:
    """Times the cases; keeps what is measured so far in a partial file.

    Raises:
      UserError: there is no GPU.
    """
    check_device(args.toy)
    copy = copy_rate(args.toy)
    rows: list[Row] = []
    targets: list[Target] = []

    def result() -> Result:
        return Result.measured(
            "model",
            "Decoding with a whole model with random weights on one device.",
            args=vars(args),
            packages=PACKAGES,
            units=UNITS | {"tokens_per_second": ""},
            rows=rows,
            targets=targets,
            plots=[Plot("A decode tick of a whole model", "case", ("time", "floor"), kind="bar")],
        )

    device: OneDevice | None = None
    for name in args.cases:
        case = CASES[name]
        config = toy_config() if args.toy else getattr(LlamaConfig, case.size)()
        if case.quantized:
            config = replace(config, quantization=Quantization(format=args.quantize))
        if device is None or device.config != config:
            device = None  # frees the weights before others are made
            gc.collect()
            device = OneDevice(config)
        rows.append(case_row(name, device, args.toy, copy))
        if not args.toy:
            what = f"{name}: share of the copy rate"
            targets.append(Target(what, rows[-1]["share"], case.share, "min"))  # type: ignore
        keep(result(), args.output)
    return result()


def case_row(name: str, device: OneDevice, toy: bool, copy: float) -> Row:
    """Times the ticks of a case; `copy` is the copy rate in bytes per second."""
    case = CASES[name]
    work = Work(rows=case.batch, context=TOY_CONTEXT if toy else case.context)
    size = device.layer_bytes + device.head_bytes + device.kv_bytes(work)
    timing, floor = time_calls(device.tick(work), 0 if toy else SECONDS), size / copy
    quantization = device.config.quantization
    return {
        "case": name,
        "model": "toy" if toy else case.size,
        "weights": "bfloat16" if quantization is None else quantization.format,
        "batch": case.batch,
        "context": work.context,
        **timing.row,
        "bytes": size,
        "copy_rate": copy,
        "floor": floor,
        "tokens_per_second": case.batch / timing.median,
        "share": floor / timing.median,
    }
