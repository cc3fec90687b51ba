"""The metrics: every value, by a clock that the tests move."""

import dataclasses
from collections.abc import AsyncGenerator, Callable, Iterable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import EngineDead, GenerationFailed, QueueFull, RequestError
from llama_jax.engine.interface import Output, Stats
from llama_jax.engine.scheduler import NOT_A_NUMBER
from llama_jax.serve.monitoring.metrics import Metrics
from llama_jax.serve.monitoring.request_record import RequestRecord
from tests.support.fake_client import FakeServer, make_info

TTFT = "time_to_first_token_seconds"
INTER_TOKEN = "inter_token_latency_seconds"
PER_TOKEN = "request_time_per_output_token_seconds"
LATENCY = "e2e_request_latency_seconds"
PHASES = (
    *("queue_time_seconds", "prefill_time_seconds", "decode_time_seconds"),
    *("inference_time_seconds", "prefill_kv_computed_tokens"),
)
LATENCIES = (TTFT, INTER_TOKEN, PER_TOKEN, LATENCY)


class Clock:
    """Seconds since some origin; a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def samples(text: str, prefix: str = "llama_jax") -> dict[str, float]:
    """Samples by name; with {value} of the label that is not the model's or the engine's."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            suffix = "".join(f"{{{value}}}" for value in labels.values())
            found[sample.name.removeprefix(f"{prefix}:") + suffix] = sample.value
    return found


class Subject:
    """Metrics with a clock of their own."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics("tiny", Stats, lambda: True, "llama_jax", self.clock)

    def measure(
        self, gaps: Iterable[float], reason: str | None = "length", prompt_tokens: int = 7
    ) -> None:
        """A sequence that arrives now and whose tokens come after these gaps."""
        with self.metrics.request(self.clock(), prompt_tokens) as timer:
            for gap in gaps:
                self.clock.now += gap
                timer.token()
            if reason is not None:
                timer.finish(reason)
            self.clock.now += 100.0  # what happens after the last token counts nowhere

    def samples(self) -> dict[str, float]:
        return samples(self.metrics.text().decode())

    def histogram(self, name: str) -> tuple[float, float, list[float]]:
        """Count, sum, and for each value the upper end of the bucket that it is in."""
        found = self.samples()
        ends, below = [], 0.0
        for key, count in found.items():
            if key.startswith(f"{name}_bucket{{"):
                ends += [float(key[len(f"{name}_bucket{{") : -1])] * int(count - below)
                below = count
        return found[f"{name}_count"], found[f"{name}_sum"], ends


@pytest.fixture
def subject() -> Subject:
    return Subject()


# Latencies


def test_latencies_of_one_sequence(subject: Subject) -> None:
    subject.measure([0.3, 0.02, 0.04, 0.06])
    assert subject.histogram(TTFT) == (1, pytest.approx(0.3), [0.5])
    assert subject.histogram(INTER_TOKEN) == (3, pytest.approx(0.12), [0.025, 0.05, 0.075])
    assert subject.histogram(PER_TOKEN) == (1, pytest.approx(0.04), [0.05])
    assert subject.histogram(LATENCY) == (1, pytest.approx(0.42), [0.5])


def test_latencies_of_several_sequences_add_up(subject: Subject) -> None:
    subject.measure([0.003, 0.011])
    subject.measure([7.0, 0.18, 0.35])
    assert subject.histogram(TTFT) == (2, pytest.approx(7.003), [0.005, 7.5])
    assert subject.histogram(INTER_TOKEN) == (3, pytest.approx(0.541), [0.025, 0.2, 0.4])
    assert subject.histogram(PER_TOKEN) == (2, pytest.approx(0.276), [0.025, 0.3])
    assert subject.histogram(LATENCY) == (2, pytest.approx(7.544), [0.3, 10.0])


def test_a_single_token_has_no_time_between_tokens(subject: Subject) -> None:
    subject.measure([0.6])
    assert subject.histogram(TTFT) == (1, pytest.approx(0.6), [0.75])
    assert subject.histogram(LATENCY) == (1, pytest.approx(0.6), [0.8])
    assert subject.histogram(INTER_TOKEN) == subject.histogram(PER_TOKEN) == (0, 0, [])


def test_a_request_that_waited_counts_from_its_arrival(subject: Subject) -> None:
    arrived = subject.clock()
    subject.clock.now += 2.0  # it was tokenized
    with subject.metrics.request(arrived, 7) as timer:
        subject.clock.now += 0.4
        timer.token()
        timer.finish("stop")
    assert subject.histogram(TTFT)[1] == subject.histogram(LATENCY)[1] == pytest.approx(2.4)


def test_the_phases_of_a_sequence(subject: Subject) -> None:
    arrived = subject.clock()
    subject.clock.now += 0.5  # it was tokenized
    with subject.metrics.request(arrived, 100) as timer:
        for gap in (3.0, 0.25, 0.75):
            subject.clock.now += gap
            timer.token()
        timer.note(Output(0, 5, cached_tokens=60, queue_seconds=2.0))
        timer.finish("stop")
    sums = {name: subject.histogram(f"request_{name}")[:2] for name in PHASES}
    assert sums == {
        "queue_time_seconds": (1, pytest.approx(2.0)),
        "prefill_time_seconds": (1, pytest.approx(1.0)),
        "decode_time_seconds": (1, pytest.approx(1.0)),
        "inference_time_seconds": (1, pytest.approx(2.0)),
        "prefill_kv_computed_tokens": (1, 40),
    }


def test_a_phase_takes_no_negative_time(subject: Subject) -> None:
    """The engine's clock may be a little ahead."""
    with subject.metrics.request(subject.clock(), 7) as timer:
        timer.token()
        timer.note(Output(0, 5, queue_seconds=0.001))
        timer.finish("stop")
    for name in ("prefill_time_seconds", "inference_time_seconds"):
        assert subject.histogram(f"request_{name}")[:2] == (1, 0)


