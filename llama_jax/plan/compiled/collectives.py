"""The collectives of a compiled program: which it has, and which it must have on its mesh."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from llama_jax.config import LlamaConfig
from llama_jax.plan.compiled.hlo import COLLECTIVES, Instruction, array_bytes, computations
from llama_jax.ring.sizes import Bucket, RingSizes
from sharding.stages import positions_per_stage, round_up

_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")  # [groups, size]<=[devices]
# mesh['stage'=4,'model'=2] {'model'}, from jax 0.11 on: the axes over which a group extends
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")


class Collective(NamedTuple):
    """Collectives of one kind over groups of one size.

    Attributes:
      kind: such as "all-reduce".
      group: the devices that take part in each.
      calls: how many of them run in a tick.
      payload: bytes of the result on one device, of all of them together.
    """

    kind: str
    group: int
    calls: int
    payload: int


def find_collectives(text: str) -> list[Collective]:
    """The collectives in optimized HLO; those in a loop count once."""
    return _added(
        Collective(kind, _group(instruction.text), 1, _payload(kind, instruction.shape))
        for body in computations(text).values()
        for instruction in body.values()
        if (kind := _kind(instruction)) is not None
    )


def expected_collectives(
    config: LlamaConfig,
    shape: tuple[int, int],
    sizes: RingSizes,
    bucket: Bucket,
    width: int,
    multiple: int = 1,
) -> list[Collective]:
    """The collectives that a tick needs: none over an axis of size 1.

    Two all-reduces a layer over the ranks of a stage, for its attention and its MLP; the hop to the
    next stage; over all devices, an all-reduce for the embedding and an all-gather for the greedy
    choice; over the stages, an all-reduce of the finished hidden states.

    Args:
      config: the model.
      shape: stages, and ranks of each.
      sizes, bucket: of the program.
      width: bytes of one activation.
      multiple: number of tokens of which the layers compute a multiple.
    """
    num_stages, num_ranks = shape
    devices, layers = num_stages * num_ranks, positions_per_stage(config.num_layers, num_stages)
    segments = sizes.num_segments(bucket)
    tokens, token = bucket.rows + bucket.chunk, config.embed_dim * width
    hidden = tokens * token
    finished = segments * token
    in_layers = 2 * layers * round_up(tokens, multiple) * token
    found = [
        Collective("all-reduce", num_ranks, 2 * layers, in_layers),
        Collective("all-reduce", devices, 1, hidden),
        Collective("all-reduce", num_stages, 1, finished),
        Collective("collective-permute", num_stages, 1, hidden),
        Collective("all-gather", devices, 1, devices * segments * 8),  # a logit and a token, int32
    ]
    return _added(each for each in found if each.group > 1)


def by_kind(collectives: Iterable[Collective]) -> Counter[str]:
    """How many there are of each kind."""
    count: Counter[str] = Counter()
    for each in collectives:
        count[each.kind] += each.calls
    return count


def _added(collectives: Iterable[Collective]) -> list[Collective]:
    """One for each kind and group size, in the order of their names."""
    count: Counter[tuple[str, int]] = Counter()
    payload: Counter[tuple[str, int]] = Counter()
    for each in collectives:
        count[each.kind, each.group] += each.calls
        payload[each.kind, each.group] += each.payload
    return [Collective(*key, count[key], payload[key]) for key in sorted(count)]


def _kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _payload(kind: str, shape: str) -> int:
    sizes = array_bytes(shape)
    if kind == "all-reduce":  # of several arrays, if XLA has combined them
        # From jax 0.11 on, the shape of a start is ((operands), results), and both are as large.
        return sum(sizes) // (2 if shape.startswith("((") else 1)
    return max(sizes)  # the start of another also has its operand


def _group(text: str) -> int:
    """The devices of a collective's groups."""
    if match := _PAIRS.search(text):
        pairs = dict(re.findall(r"\{(\d+),(\d+)\}", match[1]))
        start = device = next(iter(pairs))
        size = 0
        while device in pairs and (size == 0 or device != start):
            device, size = pairs[device], size + 1
        return size
    if match := _LISTED.search(text):
        return match[1].count(",") + 1
    if match := _NAMED.search(text):
        axes = {name: int(size) for name, size in _AXIS.findall(match[1])}
        return math.prod(axes[name] for name in re.findall(r"'(\w+)'", match[2]))
    match = _COUNTED.search(text)
    return int(match[1]) if match else 0  # 0: all devices, which HLO need not list
