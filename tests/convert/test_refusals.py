"""Directories that cannot be opened: every command names what they are, and what to do.

The layouts are those that the tools write: peft 0.21, mlx-lm 0.32, transformers, git-lfs, and
Meta's release. Every command gets every directory.
"""

import errno
import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from convert.__main__ import main as convert_main
from convert.journal import Journal
from llama_jax.checkpoint.manifest import JOURNAL, MANIFEST
from llama_jax.serve.launch import main as serve_main
from tests.support.another_user import as_another_user
from tests.support.conversions import convert_to
from tests.support.meta_checkpoint import PARAMS, meta_weights, shard, write_meta
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
NO_ENGINE = ("false",)
COMMANDS: dict[str, Callable[[Path], int]] = {
    "serve": lambda path: serve_main([str(path), "--port=0"], NO_ENGINE),
    "hf": lambda path: convert_main(["hf", str(path), f"{path}-new"]),
    "meta": lambda path: convert_main(["meta", str(path), f"{path}-new"]),
    "gguf": lambda path: convert_main(["gguf", str(path), f"{path}-new"]),
    "inspect": lambda path: convert_main(["inspect", str(path)]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint in Hugging Face layout, with a tokenizer."""
    path = tmp_path_factory.mktemp("whole")
    write_checkpoint(path, dtype="bfloat16", vocab_size=600)
    return make_tokenizer(path)


@pytest.fixture(scope="module")
def converted(whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "new"
    convert_to(path, whole)
    return path


def without_weights(path: Path, whole: Path) -> None:
    shutil.copytree(whole, path, ignore=shutil.ignore_patterns("*.safetensors"))


def lora(path: Path, whole: Path) -> None:
    path.mkdir()
    adapter = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    (path / "adapter_config.json").write_text(json.dumps(adapter))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    safetensors.torch.save_file({name: torch.ones(4, 32)}, path / "adapter_model.safetensors")
    (path / "README.md").write_text("---\nlibrary_name: peft\n---\n")


def lora_beside_config_and_tokenizer(path: Path, whole: Path) -> None:
    """As axolotl writes it."""
    without_weights(path, whole)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({}, path / "adapter_model.bin")


def lora_of_mlx(path: Path, whole: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text('{"fine_tune_type": "lora", "model": "m"}')
    safetensors.torch.save_file({"a": torch.ones(1)}, path / "adapters.safetensors")


def mlx(path: Path, whole: Path) -> None:
    shutil.copytree(whole, path)
    config = json.loads((path / "config.json").read_text())
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    config |= {"quantization": settings, "quantization_config": settings}
    (path / "config.json").write_text(json.dumps(config))
    module = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.weight": torch.zeros(64, 4, dtype=torch.uint32),
        f"{module}.scales": torch.ones(64, 1, dtype=torch.bfloat16),
        f"{module}.biases": torch.ones(64, 1, dtype=torch.bfloat16),
    }
    safetensors.torch.save_file(tensors, path / "model.safetensors")


def pytorch(path: Path, whole: Path) -> None:
    without_weights(path, whole)
    tensors = safetensors.torch.load_file(whole / "model.safetensors")
    torch.save(tensors, path / "pytorch_model.bin")
    for name in ("training_args.bin", "optimizer.pt"):  # not what is to be converted
        torch.save({}, path / name)


def pytorch_of_another_program(path: Path, whole: Path) -> None:
    path.mkdir()
    torch.save(meta_weights(), path / "model.pt")


def flax(path: Path, whole: Path) -> None:
    without_weights(path, whole)
    (path / "flax_model.msgpack").write_bytes(b"\x81")


def lfs_weights(path: Path, whole: Path) -> None:
    shutil.copytree(whole, path)
    (path / "model.safetensors").write_text(POINTER)


def lfs_tokenizer(path: Path, whole: Path) -> None:
    shutil.copytree(whole, path)
    (path / "tokenizer.json").write_text(POINTER)


def unfinished(path: Path, whole: Path) -> None:
    path.mkdir()
    (path / JOURNAL).write_text('\n{"plan": "x"}')


def config_only(path: Path, whole: Path) -> None:
    path.mkdir()
    shutil.copy(whole / "config.json", path)


def in_a_folder(path: Path, whole: Path) -> None:
    shutil.copytree(whole, path / "weights")
    (path / "README.md").write_text("The weights are in weights/.")


def in_the_cache_of_the_hub(path: Path, whole: Path) -> None:
    shutil.copytree(whole, path / "snapshots" / "0123abcd")
    (path / "blobs").mkdir()


def empty(path: Path, whole: Path) -> None:
    path.mkdir()


def a_file(path: Path, whole: Path) -> None:
    path.write_text("{}")


def nothing(path: Path, whole: Path) -> None:
    pass


def a_broken_link(path: Path, whole: Path) -> None:
    path.symlink_to("nowhere")


def lfs_gguf(path: Path, whole: Path) -> None:
    path.mkdir()
    (path / "model-Q4_K_M.gguf").write_text(POINTER)


# For `meta` and `gguf`, a directory in Hugging Face layout is that, whatever is wrong with it.
KINDS = [
    (lora, "--adapter", None),
    (lora_beside_config_and_tokenizer, "--adapter", None),
    (lora_of_mlx, "mlx_lm.fuse", None),
    (mlx, "mlx_lm.convert", "convert hf"),
    (pytorch, "holds pytorch_model.bin", None),
    (pytorch_of_another_program, "model.pt", None),
    (flax, "flax_model.msgpack", None),
    (lfs_weights, "git lfs pull", None),
    (lfs_tokenizer, "git lfs pull", None),
    (lfs_gguf, "git lfs pull", None),
    (unfinished, "--resume", None),
    (config_only, "model.safetensors", None),
    (in_a_folder, "/weights", None),
    (in_the_cache_of_the_hub, "/snapshots/0123abcd", None),
    (empty, "config.json", None),
    (a_file, "is a file", None),
    (nothing, "no directory", None),
    (a_broken_link, "no directory", None),
]


@pytest.fixture
def refused(capsys):
    """Runs a command on a path that it must refuse, and returns its message."""

    def run(command: str, path: Path) -> str:
        capsys.readouterr()
        assert COMMANDS[command](path) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.endswith(".\n")
        assert err.count("\n") == 1 and len(err) < 600
        assert not Path(f"{path}-new").exists()
        return err

    return run


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("kind", "token", "for_others"), KINDS, ids=[k[0].__name__ for k in KINDS])
def test_it_is_named(whole, tmp_path, refused, command, kind, token, for_others):
    path = tmp_path / "given"
    kind(path, whole)
    wanted = for_others if command in ("meta", "gguf") and for_others else token
    assert wanted in refused(command, path)


def test_a_release_of_meta_is_converted_first(tmp_path, refused):
    release = write_meta(tmp_path / "model" / "original", shard(meta_weights(), 1))
    for path in (release, release.parent):
        assert f"convert meta {path}" in refused("serve", path)
    assert f"convert meta {release}" in refused("gguf", release)
    for command in ("hf", "meta", "inspect"):
        assert COMMANDS[command](release) == 0
        shutil.rmtree(f"{release}-new", ignore_errors=True)


def test_each_layout_has_its_command(whole, converted, tmp_path, refused):
    for path in (whole, converted):
        for command in ("meta", "gguf"):
            assert f"convert hf {path}" in refused(command, path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert f"convert gguf {tmp_path}" in refused("meta", tmp_path)
    assert "convert gguf" in refused("meta", tmp_path / "model.gguf")


def test_pointers_in_a_release_of_meta(tmp_path, refused):
    for name in ("consolidated.00.pth", "tokenizer.model"):
        path = write_meta(tmp_path / name, shard(meta_weights(), 1))
        (path / name).write_text(POINTER)
        for command in ("hf", "meta", "inspect"):
            assert "git lfs pull" in refused(command, path)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_directory_that_may_not_be_read(whole, refused, command, mode):
    with tempfile.TemporaryDirectory() as parent:  # accessible to other users
        Path(parent).chmod(0o755)
        path = shutil.copytree(whole, Path(parent) / "given")
        path.chmod(mode)
        with as_another_user():
            assert f"chmod -R a+rX {path}" in refused(command, path)
        path.chmod(0o755)


# Conversions.


@pytest.mark.parametrize("command", COMMANDS)
def test_a_running_conversion(whole, tmp_path, refused, command):
    """No message says to delete it."""
    path = tmp_path / "given"
    unfinished(path, whole)
    journal = Journal(path, "x")
    assert "is running" in refused(command, path)
    journal.close()
    assert "--resume" in refused(command, path)


def test_a_conversion_that_ends_while_it_is_looked_at(converted, tmp_path, monkeypatch):
    path = shutil.copytree(converted, tmp_path / "given")
    manifest = (path / MANIFEST).rename(tmp_path / MANIFEST)
    (path / JOURNAL).touch()
    is_file = Path.is_file

    def look(file: Path) -> bool:
        found = is_file(file)
        if found and file == path / JOURNAL:
            manifest.rename(path / MANIFEST)
            file.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", look)
    assert COMMANDS["inspect"](path) == 0


def test_only_the_lock_of_a_writer_shows_that_a_conversion_runs(
    whole, tmp_path, refused, monkeypatch
):
    path = tmp_path / "given"
    unfinished(path, whole)
    with (path / JOURNAL).open("rb") as looked_at:  # by another program, at this moment
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        assert "--resume" in refused("inspect", path)

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert "--resume" in refused("inspect", path)


def test_a_conversion_that_runs_is_not_begun_again(whole, tmp_path, capsys):
    path = tmp_path / "given"
    unfinished(path, whole)
    journal = Journal(path, "x")
    for arguments in ([], ["--resume"]):
        assert convert_main(["hf", str(whole), str(path), *arguments]) == 1
        message = capsys.readouterr().err
        assert "is running" in message and "delete" not in message
    journal.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_incomplete_copy_of_a_conversion(converted, tmp_path, refused, command):
    path = shutil.copytree(converted, tmp_path / "given")
    (path / MANIFEST).unlink()
    assert MANIFEST in refused(command, path)


# Checkpoints that look like something else.


def test_a_folder_called_weights_means_nothing(whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "given")
    (path / "weights" / "state").mkdir(parents=True)
    (path / "original").mkdir()
    (path / "original" / "params.json").write_text("{}")
    (path / "adapter_config.json").write_text("{}")
    (path / "pytorch_model.bin").write_text(POINTER)
    (path / "tokenizer.model").write_text(POINTER)
    for command in ("hf", "inspect"):
        assert COMMANDS[command](path) == 0


@pytest.mark.parametrize("small_files", ["inside", "above"])
def test_a_release_that_is_there_twice(tmp_path, capsys, caplog, small_files):
    """Llama 3.1 405B comes in 8 and in 16 shards."""
    for count in (8, 16):
        weights = meta_weights(n_kv_heads=16)
        write_meta(
            tmp_path / "original" / f"mp{count}", shard(weights, count), PARAMS | {"n_kv_heads": 16}
        )
    if small_files == "above":
        for name in ("params.json", "tokenizer.model"):
            for folder in tmp_path.glob("original/mp*"):
                shutil.move(folder / name, tmp_path / "original" / name)
    assert convert_main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"].endswith("original/mp8") and found["num_files"] == 8
    assert "mp8" in caplog.text
    for given in (tmp_path, tmp_path / "original" / "mp16"):
        assert convert_main(["meta", str(given), f"{given}-new"]) == 0
        shutil.rmtree(f"{given}-new")


def test_no_message_is_longer_than_a_screen(whole, tmp_path, refused):
    """70B with the weights of a small model: hundreds of tensors are wrong."""
    path = shutil.copytree(whole, tmp_path / "given")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 80}))
    message = refused("inspect", path)
    assert "model.layers.3." in message and f"{77 * 9 - 4} more" in message
    index = {"weight_map": {f"tensor{n}": f"shard-{n}.safetensors" for n in range(1000)}}
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "996 more" in refused("inspect", path)
