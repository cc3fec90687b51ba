"""The command line, the socket, and what the server prints when it is ready."""

import io
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from llama_jax.config.errors import ConfigError
from llama_jax.config.huggingface import read_checkpoint_config
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import DeviceInfo
from llama_jax.engine.options import EngineOptions
from llama_jax.serve.command_line.arguments import (
    API_KEY_VARIABLE,
    DEMO_CHECKPOINT,
    parse_arguments,
)
from llama_jax.serve.command_line.engine_arguments import engine_options
from llama_jax.serve.command_line.foreign_flags import ANSWERS
from llama_jax.serve.command_line.model_arguments import check_quantization, default_params
from llama_jax.serve.command_line.ready import show_ready
from llama_jax.serve.transport.http_server import ListenError, address_of, is_loopback, listen
from tests.support.fake_client import FakeServer, events, make_info

# The command line


def test_defaults_are_those_of_the_engine():
    arguments = parse_arguments([])
    assert engine_options(arguments, Path("x")) == EngineOptions(path="x")
    assert (arguments.host, arguments.port, arguments.path) == ("127.0.0.1", 8000, None)
    assert (DEMO_CHECKPOINT / "config.json").is_file()


def test_every_option_reaches_the_engine():
    line = (
        "models/x --mesh 4x2 --dtype bfloat16 --max-model-len 100 --max-num-seqs 5 --max-queue 6 "
        "--page-size 32 --kv-cache-memory 2GiB --max-chunk 64 --results-late 1 "
        "--gpu-memory-utilization 0.9 --seed 7 --no-prefix-caching --strict-config"
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
        results_late=1,
        gpu_memory_utilization=0.9,
        seed=7,
        prefix_caching=False,
        strict_config=True,
    )


@pytest.mark.parametrize(
    ("line", "option", "value"),
    [
        ("-tp 2", "mesh", "1x2"),
        ("--tensor-parallel-size 2 --pipeline-parallel-size 4", "mesh", "4x2"),
        ("--pp-size=4", "mesh", "4x1"),
        ("--max-model-len auto", "max_model_len", None),
        ("--max-model-len 8k", "max_model_len", 8000),
        ("--max-model-len 8K", "max_model_len", 8192),
        ("--max-model-len 1.5k", "max_model_len", 1500),
        ("--context-length 100", "max_model_len", 100),
        ("--kv-cache-memory-bytes 5MB", "kv_cache_memory", 5_000_000),
        ("--kv-cache-memory auto", "kv_cache_memory", None),
        ("--block-size 32", "page_size", 32),
        ("--max-num-queued-reqs 3", "max_queue", 3),
        ("--mem-fraction-static 0.5", "gpu_memory_utilization", 0.5),
        ("--chunked-prefill-size 256", "max_chunk", 256),
        ("--no-enable-prefix-caching", "prefix_caching", False),
        ("--no-prefix-caching --enable-prefix-caching", "prefix_caching", True),
    ],
)
def test_names_that_other_servers_use(line, option, value):
    options = engine_options(parse_arguments(line.split()), Path("x"))
    assert getattr(options, option) == value


def test_the_model_may_be_named_in_two_ways():
    assert parse_arguments(["models/x"]).path == Path("models/x")
    assert parse_arguments(["--model", "models/x"]).path == Path("models/x")
    names = ["--served-model-name", "a", "--served-model-name", "b"]
    assert parse_arguments([*names, "models/x"]).served_model_name == ["a", "b"]


CONFIG_FILE = """
model: models/x
served-model-name: [a, b]
mesh: 4x2
max_num_seqs: 64
max-model-len: 8k
prefix-caching: false
strict-config: true
gpu-memory-utilization: 0.9
api-key:
port: 8001
"""


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(CONFIG_FILE)
    return file


def test_a_file_of_flags(config_file):
    arguments = parse_arguments(["--config", str(config_file)])
    assert (arguments.port, arguments.served_model_name) == (8001, ["a", "b"])
    assert engine_options(arguments, arguments.path) == EngineOptions(
        path="models/x",
        mesh="4x2",
        max_num_seqs=64,
        max_model_len=8000,
        prefix_caching=False,
        strict_config=True,
        gpu_memory_utilization=0.9,
    )


