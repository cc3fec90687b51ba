"""The command line, and what is shown of the start."""

import io
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from llama_jax.engine.interface import DeviceInfo, Progress
from llama_jax.engine.options import EngineOptions
from llama_jax.serve.arguments import (
    API_KEY_VARIABLE,
    DEMO_CHECKPOINT,
    engine_options,
    parse_arguments,
)
from llama_jax.serve.display import StartDisplay, show_ready, size_text
from llama_jax.serve.http_server import ListenError, address_of, is_loopback, listen
from llama_jax.terminal.arguments import size
from tests.support.fake_client import FakeServer, events, make_info

# The command line


def test_defaults_are_those_of_the_engine():
    arguments = parse_arguments([])
    assert engine_options(arguments, Path("x")) == EngineOptions(path="x")
    assert (arguments.host, arguments.port, arguments.path) == ("127.0.0.1", 8000, None)
    assert (DEMO_CHECKPOINT.name, DEMO_CHECKPOINT.parent.name) == ("checkpoint", "demo")


def test_every_option_reaches_the_engine():
    line = (
        "models/x --mesh 4x2 --dtype bfloat16 --max-model-len 100 --max-num-seqs 5 --max-queue 6 "
        "--page-size 32 --kv-cache-memory 2GiB --max-chunk 64"
    )
    arguments = parse_arguments(line.split())
    assert engine_options(arguments, arguments.path) == EngineOptions(
        path="models/x",
        mesh="4x2",
        dtype="bfloat16",
        max_model_len=100,
        max_num_seqs=5,
        max_queue=6,
        page_size=32,
        kv_cache_memory=2 * 1024**3,
        max_chunk=64,
    )


def test_the_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "from the environment")
    assert parse_arguments([]).api_key == "from the environment"
    assert parse_arguments(["--api-key", "given"]).api_key == "given"
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    assert parse_arguments([]).api_key is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000", 1000),
        ("10B", 10),
        ("2GiB", 2 * 1024**3),
        ("2 gib", 2 * 1024**3),
        ("20GB", 20 * 10**9),
        ("1.5KiB", 1536),
        ("1TB", 10**12),
    ],
)
def test_sizes(text, expected):
    assert size(text) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--kv-cache-memory 2G", "is not a size"),
        ("--kv-cache-memory -1GiB", "--kv-cache-memory"),
        ("--kv-cache-memory 0", "is not a size"),
        ("--kv-cache-memory 0.0001KB", "is not a size"),
        ("--max-num-seqs 0", "whole number from 1 on"),
        ("--max-num-seqs x", "whole number from 1 on"),
        ("--max-model-len 9999999999", "whole number from 1 on"),
        ("--port 65536", "is not a port"),
        ("--port -1", "--port"),
        ("--dtype float16", "float16"),
        ("--shutdown-timeout nan", "seconds"),
        ("--shutdown-timeout soon", "seconds"),
        ("--api-key ''", "printable ASCII"),
        ("--nonsense", "--nonsense"),
        ("a b", "unrecognized arguments: b"),
        ("--max-num 5", "--max-num"),  # no abbreviations, which a new option could break
    ],
)
def test_a_wrong_line_is_one_sentence_and_exit_code_2(line, said, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(shlex.split(line))
    assert caught.value.code == 2
    [message] = capsys.readouterr().err.splitlines()
    assert said in message
    assert message.startswith("python -m llama_jax.serve: ")


def test_the_help_names_defaults_units_and_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for words in ("default: 8000", "default: 1x1", "2GiB", "TOKENS", "SECONDS", "examples:"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100


# The socket


def test_a_port_in_use_is_one_sentence():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ListenError, match=f"port {port} is in use.* choose another --port"):
            listen("127.0.0.1", port)


def test_addresses_that_are_none():
    with pytest.raises(ListenError, match="no address of this machine"):
        listen("192.0.2.1", 0)
    with pytest.raises(ListenError, match="not possible"):
        listen("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("host", "shown", "loopback"),
    [("127.0.0.1", "127.0.0.1", True), ("0.0.0.0", "127.0.0.1", False), ("localhost", None, True)],
)
def test_the_address_shown_reaches_the_server(host, shown, loopback):
    with listen(host, 0) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener) == f"http://{shown or '127.0.0.1'}:{port}"
        assert is_loopback(listener) == loopback


