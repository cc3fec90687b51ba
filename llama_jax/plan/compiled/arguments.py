"""The arguments of a compiled tick: how many bytes of weights, of KV cache and of state."""

from typing import NamedTuple

from llama_jax.plan.compiled.hlo import WEIGHTS, array_bytes, computations, entry_name

_CACHE = "state.cache"  # as `WEIGHTS`


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
    for instruction in computations(text)[entry_name(text)].values():
        if instruction.opcode != "parameter":
            continue
        size = sum(array_bytes(instruction.shape))
        if instruction.op_name.startswith(WEIGHTS):
            weights += size
        elif instruction.op_name.startswith(_CACHE):
            kv_cache += size
        else:
            state += size
    return ArgumentBytes(weights, kv_cache, state)
