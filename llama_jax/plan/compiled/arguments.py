"""The arguments of a compiled tick: how many bytes of weights, of KV cache and of state."""

import re
from typing import NamedTuple

from llama_jax.plan.compiled.hlo import array_bytes, entry_computation

_NAME = re.compile(r'op_name="([^"]*)"')
# Arguments of `ring.tick.tick`, as XLA names them in the metadata of the parameters.
WEIGHTS, CACHE = "params", "state.cache"


class ArgumentBytes(NamedTuple):
    """Bytes on one device.

    Attributes:
      weights: of `Params`.
      kv_cache: pages, and the scales of a cache in 8 bits.
      state: the ring, the tokens of the slots, and the entering packet.
    """

    weights: int
    kv_cache: int
    state: int


def argument_bytes(text: str) -> ArgumentBytes:
    """Adds up the parameters of optimized HLO."""
    weights = kv_cache = state = 0
    for instruction in entry_computation(text).values():
        if instruction.opcode != "parameter":
            continue
        name = _NAME.search(instruction.text)
        size = sum(array_bytes(instruction.shape))
        if name is not None and name[1].startswith(WEIGHTS):
            weights += size
        elif name is not None and name[1].startswith(CACHE):
            kv_cache += size
        else:
            state += size
    return ArgumentBytes(weights, kv_cache, state)
