"""Analyzes the optimized HLO of a compiled program, `compiled.as_text()`.

The text is the program of one device, and the body of a loop counts once.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_ENTRY = re.compile(r"^ENTRY %?([\w.-]+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')

# Opcodes that write no buffer of their own. The instructions of a loop, a branch or an asynchronous
# operation are in the computations that it calls, which are analyzed as well.
NO_NEW_BUFFER = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "optimization-barrier",
    "while", "conditional", "call", "async-start", "async-update",
}  # fmt: skip
# The weights among the arguments of `ring.tick.tick`, as XLA names them in `op_name`.
WEIGHTS = "params"
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

    @property
    def op_name(self) -> str:
        """Where it comes from, such as "jit(decode_step)/.../layer_0/qkv/dot_general"; or ""."""
        found = _OP_NAME.search(self.text)
        return found[1] if found else ""


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


def entry_name(text: str) -> str:
    """The name of the entry computation."""
    entry = _ENTRY.search(text)
    assert entry is not None, "The text holds no entry computation."
    return entry[1]


def array_bytes(shape: str) -> list[int]:
    """Bytes of each array in a shape, which may be a tuple."""
    sizes = []
    for kind, bits, dimensions in _ARRAY.findall(shape):
        count = math.prod(int(size) for size in dimensions.split(",") if size)
        sizes.append(count if kind == "pred" else count * int(bits) // 8)
    return sizes
