"""Analyzes the optimized HLO of a compiled program, `compiled.as_text()`.

Tests analyze programs for virtual CPU devices, the audit those for a GPU target. The text is the
program of one device, and the body of a loop counts once.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_ENTRY = re.compile(r"^ENTRY %?([\w.-]+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")

# Opcodes that write no buffer of their own. The instructions of a loop, a branch or an asynchronous
# operation are in the computations that it calls, which are analyzed as well.
NO_NEW_BUFFER = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "optimization-barrier",
    "while", "conditional", "call", "async-start", "async-update",
}  # fmt: skip
COLLECTIVES = {
    "all-reduce", "all-gather", "collective-permute", "reduce-scatter", "all-to-all",
}  # fmt: skip
IN_PLACE = {"scatter", "dynamic-update-slice"}  # if XLA must copy first, it emits a `copy`


@dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    Attributes:
      opcode: its kind.
      shape: of its result, which may be a tuple, as HLO writes it.
      operands: their names.
      text: the whole line.
      calls: the computation of a fusion.
      root: whether it is the result of its computation.
    """

    opcode: str
    shape: str
    operands: list[str]
    text: str
    calls: str | None
    root: bool


def count_ops(text: str) -> Counter[str]:
    """Counts instructions by opcode; `all-reduce-start` and `all-reduce-done` count as one."""
    opcodes = [i.opcode for body in computations(text).values() for i in body.values()]
    return Counter(o.removesuffix("-start") for o in opcodes if not o.endswith("-done"))


def large_copies(text: str, at_least_bytes: int) -> list[str]:
    """Finds the instructions that write a new array of at least this many bytes.

    Any writer counts: a copy, a slice, a concatenation, or a fusion of them. A scatter or a
    dynamic-update-slice into an existing array does not: XLA runs it in place, and emits a `copy`
    before it if it cannot.

    Returns:
      The instructions, as lines of HLO.
    """
    found = computations(text)
    fused = {i.calls for body in found.values() for i in body.values() if i.calls}
    return [
        instruction.text
        for name, body in found.items()
        if name not in fused  # the inside of a fusion is never written to memory
        for instruction in body.values()
        if _largest_array(instruction.shape) >= at_least_bytes
        and instruction.opcode not in NO_NEW_BUFFER
        and not instruction.opcode.endswith("-done")
        and not _updates_in_place(instruction, found, at_least_bytes)
    ]


def aliased_outputs(text: str) -> dict[int, int]:
    """Maps each output to the parameter whose donated memory it reuses, by number."""
    header = text.split("\n", 1)[0]
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}, (?:may|must)-alias\)", header)
    return {int(output or 0): int(parameter) for output, parameter in pairs}


def unordered_collectives(text: str) -> list[tuple[str, str]]:
    """Finds pairs of collectives that do not depend on each other.

    A loop with collectives in its body counts as one, and its body is analyzed as well.

    Returns:
      The names of both instructions of each pair.
    """
    found = computations(text)

    def communicates(instruction: Instruction) -> bool:
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            return True
        called = re.findall(r"(?:body|calls|to_apply)=%?([\w.-]+)", instruction.text)
        return any(communicates(i) for name in called for i in found[name].values())

    pairs = []
    for body in found.values():
        needs: dict[str, set[str]] = {}  # instruction → the collectives that it depends on
        earlier: list[str] = []
        for name, instruction in body.items():  # operands stand before their users
            needs[name] = set().union(*(needs[o] for o in instruction.operands if o in needs))
            if communicates(instruction):
                pairs += [(other, name) for other in earlier if other not in needs[name]]
                earlier.append(name)
                needs[name].add(name)
    return pairs


@lru_cache(maxsize=2)  # the programs of a large model are megabytes of text
def computations(text: str) -> dict[str, dict[str, Instruction]]:
    """Parses HLO: computation name → instruction name → instruction."""
    found: dict[str, dict[str, Instruction]] = {}
    body: dict[str, Instruction] = {}
    for line in text.splitlines():
        if computation := _COMPUTATION.match(line):
            body = found[computation[1]] = {}
        elif match := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = match.groups()
            calls = re.search(r"calls=%?([\w.-]+)", rest) if opcode == "fusion" else None
            body[name] = Instruction(
                opcode=opcode,
                shape=shape,
                operands=_NAME.findall(rest.split(")", 1)[0]),
                text=line.strip(),
                calls=calls and calls[1],
                root=bool(root),
            )
    return found


def entry_computation(text: str) -> dict[str, Instruction]:
    """The instructions of the entry computation, by name."""
    entry = _ENTRY.search(text)
    assert entry is not None, "The text holds no entry computation."
    return computations(text)[entry[1]]


def array_bytes(shape: str) -> list[int]:
    """Bytes of each array in a shape, which may be a tuple."""
    sizes = []
    for kind, bits, dimensions in _ARRAY.findall(shape):
        count = math.prod(int(size) for size in dimensions.split(",") if size)
        sizes.append(count if kind == "pred" else count * int(bits) // 8)
    return sizes


def _largest_array(shape: str) -> int:
    return max(array_bytes(shape), default=0)


def _updates_in_place(
    instruction: Instruction, computations: dict[str, dict[str, Instruction]], at_least: int
) -> bool:
    """Whether every large output is an in-place update of an input."""
    if instruction.opcode in IN_PLACE:
        return True
    if instruction.calls is None:
        return False
    body = computations[instruction.calls]
    root = next(i for i in body.values() if i.root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return all(
        _updates_parameter(result, body)
        for result in results
        if _largest_array(result.shape) >= at_least
    )


def _updates_parameter(result: Instruction, body: dict[str, Instruction]) -> bool:
    updates = 0
    while result.opcode in IN_PLACE or result.opcode == "bitcast":
        updates += result.opcode in IN_PLACE
        result = body[result.operands[0]]
    return updates > 0 and result.opcode == "parameter"
