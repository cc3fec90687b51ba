"""What the audit writes becomes a result."""

from bench.audit_result import as_result
from bench.table import tables

PROGRAM = {
    "rows": 64,
    "chunk": 0,
    "gemm": "triton",
    "read": 2_000_000_000,
    "ratio": 1.02,
    "large_arrays": ["a kernel", "another"],
    "collectives": {"all-reduce": 42, "collective-permute": 1, "all-gather": 1},
    "most_bytes": {"layer": 5},
}


def test_each_program_and_each_size_is_a_row():
    content = {
        "what": "a test",
        "formats": [
            {
                "weights": weights,
                "bytes_per_device": {"kv_cache": 20_000_000_000},
                "programs": [PROGRAM | {"weights": weights, "missed": missed}],
            }
            for weights, missed in (("bfloat16", []), ("int4", ["ratio", "kernels"]))
        ],
        "holds": False,
    }
    found = as_result(content, {})
    programs, memory = tables(found)
    assert [row[-1] for row in programs.rows] == ["", "ratio, kernels"]
    assert programs.rows[0][:-1] == [
        "bfloat16",
        "64",
        "0",
        "triton",
        "2.00",
        "1.02",
        "2",
        "42 + 1 + 1",
    ]
    assert memory.rows == [["bfloat16", "kv cache", "20.0"], ["int4", "kv cache", "20.0"]]
    assert not found.met and as_result(content | {"holds": True}, {}).met
