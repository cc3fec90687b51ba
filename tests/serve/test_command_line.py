"""The command line in the words of other servers, configuration files, and what flags set."""

import json
from pathlib import Path

import pytest

from llama_jax.config.errors import ConfigError
from llama_jax.config.huggingface import CheckpointConfig
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.options import OPTIONS
from llama_jax.engine.sizing import SizingError, check_platform
from llama_jax.serve.command_line.arguments import engine_options, parse_arguments
from llama_jax.serve.command_line.quantization import QuantizationMismatch, check_quantization
from llama_jax.serve.command_line.sampling_defaults import DefaultsError, sampling_defaults
from llama_jax.serve.transport.api_keys import KeyFileError, read_key_file


def options(line: str):
    arguments = parse_arguments(line.split())
    return engine_options(arguments, arguments.path or Path("x"))


def wrong(line: str, capsys) -> str:
    """The one line that a wrong command line prints."""
    with pytest.raises(SystemExit) as caught:
        parse_arguments(line.split())
    assert caught.value.code == 2
    [message] = capsys.readouterr().err.splitlines()
    return message


# Other spellings


@pytest.mark.parametrize(
    ("line", "mesh"),
    [
        ("-tp 2", "1x2"),
        ("-pp 4", "4x1"),
        ("-pp 4 -tp 2", "4x2"),
        ("--tensor-parallel-size=2 --pipeline_parallel_size 4", "4x2"),
        ("--tp-size 2 --pp_size 4", "4x2"),
        ("--mesh 4x2 -tp 2 -pp 4", "4x2"),
        ("--mesh 4X2 -tp 2 -pp 4", "4x2"),
        ("--mesh 2x1", "2x1"),
        ("", "1x1"),
    ],
)
def test_parallel_sizes_make_the_mesh(line, mesh):
    assert options(line).mesh == mesh


def test_the_limits_of_the_queue_have_the_names_of_vllm():
    arguments = parse_arguments(["--max-num-queued-reqs", "7", "--max-num-queued-tokens", "99"])
    assert (arguments.max_queue, arguments.max_queue_tokens) == (7, 99)


@pytest.mark.parametrize("line", ["--mesh 4x2 -tp 4", "--mesh 2x1 -pp 4", "--mesh 4x2 -tp 2"])
def test_a_mesh_that_contradicts_the_sizes_is_refused(line, capsys):
    message = wrong(line, capsys)
    assert "--mesh" in message and "-parallel-size" in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("--mesh", value) for value in ("4", "4x", "4*2", "0x2", "")],
        *[("--served-model-name", value) for value in ("", " ", "a\nb")],
    ],
)
def test_a_value_that_nobody_could_use_is_refused_with_its_flag(flag, value, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([flag, value])
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_spelling_of_an_option_sets_it(option):
    if option.type is bool:
        return
    number = {"SxT": "2x2", "SHARE": "0.5"}.get(option.unit, "3")
    value = option.choices[-1] if option.choices else number
    flag = f"--{option.name.replace('_', '-')}"
    given = {getattr(options(f"{name} {value}"), option.name) for name in (flag, *option.flags)}
    assert len(given) == 1 and given != {option.default}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("auto", None), ("8k", 8000), ("8K", 8192), ("32.3k", 32300), ("1M", 1024**2), ("77", 77)],
)
def test_lengths_may_have_a_suffix(text, tokens):
    assert options(f"--max-model-len {text}").max_model_len == tokens


@pytest.mark.parametrize(
    ("line", "on"),
    [
        ("--enable-prefix-caching", True),
        ("--no-enable-prefix-caching", False),
        ("--no-prefix-caching", False),
    ],
)
def test_prefix_caching_in_two_spellings(line, on):
    assert options(line).prefix_caching is on


def test_the_model_with_and_without_a_flag(capsys):
    for line in (
        "models/x",
        "--model models/x",
        "--model-path models/x",
        "models/x --model models/x",
    ):
        assert parse_arguments(line.split()).path == Path("models/x")
    message = wrong("models/x --model models/y", capsys)
    assert "models/x" in message and "models/y" in message


