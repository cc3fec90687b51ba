"""Kernels that others measured on H100 and H200. Imports no JAX.

The figures are NVIDIA's (`data/measured_kernels_llama70b.json`, with its license): the products,
the attention and the collectives of Llama-3-70B, as vLLM, TensorRT-LLM and SGLang run them. The
kernels that XLA compiles are others, so the spread of the three sets is kept.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

from llama_jax.costs.curve import Curve

FILE = "measured_kernels_llama70b.json"
MICROSECOND = 1e-6
KERNEL_SETS = ("vllm", "trtllm", "sglang")
_QUERY_HEADS, _KV_HEADS = 64, 8  # of Llama-3-70B, whose attention was measured
_RANKS = (1, 2, 4, 8)


class Shape(NamedTuple):
    """A matrix that is multiplied: N outputs, K inputs."""

    outputs: int
    inputs: int


class Rates(NamedTuple):
    """What the device of a table can do: bytes/s, and FLOP/s by dtype."""

    bandwidth: float
    flops: Mapping[str, float]


# Of the devices in the table, by data sheet.
REFERENCE = {
    "h100_sxm": Rates(3.35e12, {"bfloat16": 989e12, "fp8": 1979e12}),
    "h200_sxm": Rates(4.8e12, {"bfloat16": 989e12, "fp8": 1979e12}),
}
LINK = 450e9  # bytes/s in each direction, of NVLink on both


@lru_cache
def table() -> dict[str, dict[str, dict[str, float]]]:
    """The file, in microseconds."""
    content: dict[str, Any] = json.loads((files(__package__) / "data" / FILE).read_text())
    return content


def source() -> str:
    """Where the figures come from."""
    return f"measured kernels of {str(table()['source']).split(' (')[0]}"


def product_floor(rows: float, shape: Shape, rates: Rates, dtype: str, width: float) -> float:
    """The least seconds of a product of M rows: its bytes, or its arithmetic.

    Args:
      rows: M.
      shape: of the matrix.
      rates: of the device.
      dtype: in which it is multiplied, a key of `rates.flops`.
      width: bytes of a stored element of the matrix.
    """
    n, k = shape
    activations = 1 if dtype == "fp8" else 2
    moved = n * k * width + rows * (k * activations + 2 * n)
    return max(moved / rates.bandwidth, 2 * rows * n * k / rates.flops[dtype])


@lru_cache
def products(system: str, dtype: str) -> "Products":
    """The one `Products` of these arguments: fitting takes a while."""
    return Products(system, dtype)


class Products:
    """The measured matrix products of one system and dtype.

    Args:
      system: a key of `REFERENCE`.
      dtype: "bfloat16", or "fp8" for fp8 times fp8.
    """

    def __init__(self, system: str, dtype: str) -> None:
        self.rates, self.dtype = REFERENCE[system], dtype
        self.width = 1 if dtype == "fp8" else 2
        self._fitted: dict[str, dict[float, tuple[float, float]]] = {}
        self._measured: dict[str, dict[Shape, dict[float, float]]] = defaultdict(dict)
        for key, times in table()["gemm_us"].items():
            on, by, of, _, name = key.split("|")
            if (on, of) == (system, dtype):
                n, k = map(int, re.findall(r"[NK]=(\d+)", name))
                points = {float(m): time * MICROSECOND for m, time in times.items()}
                self._measured[by.split()[0]][Shape(n, k)] = points

    def is_measured(self, shape: Shape) -> bool:
        """Whether this very shape is in the table."""
        return shape in self._measured["vllm"]

    def curve(self, kernels: str, shape: Shape, rates: Rates | None = None) -> Curve:
        """Seconds by M of a product with a matrix of this shape.

        A shape that is not in the table takes, for each M, a fixed time plus a multiple of its
        floor: those two numbers are fitted to the 16 shapes that are. Left out of the fit, half of
        the shapes of the table come out within 10 %.

        Args:
          kernels: one of `KERNEL_SETS`.
          shape: of the matrix.
          rates: of another device: the times are then those of the same share of its floor.
        """
        shapes = self._measured[kernels]
        points = shapes.get(shape) or {
            m: fixed + factor * self._floor(m, shape)
            for m, (fixed, factor) in self._fits(kernels).items()
        }
        if rates is not None and rates != self.rates:
            points = {
                m: time
                * product_floor(m, shape, rates, self.dtype, self.width)
                / self._floor(m, shape)
                for m, time in points.items()
            }
        return Curve(points)

    def _floor(self, rows: float, shape: Shape) -> float:
        return product_floor(rows, shape, self.rates, self.dtype, self.width)

    def _fits(self, kernels: str) -> dict[float, tuple[float, float]]:
        """For each M, the fixed time and the multiple of the floor."""
        if kernels not in self._fitted:
            self._fitted[kernels] = self._fit(self._measured[kernels])
        return self._fitted[kernels]

    def _fit(
        self, shapes: Mapping[Shape, Mapping[float, float]]
    ) -> dict[float, tuple[float, float]]:
        sizes = next(iter(shapes.values()))
        return {
            m: fit([(self._floor(m, shape), times[m]) for shape, times in shapes.items()])
            for m in sizes
        }


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Fits time = fixed + factor · floor, by least squares of the relative error.

    Neither may be what no device can do: fixed ≥ 0 and factor ≥ 1.
    """
    weights = [1 / time**2 for _, time in points]
    total = sum(weights)
    x = sum(w * floor for w, (floor, _) in zip(weights, points, strict=True)) / total
    y = sum(w * time for w, (_, time) in zip(weights, points, strict=True)) / total
    spread = sum(w * (floor - x) ** 2 for w, (floor, _) in zip(weights, points, strict=True))
    slope = sum(
        w * (floor - x) * (time - y) for w, (floor, time) in zip(weights, points, strict=True)
    )
    factor = max(1.0, slope / spread)
    fixed = y - factor * x
    return (fixed, factor) if fixed >= 0 else (0.0, max(1.0, y / x))


