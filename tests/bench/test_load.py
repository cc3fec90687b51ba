"""The load generator in virtual time, against a server without a network: figures are exact."""

import asyncio
import json
from dataclasses import replace

import httpx
import pytest
from pytest import approx

from bench.load.client import Server, ServerError, find_model, send_all
from bench.load.figures import Goals, error_rows, latency_rows, most_in_flight, total_row
from bench.load.sample import Sample
from bench.load.workload import LoadRequest, Workload
from bench.serve_load import run_test
from llama_jax.plan.simulation.lengths import Lengths
from tests.support.scripted_server import (
    END,
    ScriptedServer,
    delta,
    event,
    text,
    usage,
)
from tests.support.virtual_time import run_virtually

SERVER = Server(url="http://test/v1", endpoint="completions", model="tiny", seconds=60)


def every(gap: float, size: int) -> list[LoadRequest]:
    return [LoadRequest(gap * i, f"prompt {i}", 3) for i in range(size)]


def answer(first: float, gap: float = 0.0, tokens: int = 3) -> list:
    """The steps of an answer whose first token takes `first`, and each further one `gap`."""
    steps = [first, text()]
    for _ in range(tokens - 1):
        steps += [gap, text()]
    return [*steps, text("", "length"), usage(tokens), END]


def measure(script, requests, server=SERVER, status=200):
    """The samples of a test, and the server."""
    transport = ScriptedServer(script, status)
    return run_virtually(send_all(server, requests, transport)), transport


def by_latency(samples) -> dict[str, dict]:
    return {row["latency"]: row for row in latency_rows(samples)}


def test_percentiles_are_those_computed_by_hand():
    """Request i takes 100 + i ms to its first token, and i ms for each of two more."""
    samples, _ = measure(lambda _, i: answer(0.1 + i / 1e3, i / 1e3), every(1.0, 100))
    rows = by_latency(samples)
    assert rows["time to first token"] == approx(
        {"mean": 0.1495, "p50": 0.149, "p90": 0.189, "p95": 0.194, "p99": 0.198, "max": 0.199}
        | {"latency": "time to first token"}
    )
    assert rows["time per output token"]["p50"] == approx(0.049)
    assert rows["time per output token"]["p99"] == approx(0.098)
    assert rows["end to end"]["p90"] == approx(0.189 + 2 * 0.089)
    assert rows["time between events"]["p99"] == approx(0.098)
    assert rows["sent too late"]["max"] == approx(0)


def test_rates_count_from_the_first_arrival_to_the_last_end():
    samples, _ = measure(lambda _, i: answer(0.5, 0.25), every(1.0, 10))
    row = total_row(samples, Goals())
    assert row["duration"] == approx(10)  # 9 s of arrivals, and 1 s of the last answer
    assert row["requests_per_second"] == row["goodput"] == approx(1)
    assert (row["output_tokens"], row["prompt_tokens"]) == (30, 70)
    assert row["output_tokens_per_second"] == approx(3)
    assert row["tokens_per_second"] == approx(10)
    assert row["most_in_flight"] == 1


def test_a_stall_shows_in_every_request_that_should_have_arrived_meanwhile():
    """From 2 to 3 s the server does nothing; a client that waited would have sent one request."""

    def script(request, number):
        arrival = number / 10
        stall = 3 - arrival if 2 <= arrival < 3 else 0
        return answer(stall + 0.05)

    samples, transport = measure(script, every(0.1, 50))
    start = transport.requests[0][0]
    assert [time - start for time, _ in transport.requests] == approx([i / 10 for i in range(50)])
    late = [sample for sample in samples if sample.ttft > 0.06]
    assert [sample.ttft for sample in late] == approx([1.05 - i / 10 for i in range(10)])
    assert by_latency(samples)["time to first token"]["p90"] == approx(0.550)


def test_a_slow_client_reports_what_it_sent_late_and_counts_from_the_intended_arrival():
    def script(request, number):
        if number == 5:  # the client is busy for 0.35 s, as if with its own work
            asyncio.get_running_loop().now += 0.35
        return answer(0.05)

    samples, _ = measure(script, every(0.1, 10))
    late = [0, 0, 0, 0, 0, 0, 0.25, 0.15, 0.05, 0]
    assert [sample.late for sample in samples] == approx(late, abs=1e-9)
    assert [s.ttft for s in samples[6:]] == approx([0.30, 0.20, 0.10, 0.05])


def test_goodput_counts_the_requests_that_keep_all_targets():
    samples, _ = measure(lambda _, i: answer(0.1 * (i + 1), 0.01 * i), every(1.0, 10))
    for goals, kept in (
        (Goals(), 10),
        (Goals(ttft=0.5001), 5),
        (Goals(tpot=0.0301), 4),
        (Goals(ttft=0.3001, tpot=0.05), 3),
        (Goals(e2e=0.2201), 2),
    ):
        assert total_row(samples, goals)["goodput_share"] == kept / 10, goals


