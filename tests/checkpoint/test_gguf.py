"""Reading weights in GGUF.

The references are the `gguf` package's own reader, and transformers' dequantization on PyTorch,
which shares no code with the `gguf` package that the reader uses.
"""

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.gguf import dequant

import llama_jax.checkpoint.gguf
from llama_jax.checkpoint import CheckpointError, open_checkpoint
from llama_jax.gguf import GgufError
from llama_jax.model import Llama
from tests.support.gguf_file import WIDE, tiny_model, write_gguf
from tests.support.tiny_checkpoint import bits, read

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
GATE, QUERY = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model():
    return tiny_model(**(WIDE | {"num_hidden_layers": 2}))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An open reader of a small file in Q6_K."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return open_checkpoint(write_gguf(path, tiny_model(**WIDE), "Q6_K"))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("tied", [False, True])
def test_plain_weights_are_those_of_the_original(tmp_path, kind, tied):
    model = tiny_model(tie_word_embeddings=tied)
    reader = open_checkpoint(write_gguf(tmp_path / "model.gguf", model, kind))
    assert reader.config.dtype == str(PLAIN[kind]).removeprefix("torch.")
    assert reader.config.tie_embeddings == tied
    weights = dict(model.state_dict())
    if tied:
        del weights["lm_head.weight"]
    assert reader.tensors.keys() == weights.keys()
    for name, weight in weights.items():
        dtype = PLAIN[kind] if weight.ndim == 2 else torch.float32
        assert bits(read(reader, name)) == bits(weight.to(dtype)), name


@pytest.mark.parametrize("kind", QUANTIZED)
def test_blocks_are_dequantized(tmp_path, model, kind):
    path = write_gguf(tmp_path / "model.gguf", model, kind)
    reader = open_checkpoint(path)
    assert reader.config.dtype == "bfloat16"
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    head_dim, width = model.config.head_dim, model.config.hidden_size
    for name, own in ((GATE, "blk.1.ffn_gate.weight"), (QUERY, "blk.1.attn_q.weight")):
        data, number = raw[own].data, int(GGMLQuantizationType[kind])
        assert raw[own].tensor_type == number
        if kind in ("Q5_0", "Q5_1"):  # which transformers does not have
            wanted = gguf.quants.dequantize(data, GGMLQuantizationType[kind])
        else:
            wanted = dequant.dequantize(torch.from_numpy(data.copy()), number).numpy()
        wanted = wanted.reshape(-1, width)
        if name == QUERY:  # pairs of a head's rows, apart again
            wanted = wanted.reshape(-1, head_dim // 2, 2, width).swapaxes(1, 2).reshape(-1, width)
        assert np.array_equal(read(reader, name, dtype=np.float32), wanted)


@given(st.data())
def test_a_slice_is_that_part_of_the_whole(small, data):
    name = data.draw(st.sampled_from([GATE, QUERY, "model.norm.weight"]))
    index = []
    for size in small.tensors[name].shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    whole = read(small, name, dtype=np.float32)
    part = read(small, name, tuple(index), dtype=np.float32)
    assert np.array_equal(part, whole[tuple(index)])


def test_only_the_blocks_of_a_slice_are_dequantized(small, monkeypatch):
    decoded = []

    def decode(rows, kind, own=llama_jax.checkpoint.gguf.decode):
        values = own(rows, kind)
        decoded.append(values.size)
        return values

    monkeypatch.setattr(llama_jax.checkpoint.gguf, "decode", decode)
    read(small, "model.layers.0.mlp.down_proj.weight", (slice(3, 5), slice(300, 301)))
    assert decoded == [2 * 256]
    decoded.clear()
    monkeypatch.setattr(llama_jax.checkpoint.gguf, "BLOCK_BYTES", 4 * 256 * 10)
    read(small, QUERY)  # ten rows at a time: memory does not grow with the matrix
    assert max(decoded) == 10 * 256 and sum(decoded) == 256 * 256


def test_a_model_in_several_files_opens_from_any_of_them(tmp_path):
    model = tiny_model()
    write_gguf(tmp_path / "model.gguf", model, split=7)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts][:2] == [
        f"model-{number:05}-of-{len(parts):05}.gguf" for number in (1, 2)
    ]
    for path in (tmp_path, parts[0], parts[-1]):
        reader = open_checkpoint(path)
        for name, weight in model.state_dict().items():
            assert bits(read(reader, name)) == bits(weight)
    parts[1].unlink()
    with pytest.raises(GgufError, match=parts[1].name):
        open_checkpoint(tmp_path)


def test_the_model_opens_from_python(tmp_path):
    model = tiny_model()
    write_gguf(tmp_path / "model.gguf", model)
    for path in (tmp_path, tmp_path / "model.gguf"):
        found = Llama.from_pretrained(path).layers[1].attention.wqkv[...]
        queries = model.state_dict()[QUERY].numpy()
        assert np.array_equal(found[: len(queries)], queries)


@pytest.mark.parametrize("kind", ["IQ4_NL", "Q2_K", "MXFP4", "F64"])
def test_other_types_are_refused_by_name(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = np.zeros((512, 256 // block * size), np.uint8)
    changes = {"blk.0.ffn_up.weight": (raw, kind)}
    path = write_gguf(tmp_path / "model.gguf", tiny_model(**WIDE), changes=changes)
    with pytest.raises(CheckpointError, match=kind):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"output_norm.weight": None}, "model.norm.weight"),
        ({"blk.0.attn_q.bias": np.ones(64, np.float32)}, "blk.0.attn_q.bias"),
        ({"output_norm.weight": np.ones(31, np.float32)}, "model.norm.weight"),
        ({"blk.0.ffn_gate_exps.weight": np.ones((2, 48, 32), np.float32)}, "ffn_gate_exps"),
    ],
)
def test_missing_and_unknown_tensors_are_named(tmp_path, changes, named):
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), changes=changes)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(path)
