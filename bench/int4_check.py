"""Compares the products with int4 matrices that this platform chooses with float64 on the host.

The numbers of rows are each just past what fills a block of the kernel, so most of the next one is
padding. Every product runs again and again, and once beside rows full of NaN.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench.one_device import DTYPE
from bench.result import Row, Target
from llama_jax.plan.machine.random_weights import random_array
from llama_jax.quantization import Int4
from llama_jax.ring.gpu_options import product_options
from llama_jax.ring.sizes import Bucket
from sharding.mesh import make_mesh
from sharding.program import MeshProgram

# Outputs and inputs: a rank's matrices of Llama-3-70B on 4 x 2.
SHAPES = ((8192, 4096), (5120, 8192), (8192, 14336), (28672, 8192))
SMALL_SHAPES = ((192, 512), (128, 1024))
NUM_ROWS, SMALL_NUM_ROWS = (1, 9, 65, 577), (1, 9)
GROUP = 128
SAMPLE = 1024  # outputs to compute in float64
RUNS = 20
MAX_ERROR = 0.01  # of the norm
MAX_NUMBER_ERROR = 0.1  # of any number, as a share of the typical one of its row

# (rows of each product, matrix of each product) -> results, as `bench.products` multiplies
Multiply = Callable[[tuple[jax.Array, ...], tuple[Any, ...]], tuple[jax.Array, ...]]


def check(multiply: Multiply, config: Any, small: bool) -> Iterator[list[Row]]:
    """Checks the products matrix by matrix, tiny ones first; yields the rows of each for a result.

    Args:
      multiply: multiplies each x by its matrix, which has an axis over stages.
      config: the model, for the options of the compiler.
      small: whether to take tiny matrices only.
    """
    for shape in SMALL_SHAPES:
        yield check_matrix(multiply, config, shape, SMALL_NUM_ROWS)
    for shape in () if small else SHAPES:
        yield check_matrix(multiply, config, shape, NUM_ROWS)


def targets(rows: list[Row]) -> list[Target]:
    """What the rows of `check` must meet."""

    def largest(name: str) -> float:
        return max(float(row[name]) for row in rows)  # type: ignore[arg-type]

    return [
        Target("int4: error of a product", largest("error"), MAX_ERROR, "max"),
        Target("int4: error of a number", largest("number error"), MAX_NUMBER_ERROR, "max"),
        Target(f"int4: of {RUNS} runs, those that differ", largest("changed"), 0, "max"),
        Target("int4: rows that NaN in others change", largest("moved"), 0, "max"),
    ]


def check_matrix(
    multiply: Multiply, config: Any, shape: tuple[int, int], numbers: Sequence[int]
) -> list[Row]:
    """The rows of products with one matrix `[out, in]`."""
    outputs, inputs = shape
    mesh, rng = make_mesh("1x1"), np.random.default_rng(0)
    matrix = random_matrix(outputs, inputs, NamedSharding(mesh, P()))
    options = product_options(config, Bucket(max(numbers), 0))
    program = MeshProgram(multiply, mesh, (P(), P()), P(), name="int4_check", options=options)
    x = rng.standard_normal((max(numbers), inputs), np.float32).astype(ml_dtypes.bfloat16)
    poisoned = x.copy()
    poisoned[1::2] = np.nan

    def run(x: np.ndarray) -> tuple[jax.Array, ...]:
        return program(tuple(x[:number] for number in numbers), (matrix,) * len(numbers))

    outs, beside_nan = run(x), run(poisoned)
    changed = np.zeros(len(numbers), int)
    for _ in range(RUNS - 1):
        changed += [not bool((a == b).all()) for a, b in zip(outs, run(x), strict=True)]
    sample = np.sort(rng.choice(outputs, min(outputs, SAMPLE), replace=False))
    expected = x.astype(np.float64) @ dequantized(matrix, sample).T
    return [
        {
            "format": "int4",
            "compared with float64": f"{outputs} x {inputs}",
            "rows": number,
            **errors(np.asarray(out[:, sample]), expected[:number]),
            "changed": int(times),
            "moved": int((out[::2] != other[::2]).any(axis=1).sum()),
        }
        for number, out, other, times in zip(numbers, outs, beside_nan, changed, strict=True)
    ]


def random_matrix(outputs: int, inputs: int, sharding: NamedSharding) -> Int4:
    """A random matrix in the layout of GPUs, with an axis over one stage."""
    groups = (1, outputs, inputs // GROUP)
    values = jax.ShapeDtypeStruct((1, outputs, inputs), jnp.int4, sharding=sharding)
    scale = jax.ShapeDtypeStruct(groups, DTYPE, sharding=sharding)
    return Int4(
        random_array(values, 0),
        random_array(scale, 1, 0.5, 1.0),
        random_array(scale, 2, -4.0, 4.0),
    )


def dequantized(matrix: Int4, outputs: np.ndarray) -> np.ndarray:
    """Some rows of a matrix in float64, computed apart from `Int4`."""
    values, scale, zero = (np.asarray(array[0, outputs]).astype(np.float64) for array in matrix)
    return values * np.repeat(scale, GROUP, axis=1) + np.repeat(zero, GROUP, axis=1)


def errors(found: np.ndarray, expected: np.ndarray) -> Row:
    """Errors of a product as a share of its norm, and of its worst number; infinite for NaN."""
    wrong = np.abs(found.astype(np.float64) - expected)
    typical = np.sqrt((expected**2).mean(axis=1, keepdims=True))
    shares = np.linalg.norm(wrong) / np.linalg.norm(expected), (wrong / typical).max()
    error, number = (float(share) if np.isfinite(share) else float("inf") for share in shares)
    return {"error": error, "number error": number}
