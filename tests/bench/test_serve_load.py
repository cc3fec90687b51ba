"""`bench serve` over a real connection, and its flags."""

import argparse
import os
import signal
from pathlib import Path

import pytest

from bench import serve_load
from bench.__main__ import main
from bench.load.client import ServerError
from bench.partial import keep
from bench.result import Result
from bench.serve_load import add_arguments, make_loads, run
from llama_jax.terminal.arguments import Parser
from sharding.errors import UserError
from tests.support.fake_client import FakeServer
from tests.support.listening import listening
from tests.support.server_process import FAKE_SERVER, ServerProcess
from tests.support.tiny_tokenizer import make_tokenizer

QUICK = ("--rate", "200", "--requests", "20", "--prompt-tokens", "5", "--answer-tokens", "4-9")


def parse(*flags: str) -> argparse.Namespace:
    parser = Parser()
    add_arguments(parser)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(flags)


def rows_with(result, column: str) -> list[dict]:
    return [row for row in result.rows if column in row]


@pytest.fixture(scope="module")
def url():
    with listening(FakeServer(api_key="secret", max_in_flight=64)) as address:
        yield address + "/v1"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")


@pytest.fixture(autouse=True)
def kept(monkeypatch) -> list[Result]:
    """What is kept while a test runs; not in a file."""
    kept: list[Result] = []
    monkeypatch.setattr(serve_load, "keep", lambda result, output: kept.append(result))
    return kept


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_server_is_measured(url, endpoint):
    result = run(parse("--url", url, "--endpoint", endpoint, *QUICK, "--rate", "100", "200"))
    totals = rows_with(result, "sent")
    assert [row["rate"] for row in totals] == [100, 200]
    for row in totals:
        assert row["completed"] == row["sent"] == 20 and row["goodput_share"] == 1
        assert 20 * 4 <= row["output_tokens"] <= 20 * 9
        assert row["prompt_tokens"] >= 20 * 5
    assert {row["latency"] for row in rows_with(result, "p99")} == {
        "time to first token", "time per output token", "time between events", "end to end",
        "sent too late",
    }  # fmt: skip
    assert result.met and result.flags["model"] == "tiny"


def test_the_key_is_not_in_the_result(url, tmp_path):
    result = run(parse("--url", url, *QUICK))
    result.write(tmp_path / "serve.json")
    assert "secret" not in (tmp_path / "serve.json").read_text()


def test_a_missed_target_shows(url):
    result = run(parse("--url", url, *QUICK, "--ttft", "0.1"))  # milliseconds
    assert not result.met and rows_with(result, "sent")[0]["goodput_share"] == 0


def test_a_wrong_key_is_refused(url, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        run(parse("--url", url, *QUICK))


@pytest.mark.parametrize(
    "flags",
    [
        ("--url", "localhost:8000"),
        ("--url", "http://"),
        ("--url", "ftp://host/v1"),
        ("--url", "http://user:secret@host/v1"),
        ("--url", "http://host/v1?key=1"),
        ("--url", "http://[1/v1"),
        ("--url", "http://host:99999/v1"),
        ("--endpoint", "chat", "--vocab-size", "100"),
        ("--url", "http://127.0.0.1:9/v1"),  # nobody listens
    ],
)
def test_flags_that_make_no_sense_are_refused(flags):
    with pytest.raises(UserError):
        run(parse(*flags))


def test_each_rate_sends_other_prompts():
    """Else the second rate would measure the server's prefix cache."""
    (_, first), (_, second) = make_loads(parse("--rate", "2", "4"))
    prompts = [{request.prompt for request in load.to_send()} for load in (first, second)]
    assert len(prompts[0]) == len(prompts[1]) == 100 and not prompts[0] & prompts[1]


def test_a_server_that_dies_between_rates_leaves_what_was_measured(
    url, kept, tmp_path, capsys, monkeypatch
):
    measured = serve_load.run_test

    async def run_test(*args):
        if kept:
            raise ServerError("the server has died")
        return await measured(*args)

    monkeypatch.setattr(serve_load, "run_test", run_test)
    monkeypatch.setattr(serve_load, "keep", lambda *each: (keep(*each), kept.append(each[0])))
    file = tmp_path / "serve.json"
    assert main(["serve", "--url", url, *QUICK, "--rate", "100", "200", "--output", str(file)]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "python -m bench: the server has died"
    assert "100 requests/s: 20 answered, 0 failed" in out
    assert [path.name for path in tmp_path.iterdir()] == ["serve.partial.json"]
    found = Result.read(tmp_path / "serve.partial.json")
    assert found == kept[0] and {row["rate"] for row in found.rows} == {100}
    assert len(found.targets) == 1 and str(tmp_path / "serve.partial.json") in out


def test_a_rate_is_tested_once():
    with pytest.raises(UserError, match="twice"):
        run(parse("--rate", "2", "4", "2"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--rate", "0"), ("--rate", "inf"), ("--rate", "nan"), ("--rate", "-1"), ("--rate", "x"),
        ("--requests", "0"), ("--requests", "1.5"), ("--requests", "3", "--duration", "3"),
        ("--duration", "0"), ("--prompt-tokens", "0"), ("--answer-tokens", "9-4"),
        ("--prefixes", "0"), ("--prefix-tokens", "-1"), ("--vocab-size", "0"), ("--goal", "1.1"),
        ("--extra-body", "[]"), ("--extra-body", "{"), ("--extra-body", "[" * 100_000),
        ("--ttft", "0"), ("--timeout", "0"), ("--seed", "-1"), ("--arrivals", "uniform"),
    ],
)  # fmt: skip
def test_malformed_flags_are_refused_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as error:
        parse(*flags)
    assert error.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert flags[0] in line or len(flags) > 2


@pytest.mark.slow
def test_a_server_that_is_killed_is_reported_as_errors(tmp_path):
    """The engine kills itself in the middle of the test; then the server is killed, too."""
    checkpoint = make_tokenizer(tmp_path / "fake:kill:200")
    (checkpoint / "model.safetensors").touch()
    with ServerProcess(FAKE_SERVER, str(checkpoint)) as server:
        url = server.wait_ready().url + "/v1"
        result = run(parse("--url", url, *QUICK, "--requests", "60", "--answer-tokens", "20"))
        [row] = rows_with(result, "sent")
        assert row["failed"] > 0 and row["sent"] == 60 and not result.met
        os.kill(server.process.pid, signal.SIGKILL)
        server.end()
        with pytest.raises(UserError, match="cannot be reached"):
            run(parse("--url", url, *QUICK))
