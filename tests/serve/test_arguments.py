"""The command line, the socket, and what the server prints when it is ready."""

import io
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from llama_jax.engine.interface import DeviceInfo
from llama_jax.engine.options import EngineOptions
from llama_jax.serve.command_line.arguments import (
    DEMO_CHECKPOINT,
    engine_options,
    parse_arguments,
)
from llama_jax.serve.command_line.foreign_flags import ANSWERS
from llama_jax.serve.command_line.http_flags import API_KEY_VARIABLES
from llama_jax.serve.command_line.ready import show_ready
from llama_jax.serve.transport.http_server import ListenError, address_of, is_loopback, listen
from tests.support.fake_client import FakeServer, events, make_info
from tests.support.paths import ROOT

# The command line


def test_defaults_are_those_of_the_engine():
    arguments = parse_arguments([])
    assert engine_options(arguments, Path("x")) == EngineOptions(path="x")
    assert (arguments.host, arguments.port, arguments.path) == ("127.0.0.1", 8000, None)
    assert DEMO_CHECKPOINT == ROOT / "demo" / "checkpoint" and DEMO_CHECKPOINT.is_dir()


def test_every_option_reaches_the_engine():
    line = (
        "models/x --mesh 4x2 --dtype bfloat16 --kv-cache-dtype int8 --max-model-len 100 "
        "--max-num-seqs 5 --max-queue 6 --page-size 32 --kv-cache-memory 2GiB --max-chunk 64 "
        "--tpot-slo 50ms --ttft-slo 0.5 --results-late 1 --fp8-activations --strict-config"
    )
    arguments = parse_arguments(line.split())
    assert engine_options(arguments, arguments.path) == EngineOptions(
        path="models/x",
        mesh="4x2",
        dtype="bfloat16",
        kv_cache_dtype="int8",
        max_model_len=100,
        max_num_seqs=5,
        max_queue=6,
        page_size=32,
        kv_cache_memory=2 * 1024**3,
        max_chunk=64,
        tpot_slo=0.05,
        ttft_slo=0.5,
        results_late=1,
        fp8_activations=True,
        strict_config=True,
    )


