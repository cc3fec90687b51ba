"""The command line: exit codes, standard output and standard error, JSON, and progress."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert import commands
from convert.__main__ import main
from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.manifest import JOURNAL, MANIFEST
from tests.support.conversions import load_weights
from tests.support.meta_checkpoint import meta_weights, shard, write_meta
from tests.support.paths import ROOT
from tests.support.tiny_checkpoint import bits, read, write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

CONVERTED = """source adapter destination dtype quantization source_bytes bytes resumed_bytes
    seconds verify_seconds quantization_error divergence""".split()
MATRICES = "attention.wk attention.wo attention.wq attention.wv mlp.w_down mlp.w_gate mlp.w_up"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    write_checkpoint(path, dtype="bfloat16", vocab_size=600)
    return make_tokenizer(path)


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "new"
    assert main(["quantize", str(source), str(path), "--quantize", "int8"]) == 0
    return path


def start(*arguments, program=("-m", "convert"), **options):
    """Starts the program in a new process."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("JAX_")},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options,
    )


def run(*arguments, **options) -> tuple[int, str, str]:
    process = start(*arguments, **options)
    out, err = process.communicate()
    return process.returncode, out, err


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Runs the program in this process, which is faster."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def weights_of(path) -> dict[str, bytes]:
    reader = open_checkpoint(path)
    return {name: bits(read(reader, name)) for name in reader.tensors}


# The commands.


def test_there_and_back(source, tmp_path, capsys):
    code, out, err = run("hf", source, tmp_path / "orbax")
    assert code == 0
    assert str(tmp_path / "orbax") in out and "142 kB" in out and "bfloat16" in out
    assert err.startswith("Writing: 0 B of 142 kB\n") and "\nVerifying: " in err
    assert call(capsys, "verify", source, tmp_path / "orbax")[0] == 0
    assert call(capsys, "export", tmp_path / "orbax", tmp_path / "hf")[0] == 0
    original = {name: bits(tensor) for name, tensor in load_weights(source).items()}
    assert {name: bits(t) for name, t in load_weights(tmp_path / "hf").items()} == original


def test_quantized_and_exported(source, quantized, tmp_path, capsys):
    code, out, _ = call(capsys, "export", quantized, tmp_path / "hf", "--json")
    assert code == 0 and json.loads(out)["quantization"] is None
    assert {tensor.dtype for tensor in load_weights(tmp_path / "hf").values()} == {
        load_weights(source)["model.norm.weight"].dtype
    }
    assert call(capsys, "verify", quantized, tmp_path / "hf")[0] == 0


def test_dtype(source, tmp_path, capsys):
    assert call(capsys, "hf", source, tmp_path / "new", "--dtype", "float32")[0] == 0
    reader = open_checkpoint(tmp_path / "new")
    assert {tensor.dtype for tensor in reader.tensors.values()} == {"float32"}


@pytest.mark.parametrize("command", ["meta", "hf"])
def test_a_release_of_meta(command, tmp_path, capsys):
    """Also from the parent folder, and with the command for the other layout."""
    release = write_meta(tmp_path / "repository" / "original", shard(meta_weights(), 2))
    (release / "LICENSE").write_text("the license")
    given = release.parent if command == "meta" else release
    assert call(capsys, command, given, tmp_path / "new")[0] == 0
    files = {file.name for file in (tmp_path / "new").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "LICENSE"} <= files
    reader = open_checkpoint(tmp_path / "new")
    assert (reader.config.embed_dim, reader.config.num_layers) == (128, 2)
    content = json.loads((tmp_path / "new" / "config.json").read_text())
    assert content["eos_token_id"] == list(reader.config.eos_token_ids) == [257, 264, 265]
    weights = {
        "model.norm.weight": "norm.weight",
        "model.embed_tokens.weight": "tok_embeddings.weight",
    }
    for name, meta_name in weights.items():
        np.testing.assert_array_equal(read(reader, name), meta_weights()[meta_name].numpy())
    assert call(capsys, "verify", release, tmp_path / "new")[0] == 0


def test_no_verify(source, tmp_path, capsys):
    code, out, err = call(capsys, "hf", source, tmp_path / "new", "--no-verify")
    assert code == 0 and "Verif" not in out + err


def test_it_loads_no_jax(source, tmp_path):
    """Nor other modules that take seconds, memory, or an accelerator."""
    script = """if True:
        import sys
        from convert.__main__ import main
        source, new = sys.argv[1:]
        assert main(["quantize", source, new, "--quantize", "int4"]) == 0
        assert main(["verify", source, new]) == main(["inspect", new]) == 0
        assert main(["export", new, new + "-hf", "--json"]) == 0
        heavy = {"jax", "jaxlib", "flax", "orbax", "torch", "transformers", "huggingface_hub"}
        loaded = {name.split(".")[0] for name in sys.modules}
        assert not heavy & loaded, heavy & loaded
    """
    code, _, err = run(source, tmp_path / "new", program=("-c", script))
    assert code == 0, err


# --json


