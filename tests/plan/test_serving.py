"""The server that a plan proves: its command line, and its manifest for Kubernetes."""

import json
import re
import shlex
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from convert.arguments import parse_arguments as convert
from llama_jax.config import LlamaConfig
from llama_jax.costs.calibration import Calibration, MeasuredTick, model_sizes
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import GPUS
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work
from llama_jax.plan.__main__ import main as plan
from llama_jax.plan.kubernetes import POD_NETWORK
from llama_jax.plan.serving import deployed_name
from llama_jax.serve.command_line.arguments import parse_arguments
from llama_jax.serve.launch import main as serve
from llama_jax.serve.transport.door import LIVE_PATH, OPEN_PATHS

QUESTIONS = (
    "",
    pytest.param("--rate 10 --ttft 400ms --tpot 40ms --memory 0.8", marks=pytest.mark.slow),
    # Thousands of sequences: their logits take more than what the server reserves for temporaries.
    "--model 8b --gpus 1 --gpu b200 --rate 100 --prompt-tokens 8 --output-tokens 400 --tpot 1s",
    "--gpus 16 --weights fp8 --fp8-activations --kv-cache-dtype fp8 --rate 20",
    "--model llama3-8b --gpu l40s --gpus 2 --layout 2x1 --max-chunk 128 --rate 2",
    pytest.param(
        "--model meta-llama/Llama-3.3-70B-Instruct --gpu h200 --gpus 4 --rate 3",
        marks=pytest.mark.slow,
    ),
)


def ask(capsys, *argv: str) -> tuple[int, str]:
    code = plan([*argv])
    return code, capsys.readouterr().out


def command_of(capsys, question: str) -> list[str]:
    code, out = ask(capsys, *shlex.split(question), "--server-command")
    assert code in (0, 1)
    python, dash, module, *argv = shlex.split(out.splitlines()[0])
    assert (python, dash, module) == ("python", "-m", "llama_jax.serve")
    return argv


