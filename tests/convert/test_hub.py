"""Names of models instead of directories, with a local server in place of the Hub."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from convert.__main__ import main
from convert.hub import _silent_bar, local_directory
from convert.source import KV_CACHE_SCALES
from llama_jax.checkpoint import open_checkpoint
from tests.support.conversions import load_weights
from tests.support.lora_adapter import low_rank, write_adapter
from tests.support.meta_checkpoint import PARAMS, meta_weights, shard, write_meta
from tests.support.paths import ROOT
from tests.support.tiny_checkpoint import bits, read, write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

INDEX = "model.safetensors.index.json"
TEMPLATE = "additional_chat_templates/tool_use.jinja"
COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub:
    """A server with the model `owner/model`.

    Attributes:
      address: its URL.
      asked: paths of the files requested.
      refusals: path of a file → HTTP status and error code of the Hub.
    """

    def __init__(self, repository: Path):
        self.repository = repository
        self.asked: set[str] = set()
        self.refusals: dict[str, tuple[int, str]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, headers, body = hub.answer(self.path.split("?")[0])
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        files = {
            str(file.relative_to(self.repository)): file.read_bytes()
            for file in self.repository.rglob("*")
            if file.is_file()
        }
        oid = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
        if path.startswith("/api/models/owner/model/revision/"):
            return 200, {}, json.dumps({"id": "owner/model", "sha": COMMIT}).encode()
        if path == f"/api/models/owner/model/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": oid[name]}
                for name, data in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        if path.startswith(prefix := f"/owner/model/resolve/{COMMIT}/"):
            name = urllib.parse.unquote(path.removeprefix(prefix))
            self.asked.add(name)
            if name in self.refusals:
                status, code = self.refusals[name]
                return status, {"X-Error-Code": code}, b"no"
            headers = {"ETag": f'"{oid[name]}"', "X-Repo-Commit": COMMIT}
            return 200, headers, files[name]
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        thread = threading.Thread(target=self.server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            self.server.shutdown()
            thread.join()
            self.server.server_close()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A model as Meta publishes it, with files that are not needed."""
    path = tmp_path_factory.mktemp("repository")
    write_checkpoint(path, dtype="bfloat16", vocab_size=600, shard_size="50KB")
    make_tokenizer(path)
    write_meta(path / "original", shard(meta_weights(), 1))
    for name in ("pytorch_model.bin", "consolidated.pth", "onnx/model.safetensors", "README.md"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("something else")
    (path / "LICENSE").write_text("the license")
    (path / KV_CACHE_SCALES).write_text('{"model.layers.0.self_attn.k_scale": [0.25]}')
    (path / TEMPLATE).parent.mkdir()
    (path / TEMPLATE).write_text("{{ tools }}")
    return path


@pytest.fixture
def hub(repository):
    hub = Hub(repository)
    with hub.serving():
        yield hub


def run(hub_address, folder, *arguments) -> tuple[int, str, str]:
    """Runs the converter in this process with this Hub and a cache in `folder`.

    The variables of `run_process` are read when `huggingface_hub` is imported.
    """
    settings = {
        "ENDPOINT": hub_address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub_address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "cache" / "hub"),
        "HF_TOKEN_PATH": str(folder / "cache" / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("HF_TOKEN", raising=False)
        close_session()  # which may have a proxy
        code = main([*map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def run_process(hub_address, folder, *arguments) -> tuple[int, str, str]:
    """Runs `python -m convert` with this Hub and a cache in `folder`."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env = kept | {
        "HF_ENDPOINT": hub_address,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def failure(hub_address, folder, *arguments) -> str:
    """Returns the last line of standard error of a run that must fail."""
    code, out, err = run(hub_address, folder, *arguments, folder / "new")
    message = err.splitlines()[-1]
    assert (code, out) == (1, "") and "Traceback" not in err
    assert message.startswith("error: ") and message.endswith(".")
    assert not (folder / "new").exists()
    return message


def test_a_model_is_downloaded_and_converted(hub, repository, tmp_path):
    arguments = ("hf", "owner/model", tmp_path / "new", "--json")
    code, out, err = run_process(hub.address, tmp_path, *arguments)
    assert code == 0, err
    assert json.loads(out)["source"] == "owner/model"
    assert "Downloading: " in err and "it/s" not in err
    shards = {file.name for file in repository.glob("model-*")}
    assert len(shards) > 1
    assert hub.asked == shards | {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE",
        KV_CACHE_SCALES,
        TEMPLATE,
    }
    assert (tmp_path / "new" / KV_CACHE_SCALES).is_file()
    reader = open_checkpoint(tmp_path / "new")
    originals = {name: bits(tensor) for name, tensor in load_weights(repository).items()}
    assert {name: bits(read(reader, name)) for name in reader.tensors} == originals
    assert run(hub.address, tmp_path, "verify", "owner/model", tmp_path / "new")[0] == 0


def test_only_metas_release_is_downloaded(hub, tmp_path):
    assert run(hub.address, tmp_path, "meta", "owner/model", tmp_path / "new")[0] == 0
    assert hub.asked == {f"original/{name}" for name in
                         ("consolidated.00.pth", "params.json", "tokenizer.model")}  # fmt: skip
    assert open_checkpoint(tmp_path / "new").config.embed_dim == 128


def test_shards_of_any_name(repository, tmp_path):
    """The index names them; other weights are not downloaded."""
    path = shutil.copytree(repository, tmp_path / "repository")
    index = json.loads((path / INDEX).read_text())
    names = {old: f"part [{old.split('-')[1]}].safetensors" for old in index["weight_map"].values()}
    for old, new in names.items():
        (path / old).rename(path / new)
    index["weight_map"] = {tensor: names[old] for tensor, old in index["weight_map"].items()}
    (path / INDEX).write_text(json.dumps(index))
    (path / "consolidated.safetensors").write_text("something else")
    hub = Hub(path)
    with hub.serving():
        assert run(hub.address, tmp_path, "hf", "owner/model", tmp_path / "new")[0] == 0
    weights = {name for name in hub.asked if name.endswith(".safetensors")}
    assert weights == set(names.values())


@pytest.mark.parametrize("name", ["model.safetensors", "gptq_model-4bit-128g.safetensors"])
def test_weights_without_an_index(tmp_path, name):
    """Files with the name that counts, or of any name, but not those in folders."""
    path = tmp_path / "repository"
    write_checkpoint(path, num_hidden_layers=1)
    (path / "model.safetensors").rename(path / name)
    others = ["onnx/model.safetensors"] + ["other.safetensors"] * (name == "model.safetensors")
    for other in others:
        (path / other).parent.mkdir(exist_ok=True)
        (path / other).write_text("something else")
    hub = Hub(path)
    with hub.serving():
        assert run(hub.address, tmp_path, "hf", "owner/model", tmp_path / "new")[0] == 0
    assert {name for name in hub.asked if name.endswith(".safetensors")} == {name}


def test_an_adapter_is_downloaded_and_merged(repository, tmp_path):
    path = tmp_path / "repository"
    module = "model.layers.0.self_attn.q_proj"
    make_tokenizer(write_adapter(path, low_rank(module, (64, 32))))
    for name in ("training_args.bin", "checkpoint-5/adapter_model.safetensors"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("something else")
    hub = Hub(path)
    arguments = ("hf", repository, tmp_path / "new", "--adapter", "owner/model")
    with hub.serving():
        assert run(hub.address, tmp_path, *arguments)[0] == 0
        assert hub.asked == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        (path / "adapter_model.safetensors").unlink()
        other = tmp_path / "other"
        other.mkdir()
        call = ("hf", repository, other / "new", "--adapter", "owner/model")
        code, _, err = run(hub.address, other, *call)
    assert code == 1 and "adapter_model.safetensors" in err
    name = f"{module}.weight"
    before, after = (open_checkpoint(folder) for folder in (repository, tmp_path / "new"))
    changed = {n for n in before.tensors if bits(read(before, n)) != bits(read(after, n))}
    assert changed == {name}


def test_progress_counts_the_bytes_of_files():
    """The library has other bars, too, and draws a bar more often than it moves."""
    steps = []
    bar_of = _silent_bar(lambda *step: steps.append(step))
    for unit, total, done in (("B", 9, 4), ("it", 9, 5), ("B", None, 6), ("B", 9, 4), ("B", 9, 9)):
        bar = bar_of(total=total, unit=unit)
        bar.n = done
        bar.display()
    assert steps == [("Downloading", 4, 9), ("Downloading", 9, 9)]


def test_one_of_two_releases_is_downloaded(tmp_path):
    """Llama 3.1 405B comes in 8 and in 16 shards."""
    for count in (8, 16):
        folder = tmp_path / "repository" / "original" / f"mp{count}"
        parts = shard(meta_weights(n_kv_heads=16), count)
        write_meta(folder, parts, PARAMS | {"n_kv_heads": 16})
    hub = Hub(tmp_path / "repository")
    with hub.serving():
        code, _, err = run_process(hub.address, tmp_path, "meta", "owner/model", tmp_path / "new")
    assert code == 0 and "mp8" in err
    shards = {name for name in hub.asked if name.endswith(".pth")}
    assert shards == {f"original/mp8/consolidated.{rank:02}.pth" for rank in range(8)}


@pytest.mark.parametrize(
    ("file", "token"), [("adapter_config.json", "--adapter"), ("pytorch_model.bin", "meta")]
)
def test_a_repository_that_cannot_be_converted(tmp_path, file, token):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "README.md").write_text("A model.")
    (tmp_path / "repository" / file).write_text("{}")
    hub = Hub(tmp_path / "repository")
    with hub.serving():
        assert token in failure(hub.address, tmp_path, "hf", "owner/model")
    assert "pytorch_model.bin" not in hub.asked


def test_downloaded_files_are_not_downloaded_again(hub, tmp_path):
    assert run(hub.address, tmp_path, "hf", "owner/model", tmp_path / "new")[0] == 0
    hub.asked.clear()
    assert run(hub.address, tmp_path, "hf", "owner/model", tmp_path / "newer")[0] == 0
    assert not hub.asked


def test_an_unknown_model(hub, tmp_path):
    message = failure(hub.address, tmp_path, "hf", "owner/other")
    assert "owner/other" in message
    assert "`hf auth login`" in message


def test_a_gated_model(hub, tmp_path):
    hub.refusals["config.json"] = (403, "GatedRepo")
    message = failure(hub.address, tmp_path, "hf", "owner/model")
    assert "https://huggingface.co/owner/model" in message and "HF_TOKEN" in message


def test_without_a_network(tmp_path):
    with socket.socket() as taken:  # no server listens there
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        message = failure(address, tmp_path, "hf", "owner/model")
        assert "`hf download owner/model --local-dir DIR`" in message
        message = failure(address, tmp_path, "meta", "owner/model")
        assert "`hf download owner/model --include 'original/*' --local-dir DIR`" in message


def test_a_server_that_fails(hub, tmp_path):
    hub.refusals["config.json"] = (410, "Gone")
    message = failure(hub.address, tmp_path, "hf", "owner/model")
    assert "owner/model" in message and "410" in message


def test_a_repository_without_such_a_layout(tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "config.json").write_text("{}")
    hub = Hub(tmp_path / "repository")
    with hub.serving():
        message = failure(hub.address, tmp_path, "meta", "owner/model")
    assert "owner/model" in message and "original" in message


def test_directories_are_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would fail
    monkeypatch.chdir(tmp_path)
    Path("owner/model").mkdir(parents=True)
    for name in ("owner/model", "./owner/none", "/owner/none", "a/b/c", "none"):
        assert local_directory(name, "hf", print) == Path(name)
