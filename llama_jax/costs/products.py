"""The matrix products of a rank: those of its layers, and the LM head. Imports no JAX."""

from collections.abc import Callable
from typing import NamedTuple

from llama_jax.costs.deployment import Deployment
from llama_jax.costs.figure import Band, Evidence
from llama_jax.costs.kernels import (
    KERNEL_SETS,
    REFERENCE,
    Rates,
    Shape,
    product_floor,
    products,
    source,
)
from llama_jax.costs.memory import weight_bytes
from llama_jax.costs.roofline import shares_of
from llama_jax.weights.axes import kv_replicas
from sharding.stages import positions_per_stage, round_up

# Shares of the data sheet's bandwidth at which products read weights in 8 bits, and in 4, which
# they convert to the dtype of the activations: at best, as expected, and at worst. On an H200,
# XLA's read 8 bits at 45 to 88 % of the copy rate, which is 86 to 89 % of the data sheet's, and
# the kernel for int4 reads at 39 % with 1 row, 38 with 8 and 31 with 32.
_CONVERTED = (0.9, 0.7, 0.4)
_CONVERTED_INT4 = (0.7, 0.35, 0.25)
_COMPUTE_BOUND = 512  # rows from which arithmetic is the limit of a product in bfloat16
_READING = 16  # rows up to which a product takes no longer than reading its matrix


class Known(NamedTuple):
    """How times are known."""

    evidence: Evidence
    source: str


def layer_shapes(deployment: Deployment) -> dict[str, Shape]:
    """The matrices of a layer on one rank."""
    config, ranks = deployment.config, deployment.layout.num_ranks
    kv_heads = config.num_kv_heads * kv_replicas(config, ranks) // ranks
    heads = config.num_heads // ranks
    mlp = config.mlp_dim // ranks
    return {
        "qkv": Shape((heads + 2 * kv_heads) * config.head_dim, config.embed_dim),
        "o": Shape(config.embed_dim, heads * config.head_dim),
        "gate_up": Shape(2 * mlp, config.embed_dim),
        "down": Shape(config.embed_dim, mlp),
    }


def head_shape(deployment: Deployment) -> Shape:
    """The rank's share of the LM head."""
    ranks = deployment.layout.num_stages * deployment.layout.num_ranks
    vocabulary = round_up(deployment.config.vocab_size, ranks) // ranks
    return Shape(vocabulary, deployment.config.embed_dim)