def test_json_of_a_conversion(source, tmp_path, capsys):
    arguments = ("quantize", source, tmp_path / "new", "--quantize", "int8", "--json")
    code, out, err = call(capsys, *arguments)
    result = json.loads(out)
    assert (code, out.count("\n")) == (0, 1) and "Writing" in err
    assert list(result) == CONVERTED
    assert result["source"] == str(source) and result["destination"] == str(tmp_path / "new")
    assert (result["dtype"], result["quantization"]) == ("bfloat16", "int8")
    sizes = {path: sum(map(len, weights_of(path).values())) for path in (source, tmp_path / "new")}
    assert [result["source_bytes"], result["bytes"]] == list(sizes.values())
    assert result["resumed_bytes"] == 0
    assert result["seconds"] > 0 and result["verify_seconds"] > 0
    assert sorted(result["quantization_error"]) == MATRICES.split()
    assert all(0 < error < 0.02 for error in result["quantization_error"].values())
    assert result["divergence"] is None
    code, out, _ = call(capsys, *arguments, "--resume")
    again = json.loads(out)
    assert (code, again["resumed_bytes"], again["verify_seconds"]) == (0, result["bytes"], None)
    assert again["quantization_error"] == result["quantization_error"]


def test_json_of_a_comparison(source, quantized, tmp_path, capsys):
    code, out, _ = call(capsys, "verify", source, quantized, "--json")
    result = json.loads(out)
    assert code == 0 and list(result) == [
        "source",
        "adapter",
        "destination",
        "differences",
        "seconds",
    ]
    assert result["differences"] == []
    code, out, _ = call(capsys, "verify", quantized, source, "--json")
    assert code == 3
    assert "model.layers.0.mlp.up_proj.weight" in json.loads(out)["differences"][5]


def test_json_of_an_error(tmp_path, capsys):
    code, out, err = call(capsys, "hf", tmp_path / "none", tmp_path / "new", "--json")
    assert code == 1
    message = json.loads(out)["error"]
    assert err == f"error: {message}\n" and f"{tmp_path}/none" in message


