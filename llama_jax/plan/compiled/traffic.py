"""Counts the bytes that each kernel of a compiled program reads and writes in device memory.

From the optimized HLO for a GPU: an instruction of the entry computation, or of a loop's body, is a
kernel or a call of a library, and reads and writes whole arrays, with these exceptions. A gather or
a slice reads what it returns, also as the first instruction of a fusion. A scatter or a
dynamic-update-slice into an existing array writes the update. A kernel from outside XLA, such as
Pallas attention, reads from the KV cache only the pages of its sequences, which `PagedReads` tells.
Caches on the device are not considered.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from llama_jax.plan.compiled.hlo import (
    IN_PLACE,
    NO_NEW_BUFFER,
    WEIGHTS,
    Instruction,
    array_bytes,
    computations,
    entry_name,
)

_SLICES = {"gather", "dynamic-slice", "slice"}
_IGNORED = NO_NEW_BUFFER | {"partition-id", "replica-id", "after-all"}


class PagedReads(NamedTuple):
    """What a kernel from outside XLA reads of a paged cache.

    Attributes:
      sizes: bytes of an operand → how many of them it reads for each sequence.
      table: entries in the page table of a sequence. From its operand `[sequences, table]`, the
        kernel is known to attend to so many sequences.
    """

    sizes: Mapping[int, int]
    table: int


class Kernel(NamedTuple):
    """What one instruction moves.

    Attributes:
      name: of the instruction.
      opcode: its kind.
      op_name: of the instruction.
      read, written: bytes, in all its runs.
      runs: how often it runs in one run of the program.
      largest: bytes of the largest array that it writes and that is not updated in place.
      only_weights: whether its inputs derive from weights alone, or from weights and constants, so
        that it need not run in every tick.
    """

    name: str
    opcode: str
    op_name: str
    read: int
    written: int
    runs: int
    largest: int
    only_weights: bool


def kernels(text: str, paged: PagedReads, trips: int) -> list[Kernel]:
    """Lists the kernels of a program.

    Args:
      text: the optimized HLO.
      paged: what custom calls read of the cache.
      trips: of a loop whose number of iterations the compiler does not know.
    """
    return list(_kernels(entry_name(text), computations(text), paged, trips, 1))


def _kernels(
    name: str,
    bodies: Mapping[str, Mapping[str, Instruction]],
    paged: PagedReads,
    trips: int,
    runs: int,
) -> Iterator[Kernel]:
    body = bodies[name]
    only_weights: dict[str, bool | None] = {}
    for instruction_name, instruction in body.items():
        only_weights[instruction_name] = _from_weights(instruction, only_weights)
        if instruction.opcode in ("while", "conditional", "call", "async-start"):
            times = _known_trips(instruction.text) or trips if instruction.opcode == "while" else 1
            for called in _called(instruction.text):
                yield from _kernels(called, bodies, paged, trips, runs * times)
        if instruction.opcode in _IGNORED or instruction.opcode.endswith("-done"):
            continue
        fused = bodies[instruction.calls] if instruction.calls else None
        call, around = _custom_call(instruction, body, fused)
        sequences = _sequences(call, around, paged) if call else 0
        read = sum(
            _read(instruction, number, body[operand], fused, paged, sequences)
            for number, operand in enumerate(instruction.operands)
            if operand in body
        )
        outputs = _outputs(instruction, body, fused, paged)
        yield Kernel(
            name=instruction_name,
            opcode=instruction.opcode,
            op_name=instruction.op_name,
            read=read * runs,
            written=sum(size for size, _ in outputs) * runs,
            runs=runs,
            largest=max((size for size, in_place in outputs if not in_place), default=0),
            only_weights=bool(only_weights[instruction_name]),
        )


def counted_loops(text: str) -> int:
    """Counts the loops whose number of iterations the compiler knows: the host does not wait."""
    instructions = [i for body in computations(text).values() for i in body.values()]
    return sum(i.opcode == "while" and _known_trips(i.text) is not None for i in instructions)


def _from_weights(instruction: Instruction, known: Mapping[str, bool | None]) -> bool | None:
    """Whether an instruction's inputs derive from weights and constants; None if from constants."""
    if instruction.opcode == "parameter":
        return instruction.op_name.startswith(WEIGHTS)
    if instruction.opcode in ("partition-id", "replica-id"):
        return False
    inputs = {known.get(operand, False) for operand in instruction.operands} - {None}
    return all(inputs) if inputs else None