def test_a_request_that_just_keeps_its_targets_counts():
    sample = Sample(1.0, events=[1.5, 2.0], output_tokens=3)
    for kept in (Goals(ttft=0.5), Goals(tpot=0.25), Goals(e2e=1.0)):
        assert kept.kept_by(sample)
    assert not Goals(ttft=0.5).kept_by(replace(sample, error="timeout"))


def test_an_answer_of_one_token_has_no_time_per_token():
    samples, _ = measure(lambda _, i: answer(0.5, 0.25, tokens=3 if i else 1), every(2.0, 3))
    assert by_latency(samples)["time per output token"]["mean"] == approx(0.25)
    assert "time per output token" not in by_latency(samples[:1])


def test_a_late_request_is_in_flight_from_its_sending():
    late = [Sample(0.0, sent=0.0, end=2.0), Sample(1.0, sent=2.5, end=3.0)]
    assert most_in_flight(late) == 1
    # One that is sent as another ends takes its place.
    assert most_in_flight([late[0], replace(late[1], sent=2.0)]) == 1
    assert most_in_flight([late[0], replace(late[1], sent=1.9)]) == 2


def test_a_failure_is_shown_by_its_first_example():
    failed = [
        Sample(0.0, error=kind, detail=detail)
        for kind, detail in (("a", "1"), ("b", "2"), ("b", "3"))
    ]
    assert error_rows([*failed, Sample(0.0)]) == [
        {"error": "b", "count": 2, "example": "2"},
        {"error": "a", "count": 1, "example": "1"},
    ]


def test_tokens_are_counted_by_usage_not_by_events():
    """Two events carry ten tokens."""
    steps = [0.2, text("one two"), 0.9, text("three", "length"), usage(10), END]
    samples, _ = measure(lambda *_: steps, every(5.0, 2))
    row = total_row(samples, Goals())
    assert row["output_tokens"] == 20 and row["tokens_per_event"] == 5
    assert by_latency(samples)["time per output token"]["p50"] == approx(0.1)
    assert by_latency(samples)["time between events"]["p50"] == approx(0.9)


@pytest.mark.parametrize("content", ["content", "reasoning_content"])
def test_a_chat_starts_with_its_first_token_not_with_the_role(content):
    steps = [0.1, delta(role="assistant", content=""), 0.2, delta(**{content: "Hi"})]
    steps += [0.3, delta(**{content: ""}), 0.4, delta("stop"), usage(2), END]
    server = Server(url="http://test/v1", endpoint="chat", model="tiny")
    samples, transport = measure(lambda *_: steps, every(1.0, 1), server)
    assert samples[0].ttft == approx(0.3) and samples[0].e2e == approx(0.6)
    assert transport.bodies[0]["messages"] == [{"role": "user", "content": "prompt 0"}]
    assert transport.requests[0][1].url.path == "/v1/chat/completions"


def test_a_server_of_others():
    """What `transformers serve` of Hugging Face 5.24 sent: the end, with its usage, holds a choice,
    and no other event has a finish_reason."""
    steps = [
        0.1, b'data: {"id":"2258","choices":[{"index":0,"text":"I"}]}\n\n',
        0.1, b'data: {"id":"2258","choices":[{"index":0,"text":" am"}],"created":1795834906}\n\n',
        0.1, b'data: {"choices":[{"finish_reason":"length","index":0,"text":""}],"usage":'
        b'{"completion_tokens":2,"prompt_tokens":3,"total_tokens":5}}\n\n',
    ]  # fmt: skip
    [sample], _ = measure(lambda *_: steps, every(1.0, 1))
    assert sample.error is None and (sample.prompt_tokens, sample.output_tokens) == (3, 2)
    assert sample.ttft == approx(0.1) and sample.tpot == approx(0.1)


