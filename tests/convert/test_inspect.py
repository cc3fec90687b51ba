"""`python -m convert inspect`: the description of a checkpoint and its distribution on a mesh."""

import contextlib
import io
import json
import math
import shutil
from collections import Counter

import jax
import numpy as np
import pytest
import torch
from rich.console import Console

from convert.__main__ import main
from convert.commands import open_any
from convert.inspection import device_shares, inspect
from convert.report import inspection_json, show_inspection
from llama_jax.checkpoint.load import load_params
from llama_jax.config import LlamaConfig
from llama_jax.weights.table import checkpoint_tensors
from sharding.errors import UserError
from sharding.mesh import make_mesh
from tests.support.conversions import FORMATS, change_weights, convert_to
from tests.support.foreign_writer import GROUP, gptq, write_foreign
from tests.support.meta_checkpoint import meta_weights, shard, write_meta
from tests.support.paths import DEMO_CHECKPOINT
from tests.support.tiny_checkpoint import write_checkpoint

DEMO = DEMO_CHECKPOINT


def inspected(path, mesh=None):
    with contextlib.closing(open_any(path).reader) as reader:
        return inspect(reader, mesh)


def shown(outcome, width) -> list[str]:
    """The lines printed on a terminal of this width, without trailing spaces."""
    out = io.StringIO()
    show_inspection(Console(file=out, width=width), outcome)
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    write_checkpoint(
        path, dtype="bfloat16", num_hidden_layers=5, num_key_value_heads=4, shard_size="20KB"
    )
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The shapes of Llama-3-70B, in sparse files."""
    path = tmp_path_factory.mktemp("large")
    config = LlamaConfig.llama3_70b()
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    weight_map = {}
    for number, (name, tensor) in enumerate(checkpoint_tensors(config).items()):
        size = 2 * math.prod(tensor.shape)
        entry = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [0, size]}
        header = json.dumps({name: entry}).encode()
        weight_map[name] = f"model-{number:05}.safetensors"
        with (path / weight_map[name]).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


# The layouts.


def test_hugging_face_layout(source):
    found = inspected(source)
    assert (found.layout, found.formats) == ("huggingface", {"safetensors": None})
    assert found.num_files == len(list(source.glob("*.safetensors"))) > 1
    assert found.config == LlamaConfig.from_pretrained(source)
    assert found.num_parameters == 2 * 96 * 32 + 32 + 5 * (4 * 64 * 32 + 3 * 48 * 32 + 2 * 32)
    assert found.bytes == {"bfloat16": 2 * found.num_parameters}
    assert (found.quantized_by, found.quantization_error, found.devices) == (None, {}, [])


@pytest.mark.parametrize("format", FORMATS)
def test_orbax_layout(source, tmp_path, format):
    report = convert_to(tmp_path / "new", source, quantize=format)
    found = inspected(tmp_path / "new")
    assert (found.layout, found.formats) == ("orbax", {"zarr": 3, "manifest": 2})
    assert found.num_files == sum(file.is_file() for file in tmp_path.glob("new/weights/**/c/**/*"))
    assert found.config.quantization.format == format and found.quantized_by is None
    assert found.quantization_error == report.quantization_error != {}
    assert found.num_parameters == inspected(source).num_parameters
    assert sum(found.bytes.values()) == report.bytes
    stored = {"int8": "int8", "fp8": "float8_e4m3fn", "int4": "uint8"}[format]
    assert set(found.bytes) == {stored, "bfloat16", "float32"}
    assert list(found.bytes.values()) == sorted(found.bytes.values(), reverse=True)
    lines = shown(found, 80)
    (line,) = (line for line in lines if line.startswith("quantization"))
    assert format in line and ("128" in line) == (format == "int4")
    assert any(line.startswith(" mlp.w_down") or line.startswith("mlp.w_down") for line in lines)


def test_export_has_a_manifest_too(source, tmp_path):
    convert_to(tmp_path / "new", source, layout="huggingface")
    found = inspected(tmp_path / "new")
    assert found.formats == {"safetensors": None, "manifest": 2}


def test_a_release_of_meta(tmp_path):
    write_meta(tmp_path, shard(meta_weights(dtype="bfloat16"), 8))
    found = inspected(tmp_path)
    assert (found.layout, found.formats, found.num_files) == ("meta", {"pytorch": None}, 8)
    whole = sum(weight.numel() for weight in meta_weights().values())
    assert found.num_parameters == whole and found.bytes == {"bfloat16": 2 * whole}
    assert "Meta" in shown(found, 80)[2]


def test_other_files_do_not_count(source, tmp_path):
    hf = shutil.copytree(source, tmp_path / "hf")
    orbax, meta = tmp_path / "orbax", tmp_path / "meta"
    convert_to(orbax, source)
    write_meta(meta, shard(meta_weights(), 2))
    before = [inspected(path) for path in (hf, orbax, meta)]
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        (hf / name).write_bytes(b"of another program")
    array = orbax / "weights" / "state" / "model.norm.weight"
    (array / "c" / "0.backup").write_bytes(b"")
    (meta / "consolidated.old.pth").write_bytes(b"")
    assert [inspected(path) for path in (hf, orbax, meta)] == before


def test_tensors_that_are_passed_over_do_not_count(tmp_path):
    weights = write_checkpoint(tmp_path, tie_word_embeddings=True)
    before = inspected(tmp_path)
    extra = {
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "model.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(64),
    }
    change_weights(tmp_path, lambda stored: stored.update(extra))
    assert inspected(tmp_path) == before


def test_a_checkpoint_quantized_by_another_tool(tmp_path):
    gptq_config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
    write_foreign(tmp_path, gptq_config, gptq)
    found = inspected(tmp_path)
    assert (found.layout, found.quantized_by) == ("huggingface", "gptq")
    (line,) = (line for line in shown(found, 80) if line.startswith("quantization"))
    assert all(token in line for token in ("int4", str(GROUP), "gptq"))
    write_foreign(tmp_path / "none", gptq_config, gptq, plain=("layers",))
    assert inspected(tmp_path / "none").quantized_by is None


def test_an_incomplete_copy_of_a_conversion(source, tmp_path, capsys):
    convert_to(tmp_path / "new", source)
    (tmp_path / "new" / "llama_jax.json").unlink()
    assert main(["inspect", str(tmp_path / "new")]) == 1
    assert "llama_jax.json" in capsys.readouterr().err


# The devices.


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """The source in every quantization."""
    root = tmp_path_factory.mktemp("converted")
    for format in (None, *FORMATS):
        convert_to(root / str(format), source, quantize=format, verify=False)
    return root


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("mesh", ["1x1", "2x2", "3x2", "1x4"])
def test_devices_hold_what_the_loader_puts_there(converted, mesh, format):
    path = converted / str(format)
    with contextlib.closing(open_any(path).reader) as reader:
        shares = inspect(reader, mesh).devices
        device_mesh = make_mesh(mesh)
        params = load_params(reader, device_mesh, np.dtype(jax.numpy.bfloat16))
    loaded = Counter()
    for array in jax.tree.leaves(params):
        for part in array.addressable_shards:
            loaded[part.device] += part.data.nbytes
    places = {(s, r): device for (s, r), device in np.ndenumerate(device_mesh.devices)}
    assert {(share.stage, share.rank) for share in shares} == set(places)
    for share in shares:
        assert sum(share.bytes.values()) == loaded[places[share.stage, share.rank]]


def test_layers_and_heads_fall_to_devices(source):
    found = inspected(source, "3x2").devices
    assert [(share.stage, share.rank) for share in found] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)
    ]  # fmt: skip
    assert [list(share.layers) for share in found[::2]] == [[0, 1], [2, 3], [4]]
    assert [share.padding_layers for share in found[::2]] == [0, 0, 1]
    assert [(list(s.heads), list(s.kv_heads)) for s in found[:2]] == [
        ([0, 1], [0, 1]),
        ([2, 3], [2, 3]),
    ]


def test_groups_by_hand():
    """70B on 4 x 2 in bfloat16: 20 layers a stage, half of each matrix, an eighth of the rest."""
    (share, *rest) = device_shares(LlamaConfig.llama3_70b(), "4x2")
    assert len(rest) == 7 and all(other.bytes == share.bytes for other in rest)
    table = 2 * 128256 * 8192 // 8
    assert share.bytes == {
        "embedding": table,
        "attention": 20 * 2 * (2 * 8192 * 8192 + 2 * 1024 * 8192) // 2,
        "mlp": 20 * 2 * 3 * 28672 * 8192 // 2,
        "norms": 2 * 8192 * (2 * 20 + 1),
        "head": table,
    }


def test_kv_heads_that_several_ranks_hold():
    """70B has 8, one for every 8 query heads."""
    shares = device_shares(LlamaConfig.llama3_70b(), "1x32")
    assert [list(share.kv_heads) for share in shares] == [[rank // 4] for rank in range(32)]
    assert list(shares[-1].heads) == [62, 63]


def test_a_stage_without_layers(source):
    *_, last = inspected(source, "8x1").devices
    assert (list(last.layers), last.padding_layers) == ([], 1)
    assert any("none +1" in line for line in shown(inspected(source, "8x1"), 80))


def test_a_mesh_that_does_not_fit(source):
    for mesh in ("1x8", "4*2"):
        with pytest.raises(UserError):
            inspected(source, mesh)


# The report.


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("mesh", ["1x1", "3x2", "4x2", "16x8"])
def test_it_fits_on_a_terminal(large, mesh, width):
    lines = shown(inspected(large, mesh), width)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    stages, ranks = map(int, mesh.split("x"))
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("stage")) + 2 :]
    assert len([line for line in table if line[:5].strip().isdecimal()]) == stages * ranks


def test_70b(large):
    lines = shown(inspected(large, "4x2"), 80)
    facts = {line.split()[0]: line for line in reversed(lines) if line}
    for name, *tokens in (
        ("weights", "141 GB", "723"),
        ("parameters", "70,553,706,496"),
        ("heads", "64", "128", "8"),
    ):
        assert all(token in facts[name] for token in tokens)
    row = "    3    1  60-79 32-63 4-7     0.263     3.020 14.093 0.001 0.263 17.639"
    assert row in lines


def test_the_demo_checkpoint_as_json(capsys):
    assert main(["inspect", str(DEMO), "--mesh", "4x2", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == "" and out.count("\n") == 1
    assert result["num_parameters"] == 3_890_304 and result["bytes"] == 7_780_608
    assert LlamaConfig.from_dict(result["config"]) == LlamaConfig.from_pretrained(DEMO)
    assert len(result["devices"]) == 8
    last = result["devices"][-1]
    assert (last["stage"], last["rank"], last["layers"]) == (3, 1, [6, 7])
    assert last["bytes"] == sum(last["bytes_by_group"].values())
    assert result == json.loads(json.dumps(inspection_json(inspected(DEMO, "4x2"))))
