"""The time of a tick of a deployment. Imports no JAX."""

from llama_jax.costs.calibration import Calibration
from llama_jax.costs.deployment import KV_BYTES, Deployment
from llama_jax.costs.figure import Band
from llama_jax.costs.work import Work


class TickModel:
    """How long the ticks of a deployment take.

    All stages run in lockstep, so that the tick of the ring is that of its slowest stage.
    """

    def __init__(self, deployment: Deployment, calibration: Calibration | None = None) -> None:
        self.deployment, self.calibration = deployment, calibration

    def parts(self, work: Work) -> dict[str, Band]:
        """Seconds by what they are spent on: products, attention, communication, head, launch."""
        d = self.deployment
        c, gpu = d.config, d.gpu
        layers = -(-c.num_layers // d.layout.num_stages)
        matrices = c.embed_dim * (2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.mlp_dim)
        parameters = layers * matrices / d.layout.num_ranks
        width = 2 if d.weights == "bfloat16" else 1
        reading = parameters * width / gpu.bandwidth
        computing = 2 * parameters * work.tokens / gpu.flops["bfloat16"]
        kv = 2 * layers * c.num_kv_heads * c.head_dim / d.layout.num_ranks
        keys = kv * KV_BYTES[d.kv_cache_dtype] * (work.row_keys + work.chunk_keys) / gpu.bandwidth
        return {
            "products": Band(1, 1 / 0.85, 1 / 0.7) * max(reading, computing),
            "attention": Band(1, 1 / 0.7, 2) * keys,
            "launch": Band(0.0, 0.0005, 0.001),
        }

    def seconds(self, work: Work) -> Band:
        """Seconds of a tick in which the slowest stage has this work."""
        total = Band.exactly(0.0)
        for part in self.parts(work).values():
            total += part
        return total
