"""What NVIDIA's driver says, through the real bindings, and the verdict on it."""

import sys
from dataclasses import replace

import pynvml as real_pynvml
import pytest

from llama_jax.costs.gpus import GPUS
from llama_jax.plan.machine.exit_codes import Exit
from llama_jax.plan.machine.expectation import Expectation, Verdict, exit_code
from llama_jax.plan.machine.gpu_checks import clock_checks, driver_check, gpu_checks
from llama_jax.plan.machine.nvml import Nvml, NvmlMissing, visible
from tests.plan.machine.fake_nvml import (
    DRIVER_NOT_LOADED,
    LIBRARY_NOT_FOUND,
    VERSION_MISMATCH,
    FakeGpu,
    FakeLibrary,
)

H100 = Expectation((4, 2), gpus=8, gpu=GPUS["h100-sxm"])


def eight(**changes) -> list[FakeGpu]:
    """Eight GPUs, the fourth of which has these fields."""
    return [FakeGpu(**changes) if number == 3 else FakeGpu() for number in range(8)]


@pytest.fixture
def pynvml(monkeypatch):
    monkeypatch.setattr(real_pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(real_pynvml, "_nvmlLib_refcount", 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return real_pynvml


@pytest.fixture
def read(pynvml, monkeypatch):
    def read_from(gpus, **arguments):
        library = FakeLibrary(gpus, **arguments)
        monkeypatch.setattr(pynvml, "nvmlLib", library)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        with Nvml() as nvml:
            reading = nvml.read()
        assert library.open == 0
        return reading

    return read_from


def failures(reading, expected=H100) -> set[Exit]:
    checks = gpu_checks(reading, visible(reading), expected)
    return {check.code for check in checks if check.verdict is Verdict.FAILS}


def test_eight_healthy_gpus_are_what_was_planned(read):
    reading = read(eight())
    assert reading.cuda == (12, 8) and reading.driver == "570.86.15"
    checks = gpu_checks(reading, visible(reading), H100)
    assert {check.verdict for check in checks} == {Verdict.HOLDS}
    assert exit_code(checks) is Exit.HOLDS
    gpu = reading.gpus[5]
    assert (gpu.memory_bytes, gpu.links_active, gpu.power_limit) == (85_520_809_984, 18, 700.0)
    assert len(reading.peers) == 28 and set(reading.peers.values()) == {(True, True)}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"name": "NVIDIA H100 PCIe"}, Exit.GPU_MODEL),
        ({"lost": True}, Exit.GPU_MODEL),
        ({"mig": (1, 0)}, Exit.GPU_MIG),  # now, and not after the next reset
        ({"total": 68_000_000_000}, Exit.GPU_MEMORY),
        ({"used": 20_000_000_000}, Exit.GPU_MEMORY),
        ({"uncorrected": 2}, Exit.GPU_ECC),
        ({"remapped": (1, 1, 1, 0)}, Exit.GPU_ECC),
        ({"remapped": (9, 9, 0, 1)}, Exit.GPU_ECC),
        ({"links": [1] * 17 + [0]}, Exit.GPU_LINKS),
        ({"links": []}, Exit.GPU_LINKS),
    ],
)
def test_one_bad_gpu_fails_with_its_own_code(read, changes, code):
    reading = read(eight(**changes))
    assert failures(reading) == {code}
    bad = [
        check
        for check in gpu_checks(reading, visible(reading), H100)
        if check.verdict is Verdict.FAILS
    ]
    assert all("3" in check.what and check.advice for check in bad)


def test_fewer_gpus_than_planned(read):
    assert failures(read(eight()[:6])) == {Exit.GPU_COUNT}
    assert failures(read([])) == {Exit.GPU_COUNT}


def test_peers_that_do_not_reach_each_other(read, monkeypatch):
    assert failures(read(eight(), peers={(2, 5): (5, 0, 0)})) == {Exit.GPU_LINKS}
    with monkeypatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "5,2")  # in whatever order
        reading = read(eight(), peers={(2, 5): (5, 0, 0)})
        assert failures(reading, replace(H100, gpus=2)) == {Exit.GPU_LINKS}
    # Over PCIe where NVLink was planned.
    assert failures(read(eight(), peers={(0, 1): (0, 0, 5)})) == {Exit.GPU_LINKS}
    # A GPU that has no NVLink is not missing any.
    l40s = replace(H100, gpu=GPUS["l40s"])
    gpus = [FakeGpu(name="NVIDIA L40S", total=48_305_799_168, links=[]) for _ in range(8)]
    pcie = {(i, j): (0, 0, 5) for i in range(8) for j in range(8)}
    assert failures(read(gpus, peers=pcie), l40s) == set()
    # One that has some has lost one; and PCIe may go through the host.
    gpus[3] = replace(gpus[3], links=[1, 0])
    assert failures(read(gpus, peers=pcie), l40s) == {Exit.GPU_LINKS}
    gpus[3], pcie[0, 1] = gpus[4], (5, 0, 5)
    assert failures(read(gpus, peers=pcie), l40s) == set()


def test_what_a_gpu_does_not_report_is_no_failure(read):
    nothing = dict.fromkeys(
        ("ecc", "uncorrected", "remapped", "mig", "max_clock", "limit", "default_limit", "total")
    )
    reading = read(eight(**nothing))
    assert failures(reading) == set()
    gpu = reading.gpus[3]
    assert gpu.ecc is gpu.memory_bytes is gpu.power_limit is None and gpu.name is not None