def test_an_unknown_time_in_the_queue_is_not_invented(subject: Subject) -> None:
    subject.measure([0.3, 0.1])
    assert [subject.histogram(f"request_{name}")[0] for name in PHASES] == [0, 0, 1, 0, 1]


# Counts


def test_tokens_of_prompts_and_answers(subject: Subject) -> None:
    subject.measure([0.1] * 3, prompt_tokens=40)
    subject.measure([0.1] * 6, prompt_tokens=1)
    assert subject.histogram("request_prompt_tokens") == (2, 41, [1, 50])
    assert subject.histogram("request_generation_tokens") == (2, 9, [5, 10])


def test_reasons_are_counted_apart(subject: Subject) -> None:
    subject.measure([0.1], "stop")
    for _ in range(2):
        subject.measure([0.1], "length")
    for _ in range(3):
        subject.measure([0.1, 0.1], None)  # left by the client
    for _ in range(4):
        with pytest.raises(EngineDead), subject.metrics.request(0.0, 7):
            raise EngineDead("gone")
    for _ in range(5):
        with pytest.raises(QueueFull), subject.metrics.request(0.0, 7):
            raise QueueFull("full")
    with pytest.raises(RequestError), subject.metrics.request(0.0, 7):
        raise RequestError("wrong")
    with pytest.raises(RequestError), subject.metrics.request(0.0, 7) as timer:
        timer.token()
        raise RequestError("cannot go on")  # in the middle of its answer
    found = subject.samples()
    finished = {"stop": 1, "length": 2, "abort": 3, "error": 5}
    assert {key: found[f"request_success_total{{{key}}}"] for key in finished} == finished
    assert found["admission_rejections_total{queue_full}"] == 5
    # Only complete sequences have a latency; refused ones are not measured at all.
    assert [found[f"{name}_count"] for name in LATENCIES] == [7, 3, 0, 3]
    assert found["request_prompt_tokens_count"] == 11


def test_the_longest_choice_of_a_request(subject: Subject) -> None:
    record = RequestRecord(id="x", method="POST", path="/", client="c", params=SamplingParams())
    for tokens in (1, 3, 2):
        with subject.metrics.request(0.0, 7) as timer:
            for _ in range(tokens):
                timer.token()
        record.choices.append(timer)
    subject.metrics.observe(record)
    assert subject.histogram("request_max_num_generation_tokens") == (1, 3, [5])


def test_every_reason_is_exported_before_it_occurs(subject: Subject) -> None:
    found = subject.samples()
    for name in ("stop", "length", "abort", "error"):
        assert found[f"request_success_total{{{name}}}"] == 0
    assert found["admission_rejections_total{queue_full}"] == 0


# The engine's own


