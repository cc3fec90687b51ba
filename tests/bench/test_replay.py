"""`bench serve --trace`: the traces that the planner simulates, replayed against a server."""

import json
from itertools import pairwise

import pytest

from bench.load.workload import Replay
from bench.serve_load import make_loads, run
from llama_jax.plan.simulation.load import Request, Run
from llama_jax.plan.simulation.traces import TraceError
from sharding.errors import UserError
from tests.bench.test_serve_load import kept, parse, rows_with
from tests.support.fake_client import FakeServer
from tests.support.listening import listening

BLOCKS = [
    {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [7, 8]},
    {"timestamp": 40, "input_length": 600, "output_length": 3, "hash_ids": [7, 9]},
    {"timestamp": 90, "input_length": 500, "output_length": 2, "hash_ids": [7]},
]
TRACES = {
    "csv": "arrival_s,prompt_tokens,output_tokens\n5,9,3\n5.04,9,3\n5.09,8,2\n",
    "mooncake": "\n".join(map(json.dumps, BLOCKS)),
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.00,9,3\n2023-11-16 18:15:46.04,9,3\n2023-11-16 18:15:46.09,8,2\n",
}

pytestmark = pytest.mark.usefixtures(kept.__name__)


@pytest.fixture
def trace(request, tmp_path):
    file = tmp_path / "trace"
    file.write_text(TRACES[request.param])
    return file


@pytest.mark.parametrize("trace", TRACES, indirect=True)
def test_each_format_is_sent_as_it_is_simulated(trace):
    [(rate, load)] = make_loads(parse("--trace", str(trace)))
    sent = load.to_send()
    assert [r.at for r in sent] == pytest.approx([0, 0.04, 0.09]) and rate == 3
    assert [r.max_tokens for r in sent] == [3, 3, 2]
    assert [len(r.prompt.split()) for r in sent] == [r.prompt_tokens for r in load.requests]


@pytest.mark.parametrize("trace", TRACES, indirect=True)
def test_a_trace_is_replayed_against_a_server(trace):
    with listening(FakeServer(max_in_flight=64, max_model_len=10_000)) as address:
        args = parse("--url", address + "/v1", "--trace", str(trace))
        result = run(args)
    [row] = rows_with(result, "sent")
    assert row["completed"] == row["sent"] == 3 and row["output_tokens"] == 8
    assert result.flags["trace"] == trace.name and "rate" not in result.flags


@pytest.mark.parametrize("vocab_size", [None, 100])
def test_prompts_begin_alike_exactly_as_far_as_their_runs_do(vocab_size):
    runs = [
        (Run(1, 30), Run(2, 30)),
        (Run(1, 30), Run(2, 9)),  # a shorter run of a text is its beginning
        (Run(1, 30), Run(3, 30)),
        (Run(2, 30), Run(1, 30)),
        (),
    ]
    requests = [Request(0.0, 80, 1, each) for each in runs]

    def contents(seed: int) -> list[list]:
        sent = Replay(requests=requests, vocab_size=vocab_size, seed=seed).to_send()
        return [r.prompt if vocab_size else r.prompt.split() for r in sent]

    def shared(a: list, b: list) -> int:
        return next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)

    prompts = contents(0)
    assert all(len(prompt) == 80 for prompt in prompts)
    found = [shared(a, b) for a, b in pairwise(prompts)]
    # Two different texts may happen to agree in a few tokens.
    for size, expected in zip(found, [39, 30, 0, 0], strict=True):
        assert expected <= size <= expected + 3
    assert prompts == contents(0) and shared(prompts[0], contents(1)[0]) <= 3


def test_the_requests_before_a_test_have_other_contents():
    load = Replay(requests=[Request(0.0, 40, 2, (Run(1, 40),))] * 3)
    [first] = load.warm_up(1)
    assert first.prompt != load.to_send()[0].prompt and first.max_tokens == 2


@pytest.mark.parametrize("trace", ["csv"], indirect=True)
def test_a_trace_is_cut(trace):
    def count(*flags: str) -> int:
        [(_, load)] = make_loads(parse("--trace", str(trace), *flags))
        return len(load.requests)

    assert count() == 3 and count("--requests", "2") == 2 and count("--duration", "0.04") == 1


@pytest.mark.parametrize(
    "flags",
    [("--rate", "2"), ("--arrivals", "poisson"), ("--prompt-tokens", "9"), ("--answer-tokens", "9"),
     ("--prefix-tokens", "0"), ("--prefixes", "1")],
)  # fmt: skip
@pytest.mark.parametrize("trace", ["csv"], indirect=True)
def test_flags_that_a_trace_contradicts_are_refused(trace, flags):
    with pytest.raises(UserError, match=flags[0]):
        make_loads(parse("--trace", str(trace), *flags))


def test_a_broken_trace_is_refused_before_the_server_is_asked(tmp_path):
    file = tmp_path / "trace"
    file.write_text(TRACES["csv"] + "6,x,1\n")
    with pytest.raises(TraceError, match=r"line 5\b"):
        run(parse("--url", "http://127.0.0.1:9/v1", "--trace", str(file)))
