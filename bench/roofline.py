"""The rates of this device: copying memory, and multiplying matrices.

Decoding can be no faster than its bytes at the copy rate, and prefill no faster than its arithmetic
at the matrix rate. Every other measurement on a GPU measures them in the same run and reports its
figures as shares of them. `--toy` takes sizes that a CPU multiplies at once.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from bench.result import Plot, Result, Row
from bench.timing import UNITS
from llama_jax.plan.machine import rates
from sharding.errors import UserError

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy")
COPY_BYTES, TOY_COPY_BYTES = 4 << 30, 1 << 22
SIDE, TOY_SIDE = 8192, 256
SECONDS = 0.5
# Bytes/s and bfloat16 FLOP/s by datasheet (SXM; without sparsity), by the name of the device.
DATASHEET = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}


def check_device(toy: bool) -> None:
    """Checks that there is a GPU for a measurement at full size, before anything is allocated.

    Raises:
      UserError: there is none.
    """
    if not toy and jax.default_backend() == "cpu":
        raise UserError("JAX finds no GPU here: add --toy to try this at tiny sizes on the CPU.")


def copy_rate(toy: bool) -> float:
    """Bytes per second that a copy from device memory to device memory reads and writes."""
    size = TOY_COPY_BYTES if toy else COPY_BYTES
    return rates.copy_rate(jax.devices()[0], size, 0 if toy else SECONDS)


def matrix_rate(toy: bool, dtype: Any = jnp.bfloat16) -> float:
    """FLOP/s of a square matrix product of random values, with sums in float32."""
    side = TOY_SIDE if toy else SIDE
    return rates.matrix_rate(jax.devices()[0], side, 0 if toy else SECONDS, dtype)


def datasheet() -> tuple[float, float] | None:
    """Bytes/s and bfloat16 FLOP/s of this device by its datasheet, if it is in `DATASHEET`."""
    kind = jax.devices()[0].device_kind
    return next((rates for name, rates in DATASHEET.items() if name in kind), None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m bench roofline`."""
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to try it on a CPU")


def run(args: argparse.Namespace) -> Result:
    """Measures the rates.

    Raises:
      UserError: there is no GPU.
    """
    check_device(args.toy)
    rows: list[Row] = [{"operation": "copy", "copy_rate": copy_rate(args.toy)}]
    for name, dtype in (("bfloat16", jnp.bfloat16), ("fp8", jnp.float8_e4m3fn)):
        rate = matrix_rate(args.toy, dtype)
        rows.append({"operation": f"{name} product", "matrix_rate": rate})
    plots = [Plot("Matrix rate", "operation", ("matrix_rate",), kind="bar")]
    if (rates := datasheet()) is not None:
        plots = [Plot("Share of the data sheet", "operation", ("share_of_datasheet",), kind="bar")]
        for row, peak in zip(rows, (rates[0], rates[1], 2 * rates[1]), strict=True):
            row["share_of_datasheet"] = list(row.values())[1] / peak  # type: ignore
    return Result.measured(
        "roofline",
        f"The rates of one device: {jax.devices()[0].device_kind}.",
        args=vars(args),
        packages=PACKAGES,
        units=UNITS | {"share_of_datasheet": ""},
        rows=rows,
        plots=plots,
    )
