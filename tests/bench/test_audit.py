"""The limits of the audit, and what the documentation says of the committed one."""

import pytest

from bench.audit import UNITS, add_arguments, layers, line, missed_limits, widens
from bench.report import RESULTS
from bench.result import Result
from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import Layout
from llama_jax.terminal.arguments import Parser
from tests.support.paths import ROOT

ROW = {
    "weights": "bfloat16", "gemm": "cublas", "kernels": 450, "host loops": 0, "ratio": 1.0,
    "kernels per layer": 15, "rows": 8, "chunk": 0, "temporary bytes": 3e8, "large arrays": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"ratio": 1.06}, ["ratio through cublas"]),
        ({"ratio": 1.06, "gemm": "triton"}, []),
        ({"ratio": 1.11, "gemm": "triton", "weights": "int4"}, ["ratio"]),
        ({"ratio": 9.0, "weights": "int8"}, []),
        ({"ratio": 1.06, "weights": "int4", "large arrays": 1}, ["large arrays"]),
        ({"large arrays": 1}, ["large arrays"]),
        ({"temporary bytes": 4e8}, ["temporary bytes"]),
        ({"host loops": 1}, ["host loops"]),
        ({"kernels": 451}, ["kernels"]),
        ({"kernels per layer": 16}, ["kernels per layer"]),
        ({"kernels per layer": 16, "rows": 1}, []),
        ({"kernels per layer": 16, "rows": 1, "chunk": 256}, ["kernels per layer"]),
    ],
)
def test_limits(changes, expected):
    assert missed_limits(ROW | changes, 20) == expected


@pytest.mark.parametrize(
    ("weights", "gemm", "expected"),
    [("int8", "cublas", True), ("fp8", "cublas", True), ("int8", "triton", False),
     ("int4", "cublas", False), ("bfloat16", "cublas", False)],
)  # fmt: skip
def test_only_8_bits_through_cublas_are_counted_by_themselves(weights, gemm, expected):
    assert widens(ROW | {"weights": weights, "gemm": gemm}) is expected


@pytest.mark.parametrize(("mesh", "most"), [((8, 1), 225), ((2, 4), 900), ((1, 8), 1800)])
def test_the_limit_of_kernels_grows_with_the_layers_of_a_stage(mesh, most):
    count = layers(LlamaConfig.llama3_70b(), Layout(*mesh))
    assert missed_limits(ROW | {"kernels": most}, count) == []
    assert missed_limits(ROW | {"kernels": most + 1}, count) == ["kernels"]


def test_a_line_for_the_terminal():
    figures = dict.fromkeys(set(UNITS) - {"size"}, 0) | ROW
    program = figures | {"collectives": "42 + 1 + 1", "missed limits": ""}
    assert "42 + 1 + 1" in line(program)
    assert "ratio" in line(program | {"missed limits": "ratio"})
    assert "1.500 GB" in line({"weights": "int8", "on each device": "total", "size": 1_500_000_000})


def test_the_documentation_shows_the_committed_audit():
    """As it is with Triton; int8 and fp8 share their lines, and names are not repeated."""
    expected, last = [], {}
    for row in Result.read(RESULTS / "audit_70b_8xh100.json").rows:
        if row.get("gemm") == "triton":
            figures = f"{(row['read'] + row['written']) / 1e9:.2f} | {row['ratio']:.3f} | "
            figures += f"{row['kernels']} | {row['kernels per layer']:g} | "
            figures += f"{row['temporary bytes'] / 1e9:.3f}"
            expected.append((row["weights"], row["rows"], row["chunk"], figures))
    section = (ROOT / "docs/benchmarks.md").read_text().split("| weights | rows | chunk |")[1]
    shown = []
    for text in section.split("\n\n")[0].splitlines()[2:]:
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        last |= {place: cell for place, cell in enumerate(cells[:3]) if cell}
        for weights in last[0].split(", "):
            shown.append((weights, int(last[1]), int(last[2]), " | ".join(cells[3:])))
    assert sorted(shown) == sorted(expected)


def test_the_default_is_every_program():
    parser = Parser()
    add_arguments(parser)
    args = parser.parse_args([])
    assert args.mesh == "4x2" and len(args.weights) == 4 and args.chunks == [0, 256, 512]
