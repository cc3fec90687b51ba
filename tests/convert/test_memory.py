"""Memory of a conversion, measured from outside, with the tensor shapes of 70B."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.weights.table import checkpoint_tensors
from tests.support.paths import ROOT

CONFIG = LlamaConfig(
    vocab_size=128256,
    embed_dim=8192,
    num_layers=1,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=28672,
    rope_theta=500000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_position_embeddings=8192,
    dtype="bfloat16",
)
# As many workers as the memory allows, regardless of the number of cores.
PROGRAM = """
import os, sys
from pathlib import Path
from convert.conversion import Options, convert
from convert.source import open_source
source, destination, layout, quantize, max_memory = sys.argv[1:]
os.cpu_count = lambda: 64
options = Options(layout=layout, quantize=quantize or None, max_memory=int(max_memory))
print(flush=True)
sys.stdin.readline()
convert(open_source(Path(source)), Path(destination), options)
"""
SLACK = 32 << 20  # overhead of threads and of the allocator


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """3.8 GB of zeros in a sparse file."""
    path = tmp_path_factory.mktemp("source")
    header, end = {}, 0
    for name, tensor in checkpoint_tensors(CONFIG).items():
        size = 2
        for length in tensor.shape:
            size *= length
        entry = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end, end + size]}
        header[name], end = entry, end + size
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert end > 3.7e9
    return path


def anonymous(process: int) -> int:
    """Anonymous bytes of a process; 0 after it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon")]
    return 1024 * sum(int(line[1]) for line in lines)


def peak(source, destination, layout, quantize, max_memory) -> int:
    """The peak memory beyond that of the interpreter with everything imported."""
    arguments = [source, destination, layout, quantize or "", max_memory]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        before = highest = anonymous(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        while process.poll() is None:
            highest = max(highest, anonymous(process.pid))
    assert process.returncode == 0
    return highest - before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "quantize", "max_memory", "allowed"),
    [
        ("orbax", None, 1 << 30, 1.2 * (1 << 30)),
        ("orbax", None, 1 << 28, (1 << 28) + SLACK),
        ("huggingface", None, 1 << 28, (1 << 28) + SLACK),
        ("orbax", "int8", 1 << 28, (1 << 28) + SLACK),
        ("orbax", "fp8", 1 << 28, (1 << 28) + SLACK),
        ("orbax", "int4", 1 << 28, (1 << 28) + SLACK),
        ("orbax", "int4", 1 << 30, 1.2 * (1 << 30)),
    ],
)
def test_a_conversion_stays_within_its_memory(
    source, tmp_path, layout, quantize, max_memory, allowed
):
    """Less than the largest tensor, which has 2.1 GB."""
    try:
        found = peak(source, tmp_path / "new", layout, quantize, max_memory)
        print(f"{layout} {quantize} {max_memory >> 20} MiB: {found >> 20} MiB")
        assert (tmp_path / "new" / "llama_jax.json").is_file()
        assert 4 << 20 < found <= allowed
    finally:
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