def test_targets_that_the_server_does_not_know_become_the_nearest(capsys):
    _, *flags = command_of(capsys, "--ttft 20min --tpot 30s")
    assert {"--ttft-slo=300000ms", "--tpot-slo=10000ms"} <= {*flags}
    _, *flags = command_of(capsys, "--ttft 1us --tpot 1us")
    assert {"--ttft-slo=1ms", "--tpot-slo=0.1ms"} <= {*flags}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_servers_dry_run_accepts_the_command(question, capsys, tmp_path):
    """With a checkpoint at the path: its config is what the question says."""
    path, *flags = command_of(capsys, question)
    config = LlamaConfig.llama3_8b() if "8b" in question else LlamaConfig.llama3_70b()
    content = config.to_dict()
    if "fp8" in question:
        content["quantization_config"] = {"quant_method": "llama_jax", "format": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    gpu = re.search(r"--gpu (\S+)", question)
    where = ["--dry-run", "--dry-run-gpu", gpu[1] if gpu else "h100-sxm"]
    assert serve([str(tmp_path), *flags, *where]) == 0
    assert path.startswith("/models/")


def test_the_command_has_what_the_plan_counts_on(capsys):
    question = "--rate 10 --ttft 400ms --tpot 40ms --memory 0.8 --max-chunk 192"
    arguments = parse_arguments(command_of(capsys, question))
    assert (arguments.ttft_slo, arguments.tpot_slo) == (0.4, 0.04)
    assert (arguments.gpu_memory_utilization, arguments.max_chunk) == (0.8, 192)
    assert arguments.max_model_len >= 1024 + 256
    _, out = ask(capsys, *question.split(), "--json")
    best = json.loads(out)["layouts"][0]
    assert arguments.mesh in json.dumps(best)
    question = "--kv-cache-dtype fp8 --weights fp8 --fp8-activations --layout 4x2"
    arguments = parse_arguments(command_of(capsys, question))
    assert (arguments.kv_cache_dtype, arguments.fp8_activations) == ("fp8", True)
    short = command_of(capsys, "--max-chunk 512 --prompt-tokens 100 --layout 4x2")
    assert parse_arguments(short).max_chunk == 512  # for longer prompts than the mean
    cpu = parse_arguments(command_of(capsys, "--gpu cpu --model 1b --gpus 1 --rate 0.001"))
    assert cpu.gpu_memory_utilization is None  # a server without GPUs refuses it


def test_names_are_labels_of_dns():
    assert deployed_name("/models/8B_x.") == "llama-8b-x"
    assert deployed_name("a" * 49 + "-b" * 20) == "a" * 49  # a suffix has room in 63 letters


def test_no_sequence_is_longer_than_the_cache(capsys):
    """70.6 GB of weights leave 3,456 tokens of an H100, and requests are of up to 3,400."""
    question = "--layout 1x2 --gpus 2 --rate 0.01 --prompt-tokens 3300 --output-tokens 100"
    assert parse_arguments(command_of(capsys, question)).max_model_len == 3456


def manifests(capsys, question: str) -> tuple[dict, dict]:
    _, out = ask(capsys, *shlex.split(question), "--kubernetes")
    deployment, service = yaml.safe_load_all(out)
    return deployment, service


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_manifest_starts_that_command_and_probes_what_the_server_has(question, capsys):
    deployment, service = manifests(capsys, question)
    spec = deployment["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert container["args"] == [*command_of(capsys, question), *POD_NETWORK]
    assert parse_arguments(command_of(capsys, question)).host == "127.0.0.1"
    arguments = parse_arguments(container["args"])  # exits if one is wrong

    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert all(re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", v) for v in
               labels.values())  # fmt: skip
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", service["metadata"]["name"])

    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in
              ("startup", "liveness", "readiness")}  # fmt: skip
    assert probes["liveness"]["path"] == LIVE_PATH
    assert {probe["path"] for probe in probes.values()} <= OPEN_PATHS  # need no key
    assert {probe["port"] for probe in probes.values()} == {"http"}
    [port] = container["ports"]
    assert port == {"name": "http", "containerPort": arguments.port}
    assert arguments.host == "0.0.0.0"
    sleep, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep" and int(seconds) >= 10
    assert spec["terminationGracePeriodSeconds"] > int(seconds) + arguments.shutdown_timeout

    stages, ranks = map(int, arguments.mesh.split("x"))
    assert container["resources"]["limits"] == {"nvidia.com/gpu": str(stages * ranks)}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert any(container["args"][0].startswith(f"{mount}/") for mount in mounts)


def test_a_plan_that_holds_shows_the_command(capsys):
    command = shlex.join(["python", "-m", "llama_jax.serve", *command_of(capsys, "--rate 8")])
    shown = ask(capsys, "--rate", "8")[1]
    assert command in " ".join(shown.replace("\\\n", " ").split())
    assert "llama_jax.serve" not in ask(capsys, "--rate", "100")[1]


def test_a_pod_finds_a_local_checkpoint_in_the_claim(capsys, tmp_path):
    model = tmp_path / "my model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LlamaConfig.llama3_70b().to_dict()))
    assert command_of(capsys, f"--model '{model}'")[0] == str(model)
    deployment, _ = manifests(capsys, f"--model '{model}'")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    [mount] = [m for m in container["volumeMounts"] if m["name"] == "models"]
    assert container["args"][0] == f"{mount['mountPath']}/my-model"


def checkpoint(folder: Path, **content: object) -> Path:
    """The config.json of a checkpoint of Llama-3-8B, without weights."""
    folder.mkdir()
    config = LlamaConfig.llama3_8b().to_dict() | content
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_is_quantized_before_it_is_served(capsys, tmp_path):
    plain = checkpoint(tmp_path / "plain")
    question = f"--model {plain} --gpus 1 --rate 1 --weights int8"
    assert command_of(capsys, question)[0] == f"{plain}-int8"
    notes = ask(capsys, *question.split(), "--server-command")[1]
    asked = convert(shlex.split(notes.partition("python -m convert ")[2]))
    assert (asked.source, asked.destination) == (str(plain), Path(f"{plain}-int8"))
    assert asked.quantize == "int8"
    stored = {"quant_method": "llama_jax", "format": "int8"}
    quantized = checkpoint(tmp_path / "quantized", quantization_config=stored)
    question = f"--model {quantized} --gpus 1 --rate 1 --weights int8"
    assert command_of(capsys, question)[0] == str(quantized)
    assert "python -m convert" not in ask(capsys, *question.split(), "--server-command")[1]


def test_a_checkpoint_in_float32_is_served_in_the_dtype_of_the_plan(capsys, tmp_path):
    model = checkpoint(tmp_path / "model", torch_dtype="float32")
    question = f"--model {model} --gpus 1 --rate 1 --weights"
    for weights, dtype in (("bf16", "bfloat16"), ("int4", "bfloat16")):
        assert parse_arguments(command_of(capsys, f"{question} {weights}")).dtype == dtype
    assert parse_arguments(command_of(capsys, question.removesuffix(" --weights"))).dtype == "auto"


def test_each_replica_is_a_pod(capsys):
    deployment, _ = manifests(capsys, "--layout 4x2 --gpus 16 --rate 20")
    assert deployment["spec"]["replicas"] == 2
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    _, out = ask(capsys, *"--layout 4x2 --gpus 16 --rate 20 --server-command".split())
    assert "Start 2 of these servers" in out


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_manifest_fits_the_schema_of_kubernetes(question, capsys):
    for version in ("1.27", kubernetes_validate.latest_version()):
        for document in manifests(capsys, question):
            kubernetes_validate.validate(document, version, strict=True)


def test_json_has_both(capsys):
    code, out = ask(capsys, "--rate", "10", "--json", "--kubernetes")
    content = json.loads(out)
    assert code == 0 and shlex.split(content["command"])[:3] == ["python", "-m", "llama_jax.serve"]
    assert [document["kind"] for document in content["kubernetes"]] == ["Deployment", "Service"]
    assert ask(capsys, "--rate", "10", "--json", "--kubernetes") == (code, out)


@pytest.fixture
def calibration(tmp_path):
    """A file that says that the ticks of the reference deployment take 20 % longer."""
    table = TickModel(Deployment(LlamaConfig.llama3_70b(), GPUS["h100-sxm"], Layout(4, 2)))
    batches = [(rows, 1024, chunk, 0) for rows in (1, 8, 32, 64) for chunk in (0, 64, 256)]
    ticks = [MeasuredTick(*b, 1.2 * table.expected(Work.of(*b))) for b in batches]
    path = tmp_path / "calibration.json"
    Calibration(
        device="NVIDIA H100 80GB HBM3", mesh="4x2", model=model_sizes(LlamaConfig.llama3_70b()),
        weights="bfloat16", kv_cache_dtype="bf16", ticks=tuple(ticks),
    ).write(path)  # fmt: skip
    return str(path)


def test_the_server_gets_the_calibration_that_the_plan_counts_on(calibration, capsys, tmp_path):
    question = f"--layout 4x2 --calibration {calibration}"
    argv = command_of(capsys, question)
    assert parse_arguments(argv).calibration == calibration
    without = command_of(capsys, f"{question} --ttft none --tpot none")
    assert parse_arguments(without).calibration is None  # no target would use it
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LlamaConfig.llama3_70b().to_dict()))
    where = ["--dry-run", "--dry-run-gpu"]
    assert serve([str(model), *argv[1:], *where, "h100-sxm"]) == 0
    assert serve([str(model), *argv[1:], *where, "h200"]) == 2  # it is for another GPU


def test_the_calibration_travels_with_the_manifest(calibration, capsys):
    _, out = ask(capsys, "--layout", "4x2", "--calibration", calibration, "--kubernetes")
    config, deployment, _ = yaml.safe_load_all(out)
    for document in (config, deployment):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    spec = deployment["spec"]["template"]["spec"]
    [container] = spec["containers"]
    inside = Path(parse_arguments(container["args"]).calibration)
    [mount] = [m for m in container["volumeMounts"] if Path(m["mountPath"]) == inside.parent]
    [volume] = [v for v in spec["volumes"] if v["name"] == mount["name"]]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    assert config["data"] == {inside.name: Path(calibration).read_text()}


@pytest.mark.parametrize(
    ("question", "code"), [("--rate 100", 1), ("--gpus 1", 2), ("--gpu tpu-v5e", 2)]
)
def test_a_plan_that_does_not_hold_has_its_own_exit_code(question, code, capsys):
    assert ask(capsys, *question.split(), "--server-command")[0] == code