def test_every_counter_of_the_engine_is_exported() -> None:
    stats = Stats(
        num_running=2,
        num_waiting=1,
        pages_total=64,
        pages_free=48,
        prompt_tokens=7,
        generation_tokens=8,
        preemptions=9,
        ticks=10,
        stage_ticks=20,
        stage_ticks_busy=19,
        token_slots=100,
        token_slots_used=90,
        compilations=12,
        tick_seconds=1.5,
        host_seconds=0.5,
        queue_tokens=13,
        pages_cached=14,
        programs_ready=5,
        packet_tokens=3000,
        packets_by_tokens=(3, 0, 2, *[0] * 8, 1, 0, 1),
        request_preemptions=35,
        requests_by_preemptions=(40, 3, 1, 0, 0, 0, 0, 0, 1),
    )
    values = [v for v in dataclasses.asdict(stats).values() if isinstance(v, int | float)]
    assert len(set(values)) == len(values), "equal values could be swapped"
    metrics = Metrics("tiny", lambda: stats, lambda: True, "llama_jax")
    expected = {
        "num_requests_running": 2,
        "num_requests_waiting": 1,
        "num_requests_waiting_by_reason{capacity}": 1,
        "num_requests_waiting_by_reason{deferred}": 0,
        "kv_cache_usage_perc": 0.25,
        "kv_pages": 64,
        "kv_pages_free": 48,
        "programs_ready": 5,
        "engine_up": 1,
        "prompt_tokens_total": 7,
        "generation_tokens_total": 8,
        "num_preemptions_total": 9,
        "ticks_total": 10,
        "stage_ticks_total": 20,
        "stage_ticks_busy_total": 19,
        "token_slots_total": 100,
        "token_slots_used_total": 90,
        "compilations_total": 12,
        "tick_seconds_total": 1.5,
        "host_seconds_total": 0.5,
        "queue_tokens": 13,
        "kv_pages_cached": 14,
        "iteration_tokens_total_sum": 3000,
        "iteration_tokens_total_count": 7,
        "iteration_tokens_total_bucket{1.0}": 3,
        "iteration_tokens_total_bucket{8.0}": 3,
        "iteration_tokens_total_bucket{16.0}": 5,
        "iteration_tokens_total_bucket{4096.0}": 5,
        "iteration_tokens_total_bucket{8192.0}": 6,
        "iteration_tokens_total_bucket{16384.0}": 6,
        "iteration_tokens_total_bucket{+Inf}": 7,
        "request_num_preemptions_sum": 35,
        "request_num_preemptions_count": 45,
        "request_num_preemptions_bucket{0.0}": 40,
        "request_num_preemptions_bucket{1.0}": 43,
        "request_num_preemptions_bucket{2.0}": 44,
        "request_num_preemptions_bucket{20.0}": 44,
        "request_num_preemptions_bucket{+Inf}": 45,
    }
    found = samples(metrics.text().decode())
    assert {name: found[name] for name in expected} == expected


def test_an_engine_without_a_report_has_used_no_page(subject: Subject) -> None:
    assert subject.samples()["kv_cache_usage_perc"] == 0


def test_the_cache_and_the_sources_of_prompts_are_exported() -> None:
    stats = Stats(prompt_tokens=7, cached_tokens=5)
    info = make_info(prefix_caching=False)
    metrics = Metrics("tiny", lambda: stats, lambda: True, "vllm", info=info)
    found = samples(metrics.text().decode(), "vllm")
    assert found["prompt_tokens_total"] == 12, "of both sources, as in vLLM"
    assert found["prompt_tokens_by_source_total{local_compute}"] == 7
    assert found["prompt_tokens_by_source_total{local_cache_hit}"] == 5
    assert found["prompt_tokens_cached_total"] == 5
    assert (found["prefix_cache_queries_total"], found["prefix_cache_hits_total"]) == (12, 5)
    [family] = [
        family
        for family in text_string_to_metric_families(metrics.text().decode())
        if family.name == "vllm:cache_config_info"
    ]
    [sample] = family.samples
    assert sample.value == 1
    assert (sample.labels["block_size"], sample.labels["num_gpu_blocks"]) == ("16", "64")
    assert sample.labels["cache_dtype"] == "float32"
    assert sample.labels["enable_prefix_caching"] == "False"


def test_only_a_result_that_is_not_a_number_counts_as_corrupted(subject: Subject) -> None:
    for message in (NOT_A_NUMBER, NOT_A_NUMBER, "It took too long."):
        with pytest.raises(GenerationFailed), subject.metrics.request(0.0, 7):
            raise GenerationFailed(message)
    assert subject.samples()["corrupted_requests_total"] == 2


# HTTP requests