def test_several_names_and_keys():
    line = "models/x --served-model-name a b --api-key k1 k2 --api_key=k_3"
    arguments = parse_arguments(line.split())
    assert arguments.served_model_name == ["a", "b"]
    assert arguments.api_keys == ["k1", "k2", "k_3"]


@pytest.mark.parametrize("flag", ["--served-model-name", "--api-key"])
def test_a_path_that_a_list_swallowed_is_noticed(flag, tmp_path, capsys):
    assert flag in wrong(f"{flag} a {tmp_path}", capsys)
    for line in (["models/x", flag, "a"], [flag]):
        parse_arguments([*line, str(tmp_path)])
    parse_arguments([flag, "a", "b" * 1000])  # longer than the name of a file may be


def test_a_share_of_a_gpu_is_refused_without_a_gpu():
    check_platform(options("--gpu-memory-utilization 0.9"), "gpu")
    check_platform(options(""), "cpu")
    with pytest.raises(SizingError, match="gpu_memory_utilization"):
        check_platform(options("--gpu-memory-utilization 0.9"), "cpu")


# Configuration files


def config(tmp_path, text: str) -> str:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    return f"--config {file}"


def test_a_configuration_file_sets_defaults_and_the_command_line_wins(tmp_path):
    line = config(
        tmp_path,
        """
        model: models/x
        tensor_parallel_size: 2
        max-model-len: 8k
        served-model-name: [a, b]
        api-key: [k1, k2]
        port: 9000
        metrics-open: true
        strict-config: false
        enable-prefix-caching: false
        override-generation-config: {temperature: 0.5}
        generation-config: -x
        kv-cache-memory: 2GB
        seed:
        """,
    )
    arguments = parse_arguments([*line.split(), "--port=9001", "--api-key", "k3"])
    assert (arguments.path, arguments.mesh, arguments.port) == (Path("models/x"), "1x2", 9001)
    assert arguments.served_model_name == ["a", "b"]
    assert arguments.api_keys == ["k3"]
    assert arguments.metrics_open is True
    assert arguments.override_generation_config == {"temperature": 0.5}
    assert arguments.generation_config == "-x"
    made = engine_options(arguments, arguments.path)
    assert made.max_model_len == 8000 and made.prefix_caching is False
    assert made.kv_cache_memory == 2 * 10**9 and made.strict_config is False
    assert parse_arguments(config(tmp_path, "# nothing").split()).path is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1", "'prot'"),
        ("config: x.yaml", "'config'"),
        ("help: true", "'help'"),
        ("dry-run: true", "'dry-run'"),
        ("port: x", "--port"),
        ("port: [1, 2]", "port"),
        ("port: true", "port"),
        ("port: {a: 2026-12-01}", "port"),
        ("metrics-open: 1", "metrics-open"),
        ("max-num-batched-tokens: 5", "max-num-batched-tokens"),
        ("- port", "mapping"),
        ("a: [", "line"),
        ("served-model-name: 2026-13-01", "YAML"),
        ("!!python/object/apply:os.getcwd []", "YAML"),
    ],
)
def test_what_a_configuration_file_cannot_say(text, said, tmp_path, capsys):
    message = wrong(config(tmp_path, text), capsys)
    assert said in message and "server.yaml" in message


def test_a_missing_configuration_file(capsys):
    assert "nowhere.yaml" in wrong("--config nowhere.yaml", capsys)


def test_an_error_beside_a_configuration_file_is_not_one_of_it(tmp_path, capsys):
    assert "server.yaml" not in wrong(config(tmp_path, "port: 1") + " --port x", capsys)


def test_paths_may_begin_with_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "server.yaml").write_text("request-log: ~/requests\nuds: ~/socket")
    arguments = parse_arguments(["--config=~/server.yaml"])
    assert (arguments.request_log, arguments.uds) == (tmp_path / "requests", tmp_path / "socket")


