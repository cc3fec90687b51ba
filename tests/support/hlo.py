"""What tests look for in the optimized HLO of a compiled program, `compiled.as_text()`."""

import re
from collections import Counter

from llama_jax.plan.compiled.hlo import (
    COLLECTIVES,
    IN_PLACE,
    NO_NEW_BUFFER,
    Instruction,
    array_bytes,
    computations,
)


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
