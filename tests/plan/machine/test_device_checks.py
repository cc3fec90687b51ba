"""The verdict on what JAX sees and measures, and on the host."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from llama_jax.costs.gpus import CPU, GPUS
from llama_jax.plan.machine.device_checks import host_checks, jax_checks, rate_checks
from llama_jax.plan.machine.exit_codes import Exit
from llama_jax.plan.machine.expectation import Expectation, Verdict, exit_code
from llama_jax.plan.machine.host import DiskRate, available_memory, read_rate
from llama_jax.plan.machine.measurement import Measurement, MeasurementFailed, finish
from tests.support.paths import ROOT

GPU = GPUS["h100-sxm"]
H100 = Expectation((4, 2), gpus=8, gpu=GPU)
SMALL, LARGE = 16_384, 64 << 20


def collectives(small: float, large: float) -> list[dict]:
    return [
        {"kind": kind, "ranks": ranks, "bytes": size, "seconds": seconds}
        for size, seconds in ((SMALL, small), (LARGE, large))
        for kind, ranks in (("all_reduce", 2), ("ppermute", 4))
    ]


SEEN = Measurement(
    platform="gpu",
    devices=["NVIDIA H100 80GB HBM3"] * 8,
    versions={"jax": "0.11.2"},
    copy_rates=[3.0e12] * 8,
    matrix_rates=[700e12] * 8,
    collectives=collectives(8e-6, LARGE / 400e9),
)


def failures(checks) -> set[Exit]:
    return {check.code for check in checks if check.verdict is Verdict.FAILS}


def test_a_process_that_aborts_says_why_and_not_where():
    said = (
        "F0000 rendezvous.cc:55] Timed out.\n*** Check failure stack trace: ***\n    @ 0x7f93 abort"
    )
    code = f"import os, sys; sys.stderr.write({said!r}); sys.stderr.flush(); os.abort()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with pytest.raises(MeasurementFailed, match=r"code -6 and said 'F0000 .*Timed out\.'"):
        finish(process, 60)


def test_a_machine_as_planned_holds():
    checks = [*jax_checks(SEEN, H100, {}), *rate_checks(SEEN, H100)]
    assert failures(checks) == set() and exit_code(checks) is Exit.HOLDS
    # Each figure was compared with one of the plan.
    rates = rate_checks(SEEN, H100)
    assert len(rates) == 8 and {check.verdict for check in rates} == {Verdict.HOLDS}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"copy_rates": [3.0e12] * 7 + [2.6e12]}, Exit.COPY_RATE),
        ({"copy_rates": [3.3e12] * 7 + [3.0e12]}, Exit.COPY_RATE),  # 9 % slower than the others
        ({"matrix_rates": [500e12] * 8}, Exit.MATRIX_RATE),
        ({"collectives": collectives(80e-6, LARGE / 400e9)}, Exit.COLLECTIVES),
        ({"collectives": collectives(8e-6, LARGE / 20e9)}, Exit.COLLECTIVES),
    ],
)
def test_what_is_too_slow_fails_with_its_own_code(changes, code):
    assert failures(rate_checks(replace(SEEN, **changes), H100)) == {code}


def test_the_bandwidth_of_the_table_decides():
    """The same machine fails a plan for a faster GPU."""
    fast = replace(H100, gpu=replace(GPU, bandwidth=4.8e12, link_bandwidth=900e9))
    assert failures(rate_checks(SEEN, fast)) == {Exit.COPY_RATE, Exit.COLLECTIVES}


def test_an_all_reduce_sends_more_than_its_array():
    """Over 8 GPUs 7/4 of it: 200 GB/s of arrays are 350 of the 450 of a link, and half must be."""
    for kind, code in (("all_reduce", set()), ("ppermute", {Exit.COLLECTIVES})):
        small, large = (
            {"kind": kind, "ranks": 8, "bytes": size, "seconds": seconds}
            for size, seconds in ((SMALL, 8e-6), (LARGE, LARGE / 200e9))
        )
        assert failures(rate_checks(replace(SEEN, collectives=[small, large]), H100)) == code


def test_collectives_are_missed_only_where_a_mesh_has_some():
    alone = replace(SEEN, collectives=[])
    for mesh, unknown in (((1, 1), 0), ((4, 2), 1)):
        checks = rate_checks(alone, replace(H100, mesh=mesh))
        assert sum(check.verdict is Verdict.UNKNOWN for check in checks) == unknown


def test_a_cpu_is_seen_and_not_judged():
    seen = Measurement("cpu", ["cpu"] * 8, {"jax": "0.10.2"}, [1e9], [1e10], collectives(5e-4, 0.1))
    expected = Expectation((4, 2), gpu=CPU)
    assert failures([*jax_checks(seen, expected, {}), *rate_checks(seen, expected)]) == set()
    # But it is not the eight GPUs that a plan assumes.
    assert failures(jax_checks(seen, H100, {})) == {Exit.JAX}


@pytest.mark.parametrize("version", ["0.9.1", "0.13.0", "unknown"])
def test_versions_of_jax_that_nobody_tried(version):
    seen = replace(SEEN, versions={"jax": version})
    assert failures(jax_checks(seen, H100, {})) == {Exit.JAX}


def test_flags_that_spoil_a_server_are_noted():
    flags = {"JAX_DISABLE_JIT": "1", "NCCL_P2P_DISABLE": "0", "XLA_PYTHON_CLIENT_ALLOCATOR": "BFC"}
    checks = jax_checks(SEEN, H100, flags)
    assert [check.what for check in checks if check.verdict is Verdict.NOTE] == ["JAX_DISABLE_JIT"]


def test_whatever_there_is_takes_the_gpus_of_the_mesh():
    anything = Expectation((4, 2))
    found = anything.on(["NVIDIA H100 80GB HBM3"] * 9)
    assert (found.gpus, found.gpu) == (8, GPU)
    assert anything.on([]) == anything and H100.on(["NVIDIA H200"]) == H100
    assert Expectation((4, 2), gpu=CPU).on(["NVIDIA H200"]).gpus == 0


def test_the_host_needs_room_and_a_fast_disk():
    disk = DiskRate(seconds=1.0, bytes_read=2 * 10**9, bytes_all=141 * 10**9)
    assert failures(host_checks(64 << 30, disk, H100)) == set()
    assert failures(host_checks(4 << 30, disk, H100)) == {Exit.HOST_MEMORY}
    hurried = replace(H100, load_seconds=60.0)  # 141 GB at 2 GB/s take 70 s
    assert failures(host_checks(64 << 30, disk, hurried)) == {Exit.DISK}
    assert failures(host_checks(64 << 30, disk, replace(hurried, load_seconds=80.0))) == set()
    assert failures(host_checks(None, None, H100)) == set()
    # A CPU holds the weights itself, in 32 bits.
    demo = Expectation((1, 1), gpu=CPU, checkpoint_bytes=16 << 30)
    assert failures(host_checks(32 << 30, None, demo)) == {Exit.HOST_MEMORY}


def test_the_disk_is_read(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(9 << 20))
    (tmp_path / "b.safetensors").write_bytes(bytes(1 << 20))
    (tmp_path / "notes.txt").write_text("not weights")
    found = read_rate(tmp_path)
    assert found.bytes_read == found.bytes_all == 10 << 20 and found.rate > 0
    partly = read_rate(tmp_path, most=8 << 20)
    assert (partly.bytes_read, partly.bytes_all) == (8 << 20, 10 << 20)
    single = read_rate(tmp_path / "b.safetensors")
    assert single.bytes_read == 1 << 20
    assert read_rate(tmp_path / "notes.txt").bytes_read == 11
    (tmp_path / "empty").mkdir()
    assert read_rate(tmp_path / "empty") is None


def test_every_exit_code_is_documented():
    table = re.findall(r"^\| (\d+) \|", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert [int(code) for code in table] == sorted(Exit)[1:]


def test_the_memory_of_this_host_is_known(tmp_path):
    assert available_memory() > 1 << 20
    proc, group = tmp_path / "proc", tmp_path / "sys/fs/cgroup"
    proc.mkdir()
    assert available_memory(tmp_path) is None
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    group.mkdir(parents=True)
    assert available_memory(tmp_path) == 8000 * 1024
    # A checkpoint that was just read fills a container, but only until a program needs the room.
    (group / "memory.current").write_text("5000000\n")
    (group / "memory.stat").write_text("anon 1000000\nactive_file 1500000\ninactive_file 2500000\n")
    for limit, free in (("max", 8000 * 1024), ("6000000", 5_000_000), ("500000", 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert available_memory(tmp_path) == free