# Sampling parameters of requests that set none


def declared(tmp_path, **generation) -> CheckpointConfig:
    return CheckpointConfig(tmp_path, None, None, generation)


def test_defaults_come_from_the_checkpoint_another_directory_or_nothing(tmp_path, monkeypatch):
    checkpoint = declared(tmp_path, do_sample=True, temperature=0.6, top_p=0.9)
    assert sampling_defaults(checkpoint, "auto", {}) == SamplingParams(temperature=0.6, top_p=0.9)
    assert sampling_defaults(checkpoint, "vllm", {}) == SamplingParams()
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 7}))
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("~", str(tmp_path)):
        assert sampling_defaults(checkpoint, source, {}).top_k == 7
    with pytest.raises(DefaultsError, match="--generation-config"):
        sampling_defaults(checkpoint, str(tmp_path / "nowhere"), {})
    for content, error in (("{", DefaultsError), ("[]", ConfigError)):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(error):
            sampling_defaults(checkpoint, str(tmp_path), {})


def test_overrides_come_first(tmp_path):
    checkpoint = declared(tmp_path, do_sample=True, temperature=0.6)
    given = {"temperature": 0, "top_k": -1, "presence_penalty": 1.5}
    made = sampling_defaults(checkpoint, "auto", given)
    assert made == SamplingParams(temperature=0, top_k=0, presence_penalty=1.5)


@pytest.mark.parametrize(
    "overrides",
    [{"heat": 1}, *({"temperature": value} for value in ("hot", 9, True)), {"top_k": 1.5}],
)
def test_a_wrong_override_names_its_flag(overrides, tmp_path):
    with pytest.raises(DefaultsError, match="--override-generation-config"):
        sampling_defaults(declared(tmp_path), "vllm", overrides)


# Quantization


class Stored:
    def __init__(self, method: str) -> None:
        self.method = method


@pytest.mark.parametrize(
    ("method", "wanted", "fits"),
    [
        ("gptq", "gptq_marlin", True),
        ("compressed-tensors", "compressed_tensors", True),
        ("gptq", "awq", False),
        (None, "fp8", False),
        ("fp8", None, True),
    ],
)
def test_the_method_of_a_checkpoint_is_checked(method, wanted, fits, tmp_path):
    checkpoint = CheckpointConfig(tmp_path, None, Stored(method) if method else None, {})
    if fits:
        check_quantization(checkpoint, tmp_path, wanted)
    else:
        with pytest.raises(QuantizationMismatch, match="--quantization"):
            check_quantization(checkpoint, tmp_path, wanted)


def test_a_gguf_file_has_a_method_of_its_own(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    checkpoint = CheckpointConfig(file, None, None, {})
    check_quantization(checkpoint, file, "GGUF")
    with pytest.raises(QuantizationMismatch):
        check_quantization(checkpoint, file, "awq")


# Files of keys


def test_a_file_of_keys(tmp_path, caplog):
    file = tmp_path / "keys"
    text = "# of the team\n\n  first \nsecond\n"
    file.write_text(text, encoding="utf-8-sig")  # as editors on Windows do
    file.chmod(0o600)
    assert read_key_file(file) == ["first", "second"] and not caplog.records
    for mode in (0o640, 0o604):
        file.chmod(mode)
        assert read_key_file(file) == ["first", "second"]
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        caplog.clear()


@pytest.mark.parametrize("content", [b"", b"# none\n", "schl\u00fcssel\n".encode(), b"\xff\n"])
def test_a_file_without_usable_keys(content, tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(KeyFileError, match="--api-key-file") as caught:
        read_key_file(file)
    assert "schl" not in str(caught.value)


def test_a_missing_file_of_keys(tmp_path):
    with pytest.raises(KeyFileError, match="--api-key-file"):
        read_key_file(tmp_path / "nowhere")