# What is shown


def big_mesh(stages: int, ranks: int):
    devices = [
        DeviceInfo(f"cuda:{stage * ranks + rank}", stage, rank, [2 * stage, 2 * stage + 1], 5, 7)
        for stage in range(stages)
        for rank in range(ranks)
    ]
    return make_info(devices=devices, mesh=f"{stages}x{ranks}")


def shown(width: int = 80, **options) -> str:
    console = Console(file=io.StringIO(), width=width)
    values = dict(model="tiny", address="http://127.0.0.1:8000", seconds=3.5, chat=True, key=False)
    info = options.pop("info", make_info())
    show_ready(console, info, **{**values, **options})
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (4, 2), (2, 8)])
def test_the_picture_holds_every_device_in_its_stage(width, stages, ranks):
    text = shown(width, info=big_mesh(stages, ranks))
    picture = text[: text.index("KV pool:")]
    blocks = picture.split("╭─ ")[1:]
    assert len(blocks) == stages
    for stage, block in enumerate(blocks):
        assert block.startswith(f"stage {stage}: layers {2 * stage} to {2 * stage + 1}")
        assert [line.split()[1] for line in block.splitlines() if line.startswith("│")] == [
            f"cuda:{stage * ranks + rank}" for rank in range(ranks)
        ]
    assert max(map(len, picture.splitlines())) <= width


def test_what_an_operator_wants_to_know():
    text = shown(info=make_info(num_pages=100, page_size=16, max_model_len=200))
    for words in (
        "weights    1.4 MiB",
        "KV pool    7.6 MiB",
        "1,600 tokens, 8 sequences of full length (200 tokens)",
        "Started in 3.5 s (loading weights 1.0, compiling 3 programs 2.0)",
        "Ready at http://127.0.0.1:8000",
    ):
        assert words in text


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("key", [None, "sesame"])
def test_the_command_that_is_shown_works(chat, key):
    """It is read as a shell would, and sent to a server of the same kind."""
    text = shown(40, chat=chat, key=key is not None)
    command = text[text.index("curl") :].strip().replace("YOUR-KEY", key or "")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["curl", "-N"]
    headers = dict(
        value.split(": ", 1) for flag, value in itertools.pairwise(words) if flag == "-H"
    )
    body = json.loads(words[words.index("-d") + 1])
    server = FakeServer(chat_template=chat, api_key=key)
    path = words[2].removeprefix("http://127.0.0.1:8000")
    assert events(server.post(path, body, headers=headers))
    assert body["stream"] is True


PROGRESS = [
    Progress("starting", 0, 1, "importing JAX"),
    *(Progress("loading", done, 3) for done in (1, 2, 3)),
    Progress("compiling", 0, 2, "8 rows, chunk of 0"),
    Progress("compiling", 1, 2, "8 rows, chunk of 64"),
    Progress("compiling", 2, 2),
]


def test_without_a_terminal_progress_is_a_few_plain_lines():
    console = Console(file=io.StringIO())
    with StartDisplay(console) as display:
        for progress in PROGRESS:
            display(progress)
    assert console.file.getvalue().splitlines() == [
        "Starting the engine (importing JAX) ...",
        "Loading weights (3) ...",
        "Compiling programs: 1 of 2 (8 rows, chunk of 0) ...",
        "Compiling programs: 2 of 2 (8 rows, chunk of 64) ...",
    ]


def test_in_a_terminal_progress_is_bars_that_end_full():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with StartDisplay(console) as display:
        for progress in PROGRESS:
            display(progress)
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    for title, count in (("Starting", "1/1"), ("Loading", "3/3"), ("Compiling", "2/2")):
        line = [line for line in written.splitlines() if line.lstrip("\r").startswith(title)][-1]
        assert count in line


def test_bytes_have_units():
    assert [size_text(n) for n in (0, 1023, 1024, 20 * 1024**3, 5 * 1024**5)] == [
        "0.0 B",
        "1023.0 B",
        "1.0 KiB",
        "20.0 GiB",
        "5120.0 TiB",
    ]
