"""One rank's tick at full size: a middle stage of Llama-3-70B on 4 x 2 (B1 and B4).

The rank has 20 layers with half of the heads and of the MLP, 1/8 of the vocabulary, and random
bfloat16 weights. Decoding ticks (B1) have 1, 8 and 32 rows of 2,048 tokens; their floor is the time
that the bytes of the layers and of the KV cache take at the copy rate of this run. Prefill ticks
(B4) have a prompt of 2,048 tokens, or a chunk of 512; their floor is the time that the arithmetic
of the layers takes at the matrix rate of this run. The LM head runs too and counts as a cost. The
program is the project's own without its collectives, since a mesh of one device has none.
"""

import argparse
from dataclasses import replace

from bench.one_device import OneDevice, Work
from bench.partial import keep
from bench.result import Plot, Result, Row, Target
from bench.roofline import PACKAGES, check_device, copy_rate, matrix_rate
from bench.timing import UNITS
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.plan.machine.timing import time_calls
from llama_jax.quantization import QUANTIZERS

STAGES, RANKS = 4, 2
# Batch → the least share of the copy rate (B1).
DECODE = {1: 0.80, 8: 0.85, 32: 0.85}
CONTEXT = 2048
# (chunk, prefix) → the greatest time in seconds (B4).
PREFILL = {(2048, 0): 0.060, (512, 0): 0.016, (512, 1536): 0.016}
TOY_CONTEXT, TOY_PREFILL = 64, ((128, 0), (64, 64))
SECONDS = 1.0


def rank_config(config: LlamaConfig) -> LlamaConfig:
    """The share of one rank on 4 x 2, as a model of its own."""
    return replace(
        config,
        num_layers=config.num_layers // STAGES,
        num_heads=config.num_heads // RANKS,
        num_kv_heads=config.num_kv_heads // RANKS,
        mlp_dim=config.mlp_dim // RANKS,
        vocab_size=config.vocab_size // (STAGES * RANKS),
        eos_token_ids=(),
    )


def toy_config() -> LlamaConfig:
    """A model that a CPU runs at once, with the proportions of heads of Llama-3-70B."""
    return replace(
        LlamaConfig.llama3_70b(),
        vocab_size=1024,
        embed_dim=64,
        num_layers=4,
        num_heads=16,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=128,
        eos_token_ids=(),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m bench step`."""
    parser.add_argument("--batches", type=int, nargs="*", default=list(DECODE), help="decode rows")
    parser.add_argument("--quantize", choices=QUANTIZERS, help="format of the layers' matrices")
    parser.add_argument("--no-prefill", action="store_true", help="only decode")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try it on a CPU")


def run(args: argparse.Namespace) -> Result:
    """Times the ticks; keeps what is measured so far in a partial file.

    Raises:
      UserError: there is no GPU.
    """
    check_device(args.toy)
    config = rank_config(toy_config() if args.toy else LlamaConfig.llama3_70b())
    if args.quantize:
        config = replace(config, quantization=Quantization(format=args.quantize))
    copy, matrix = copy_rate(args.toy), matrix_rate(args.toy)
    device = OneDevice(config)
    rows: list[Row] = []
    targets: list[Target] = []

    def result() -> Result:
        plot = Plot("A rank's decode tick", "batch", ("time", "floor"))
        return Result.measured(
            "step",
            "One tick of one rank of a middle stage of Llama-3-70B on 4 x 2, without collectives.",
            args=vars(args),
            packages=PACKAGES,
            units=UNITS,
            rows=rows,
            targets=targets,
            plots=[plot] if args.batches else [],
        )

    context, seconds = (TOY_CONTEXT, 0.0) if args.toy else (CONTEXT, SECONDS)
    for batch in args.batches:
        rows.append(decode_row(device, batch, context, copy, seconds))
        if batch in DECODE and not args.toy:
            what = f"share of the copy rate at batch {batch}"
            targets.append(Target(what, rows[-1]["share"], DECODE[batch], "min"))  # type: ignore
        keep(result(), args.output)
    for chunk, prefix in () if args.no_prefill else TOY_PREFILL if args.toy else PREFILL:
        rows.append(prefill_row(device, chunk, prefix, matrix, seconds))
        if not args.toy:
            what, limit = f"chunk of {chunk} after {prefix} tokens", PREFILL[chunk, prefix]
            targets.append(Target(what, rows[-1]["time"], limit, "max", "s"))  # type: ignore
        keep(result(), args.output)
    return result()


def decode_row(device: OneDevice, batch: int, context: int, copy: float, seconds: float) -> Row:
    """Times a tick of decode rows; `copy` is the copy rate in bytes per second."""
    work = Work(rows=batch, context=context)
    size = device.layer_bytes + device.kv_bytes(work)
    timing, floor = time_calls(device.tick(work), seconds), size / copy
    return {
        "batch": batch,
        "context": context,
        **timing.row,
        "bytes": size,
        "copy_rate": copy,
        "floor": floor,
        "share": floor / timing.median,
    }


def prefill_row(device: OneDevice, chunk: int, prefix: int, matrix: float, seconds: float) -> Row:
    """Times a tick of one chunk; `matrix` is the matrix rate in FLOP/s."""
    work = Work(chunk=chunk, prefix=prefix)
    flops = work.flops(device.config)
    timing, floor = time_calls(device.tick(work), seconds), flops / matrix
    return {
        "chunk": chunk,
        "prefix": prefix,
        **timing.row,
        "flops": flops,
        "matrix_rate": matrix,
        "floor": floor,
        "share": floor / timing.median,
    }