def _known_trips(text: str) -> int | None:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', text)
    return int(known[1]) if known else None


def _called(text: str) -> list[str]:
    """The computations of a loop (without its condition), a branch or a call."""
    branches = re.search(r"branch_computations=\{([^}]*)\}", text)
    names = re.findall(
        r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", text
    )
    return names + (re.findall(r"[\w.-]+", branches[1]) if branches else [])


def _custom_call(
    instruction: Instruction,
    body: Mapping[str, Instruction],
    fused: Mapping[str, Instruction] | None,
) -> tuple[Instruction | None, Mapping[str, Instruction]]:
    """The custom call that an instruction is, or around which it takes slices, and its body.

    From jax 0.11 on, XLA passes a custom call a view of an array in such a fusion.
    """
    candidates = [instruction] if fused is None else list(fused.values())
    found = next((each for each in candidates if each.opcode == "custom-call"), None)
    return found, body if fused is None else fused


def _sequences(call: Instruction, body: Mapping[str, Instruction], paged: PagedReads) -> int:
    """The sequences that a custom call attends to, from the shape of its page table."""
    table = re.compile(rf"s32\[(\d+),{paged.table}\]")
    for operand in call.operands:
        if operand in body and (shape := table.match(body[operand].shape)):
            return int(shape[1])
    return 0


def _read(
    instruction: Instruction,
    number: int,
    operand: Instruction,
    fused: Mapping[str, Instruction] | None,
    paged: PagedReads,
    sequences: int,
) -> int:
    """Bytes that an instruction reads of one operand."""
    size = sum(array_bytes(operand.shape))
    if fused is not None:
        return _read_in_fusion(number, size, fused, paged, sequences)
    if instruction.opcode in _SLICES and number == 0:
        return min(size, sum(array_bytes(instruction.shape)))
    if instruction.opcode in IN_PLACE and number == 0:
        return 0
    if instruction.opcode == "custom-call":
        return _read_by_call(size, paged, sequences)
    return size


def _read_by_call(size: int, paged: PagedReads, sequences: int) -> int:
    each = paged.sizes.get(size)
    return size if each is None else min(size, each * sequences)


def _read_in_fusion(
    number: int,
    size: int,
    fused: Mapping[str, Instruction],
    paged: PagedReads,
    sequences: int,
) -> int:
    parameter = next(
        name
        for name, i in fused.items()
        if i.opcode == "parameter" and f" parameter({number})" in i.text
    )
    total, views = 0, [parameter]
    while views:
        view = views.pop()
        for name, user in fused.items():
            if view not in user.operands:
                continue
            if user.opcode == "bitcast":
                views.append(name)
            elif user.opcode in _SLICES and user.operands[0] == view:
                total += sum(array_bytes(user.shape))
            elif user.opcode == "custom-call" and view == parameter:
                total += _read_by_call(size, paged, sequences)
            elif not (user.opcode in IN_PLACE and user.operands[0] == view):
                return size
    return min(total, size)


def _outputs(
    instruction: Instruction,
    body: Mapping[str, Instruction],
    fused: Mapping[str, Instruction] | None,
    paged: PagedReads,
) -> list[tuple[int, bool]]:
    """The bytes written to each array of the result, and whether it is updated in place."""
    if fused is not None:
        root = next(i for i in fused.values() if i.root)
        roots = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return [_output(result, fused) for result in roots]
    if instruction.opcode in IN_PLACE:
        return [_output(instruction, body)]
    sizes = array_bytes(instruction.shape)
    if instruction.opcode == "custom-call":
        if "__cublas" in instruction.text:
            sizes = sizes[:1]  # the others are its workspace
        return [(0, True) if size in paged.sizes else (size, False) for size in sizes]
    if instruction.opcode.endswith("-start"):
        sizes = sizes[-1:]  # the others are its operands
    return [(size, False) for size in sizes]


def _output(result: Instruction, body: Mapping[str, Instruction]) -> tuple[int, bool]:
    while result.opcode == "bitcast":
        result = body[result.operands[0]]
    if result.opcode in IN_PLACE:
        update = result.operands[2 if result.opcode == "scatter" else 1]
        return sum(array_bytes(body[update].shape)), True
    return sum(array_bytes(result.shape)), False
