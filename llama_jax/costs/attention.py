"""The attention of a rank, over the KV cache. Imports no JAX."""

from llama_jax.costs.curve import Curve
from llama_jax.costs.deployment import KV_BYTES, Deployment
from llama_jax.costs.figure import Band, Evidence
from llama_jax.costs.kernels import (
    KERNEL_SETS,
    REFERENCE,
    DecodeAttention,
    prefill_attention,
    source,
)
from llama_jax.costs.memory import kv_bytes_per_token
from llama_jax.costs.products import Known
from llama_jax.costs.roofline import shares_of
from llama_jax.weights.axes import kv_replicas
from sharding.stages import positions_per_stage

_HEAD_DIM = 128  # of the measured kernels
# Beyond any context, and any pairs of a chunk: the lowest, middle and highest of several curves may
# change places up to it.
_FAR = 1e12
_ENDS = (0.0, _FAR)  # of the roofline's lines, which are straight


class RankAttention:
    """The attention of all layers of a stage on one rank: floors and times.

    Attributes:
      known: how the times are known.
    """

    def __init__(self, deployment: Deployment) -> None:
        config, gpu, ranks = deployment.config, deployment.gpu, deployment.layout.num_ranks
        self._gpu = gpu
        self.layers = positions_per_stage(config.num_layers, deployment.layout.num_stages)
        self.query_heads = config.num_heads // ranks
        self.head_dim = config.head_dim
        self.token_bytes = kv_bytes_per_token(deployment)  # in all layers
        own = deployment.dtype if deployment.dtype in gpu.flops else "bfloat16"
        self._flops = gpu.flops[own]
        self._shares = shares_of(gpu.platform)
        narrow = KV_BYTES[deployment.kv_dtype] == 1
        self._curves: dict[int, tuple[Curve, Curve, Curve]] = {}
        system, kv = gpu.measured_as, "fp8" if narrow else "bfloat16"
        self._sets: list[DecodeAttention] = []
        prefill: list[Curve] = []
        compute_scale = 1.0
        self.known = Known(Evidence.ARITHMETIC, "roofline at assumed shares of the peak")
        if system and deployment.dtype != "float32":
            wide = config.head_dim / _HEAD_DIM
            kv_heads = config.num_kv_heads * kv_replicas(config, ranks) // ranks * wide
            heads = self.query_heads * wide
            self._sets = [DecodeAttention(system, name, kv, kv_heads) for name in KERNEL_SETS]
            prefill = [prefill_attention(system, name, kv, heads) for name in KERNEL_SETS]
            # Others' caches in 8 bits have one scale for all tokens.
            bytes_of_head = config.head_dim * (1 if narrow else 2)
            self._factor = self.token_bytes / (2 * self.layers * kv_heads / wide * bytes_of_head)
            scale = REFERENCE[system].bandwidth / gpu.bandwidth
            self._factor *= scale * self.layers
            compute_scale = REFERENCE[system].flops["bfloat16"] / self._flops * self.layers
            same = scale == 1 and (kv_heads, heads) in {(8, 64), (4, 32), (2, 16), (1, 8)}
            if same and not narrow:
                self.known = Known(Evidence.MEASURED_ELSEWHERE, source())
            else:
                self.known = Known(Evidence.ARITHMETIC, f"{source()}, scaled to these heads")
        fixed = (0.0, 0.0, 0.0) if prefill else self._shares.attention
        shares = (1.0, 1.0, 1.0) if prefill else self._shares.bandwidth
        self._reading = [(self.layers * f, s) for f, s in zip(fixed, shares, strict=True)]
        self._seconds_per_key = self.token_bytes / gpu.bandwidth
        self._prefill_curves = self._make_prefill_curves(prefill, compute_scale)

    def decode_floor(self, keys: float) -> float:
        """The least seconds to read this many keys and values."""
        return keys * self.token_bytes / self._gpu.bandwidth

    def prefill_floor(self, pairs: float) -> float:
        """The least seconds for this many pairs of a query and a key."""
        return self.layers * 4 * self.query_heads * self.head_dim * pairs / self._flops

    def decode_curves(self, rows: int) -> tuple[Curve, Curve, Curve]:
        """Seconds by the mean context of this many rows: low, expected and high."""
        found = self._curves.get(rows)
        if found is None:
            found = self._curves[rows] = self._make_curves(rows)
        return found

    def _make_curves(self, rows: int) -> tuple[Curve, Curve, Curve]:
        if not self._sets:
            shares = zip(self._shares.attention, self._shares.bandwidth, strict=True)
            low, expected, high = (
                Curve(
                    {
                        context: self.layers * fixed + self.decode_floor(rows * context) / share
                        for context in _ENDS
                    }
                )
                for fixed, share in shares
            )
            return low, expected, high
        curves = [attention.curve(rows) for attention in self._sets]
        contexts = (*curves[0].sizes, _FAR)
        floors = {context: self.decode_floor(rows * context) for context in contexts}
        # On an H200, some measured times of large batches are below what its bandwidth allows.
        points = [
            (
                context,
                sorted(max(curve.at(context) * self._factor, floors[context]) for curve in curves),
            )
            for context in contexts
        ]
        low, expected, high = (
            Curve({context: times[i] for context, times in points}) for i in range(3)
        )
        return low, expected, high

    def decode(self, rows: int, keys: float) -> Band:
        """Seconds of rows that attend to this many keys together."""
        if not rows:
            return Band.exactly(0.0)
        return Band(*(curve.at(keys / rows) for curve in self.decode_curves(rows)))

    def prefill(self, pairs: float, keys: float) -> Band:
        """Seconds of a chunk.

        Args:
          pairs: of a query and a key.
          keys: that its tiles read, all together.
        """
        return Band(*(self.prefill_time(bound, pairs, keys) for bound in range(3)))

    def prefill_time(self, bound: int, pairs: float, keys: float) -> float:
        """As `prefill`: its low (0), expected (1) or high (2) bound alone."""
        fixed, share = self._reading[bound]
        return max(
            self._prefill_curves[bound].at(pairs), fixed + keys * self._seconds_per_key / share
        )

    def _make_prefill_curves(self, sets: list[Curve], scale: float) -> tuple[Curve, Curve, Curve]:
        """Seconds by pairs: low, expected and high."""
        if not sets:
            low, expected, high = (
                Curve(
                    {
                        pairs: self.layers * fixed + self.prefill_floor(pairs) / share
                        for pairs in _ENDS
                    }
                )
                for fixed, share in zip(self._shares.attention, self._shares.flops, strict=True)
            )
            return low, expected, high
        points = [
            (
                pairs,
                sorted(max(curve.at(pairs) * scale, self.prefill_floor(pairs)) for curve in sets),
            )
            for pairs in (*sets[0].sizes, _FAR)
        ]
        low, expected, high = (
            Curve({pairs: times[i] for pairs, times in points}) for i in range(3)
        )
        return low, expected, high
