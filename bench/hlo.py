"""What a compiled program does, read from its optimised HLO: `compiled.as_text()`.

Used on the program for virtual CPU devices (tests) and for a GPU target (the audit). Numbers are of
the text, which is what one device runs: a loop's body counts once.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")

# Opcodes that name or pass on buffers that exist already. The work of a loop, branch or
# asynchronous operation is in the computations that it calls, whose instructions are seen too.
_NO_NEW_BUFFER = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "optimization-barrier",
    "while", "conditional", "call", "async-start", "async-update",
}  # fmt: skip
_COLLECTIVES = {
    "all-reduce", "all-gather", "collective-permute", "reduce-scatter", "all-to-all",
}  # fmt: skip
_IN_PLACE = {"scatter", "dynamic-update-slice"}  # XLA copies first, visibly, where it must


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    shape: str
    operands: list[str]
    text: str
    calls: str | None  # the computation of a fusion
    root: bool


def count_ops(text: str) -> Counter[str]:
    """Instructions by opcode; an asynchronous pair (`all-reduce-start`, `-done`) counts as one."""
    opcodes = [i.opcode for body in _computations(text).values() for i in body.values()]
    return Counter(o.removesuffix("-start") for o in opcodes if not o.endswith("-done"))


def large_copies(text: str, at_least_bytes: int) -> list[str]:
    """The instructions that write a new array of so many bytes or more, as lines of HLO.

    Whatever writes it counts: a copy, a slice, a concatenation, a fusion of them. Scatters and
    dynamic-update-slices into an array that exists do not: XLA runs them in place, and shows a
    `copy` before them where that is not possible.
    """
    computations = _computations(text)
    fused = {i.calls for body in computations.values() for i in body.values() if i.calls}
    return [
        instruction.text
        for name, body in computations.items()
        if name not in fused  # what happens inside of a fusion is never written to memory
        for instruction in body.values()
        if _largest_array(instruction.shape) >= at_least_bytes
        and instruction.opcode not in _NO_NEW_BUFFER
        and not instruction.opcode.endswith("-done")
        and not _updates_in_place(instruction, computations, at_least_bytes)
    ]


def aliased_outputs(text: str) -> dict[int, int]:
    """Output number → number of the parameter whose memory it takes over, for donated arguments."""
    header = text.split("\n", 1)[0]
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}, (?:may|must)-alias\)", header)
    return {int(output or 0): int(parameter) for output, parameter in pairs}


def unordered_collectives(text: str) -> list[tuple[str, str]]:
    """Pairs of collectives of which neither needs the other's result, by name.

    A loop that holds collectives counts as one of them, and is looked into as well.
    """
    computations = _computations(text)

    def communicates(instruction: _Instruction) -> bool:
        if instruction.opcode.removesuffix("-start") in _COLLECTIVES:
            return True
        called = re.findall(r"(?:body|calls|to_apply)=%?([\w.-]+)", instruction.text)
        return any(communicates(i) for name in called for i in computations[name].values())

    pairs = []
    for body in computations.values():
        needs: dict[str, set[str]] = {}  # instruction → the collectives that it depends on
        earlier: list[str] = []
        for name, instruction in body.items():  # operands stand before their users
            needs[name] = set().union(*(needs[o] for o in instruction.operands if o in needs))
            if communicates(instruction):
                pairs += [(other, name) for other in earlier if other not in needs[name]]
                earlier.append(name)
                needs[name].add(name)
    return pairs


def _computations(text: str) -> dict[str, dict[str, _Instruction]]:
    """Computation name → instruction name → instruction."""
    found: dict[str, dict[str, _Instruction]] = {}
    body: dict[str, _Instruction] = {}
    for line in text.splitlines():
        if computation := _COMPUTATION.match(line):
            body = found[computation[1]] = {}
        elif match := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = match.groups()
            calls = re.search(r"calls=%?([\w.-]+)", rest) if opcode == "fusion" else None
            body[name] = _Instruction(
                opcode=opcode,
                shape=shape,
                operands=_NAME.findall(rest.split(")", 1)[0]),
                text=line.strip(),
                calls=calls and calls[1],
                root=bool(root),
            )
    return found


def _largest_array(shape: str) -> int:
    """Bytes of the largest array of a shape, which may be a tuple's."""
    sizes = [0]
    for kind, bits, dimensions in _ARRAY.findall(shape):
        count = math.prod(int(size) for size in dimensions.split(",") if size)
        sizes.append(count if kind == "pred" else count * int(bits) // 8)
    return max(sizes)


def _updates_in_place(
    instruction: _Instruction, computations: dict[str, dict[str, _Instruction]], at_least: int
) -> bool:
    """Whether every large array that comes out is an update of one that went in."""
    if instruction.opcode in _IN_PLACE:
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


def _updates_parameter(result: _Instruction, body: dict[str, _Instruction]) -> bool:
    updates = 0
    while result.opcode in _IN_PLACE or result.opcode == "bitcast":
        updates += result.opcode in _IN_PLACE
        result = body[result.operands[0]]
    return updates > 0 and result.opcode == "parameter"