def test_replaced_memory_rows_are_no_failure(read):
    assert failures(read(eight(remapped=(4, 1, 0, 0)))) == set()


def test_drivers_differ_in_what_they_reserve(read):
    assert failures(read(eight(total=84_100_000_000, used=1_000_000_000))) == set()


def test_a_gpu_that_may_use_less_power_is_worth_a_note(read):
    for limit, noted in ((650_000, [Exit.GPU_CLOCKS]), (700_000, []), (750_000, [])):
        reading = read(eight(limit=limit))
        checks = gpu_checks(reading, visible(reading), H100)
        assert [c.code for c in checks if c.verdict is Verdict.NOTE] == noted


def test_a_gpu_that_the_mesh_does_not_take_may_be_bad(read):
    reading = read(eight(lost=True))
    assert failures(reading, replace(H100, gpus=3)) == set()
    assert failures(reading, replace(H100, gpus=4)) == {Exit.GPU_MODEL}


def test_memory_without_error_correction_is_worth_a_note(read):
    reading = read(eight(ecc=(0, 1)))
    notes = [c for c in gpu_checks(reading, visible(reading), H100) if c.verdict is Verdict.NOTE]
    assert [check.code for check in notes] == [Exit.GPU_ECC] and failures(reading) == set()


@pytest.mark.parametrize("error", [LIBRARY_NOT_FOUND, DRIVER_NOT_LOADED, VERSION_MISMATCH, 999])
def test_a_driver_that_does_not_work(pynvml, monkeypatch, error):
    monkeypatch.setattr(pynvml, "nvmlLib", FakeLibrary([], init=error))
    with pytest.raises(NvmlMissing):
        Nvml()


def test_a_machine_without_the_library(pynvml, monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlLib", None)

    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "CDLL", absent)
    with pytest.raises(NvmlMissing):
        Nvml()


def test_a_machine_without_the_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlMissing):
        Nvml()


@pytest.mark.parametrize("missing", ["", "nvmlDeviceGetCurrentClocksEventReasons"])
def test_clocks_are_read_from_old_and_new_drivers(pynvml, monkeypatch, missing):
    library = FakeLibrary(eight(clock=1200, reasons=0x40 | 0x04), missing=[missing])
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    with Nvml() as nvml:
        gpus = nvml.read().gpus
        now = nvml.clocks(tuple(range(8)))
    assert now[3].sm == 1200
    assert now[3].slowed_by == {"temperature, by hardware", "power limit"}
    assert now[0].slowed_by == frozenset()  # idle is no reason
    slowed = {index: clocks.slowed_by for index, clocks in now.items()}
    clocks = {index: clocks.sm for index, clocks in now.items()}
    checks = clock_checks(gpus, slowed, clocks)
    assert [check.code for check in checks if check.verdict is Verdict.FAILS] == [Exit.GPU_CLOCKS]
    # A power limit alone is how every GPU multiplies large matrices; a low clock is not.
    power = dict.fromkeys(range(8), frozenset({"power limit"}))
    assert exit_code(clock_checks(gpus, power, dict.fromkeys(range(8), 1700))) is Exit.HOLDS
    assert exit_code(clock_checks(gpus, power, dict.fromkeys(range(8), 1300))) is Exit.GPU_CLOCKS
    hot = dict.fromkeys(range(8), frozenset({"temperature, by software"}))
    assert exit_code(clock_checks(gpus, hot, dict.fromkeys(range(8), 1900))) is Exit.GPU_CLOCKS


@pytest.mark.parametrize(
    ("variable", "indices"),
    [
        ("3,1", (3, 1)),
        ("", ()),
        ("GPU-00000002, 5", (2, 5)),
        ("0,1,9,2", (0, 1)),  # CUDA ends the list at the first entry that names nothing
        ("GPU-0000000", ()),  # names all eight
        ("-1", ()),
    ],
)
def test_cuda_visible_devices(read, variable, indices):
    found = visible(read(eight()), variable)
    assert tuple(gpu.index for gpu in found) == indices


def test_a_single_gpu_may_be_hidden(read):
    assert visible(read([FakeGpu()]), "") == ()


def test_hidden_gpus_do_not_count(read, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,4,5,6,7")
    reading = read(eight(lost=True))
    assert failures(reading) == {Exit.GPU_COUNT}
    assert failures(reading, replace(H100, gpus=7)) == set()


def test_the_driver_must_be_new_enough_for_the_plugin(read):
    reading = read(eight(), cuda=12080)
    for plugin, verdict in (
        ("jax-cuda12-plugin", Verdict.HOLDS), ("jax-cuda13-plugin", Verdict.FAILS),
        ("numpy", Verdict.SEEN),
    ):  # fmt: skip
        assert driver_check(reading, {plugin: "0.11.2"}).verdict is verdict


def test_the_first_failure_gives_the_exit_code(read):
    gpus = eight(uncorrected=1)[:7]
    reading = read(gpus)
    assert failures(reading) == {Exit.GPU_COUNT, Exit.GPU_ECC}
    checks = gpu_checks(reading, visible(reading), H100)
    assert exit_code(checks) is Exit.GPU_COUNT == 11
