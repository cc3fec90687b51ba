"""The matrix products of a rank's layer, by weight format and number of rows M.

Each product is `llama_jax.model.llama.linear` with a matrix as the engine holds it in memory. One
program multiplies by many different matrices of the same shape, so that no cache holds them, and
the device takes longer than the host does to start it. Before, products with int4 are compared with
float64 (`bench.int4_check`). A figure is the time of one product; the bytes are those of the
weights, and the share is that of the copy rate of the same run. From a few hundred rows on the
arithmetic is the limit, and the rate in TFLOP/s says more.
"""

import argparse
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench.int4_check import Multiply, check, targets
from bench.one_device import DTYPE
from bench.partial import keep
from bench.result import Plot, Result, Row, Target
from bench.roofline import PACKAGES, check_device, copy_rate, matrix_rate
from bench.step import rank_config, toy_config
from bench.timing import UNITS
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.model.llama import linear
from llama_jax.plan.machine.random_weights import nbytes, random_array, random_params
from llama_jax.plan.machine.timing import Timing, time_calls
from llama_jax.quantization import QUANTIZERS
from llama_jax.ring.backend import AUTO, choose_backend
from llama_jax.ring.gpu_options import product_options
from llama_jax.ring.sizes import Bucket
from llama_jax.weights.placement import param_shapes
from sharding.mesh import make_mesh
from sharding.program import MeshProgram

