"""`--dry-run`: what would run, by arithmetic, and why it could not."""

import json
import re
import shutil

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import GPUS
from llama_jax.costs.tick_time import TickModel
from llama_jax.engine.core import Engine
from llama_jax.engine.latency_targets import largest_chunk
from llama_jax.engine.options import EngineOptions
from llama_jax.ring.sizes import TILE
from llama_jax.serve.launch import main
from llama_jax.terminal.units import bytes_text
from tests.support.paths import DEMO_CHECKPOINT


@pytest.fixture(autouse=True)
def no_memory_share(monkeypatch):
    """The environment may say how much of a GPU is taken, also by an engine of another test."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def path_70b(tmp_path):
    """A directory with nothing but the config of Llama-3-70B."""
    config = LlamaConfig.llama3_70b().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main([*argv, "--dry-run"])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_reference_deployment_is_counted_without_a_gpu(path_70b, capsys):
    flags = "--mesh 4x2 --dry-run-gpu h100-sxm --kv-cache-memory 20GB --max-num-seqs 256"
    code, out, _ = run(capsys, path_70b, *flags.split())
    assert code == 0
    found = re.search(r"weights ([\d.]+) GB \+ KV cache ([\d.]+) GB", out)
    assert found and found.groups() == ("17.6", "20.0")
    assert re.search(r"(\d+) \(rows 1, 8, 16, 32, 64; chunks 0, 64, 128, 256\)", out)[1] == "20"


def test_a_target_chooses_the_buckets(path_70b, capsys):
    flags = ["--mesh", "4x2", "--dry-run-gpu", "h100-sxm"]

    def chunks(*more: str) -> list[int]:
        code, out, _ = run(capsys, path_70b, *flags, *more)
        assert code == 0
        return [int(text) for text in re.search(r"chunks ([\d, ]+)", out)[1].split(",")]

    model = TickModel(Deployment(LlamaConfig.llama3_70b(), GPUS["h100-sxm"], Layout(4, 2)))
    assert chunks()[-1] == chunks("--ttft-slo=500ms")[-1] == 256
    assert chunks("--ttft-slo=500ms", "--tpot-slo=0.001")[-1] == 256
    for tpot in (0.001, 0.03, 0.05, 0.2):
        assert chunks(f"--tpot-slo={tpot}")[-1] == largest_chunk(model, 4, tpot, TILE)
    assert chunks("--tpot-slo=50ms", "--max-chunk=128")[-1] == 128


def test_a_target_says_how_many_sequences_can_run(path_70b, capsys):
    flags = ["--mesh", "4x2", "--dry-run-gpu", "h100-sxm", "--max-model-len", "4096"]

    def running(tpot: str) -> int | None:
        _, out, _ = run(capsys, path_70b, *flags, f"--tpot-slo={tpot}")
        found = re.search(r"TPOT lets (\d+) sequence", out)
        return int(found[1]) if found else None

    assert running("50ms") is None  # as many as there are slots
    assert running("1ms") is None  # which not even one keeps
    few, more = running("30ms"), running("33ms")
    assert few and more and 4 <= few < more < 256 and few % 4 == 0


@pytest.mark.parametrize(
    "flags",
    [
        "--mesh 4x3 --dry-run-gpu h100-sxm",  # 8 KV heads on 3 ranks
        "--mesh 81x1 --dry-run-gpu h100-sxm",  # 80 layers
        "--mesh 1x1 --dry-run-gpu h100-sxm",  # 141 GB
        "--mesh 4x2 --dry-run-gpu h100-sxm --kv-cache-memory 70GB",
        "--mesh 4x2 --dry-run-gpu h100-sxm --max-model-len 9000",
        "--mesh 4x2 --dry-run-gpu h100",
        "--mesh 4x2 --gpu-memory-utilization 0.9",
        "--quantization awq",
    ],
)
def test_what_could_not_start_is_refused(flags, path_70b, capsys):
    code, out, err = run(capsys, path_70b, *flags.split())
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ("--max-chunk 2000000000", "lower max_chunk, now 2,000,000,000"),
        ("--max-chunk 2000000000 --kv-cache-memory 20GB", "lower max_chunk"),
        ("--max-num-seqs 2000000000", "lower max_num_seqs, now 2,000,000,000"),
        # 72.2 GB of memory less 17.6 of weights, and 0.07 or 2.72 of the ring.
        ("--kv-cache-memory 70GB", "set kv_cache_memory to less than 54.5 GB"),
        ("--max-chunk 20000 --kv-cache-memory 54GB", "set kv_cache_memory to less than 51.8 GB"),
        ("--mesh 1x1", "use a mesh with more devices"),
        ("--mesh 1x1 --kv-cache-memory 1GB", "use a mesh with more devices"),
    ],
)
def test_the_option_that_asks_for_too_much_is_named(flags, remedy, path_70b, capsys):
    argv = ["--mesh", "4x2", "--dry-run-gpu", "h100-sxm", *flags.split()]
    code, out, err = run(capsys, path_70b, *argv)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.rstrip(".\n").rpartition(": ")[2].startswith(remedy)


@pytest.mark.parametrize(
    ("memory", "flags", "remedy"),
    [
        (64e9, "--max-chunk 2000000000", "lower max_chunk, now 2,000,000,000"),
        (32e6, "", "set kv_cache_memory to less than"),
        (16e6, "", "use a machine with more memory"),  # the weights alone are 15.6 MB
        (64e9, "--page-size 1000000000", "lower page_size, now 1000000000"),
        (64e9, "--dry-run-gpu cpu --max-num-seqs 2000000000", "lower max_num_seqs"),
    ],
)
def test_cpu_devices_share_the_memory_of_the_machine(memory, flags, remedy, capsys, monkeypatch):
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(memory)}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    code, out, err = run(capsys, str(DEMO_CHECKPOINT), *flags.split())
    assert (code, out) == (2, "") and err.rpartition(": ")[2].startswith(remedy)


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_the_environment_says_how_much_of_a_gpu_may_be_taken(name, path_70b, capsys, monkeypatch):
    argv = [path_70b, "--mesh", "4x2", "--dry-run-gpu", "h100-sxm"]
    monkeypatch.setenv(name, "0.5")
    assert "(50%)" in run(capsys, *argv)[1]
    for bad in ("half", "", "nan", "0", "-1", "inf"):
        monkeypatch.setenv(name, bad)
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "") and name in err and err.count("\n") == 1
        assert run(capsys, *argv, "--gpu-memory-utilization=0.9")[0] == 0


def test_a_checkpoint_without_its_tokenizer_is_refused(tmp_path, capsys):
    whole = tmp_path / "whole"
    shutil.copytree(DEMO_CHECKPOINT, whole)
    assert run(capsys, str(whole))[0] == 0
    (whole / "tokenizer.json").unlink()
    assert run(capsys, str(whole))[0] == 2


def test_the_flag_of_the_gpu_needs_a_dry_run():
    with pytest.raises(SystemExit) as caught:
        main(["--dry-run-gpu", "h200"])
    assert caught.value.code == 2


@pytest.mark.slow
def test_the_engine_takes_what_was_counted(capsys):
    options = dict(mesh="2x2", max_num_seqs=6, max_chunk=64, max_model_len=256, page_size=32)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    code, out, _ = run(capsys, str(DEMO_CHECKPOINT), *flags)
    info = Engine(EngineOptions(path=str(DEMO_CHECKPOINT), **options)).info
    device = info.devices[0]
    assert code == 0
    assert f"weights {bytes_text(device.weight_bytes)} " in out
    assert f"KV cache {bytes_text(device.kv_bytes)} " in out
    assert f"programs: {info.num_programs} " in out
    assert f"max_model_len {info.max_model_len:,} " in out
