"""A rule of thumb for the time of a tick on devices that nobody has measured. Imports no JAX."""

from typing import NamedTuple

from llama_jax.costs.work import Work


class TickCost(NamedTuple):
    """The time of a tick, counted in the time in which the devices compute one more token.

    Attributes:
      overhead: what every tick costs.
      free: the tokens that are computed while the weights are read, in the same time.
      unit: seconds for one more token.
    """

    overhead: int
    free: int
    unit: float = 1.0

    def seconds(self, work: Work) -> float:
        """The time of a tick with this work in each packet."""
        return self.unit * (self.overhead + max(self.free, work.tokens))


# The units are powers of two: multiplying by them rounds nothing, and so changes no comparison.
# Of the demo checkpoint on 4x2 virtual devices: 10, 17 and 26 ms with chunks of 0, 64 and 128.
CPU_COST = TickCost(overhead=64, free=0, unit=2**-13)
# An H100 at 60 % of its arithmetic and 90 % of its bandwidth, with weights of 16 bits: unmeasured.
# The unit is that of Llama-3-70B on 4x2.
GPU_COST = TickCost(overhead=16, free=192, unit=2**-15)
