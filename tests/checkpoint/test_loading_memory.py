"""Loading adds little more memory than the weights; runs `bench/loading.py` on a small model."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench import loading
from bench.new_process import in_new_process
from llama_jax.config import LlamaConfig
from llama_jax.weights.table import checkpoint_tensors
from tests.support.conversions import convert_to

# 41 M parameters, 164 MB in float32. The largest tensors, 50 MB each, are loaded last, when all
# others are in memory: the hardest case for a loader that holds a tensor twice.
CONFIG = LlamaConfig(
    vocab_size=1000,
    embed_dim=1024,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=12288,
    rope_theta=500000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_position_embeddings=8192,
)
LAYOUTS = ("hf", "orbax")


@pytest.fixture(scope="module")
def checkpoints():
    """Directory by layout."""
    with tempfile.TemporaryDirectory() as directory:
        paths = {layout: Path(directory) / layout for layout in LAYOUTS}
        weights = {
            name: torch.full(tensor.shape, 0.5, dtype=torch.bfloat16)
            for name, tensor in checkpoint_tensors(CONFIG).items()
        }
        paths["hf"].mkdir()
        (paths["hf"] / "config.json").write_text(json.dumps(CONFIG.to_dict()))
        save_file(weights, paths["hf"] / "model.safetensors")
        convert_to(paths["orbax"], paths["hf"])
        yield paths


def load(path: Path, mesh: str, dtype: str) -> dict[str, float]:
    """Returns what `bench/loading.py` measures."""
    return in_new_process(loading.load, str(path), mesh, dtype, JAX_PLATFORMS="cpu")


# The quick set has each layout and each mesh once; a case starts a process.
@pytest.mark.parametrize(
    ("layout", "mesh"),
    [
        ("hf", "1x1"),
        ("orbax", "1x2"),
        pytest.param("hf", "1x2", marks=pytest.mark.slow),
        pytest.param("orbax", "1x1", marks=pytest.mark.slow),
    ],
)
def test_loading_adds_little_more_than_the_weights(checkpoints, layout, mesh):
    found = load(checkpoints[layout], mesh, "float32")
    # All of it is in the process's own memory, not in pages of the file.
    assert found["after"] >= found["weights"] >= 4 * 41_000_000
    assert found["peak"] <= 1.1 * found["weights"]