class RankProducts:
    """The products of one rank in a tick: their floors and times by the number of rows M.

    Attributes:
      layers: layer positions of a stage.
      width: bytes that an element of the layers' matrices takes, scales included.
      known: how the times of the layers' products are known.
      head_known: how the time of the head's is.
    """

    def __init__(self, deployment: Deployment) -> None:
        gpu, config = deployment.gpu, deployment.config
        self.deployment = deployment
        self.layers = positions_per_stage(config.num_layers, deployment.layout.num_stages)
        self.shapes, self.head = layer_shapes(deployment), head_shape(deployment)
        held = weight_bytes(deployment)
        elements = sum(shape.outputs * shape.inputs for shape in self.shapes.values())
        self.width = (held["matrices"] + held["scales"]) / (elements * self.layers)
        self.plain_width = 4 if deployment.dtype == "float32" else 2
        own = deployment.dtype if deployment.dtype in gpu.flops else "bfloat16"
        in_fp8 = deployment.fp8_activations and deployment.weights.startswith("fp8")
        self.dtype = "fp8" if in_fp8 and "fp8" in gpu.flops else own
        self.converted = self.width < self.plain_width and self.dtype != "fp8"
        self._reading_shares = _CONVERTED if self.width >= 1 else _CONVERTED_INT4
        self._own = own
        # Of the dtypes in the table only, so that equal rates are those of its device.
        rates = {name: rate for name, rate in gpu.flops.items() if name != "int8"}
        self._rates = Rates(gpu.bandwidth, rates)
        self._shares = shares_of(gpu.platform)
        system = gpu.measured_as
        if system and own == "bfloat16" and self.plain_width == 2:
            self._sets = [self._measured_layer(system, name) for name in KERNEL_SETS]
            head = products(system, own)
            self._head_sets = [head.curve(name, self.head, self._rates) for name in KERNEL_SETS]
            self.known = self._how(system)
            self.head_known = Known(
                Evidence.ARITHMETIC, f"fitted to {source()}: a fixed time and a share of its floor"
            )
        else:
            self._sets, self._head_sets = [], []
            self.known = self.head_known = Known(
                Evidence.ARITHMETIC, "roofline at assumed shares of the peak"
            )

    def _how(self, system: str) -> Known:
        measured = all(products(system, "bfloat16").is_measured(s) for s in self.shapes.values())
        if not measured:
            return Known(
                Evidence.ARITHMETIC, f"fitted to {source()}: a fixed time and a share of its floor"
            )
        if self._rates != REFERENCE[system]:
            return Known(Evidence.ARITHMETIC, f"{source()}, scaled to this device")
        if self.converted:
            how = "reading from its fp8 products, arithmetic from its bfloat16 products"
            return Known(Evidence.ARITHMETIC, f"{source()}: {how}")
        return Known(Evidence.MEASURED_ELSEWHERE, source())

    def _measured_layer(self, system: str, kernels: str) -> Callable[[float], float]:
        """Seconds of the products of a layer by M, with one set of measured kernels."""
        if not self.converted:
            table = products(system, self.dtype)
            curves = [table.curve(kernels, s, self._rates) for s in self.shapes.values()]
            return lambda rows: sum(curve.at(rows) for curve in curves)
        table, narrow = products(system, "bfloat16"), products(system, "fp8")
        shapes = [
            Shape(n, k if abs(self.width - 1) < 0.01 else round(k * self.width))
            for n, k in self.shapes.values()
        ]
        reading = sum(narrow.curve(kernels, s, self._rates).at(_READING) for s in shapes)
        computing = [table.curve(kernels, s, self._rates) for s in self.shapes.values()]

        def seconds(rows: float) -> float:
            full = max(rows, _COMPUTE_BOUND)
            return max(reading, sum(curve.at(full) for curve in computing) * rows / full)

        return seconds

    def floor(self, rows: float) -> float:
        """The least seconds of the products of all layers of a stage."""
        each = (
            product_floor(rows, shape, self._rates, self.dtype, self.width)
            for shape in self.shapes.values()
        )
        return self.layers * sum(each)

    def head_floor(self, rows: float) -> float:
        """The least seconds of the rank's share of the LM head."""
        return product_floor(rows, self.head, self._rates, self._own, self.plain_width)

    def time(self, rows: float) -> Band:
        """Seconds of the products of all layers of a stage."""
        if not self._sets:
            return self._roofline(rows)
        low, expected, high = sorted(seconds(rows) for seconds in self._sets)
        if self.converted:
            read = self._bytes() / self._rates.bandwidth
            expected = max(expected, read / self._reading_shares[1])
            high = max(high, expected, read / self._reading_shares[2])
        return Band(low, expected, high) * self.layers

    def head_time(self, rows: float) -> Band:
        """Seconds of the rank's share of the LM head."""
        if self._head_sets:
            return Band(*sorted(curve.at(rows) for curve in self._head_sets))
        return self._at_shares([(self.head, self._own, float(self.plain_width))], rows, False)

    def _bytes(self) -> float:
        return self.width * sum(shape.outputs * shape.inputs for shape in self.shapes.values())

    def _roofline(self, rows: float) -> Band:
        matrices = [(shape, self.dtype, self.width) for shape in self.shapes.values()]
        return self._at_shares(matrices, rows, self.converted) * self.layers

    def _at_shares(
        self, matrices: list[tuple[Shape, str, float]], rows: float, converted: bool
    ) -> Band:
        shares = self._shares
        converted = converted and self.deployment.gpu.platform == "gpu"
        bandwidth = self._reading_shares if converted else shares.bandwidth
        return Band(
            *(
                sum(
                    fixed
                    + product_floor(
                        rows,
                        shape,
                        Rates(
                            self._rates.bandwidth * reading,
                            {dtype: self._rates.flops[dtype] * computing},
                        ),
                        dtype,
                        width,
                    )
                    for shape, dtype, width in matrices
                )
                for fixed, reading, computing in zip(
                    shares.kernel, bandwidth, shares.flops, strict=True
                )
            )
        )