def test_the_command_line_wins_over_the_file(config_file):
    line = "models/y --port 1 -tp 2 --max-num-seqs 5 --enable-prefix-caching --config"
    arguments = parse_arguments([*line.split(), str(config_file)])
    options = engine_options(arguments, arguments.path)
    assert (arguments.port, options.path, options.mesh) == (1, "models/y", "1x2")
    assert (options.max_num_seqs, options.prefix_caching) == (5, True)
    assert options.max_model_len == 8000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("nonsense: 1", "--nonsense"),
        ("port: x", "--port"),
        ("port: [1, [2]]", "port"),
        ("mesh: {a: 1}", "mesh"),
        ("strict-config: 1", "--strict-config"),
        ("port: true", "--port"),
        ("config: other.yaml", "config"),
        ("help: true", "help"),
        ("- port", "flags and their values"),
        ("a: [", "cannot be read"),
        ("!!python/object/apply:os.getcwd []", "cannot be read"),
        ("model: a\nmesh: 1x2\ntp: 2", "--tensor-parallel-size"),
    ],
)
def test_a_wrong_file_prints_one_line_that_names_it(content, said, tmp_path, capsys):
    file = tmp_path / "server.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--config", str(file)])
    assert caught.value.code == 2
    [message] = capsys.readouterr().err.splitlines()
    assert said in message and (str(file) in message or "--mesh" in message)


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("", {"temperature": 0.6, "top_p": 0.9}),
        ("--generation-config none", {}),
        ("--generation-config vllm", {}),
        ("--generation-config {other}", {"temperature": 0.0}),
        (
            '--override-generation-config {{"top_k":5}}',
            {"temperature": 0.6, "top_p": 0.9, "top_k": 5},
        ),
        (
            '--generation-config none --override-generation-config {{"temperature":0.1}}',
            {"temperature": 0.1},
        ),
    ],
)
def test_default_sampling_parameters(line, changes, tmp_path):
    checkpoint, other = tmp_path / "checkpoint", tmp_path / "other"
    for path, content in (
        (checkpoint, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        (other, {"do_sample": False}),
    ):
        path.mkdir()
        (path / "generation_config.json").write_text(json.dumps(content))
    (checkpoint / "config.json").write_text((DEMO_CHECKPOINT / "config.json").read_text())
    arguments = parse_arguments(line.format(other=other).split())
    declared = read_checkpoint_config(checkpoint)
    assert default_params(declared, arguments) == SamplingParams(**changes)


def test_wrong_default_sampling_parameters(tmp_path):
    declared = read_checkpoint_config(DEMO_CHECKPOINT)
    for line in (
        f"--generation-config {tmp_path}",
        '--override-generation-config {"temperature":9}',
    ):
        with pytest.raises(ConfigError):
            default_params(declared, parse_arguments(line.split()))


def test_the_quantization_flag_checks_the_checkpoint():
    declared = read_checkpoint_config(DEMO_CHECKPOINT)
    check_quantization(declared, None)
    with pytest.raises(ConfigError, match="not quantized"):
        check_quantization(declared, "fp8")


def test_every_model_name_is_served():
    server = FakeServer()
    server.served.aliases = ("other",)
    listed = server.get("/v1/models").json()["data"]
    assert [card["id"] for card in listed] == [server.served.name, "other"]
    assert server.get("/v1/models/other").json()["id"] == "other"
    body = {"model": "other", "prompt": [5], "max_tokens": 1}
    assert server.post("/v1/completions", body).json()["model"] == server.served.name
    assert server.post("/v1/completions", {**body, "model": "third"}).status_code == 404


def test_the_api_key_can_be_set_in_the_environment(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "from the environment")
    assert parse_arguments([]).api_key == "from the environment"
    assert parse_arguments(["--api-key", "given"]).api_key == "given"
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    assert parse_arguments([]).api_key is None


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
        ("--max-model-len 1.5", "--max-model-len"),
        ("--max-model-len 8T", "--max-model-len"),
        ("--gpu-memory-utilization 0", "--gpu-memory-utilization"),
        ("--gpu-memory-utilization 1.01", "--gpu-memory-utilization"),
        ("--gpu-memory-utilization nan", "--gpu-memory-utilization"),
        ("--seed -1", "--seed"),
        ("-tp 0", "-tp"),
        ("--mesh 2x2 -tp 2", "--tensor-parallel-size"),
        ("models/x --model models/y", "--model"),
        ("--override-generation-config {", "--override-generation-config"),
        ("--override-generation-config '[]'", "--override-generation-config"),
        ("""--override-generation-config '{"eos_token_id": 1}'""", "eos_token_id"),
        ("""--override-generation-config '{"top_k": 1.5}'""", "top_k"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--shutdown-timeout nan", "--shutdown-timeout"),
        ("--shutdown-timeout soon", "--shutdown-timeout"),
        ("--sse-keep-alive-interval -1", "--sse-keep-alive-interval"),
        ("--api-key ''", "--api-key"),
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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("models/x --max-num-batched-tokens 512", "--max-chunk"),
        ("models/x --enforce-eager", "compiled"),
        ("--max-num-batched-tokens nonsense --port x", "--max-chunk"),
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


def shown(width: int = 80, **options) -> str:
    console = Console(file=io.StringIO(), width=width)
    values = dict(model="tiny", address="http://127.0.0.1:8000", seconds=3.5, chat=True, key=False)
    info = options.pop("info", make_info())
    show_ready(console, info, **{**values, **options})
    return console.file.getvalue()


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


def test_memory_cache_and_times_are_shown():
    text = shown(info=make_info(num_pages=100, page_size=16, max_model_len=200))
    for words in (
        "weights    1.50 MB",
        "KV pool    8.00 MB",
        "1,600 tokens, 8 sequences of full length (200 tokens)",
        "Started in 3.5 s (loading weights 1.0 s, compiling 3 programs 2.0 s)",
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