def http(server: FakeServer) -> dict[tuple[str, str, str], float]:
    """The counts of http_requests_total by handler, method and status."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {
        (sample.labels["handler"], sample.labels["method"], sample.labels["status"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name == "http_requests_total"
    }


def test_http_requests_are_counted_by_route_method_and_status() -> None:
    server = FakeServer()
    server.complete()
    server.complete()
    server.post("/v1/completions", {})
    server.get("/v1/models/tiny")
    server.get("/v1/models/other/name")
    server.post("/health", {})
    assert http(server) == {
        ("/v1/completions", "POST", "2xx"): 2,
        ("/v1/completions", "POST", "4xx"): 1,
        ("/v1/models/{name:path}", "GET", "2xx"): 1,
        ("/v1/models/{name:path}", "GET", "4xx"): 1,
        ("/health", "POST", "4xx"): 1,
    }
    text = server.get("/metrics").text
    assert 'http_request_duration_seconds_count{handler="/v1/completions",method="POST"} 3' in text


def test_clients_cannot_make_labels() -> None:
    server = FakeServer()
    for number in range(30):
        server.get(f"/nowhere/{number}")
        server.run(lambda client, n=number: client.request(f"VERB{n}", f"/{n}"))
    assert http(server) == {("none", "GET", "4xx"): 30, ("none", "other", "4xx"): 30}


def test_the_parameters_of_requests_are_measured() -> None:
    server = FakeServer("Hello!")
    server.complete(prompt=["Hi", "Hi"], n=2, max_tokens=3)
    server.chat()
    server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 9999})
    found = samples(server.get("/metrics").text)
    assert (found["request_params_n_count"], found["request_params_n_sum"]) == (2, 3)
    assert (found["request_params_max_tokens_count"], found["request_params_max_tokens_sum"]) == (
        1,
        3,
    )
    assert found["request_max_num_generation_tokens_count"] == 2


# Over HTTP


def timed(server: FakeServer, gaps: list[float]) -> Clock:
    """Gives a server a clock, and its engine's tokens these times between them."""
    clock = server.served.metrics.clock = Clock()
    generate: Callable[..., AsyncGenerator[Output, None]] = server.engine.generate

    async def slow(
        prompt: list[int],
        params: SamplingParams,
        *,
        on_token: Callable[[], None],
        deadline: float | None,
    ) -> AsyncGenerator[Output, None]:
        times = iter(gaps)
        async for output in generate(prompt, params):
            clock.now += next(times)
            on_token()
            yield output

    server.engine.generate = slow
    return clock


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_over_http_is_measured(path: str, stream: bool) -> None:
    server = FakeServer("Hello!")
    timed(server, [0.25, 0.5, 1.0])
    body = (
        {"prompt": "Hi"}
        if path == "/v1/completions"
        else {"messages": [{"role": "user", "content": "Hi"}]}
    )
    assert server.post(path, {**body, "max_tokens": 3, "stream": stream}).status_code == 200
    found = samples(server.get("/metrics").text)
    assert [found[f"{name}_sum"] for name in LATENCIES] == [0.25, 1.5, 0.75, 1.75]
    assert [found[f"{name}_count"] for name in LATENCIES] == [1, 2, 1, 1]
    [(prompt, _)] = server.engine.requests
    assert found["request_prompt_tokens_sum"] == len(prompt)
    assert found["request_generation_tokens_sum"] == 3
    assert found["request_success_total{length}"] == 1


def test_a_pause_of_the_reader_is_no_latency() -> None:
    """The tokens arrive while the client reads none of them."""
    server = FakeServer("Hello!")
    clock = server.served.metrics.clock = Clock()
    generate = server.engine.generate

    async def ahead_of_the_reader(
        prompt: list[int],
        params: SamplingParams,
        *,
        on_token: Callable[[], None],
        deadline: float | None,
    ) -> AsyncGenerator[Output, None]:
        outputs = [output async for output in generate(prompt, params)]
        for _ in outputs:
            clock.now += 0.25
            on_token()
        for output in outputs:
            clock.now += 30.0
            yield output

    server.engine.generate = ahead_of_the_reader
    server.stream("/v1/completions", max_tokens=3)
    found = samples(server.get("/metrics").text)
    assert [found[f"{name}_sum"] for name in LATENCIES] == [0.25, 0.5, 0.25, 0.75]


def test_a_stop_string_is_a_stop_and_a_refused_request_is_nothing() -> None:
    server = FakeServer("Hello!")
    server.stream("/v1/chat/completions", stop="l")
    server.post("/v1/completions", {"prompt": [999]})
    found = samples(server.get("/metrics").text)
    assert found["request_success_total{stop}"] == 1
    assert sum(n for name, n in found.items() if name.startswith("request_success_total")) == 1
    assert found["request_prompt_tokens_count"] == 1


def test_metrics_can_have_the_names_that_dashboards_know() -> None:
    server = FakeServer(prefix="vllm")
    text = server.get("/metrics").text
    assert samples(text, "vllm")["num_requests_running"] == 2
    assert "llama_jax:" not in text


def test_metrics_outlive_the_engine() -> None:
    server = FakeServer()
    server.engine.die()
    assert samples(server.get("/metrics").text)["engine_up"] == 0
