"""The command lines, flags, configuration and metrics that the documentation names exist."""

import json
import re
import shlex

import pytest

from bench.__main__ import parse as parse_bench
from bench.commands import MEASUREMENTS, READERS
from convert.arguments import parse_arguments as parse_convert
from llama_jax.config import LlamaConfig
from llama_jax.engine.interface import Stats
from llama_jax.plan.command_line import make_parser
from llama_jax.serve.command_line.arguments import parse_arguments as parse_serve
from llama_jax.serve.dry_run import dry_run
from llama_jax.serve.monitoring.metrics import Metrics
from tests.support.fake_client import make_info
from tests.support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PROGRAMS = {
    "llama_jax.serve": parse_serve,
    "llama_jax.plan": make_parser().parse_args,
    "convert": parse_convert,
    "bench": parse_bench,
}
COMMAND = re.compile(rf"python -m ({'|'.join(map(re.escape, PROGRAMS))})(?= |$)(.*)")
OF_OTHERS = {  # pip, lm-evaluation-harness, XLA
    *("--no-deps", "--model_args", "--tasks", "--xla_dump_to"),
    "--xla_gpu_per_fusion_autotune_cache_dir",
}


def blocks(text: str) -> list[str]:
    """The blocks of code of a page, without the names of their languages."""
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(lines: list[str]) -> list[tuple[str, list[str]]]:
    """(program, arguments) of each command line."""
    found = [COMMAND.search(line.split(" | ")[0]) for line in lines]
    return [(match[1], shlex.split(match[2], comments=True)) for match in found if match]


def command_lines(text: str) -> list[tuple[str, list[str]]]:
    """The whole command lines of a page; sentences also name programs, with one flag or none."""
    shown = [line for block in blocks(text) for line in block.replace("\\\n", "").splitlines()]
    named = [each for each in commands(re.findall(r"`([^`\n]+)`", text)) if len(each[1]) > 1]
    return [*commands(shown), *(each for each in named if each[1][0] != "NAME")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_line_parses(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for program, arguments in command_lines(page.read_text()):
        try:
            PROGRAMS[program](arguments)
        except SystemExit as ended:
            pytest.fail(f"{program} {shlex.join(arguments)} ends with code {ended.code}")


def test_the_configuration_file_is_read(tmp_path):
    [content] = [
        block for block in blocks((ROOT / "docs/operations.md").read_text()) if "model:" in block
    ]
    file = tmp_path / "server.yaml"
    file.write_text(content)
    assert parse_serve([f"--config={file}"]).mesh == "4x2"


def flags_of(capsys, parse, *arguments: str) -> set[str]:
    """The flags that the help of a command shows."""
    with pytest.raises(SystemExit):
        parse([*arguments, "--help"])
    return set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out))


def test_every_flag_exists(capsys):
    known = set(OF_OTHERS)
    for program, parse in PROGRAMS.items():
        names = {"convert": ("hf", "inspect"), "bench": (*MEASUREMENTS, *READERS)}
        for command in names.get(program, ("",)):
            known |= flags_of(capsys, parse, *filter(None, [command]))
    unknown = {
        f"{page.name}: {flag}"
        for page in PAGES
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text())
        if flag not in known
    }
    assert unknown == set()


def test_every_metric_is_documented():
    metrics = Metrics("tiny", Stats, lambda: True, "llama_jax", info=make_info())
    types = re.findall(r"^# TYPE llama_jax:(\w+) (\w+)$", metrics.text().decode(), re.MULTILINE)
    exported = {
        name.removesuffix("_total") if kind == "counter" else name
        for name, kind in types
        if not name.endswith("_created")
    }
    section = (ROOT / "docs/operations.md").read_text().split("\n## Metrics\n")[1]
    table = re.search(r"^\| kind .*?\n\n", section, re.MULTILINE | re.DOTALL)[0]
    rows = [row for row in table.splitlines() if not row.startswith("| HTTP")]
    named = {name for row in rows for name in re.findall(r"`([a-z_0-9]+)`", row)}
    assert named == exported


def test_every_measurement_exists():
    named = {
        name
        for page in PAGES
        for name in re.findall(r"python -m bench ([a-z][a-z-]+)", page.read_text())
    }
    assert len(named) > 20 and named <= {*MEASUREMENTS, *READERS}


def test_the_dry_run_prints_what_is_shown(tmp_path, monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    [shown] = [
        block for block in blocks((ROOT / "docs/operations.md").read_text()) if "--dry-run" in block
    ]
    [(_, arguments)] = commands(shown.replace("\\\n", "").splitlines())
    config = tmp_path / "llama3-70b" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(LlamaConfig.llama3_70b().to_dict()))
    printed = dry_run(parse_serve([str(config.parent), *arguments[1:]]))
    assert printed[:-1] == shown.splitlines()[-len(printed) + 1 :]  # the last: there are no weights