def test_help_names_every_key_of_the_json(source, quantized, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    documented = set(re.findall(r"\w+", capsys.readouterr().out.split("With --json")[1]))
    for command in (
        ["verify", source, quantized],
        ["inspect", quantized, "--mesh", "2x2"],
        ["quantize", source, quantized, "--quantize", "int8", "--resume"],
    ):
        result = json.loads(call(capsys, *command, "--json")[1])
        keys = set(result) | set(result.get("devices", [{}])[0])
        assert keys <= documented


# Exit codes and errors.


def test_differences_are_named(source, quantized):
    code, out, _ = run("verify", quantized, source)
    lines = out.splitlines()
    assert code == 3
    assert len(lines) == 22 and all(".weight " in line for line in lines[:20])
    assert "1 more" in lines[20] and "--json" in lines[20]
    assert str(source) in lines[21] and str(quantized) in lines[21]


def test_a_changed_byte_is_found(source, tmp_path, capsys):
    assert call(capsys, "hf", source, tmp_path / "new")[0] == 0
    name = "weights/state/model.layers.1.mlp.gate_proj.weight/c/0/0"
    file = tmp_path / "new" / name
    data = bytearray(file.read_bytes())
    data[64] ^= 1
    file.write_bytes(data)
    code, out, _ = call(capsys, "verify", source, tmp_path / "new")
    assert code == 3
    changed, differs, *_ = out.splitlines()
    assert name in changed
    assert "model.layers.1.mlp.gate_proj.weight " in differs and "[1, 0]" in differs


@pytest.mark.parametrize(
    ("arguments", "token"),
    [
        ("", "COMMAND"),
        ("onnx A B", "'onnx'"),
        ("hf A", "DST"),
        ("hf A B --quantize int3", "'int3'"),
        ("hf A B --dtype float64", "'float64'"),
        ("hf A B --max-memory lots", "'lots'"),
        ("hf A B --res", "--res"),
        ("quantize A B", "--quantize"),
        ("hf A B --check", "--quantize"),
        ("export A B --quantize int8", "--quantize int8"),
        ("inspect", "PATH"),
    ],
)
def test_wrong_usage(arguments, token, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert token in err and err.count("\n") == 1


def test_wrong_usage_ends_the_process_with_2():
    assert run("hf")[0] == 2


def error(capsys, *arguments) -> str:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith(".\n")
    return err


def test_errors_are_one_sentence(source, quantized, tmp_path, capsys):
    new = tmp_path / "new"
    for token, *arguments in (
        ("/none", "hf", "/none", new),
        ("config.json", "hf", source / "config.json", new),
        (f"{source}/new", "hf", source, source / "new"),
        (quantized, "hf", source, quantized),
        (source, "hf", quantized, source),
        (__file__, "hf", source, __file__),
        ("convert hf", "meta", source, new),
        ("--max-memory", "hf", source, new, "--max-memory", "1MiB"),
        ("int8", "hf", quantized, new, "--quantize", "fp8"),
        ("/none", "verify", source, "/none"),
        ("/none", "inspect", "/none"),
        ("4*2", "inspect", source, "--mesh", "4*2"),
    ):
        assert str(token) in error(capsys, *arguments)
    assert not new.exists()


def test_a_failed_process_ends_with_1_and_without_a_traceback(tmp_path):
    code, out, err = run("hf", tmp_path / "none", tmp_path / "new")
    assert (code, out) == (1, "") and err.startswith("error: ") and "Traceback" not in err


@pytest.mark.parametrize("defect", [ValueError("of NumPy"), OSError("no path"), KeyError("x")])
def test_a_defect_shows_its_traceback_and_has_its_own_exit_code(
    source, monkeypatch, capsys, defect
):
    def fail(reader, mesh):
        raise defect

    monkeypatch.setattr(commands, "inspect", fail)
    code, out, err = call(capsys, "inspect", source, "--json")
    assert code == 70 and set(json.loads(out)) == {"error"}
    assert "Traceback" in err and "in fail" in err


def test_an_os_error_with_a_path_is_a_sentence(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "inspect", lambda *_: (tmp_path / "gone").read_text())
    assert str(tmp_path / "gone") in error(capsys, "inspect", source)


# The signal comes to a thread that cannot handle it, while the main thread waits.
INTERRUPTED_AFTER_TWO = """if True:
    import signal, sys, threading, time
    from convert import conversion
    from convert.__main__ import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    run_task, begun = conversion.run_task, []

    def run(task, directory, advance, stopped):
        begun.append(task)
        if len(begun) == 3:
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        while len(begun) > 2 and not stopped():
            time.sleep(0.001)
        return run_task(task, directory, advance, stopped)

    conversion.run_task = run
    sys.exit(main())
"""


@pytest.mark.parametrize("json_asked", [False, True])
def test_ctrl_c_and_then_resume(source, tmp_path, capsys, json_asked):
    new = tmp_path / "new"
    arguments = ["hf", source, new, *["--json"] * json_asked]
    code, out, err = run(*arguments, program=("-c", INTERRUPTED_AFTER_TWO))
    assert code == 130 and "Traceback" not in err
    message = err.splitlines()[-1].removeprefix("error: ")
    assert "--resume" in message
    assert json.loads(out) == {"error": message} if json_asked else out == ""
    assert (new / JOURNAL).is_file() and not (new / MANIFEST).exists()
    for again in (["inspect", new], arguments):
        code, _, err = call(capsys, *again)
        assert code == 1 and "--resume" in err
    code, out, _ = call(capsys, "hf", source, new, "--resume", "--json")
    assert code == 0 and 0 < json.loads(out)["resumed_bytes"] < json.loads(out)["bytes"]
    assert weights_of(new) == weights_of(source)
    assert call(capsys, "verify", source, new)[0] == 0


def test_ctrl_c_while_comparing(source, quantized):
    script = """if True:
        import os, signal, sys
        from convert import commands
        from convert.__main__ import main

        signal.signal(signal.SIGINT, signal.default_int_handler)

        def compare(*arguments):
            os.kill(os.getpid(), signal.SIGINT)

        commands.compare = compare
        sys.exit(main())
    """
    code, out, err = run("verify", source, quantized, program=("-c", script))
    assert (code, out) == (130, "") and "Traceback" not in err


# --check


def test_check(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")  # too late for JAX, which these tests have loaded
    text = tmp_path / "text"
    text.write_text("The quick brown fox.")
    arguments = ["quantize", source, tmp_path / "new", "--quantize", "int4", "--check"]
    code, out, err = call(capsys, *arguments, text, "--json")
    found = json.loads(out)["divergence"]
    assert code == 0 and list(found) == ["tokens", "mean", "largest", "agreement"]
    assert 2 < found["tokens"] < 25
    assert 0 < found["mean"] < found["largest"] and 0 <= found["agreement"] <= 1
    assert "Checking: " in err
    assert os.environ["JAX_PLATFORMS"] == "cpu"  # it would take the memory of an accelerator
    code, out, _ = call(capsys, *arguments, "--resume")
    assert code == 0 and re.search(r"\d tokens.* nats", out)


def test_errors_of_check_come_before_the_conversion(source, quantized, tmp_path, capsys):
    new, bare = tmp_path / "new", tmp_path / "bare"
    check = ("--quantize", "int8", "--check")
    write_checkpoint(bare)
    capsys.readouterr()
    assert str(bare) in error(capsys, "hf", bare, new, *check)
    assert str(quantized) in error(capsys, "hf", quantized, new, *check)
    assert "/none" in error(capsys, "hf", source, new, *check, tmp_path / "none")
    assert not new.exists()


# Progress.


def test_bars_on_a_terminal(source, tmp_path):
    screen, terminal = pty.openpty()
    process = start("hf", source, tmp_path / "new", stderr=terminal)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(screen, 4096)
        except OSError:  # the other end is closed
            break
    out, _ = process.communicate()
    os.close(screen)
    assert process.returncode == 0 and str(tmp_path / "new") in out
    text = shown.decode()
    assert "\x1b[" in text, "it moves"
    for phase in ("Writing", "Verifying"):
        assert re.search(rf"{phase}.*142 kB of 142 kB", text)
    assert Path(tmp_path / "new" / MANIFEST).is_file()
