"""Reads the thunks of a program for a GPU: what the host launches, in order.

XLA writes them to the directory of `xla_dump_to`.
Launches in a command buffer (a CUDA graph) cost the host one launch together. A loop or a branch
outside of one makes the host wait for the device in every iteration.
"""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

_THUNK = re.compile(r"( *)\d+: k(\w+)")
_CONTROL = {"CommandBuffer", "While", "Conditional", "AsyncStart", "AsyncDone", "Sequential"}
_COLLECTIVES = {
    "AllReduce": "all-reduce",
    "AllGather": "all-gather",
    "CollectivePermute": "collective-permute",
    "ReduceScatter": "reduce-scatter",
    "AllToAll": "all-to-all",
}


class Thunks(NamedTuple):
    """The launches of one run of the program; those in a loop count once.

    Attributes:
      kernels: kernels, copies, and calls of libraries, inside and outside of graphs.
      graphs: command buffers.
      in_graphs: kernels in them.
      loops: loops and branches that the host decides.
      collectives: by kind; they are not among the kernels.
    """

    kernels: int
    graphs: int
    in_graphs: int
    loops: int
    collectives: Counter[str]


def find_dump(directory: Path) -> str:
    """The text of the thunks in a directory of `xla_dump_to` for one program.

    XLA writes them a second time only if its passes changed them, by making graphs.
    """
    for name in ("thunk_sequence_after_thunk_passes", "thunk_sequence"):
        for file in directory.glob(f"*.{name}.txt"):
            return file.read_text()
    raise FileNotFoundError(f"XLA has written no thunks to {directory}.")


def read_thunks(text: str) -> Thunks:
    """Reads the dump of the thunks."""
    kernels = graphs = in_graphs = loops = 0
    collectives: Counter[str] = Counter()
    graph_indent: int | None = None  # of the command buffer that we are in
    for line in text.splitlines():
        match = _THUNK.match(line)
        if match is None:
            continue
        indent, kind = len(match[1]), match[2]
        if graph_indent is not None and indent <= graph_indent:
            graph_indent = None
        if kind == "CommandBuffer":
            graphs, graph_indent = graphs + 1, indent
        elif kind in ("While", "Conditional"):
            loops += graph_indent is None
        elif kind in _COLLECTIVES:
            collectives[_COLLECTIVES[kind]] += 1
        elif kind not in _CONTROL:
            kernels += 1
            in_graphs += graph_indent is not None
    return Thunks(kernels, graphs, in_graphs, loops, collectives)