def _fewest_heads(heads: float, measured: tuple[int, ...]) -> int:
    """The least measured number of heads that is not below this one; else the greatest."""
    return next((n for n in sorted(measured) if n >= heads), max(measured))


class DecodeAttention:
    """The measured attention of decode rows in one layer.

    A number of heads that was not measured is that of the next larger one with fewer rows, since
    each pair of a row and a KV head is work of its own.

    Args:
      system: a key of `REFERENCE`.
      kernels: one of `KERNEL_SETS`.
      kv_dtype: "bfloat16" or "fp8".
      kv_heads: of the rank, in heads of 128 numbers.
    """

    def __init__(self, system: str, kernels: str, kv_dtype: str, kv_heads: float) -> None:
        heads = _fewest_heads(kv_heads, tuple(_KV_HEADS // ranks for ranks in _RANKS))
        ranks = _KV_HEADS // heads
        self._factor = kv_heads / heads
        name = f"{system}|{kernels}|kv {kv_dtype}|TP{ranks} {_QUERY_HEADS // ranks}q/{heads}kv"
        by_rows: dict[int, dict[float, float]] = defaultdict(dict)
        for key, time in table()["decode_attention_us"][name].items():
            rows, context = key.removeprefix("b").split("@")
            by_rows[int(rows)][float(context)] = time * MICROSECOND
        self._by_rows = {rows: Curve(times) for rows, times in sorted(by_rows.items())}
        self._contexts = sorted({context for times in by_rows.values() for context in times})

    def curve(self, rows: int) -> Curve:
        """Seconds by context of this many rows, all with the same context."""
        scaled = rows * self._factor
        return Curve(
            {
                context: Curve(
                    {float(known): curve.at(context) for known, curve in self._by_rows.items()}
                ).at(scaled)
                for context in self._contexts
            }
        )


def prefill_attention(system: str, kernels: str, kv_dtype: str, query_heads: float) -> Curve:
    """Seconds, in one layer, of the attention of a chunk by its pairs of a query and a key.

    Measured are whole prompts. A chunk with a prefix takes the time of the prompt that has as many
    pairs.

    Args:
      system, kernels, kv_dtype: as for `DecodeAttention`.
      query_heads: of the rank, in heads of 128 numbers.
    """
    heads = _fewest_heads(query_heads, tuple(_QUERY_HEADS // ranks for ranks in _RANKS))
    measured = table()["prefill_attention_us"][
        f"{system}|{kernels}|kv {kv_dtype}|TP{_QUERY_HEADS // heads}"
    ]
    factor = heads / query_heads
    return Curve(
        {float(t) * (float(t) + 1) / 2 * factor: us * MICROSECOND for t, us in measured.items()}
    )


def all_reduce(system: str, kernels: str, ranks: int) -> Curve | None:
    """Seconds of an all-reduce by the bytes of each rank's array; None if it was not measured.

    Args:
      system: a key of `REFERENCE`.
      kernels: one of `KERNEL_SETS`, or "nccl", which was measured on H100 only and stands for both.
      ranks: in the group.
    """
    name = f"{system}|{kernels} custom (CUDA graph)|{ranks} GPUs|elements of bf16"
    if kernels == "nccl":
        name = f"h100_sxm|NCCL 2.29.2 all_reduce|{ranks} GPUs|elements"
    return _bytes_curve(name)


def all_gather(ranks: int) -> Curve | None:
    """Seconds of NCCL's all-gather by the bytes of each rank's array; None if not measured.

    The elements of the table are those that a rank has in the end: if they were each rank's own,
    the largest would move at six times the bandwidth of the links.
    """
    return _bytes_curve(f"h100_sxm|NCCL 2.29.2 all_gather|{ranks} GPUs|elements", ranks)


def _bytes_curve(name: str, parts: int = 1) -> Curve | None:
    """The curve of a collective by the bytes of one of so many parts of its elements."""
    times = table()["all_reduce_us"].get(name)
    if times is None:
        return None
    return Curve({2 * float(count) / parts: time * MICROSECOND for count, time in times.items()})