ROWS, TOY_ROWS = (1, 8, 32, 512), (8,)
FORMATS = ("bfloat16", *QUANTIZERS)
# Of the matrices in a program. To read so many bytes takes an H200 1 ms; the host needs 0.1 to 0.2
# to start a program of a few kernels, and 0.6 for one of a hundred.
ENOUGH_BYTES = 4_000_000_000
COPIES = 64  # at most
SECONDS = 0.2
MAX_ERROR = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m bench products`."""
    parser.add_argument("--rows", type=int, nargs="+", help="values of M (default: 1 8 32 512)")
    parser.add_argument("--formats", choices=FORMATS, nargs="+", default=list(FORMATS))
    parser.add_argument("--check-only", action="store_true", help="check int4, and time nothing")
    parser.add_argument("--small", action="store_true", help="tiny matrices in the check")
    parser.add_argument("--toy", action="store_true", help="tiny matrices, to try it on a CPU")


def run(args: argparse.Namespace) -> Result:
    """Checks and times the products; keeps what is measured so far in a partial file.

    Raises:
      UserError: there is no GPU.
    """
    check_device(args.toy)
    rows: list[Row] = []
    checks: list[Target] = []

    def result() -> Result:
        plot = Plot("Products of a layer", "rows", ("layer_time",), by=("format",), log="xy")
        return Result.measured(
            "products",
            "The matrix products of one layer of a rank of Llama-3-70B on 4 x 2.",
            args=vars(args),
            packages=PACKAGES,
            units=UNITS
            | dict.fromkeys(("share_of_copy", "share_of_matrix", "error", "number error"), "")
            | {"layer_time": "s", "changed": "", "moved": ""},
            rows=rows,
            targets=checks + error_targets(rows),
            plots=[plot] if any("layer_time" in row for row in rows) else [],
        )

    if args.check_only or "int4" in args.formats:
        small = args.small or args.toy
        # Kept after each matrix: that a kernel hangs or crashes then says with which one.
        for found in check(chosen_products(), layer_config("int4", args.toy), small):
            rows += found
            checks = targets(rows)
            keep(result(), args.output)
    if args.check_only:
        return result()
    copy, matrix = copy_rate(args.toy), matrix_rate(args.toy)
    for num_rows in args.rows or (TOY_ROWS if args.toy else ROWS):
        for name in args.formats:
            rows += layer_rows(name, num_rows, args.toy, copy, matrix)
            keep(result(), args.output)
    return result()


def error_targets(rows: list[Row]) -> list[Target]:
    """The largest error of each format; the products of formats with groups are in bfloat16."""
    timed = [row for row in rows if "time" in row]
    errors = [(row["format"], row["error"]) for row in timed if isinstance(row["error"], float)]
    largest = {name: max(error for other, error in errors if other == name) for name, _ in errors}
    return [Target(f"error of {name}", error, MAX_ERROR, "max") for name, error in largest.items()]


def layer_rows(name: str, num_rows: int, toy: bool, copy: float, matrix: float) -> list[Row]:
    """Times each product of a layer in one format; the last row has their sum."""
    found: list[Row] = []
    for product, shapes, width in matrices(name, toy):
        case = {"format": name, "product": product, "rows": num_rows}
        try:
            row = product_row(shapes, width, num_rows, name, copy, matrix, 0 if toy else SECONDS)
        except jax.errors.JaxRuntimeError as error:  # a finding, too
            row = {"error": str(error).splitlines()[0][:200]}
        found.append(case | row)
    if not all("time" in row for row in found):
        return found
    total = sum(row["time"] for row in found)  # type: ignore[misc]
    return [*found, {"format": name, "rows": num_rows, "layer_time": total}]


def layer_config(name: str, toy: bool) -> LlamaConfig:
    """A rank's share of one layer, in one format."""
    config = replace(rank_config(toy_config() if toy else LlamaConfig.llama3_70b()), num_layers=1)
    return replace(config, quantization=Quantization(format=name)) if name in QUANTIZERS else config


def matrices(name: str, toy: bool) -> list[tuple[str, Any, int]]:
    """The matrices of a layer in one format: name, shapes as in memory, and number of columns."""
    config = layer_config(name, toy)
    layer = param_shapes(config, make_mesh("1x1"), DTYPE).layers[0]
    columns = {"wo": config.num_heads * config.head_dim, "w_down": config.mlp_dim}
    return [
        (product, shapes, columns.get(product.split(".")[-1], config.embed_dim))
        for product, shapes in layer.items()
        if max(len(array.shape) for array in jax.tree.leaves(shapes)) == 3
    ]


def product_row(
    shapes: Any, width: int, num_rows: int, name: str, copy: float, matrix: float, seconds: float
) -> Row:
    """Times one product in the format `name`; the rates are in bytes and FLOP per second."""
    size = nbytes(shapes)
    copies = max(2, min(COPIES, -(-ENOUGH_BYTES // size))) if seconds else 2
    timing, outputs, error = time_products(shapes, width, num_rows, copies, name, seconds)
    flops = 2 * num_rows * width * outputs
    return {
        **timing.row,
        "bytes": size,
        "copy_rate": copy,
        "share_of_copy": size / copy / timing.median,
        "flops": flops,
        "matrix_rate": matrix,
        "share_of_matrix": flops / matrix / timing.median,
        "error": error,
    }


def time_products(
    shapes: Any, width: int, num_rows: int, copies: int, name: str, seconds: float
) -> tuple[Timing, int, float]:
    """Times one product in a program of `copies`; also returns its number of outputs and error."""
    mesh = make_mesh("1x1")
    sharding = NamedSharding(mesh, P())
    weights = tuple(random_params([shapes] * copies))
    x_shape = jax.ShapeDtypeStruct((num_rows, width), DTYPE, sharding=sharding)
    # XLA would join products of one x into one product.
    xs = tuple(random_array(x_shape, seed) for seed in range(copies))
    options = product_options(layer_config(name, toy=False), Bucket(num_rows, 0))
    program = MeshProgram(
        chosen_products(), mesh, (P(), P()), P(), name="products", options=options
    )
    timing = time_calls(lambda: program(xs, weights), seconds) / copies
    out = program(xs, weights)[0]
    return timing, out.shape[-1], relative_error(out, xs[0], weights[0])


def chosen_products() -> Multiply:
    """Multiplies as the layers do on this device; `ring.stage.make_layer` chooses alike."""
    mesh = make_mesh("1x1")
    return _multiply_by_kernel if choose_backend(AUTO, mesh).int4_kernel else _multiply


def relative_error(out: jax.Array, x: jax.Array, weight: Any) -> float:
    """The norm of the difference from a product in float32, as a share of the norm of that."""

    def compare(out: jax.Array, x: jax.Array, weight: Any) -> jax.Array:
        matrix = jax.tree.map(lambda array: array[0], weight)
        wide = matrix.dequantize() if isinstance(matrix, tuple) else matrix.astype(jnp.float32)
        exact = jnp.matmul(x.astype(jnp.float32), wide.T, precision="highest")
        return jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)

    # It runs once, so that no GPU should look for the fastest way.
    options = {"xla_gpu_autotune_level": 0}
    return float(jax.jit(compare, compiler_options=options)(out, x, weight))


def _multiply(xs: tuple[jax.Array, ...], weights: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    # Without the axis over stages, as the ring passes them to the layers.
    matrices = (jax.tree.map(lambda array: array[0], weight) for weight in weights)
    return tuple(linear(x, matrix) for x, matrix in zip(xs, matrices, strict=True))


def _multiply_by_kernel(
    xs: tuple[jax.Array, ...], weights: tuple[Any, ...]
) -> tuple[jax.Array, ...]:
    from llama_jax.model.hopper_int4 import with_kernel

    return _multiply(xs, with_kernel(weights))