def test_what_is_sent():
    server = Server(
        url="http://test/v1", endpoint="completions", model="tiny", api_key="secret",
        extra={"ignore_eos": True},
    )  # fmt: skip
    samples, transport = measure(lambda *_: answer(0.1), every(1.0, 2), server)
    assert transport.bodies[1] == {
        "model": "tiny",
        "prompt": "prompt 1",
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert transport.requests[0][1].headers["authorization"] == "Bearer secret"
    assert "secret" not in repr(server) and not error_rows(samples)


def test_an_event_may_arrive_in_pieces_and_hold_any_character():
    line = text("a\u2028b\x85c")
    whole = json.dumps("a\u2028b\x85c", ensure_ascii=False).encode()
    line = b'data: {"choices": [{"text": ' + whole + b', "finish_reason": "length"}]}\r\n\r\n'
    steps = [0.1, line[:30], 0.1, line[30:] + usage(1)[:9], 0.1, usage(1)[9:], END]
    [sample], _ = measure(lambda *_: steps, every(1.0, 1))
    assert sample.error is None and sample.output_tokens == 1
    assert sample.ttft == approx(0.2)


REFUSED = httpx.ConnectError("refused")
FAILURES = {
    "no connection": [REFUSED],
    "disconnected": [0.1, text(), httpx.ReadError("reset")],
    "timeout": [0.1, text(), 100.0],
    "cut off": [0.1, text(), END],
    "no usage": [0.1, text("a", "length"), END],
    "no output": [0.1, text("", "length"), usage(3), END],
    "error in the stream": [0.1, text(), event(error={"message": "the engine died"})],
    "bad event": [0.1, b"data: {not json}\n\n", END],
    "AttributeError": [0.1, event(choices=["text"]), END],
}


def test_an_empty_text_is_a_token_and_the_usage_may_come_before_the_end():
    """Half a character has no text yet."""
    steps = [0.1, text(""), 0.2, text("é", "length"), usage(2), event(choices=[]), END]
    [sample], _ = measure(lambda *_: steps, every(1.0, 1))
    assert sample.error is None and (sample.ttft, sample.tpot) == (approx(0.1), approx(0.2))


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("no usage", [0.1, text("a", "length"), usage(0), END]),
        ("disconnected", [0.1, text(), httpx.RemoteProtocolError("closed")]),
        ("disconnected", [0.1, text(), httpx.WriteError("reset")]),
    ],
)
def test_failures_of_other_kinds(kind, steps):
    samples, _ = measure(lambda *_: steps, every(1.0, 1))
    assert [sample.error for sample in samples] == [kind]


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_counted_by_its_kind_and_ends_nothing(kind):
    """Every other request fails."""
    samples, _ = measure(lambda _, i: FAILURES[kind] if i % 2 else answer(0.1), every(1.0, 10))
    [row] = error_rows(samples)
    assert (row["error"], row["count"]) == (kind, 5) and row["example"]
    total = total_row(samples, Goals())
    assert (total["completed"], total["failed"], total["goodput_share"]) == (5, 5, 0.5)
    assert by_latency(samples)["time to first token"]["max"] == approx(0.1)


def test_an_http_error_is_counted_by_its_status():
    steps = [0.1, b'{"error": {"message": "The queue is full."}}']
    samples, _ = measure(lambda *_: steps, every(1.0, 3), status=503)
    [row] = error_rows(samples)
    assert (row["error"], row["count"]) == ("HTTP 503", 3) and "queue" in row["example"]
    assert by_latency(samples).keys() == {"sent too late"}


def test_a_server_that_dies_ends_the_test_with_errors():
    """It dies at 4.5 s, in the middle of an answer."""

    def script(request, number):
        if number < 4:
            return answer(0.9)
        return [0.5, text(), httpx.ReadError("")] if number == 4 else [REFUSED]

    samples, _ = measure(script, every(1.0, 10))
    counts = {row["error"]: row["count"] for row in error_rows(samples)}
    assert counts == {"no connection": 5, "disconnected": 1}
    assert total_row(samples, Goals())["duration"] == approx(9)


def test_many_requests_run_at_once():
    samples, _ = measure(lambda *_: answer(10.0), every(0.01, 500))
    assert total_row(samples, Goals())["most_in_flight"] == 500
    assert {round(sample.ttft, 9) for sample in samples} == {10.0}


WORKLOAD = Workload(rate=5.0, num_requests=3, prompt=Lengths.parse("8"), answer=Lengths.parse("3"))


def test_requests_before_the_test_do_not_count_and_have_other_prompts():
    transport = ScriptedServer(lambda *_: answer(0.1))
    samples = run_virtually(run_test(SERVER, WORKLOAD.warm_up(2), WORKLOAD.to_send(), transport))
    assert len(samples) == 3 and len({body["prompt"] for body in transport.bodies}) == 5


def test_a_server_that_answers_nothing_is_not_tested():
    transport = ScriptedServer(lambda *_: [b"{}"], 404)
    with pytest.raises(ServerError, match="404"):
        run_virtually(run_test(SERVER, WORKLOAD.warm_up(2), WORKLOAD.to_send(), transport))
    assert len(transport.requests) == 2


@pytest.mark.parametrize(
    ("status", "body", "named"),
    [
        (401, b"{}", "OPENAI_API_KEY"),
        (503, b"", "not ready"),
        (404, b"{}", "404"),
        (200, b"[1]", "200"),
        (200, b"", "200"),
    ],
)
def test_a_server_without_a_model_is_refused(status, body, named):
    transport = ScriptedServer(lambda *_: [body], status)
    with pytest.raises(ServerError, match=named):
        run_virtually(find_model(SERVER, transport))


def test_the_first_model_is_found():
    transport = ScriptedServer(lambda *_: [b'{"data": [{"id": "tiny"}, {"id": "other"}]}'])
    assert run_virtually(find_model(SERVER, transport)) == "tiny"
    with pytest.raises(ServerError, match="refused"):
        run_virtually(find_model(SERVER, ScriptedServer(lambda *_: [REFUSED])))