@pytest.mark.parametrize("variable", API_KEY_VARIABLES)
def test_the_api_key_can_be_set_in_the_environment(monkeypatch, capsys, variable):
    for name in API_KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "from the environment")
    assert parse_arguments([]).api_keys == ["from the environment"]
    assert parse_arguments(["--api-key", "given"]).api_keys == ["given"]
    assert parse_arguments(["--api-key-file", "keys", "--metrics-open"]).api_keys == []
    monkeypatch.setenv(variable, "")
    assert parse_arguments([]).api_keys == []
    monkeypatch.setenv(variable, "schlüssel")
    with pytest.raises(SystemExit):
        parse_arguments([])
    printed = capsys.readouterr().err
    assert variable in printed and "schl" not in printed


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--kv-cache-memory 2G", "--kv-cache-memory"),
        ("--kv-cache-memory -1GiB", "--kv-cache-memory"),
        ("--kv-cache-memory 0", "--kv-cache-memory"),
        ("--kv-cache-memory 0.0001KB", "--kv-cache-memory"),
        ("--max-num-seqs 0", "--max-num-seqs"),
        ("--max-num-seqs x", "--max-num-seqs"),
        ("--max-num-seqs 1.5", "--max-num-seqs"),
        ("--max-model-len 1", "--max-model-len"),
        ("--max-queue 99999999999999999999", "--max-queue"),
        ("--results-late -1", "--results-late"),
        ("--port 65536", "--port"),
        ("--port -1", "--port"),
        ("--dtype float16", "--dtype"),
        ("--kv-cache-dtype fp4", "--kv-cache-dtype"),
        ("--shutdown-timeout nan", "--shutdown-timeout"),
        ("--shutdown-timeout inf", "--shutdown-timeout"),
        ("--shutdown-timeout soon", "--shutdown-timeout"),
        ("--api-key ''", "--api-key"),
        ("--api-key ü", "--api-key"),
        ("--request-timeout 0", "--request-timeout"),
        ("--max-choices 2147483648", "--max-choices"),
        ("--gpu-memory-utilization 0", "--gpu-memory-utilization"),
        ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization"),
        ("--gpu-memory-utilization nan", "--gpu-memory-utilization"),
        ("--gpu-memory-utilization x", "--gpu-memory-utilization"),
        ("-tp 0", "-tp"),
        ("--seed 99999999999999999999", "--seed"),
        ("--override-generation-config [1]", "--override-generation-config"),
        ("--root-path llama", "--root-path"),
        ("--allowed-origins chat.example", "--allowed-origins"),
        ("--allowed-origins https://chat.example/page", "--allowed-origins"),
        ("--allow-credentials", "--allow-credentials"),
        ("--allowed-origins * --allow-credentials", "--allow-credentials"),
        ("--forwarded-allow-ips proxy", "--forwarded-allow-ips"),
        ("--ssl-keyfile key.pem", "--ssl-certfile"),
        ("--ssl-ca-certs ca.pem", "--ssl-certfile"),
        ("--ssl-keyfile-password x", "--ssl-certfile"),
        ("--dry-run-gpu h100-sxm", "--dry-run-gpu"),
        ("--log-prompts", "--request-log"),
        ("--metrics-open", "--metrics-open"),
        ("--uds s --port 1", "--uds"),
        ("--otlp-traces-endpoint localhost:4318", "--otlp-traces-endpoint"),
        ("--otlp-traces-endpoint grpc://localhost:4317", "--otlp-traces-endpoint"),
        ("--otlp-traces-endpoint http:localhost", "--otlp-traces-endpoint"),
        ("--log-level loud", "--log-level"),
        ("--nonsense", "--nonsense"),
        ("a b", ": b "),
        ("--max-num 5", "--max-num"),  # no abbreviations, which a new option could break
    ],
)
def test_wrong_usage_prints_one_line_and_exits_with_2(line, said, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(shlex.split(line))
    assert caught.value.code == 2
    [message] = capsys.readouterr().err.splitlines()
    assert said in message
    assert message.startswith("python -m llama_jax.serve: ")


def test_values_that_are_read_in_more_than_one_way():
    given = parse_arguments(
        ["--root-path=/llama/", "--forwarded-allow-ips", "10.0.0.0/8, ::1", "--log-level=INFO"]
    )
    assert (given.root_path, given.log_level) == ("/llama", "info")
    assert parse_arguments(["--forwarded-allow-ips", "*"]).forwarded_allow_ips == "*"
    for line in (["--disable-log-stats"], ["--log-stats-interval", "0"]):
        assert parse_arguments(line).log_stats_interval == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("models/x --num_gpu_blocks_override=9", "--kv-cache-memory"),
        ("models/x --max-num-batched-tokens 512", "--max-chunk"),
        ("models/x --enforce-eager", "compiled"),
        ("models/x -O3", "compiled"),
        ("models/x --compilation-config.mode=3", "compiled"),
        ("models/x --no-enable-chunked-prefill", "--max-chunk"),
        ("models/x --pp-max-micro-batch-size 4", "--max-num-seqs"),
        ("--mem-fraction-static nonsense --port x", "--gpu-memory-utilization"),
    ],
)
def test_a_flag_of_another_server_is_answered(line, said, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(line.split())
    assert caught.value.code == 2
    [message] = capsys.readouterr().err.splitlines()
    assert said in message


def test_the_answers_to_other_flags_name_flags_that_exist(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    own = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    named = {flag for answer in ANSWERS.values() for flag in re.findall(r"--[a-z-]+", answer)}
    assert "--max-chunk" in named <= own
    assert not own & set(ANSWERS)


def test_the_help_names_defaults_units_and_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for words in ("default: 8000", "default: 1x1", "2GB", "TOKENS", "SECONDS", "examples:"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100


# The socket


def test_a_port_in_use_is_one_sentence():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ListenError, match=str(port)):
            listen("127.0.0.1", port)


def test_an_invalid_host_is_refused():
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(ListenError, match=host):
            listen(host, 0)


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


def shown(width: int = 80, file: io.TextIOBase | None = None, **options) -> str:
    console = Console(file=file or io.StringIO(), width=width)
    values = dict(model="tiny", address="http://127.0.0.1:8000", seconds=3.5, chat=True, key=False)
    info = options.pop("info", make_info())
    with console.capture() as capture:
        show_ready(console, info, **{**values, **options})
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (4, 2), (2, 8)])
def test_the_picture_shows_every_device_in_its_stage(width, stages, ranks):
    text = shown(width, info=big_mesh(stages, ranks))
    picture = text[: text.index("KV pool:")]
    blocks = picture.split("╭─ ")[1:]
    assert len(blocks) == stages
    for stage, block in enumerate(blocks):
        assert block.startswith(f"stage {stage}: layers {2 * stage}-{2 * stage + 1}")
        assert [line.split()[1] for line in block.splitlines() if line.startswith("│")] == [
            f"cuda:{stage * ranks + rank}" for rank in range(ranks)
        ]
    assert max(map(len, picture.splitlines())) <= width
    assert picture.count("back to stage 0") == 1


def test_a_terminal_without_unicode_gets_a_picture_too():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    text = shown(file=file, info=big_mesh(2, 1))
    assert "v stage 1" in text and "^ sampled, and back to stage 0" in text


def test_a_unix_socket_is_shown():
    text = shown(unix_socket=Path("/run/a b"))
    assert "Ready at /run/a b." in text and "curl -N --unix-socket '/run/a b' http://" in text


def test_memory_cache_and_times_are_shown():
    text = shown(info=make_info(num_pages=100, page_size=16, max_model_len=210))
    for words in (
        "weights    1.50 MB",
        "KV pool    8.00 MB",
        "1,600 tokens in float32, 7 sequences of full length (210 tokens)",
        "Started in 3.5 s (loading weights 1.0 s, compiling 2 of 3 programs 2.0 s)",
        "Ready at http://127.0.0.1:8000",
    ):
        assert words in text


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("key", [None, "sesame"])
def test_the_command_that_is_shown_works(chat, key):
    """It is parsed like a shell would, and sent to a server of the same kind."""
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
