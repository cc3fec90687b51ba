"""The client of an engine: streams, aborts and requests that are refused."""

import asyncio
import time
import tracemalloc
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import uvloop

from llama_jax.client.client import SILENCE_SECONDS, SILENCE_TICKS, EngineClient
from llama_jax.client.output_stream import OutputStream
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import EngineDead, QueueFull, RequestError
from llama_jax.engine.interface import Output, Stats, TokenLogprobs
from llama_jax.engine.options import EngineOptions
from tests.support.engine_clients import FOREVER, Body, collect, run_with_engine, tokens, until
from tests.support.fake_engine import VOCAB_SIZE, score
from tests.support.processes import FAKE, assert_gone

MAX_MODEL_LEN = 10_000
Run = Callable[[Body], None]

pytestmark = pytest.mark.usefixtures("temporary_directory")


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs test bodies with one client, for tests that leave its engine as they found it."""
    with asyncio.Runner() as runner:
        options = EngineOptions(path="fake:refuse", max_model_len=MAX_MODEL_LEN)
        client = runner.run(EngineClient.start(options, command=FAKE))

        async def check(body: Body) -> None:
            await asyncio.wait_for(body(client), 30)
            await until(lambda: client.stats.num_running == 0)

        yield lambda body: runner.run(check(body))
        runner.run(client.close())


# Streams


def test_streams_are_kept_apart(run: Run) -> None:
    async def body(client: EngineClient) -> None:
        first, second, third = await asyncio.gather(
            collect(client, [5], max_tokens=3),
            collect(client, [1, 2, 100], max_tokens=4),
            collect(client, [997]),
        )
        assert tokens(first) == [6, 7, 8]
        assert [output.finish_reason for output in first] == [None, None, "length"]
        assert tokens(second) == [101, 102, 103, 104]
        assert tokens(third) == [998, 999, 0]
        assert third[-1].finish_reason == "stop"

    run(body)


def test_an_output_has_all_that_the_engine_says_of_a_token(run: Run) -> None:
    """Whether it is read when it arrives or later."""

    async def body(client: EngineClient) -> None:
        for seconds in (0, 0.1):
            stream = client.generate([5], SamplingParams(max_tokens=3, logprobs=1))
            outputs = [await anext(stream)]
            await asyncio.sleep(seconds)
            outputs += [output async for output in stream]
            for output, token in zip(outputs, (6, 7, 8), strict=True):
                assert (output.token, output.error, output.cached_tokens) == (token, None, 3)
                assert output.logprobs == TokenLogprobs(-token / 1000, [(token, -0.5)])
                assert output.queue_seconds == 0.25
        [plain, *_] = await collect(client, [5], max_tokens=3)
        assert plain.logprobs is None and plain.cached_tokens == 3

    run(body)


def test_works_on_uvloop() -> None:
    async def scenario() -> list[int | None]:
        client = await EngineClient.start(EngineOptions(path="fake"), command=FAKE)
        outputs = await collect(client, [5], max_tokens=3)
        client.kill()
        with pytest.raises(EngineDead):
            await collect(client, [5])
        await client.close()
        assert_gone(client.pid)
        return tokens(outputs)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(scenario()) == [6, 7, 8]


def test_the_engine_reports_with_and_without_work(run: Run) -> None:
    async def body(client: EngineClient) -> None:
        running = asyncio.create_task(collect(client, [1], ignore_eos=True))
        await until(lambda: client.stats.num_running == 1)
        running.cancel()
        await until(lambda: client.stats.num_running == 0)
        before = client.stats  # from now on only a heartbeat brings new ones
        await until(lambda: client.stats is not before)
        assert client.alive and client.ended is None

    run(body)


def test_the_age_of_the_last_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: EngineClient) -> None:
        await collect(client, [5], max_tokens=1)
        now = 100.0 + time.monotonic()
        monkeypatch.setattr("llama_jax.client.client.time", SimpleNamespace(monotonic=lambda: now))
        before = client.stats
        assert client.seconds_since_report > 90
        await until(lambda: client.stats is not before)
        assert client.seconds_since_report == 0

    run(body)


def test_silence_is_measured_by_the_length_of_ticks(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(client: EngineClient) -> None:
        await collect(client, [5], max_tokens=1)
        assert client.responds
        monkeypatch.setattr(EngineClient, "seconds_since_report", SILENCE_SECONDS)
        client.stats = Stats(ticks=100, tick_seconds=1.0)
        assert client.responds
        monkeypatch.setattr(EngineClient, "seconds_since_report", 60.0)
        for tick_seconds, responds in ((0.03, False), (61.0 / SILENCE_TICKS, True)):
            client.stats = Stats(ticks=100, tick_seconds=100 * tick_seconds)
            assert client.responds == responds

    run(body)


# Aborts


@pytest.mark.parametrize("how", ["close", "break", "cancel"])
def test_a_stream_that_is_closed_early_is_aborted(run: Run, how: str) -> None:
    async def body(client: EngineClient) -> None:
        async def consume() -> None:
            stream = client.generate([1], FOREVER)
            async for output in stream:
                if output.token == 5 and how == "close":
                    await stream.aclose()
                if output.token == 5 and how == "break":
                    break

        task = asyncio.create_task(consume())
        await until(lambda: client.stats.num_running == 1 or task.done())
        made = client.stats.generation_tokens
        if how == "cancel":
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == (how == "cancel")
        await until(lambda: client.stats.generation_tokens > made and client.stats.num_running == 0)
        # The engine still answers, and the new stream has no token of the old one.
        assert tokens(await collect(client, [5], max_tokens=2)) == [6, 7]

    run(body)


# Readers that stop


def test_a_finished_answer_that_is_not_read_holds_no_place() -> None:
    async def body(client: EngineClient) -> None:
        params = SamplingParams(max_tokens=200)
        streams = [client.generate([100 * i], params) for i in range(1, 7)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(QueueFull):
            await collect(client, [1])
        waiting = asyncio.create_task(
            anext(client.generate([5], SamplingParams(max_tokens=2), wait=True))
        )
        assert (await waiting).token == 6
        await until(lambda: client.stats.generation_tokens == 6 * 200 + 2)
        assert tokens(await collect(client, [5], max_tokens=2)) == [6, 7]
        for i, stream in enumerate(streams, start=1):  # nothing is lost meanwhile
            rest = [output async for output in stream]
            assert tokens(rest) == [100 * i + 2 + n for n in range(199)]
            assert rest[-1].finish_reason == "length"

    run_with_engine(body, max_num_seqs=4, max_queue=2)


def test_tokens_are_announced_when_they_arrive(run: Run) -> None:
    async def body(client: EngineClient) -> None:
        arrived: list[None] = []
        params = SamplingParams(max_tokens=30)
        stream = client.generate([1], params, on_token=lambda: arrived.append(None))
        await anext(stream)
        await until(lambda: len(arrived) == 30)
        assert len([output async for output in stream]) == 29
        assert len(arrived) == 30

    run(body)


def test_unread_tokens_take_four_bytes_each() -> None:
    count = 100_000
    outputs = [Output(1, token) for token in range(count)]
    stream = OutputStream(1, lambda: None)
    tracemalloc.start()
    try:
        for output in outputs:
            stream.put(output)
        assert tracemalloc.get_traced_memory()[0] < 6 * count
    finally:
        tracemalloc.stop()

    async def read() -> list[int | None]:
        return [(await stream.get()).token for _ in outputs]

    assert asyncio.run(read()) == list(range(count))


def test_the_scores_of_a_prompt_come_with_its_first_token() -> None:
    scores = score([4, 5], SamplingParams(prompt_logprobs=1))
    stream = OutputStream(1, lambda: None)
    first, second = Output(1, 6, prompt_logprobs=scores), Output(1, 7)
    stream.put(first)
    stream.put(second)

    async def read() -> list[Output]:
        return [await stream.get(), await stream.get()]

    assert scores is not None and asyncio.run(read()) == [first, second]


@pytest.mark.parametrize("waits", [False, True])
def test_outputs_that_arrived_before_an_error_are_read_before_it(waits: bool) -> None:
    """Also if they come in the same turn of the event loop, before a reader that waits can run."""

    async def scenario() -> None:
        stream = OutputStream(1, lambda: None)
        first = asyncio.create_task(stream.get())
        if waits:
            await asyncio.sleep(0)
        stream.put(Output(1, 5))
        stream.fail(EngineDead("gone"))
        assert await first == Output(1, 5)
        with pytest.raises(EngineDead, match="gone"):
            await stream.get()

    asyncio.run(scenario())


# Requests that are refused


@pytest.mark.parametrize(
    ("prompt", "params", "param", "code"),
    [
        ([], {}, "prompt", "invalid_value"),
        ([3, VOCAB_SIZE], {}, "prompt", "invalid_value"),
        ([3, -1], {}, "prompt", "invalid_value"),
        ([3, True], {}, "prompt", "invalid_type"),
        ([3, 4.0], {}, "prompt", "invalid_type"),
        ([3] * MAX_MODEL_LEN, {}, "prompt", "context_length_exceeded"),
        ([3], {"temperature": "hot"}, "temperature", "invalid_type"),
        ([3], {"stop": ("a", 3)}, "stop", "invalid_type"),
        ([3], {"stop": ("\ud800",)}, "stop", "invalid_value"),
        ([3], {"max_tokens": 10**30}, "max_tokens", "invalid_value"),
        ([3], {"seed": object()}, "seed", "invalid_type"),
        ([3], {"stop_token_ids": (1, VOCAB_SIZE)}, "stop_token_ids", "invalid_value"),
        ([3], {"stop_token_ids": (-1,)}, "stop_token_ids", "invalid_value"),
    ],
)
def test_invalid_requests_are_refused_before_they_are_sent(
    run: Run, prompt: list[int], params: dict[str, object], param: str, code: str
) -> None:
    async def body(client: EngineClient) -> None:
        for refuse in (
            lambda: client.check(prompt, SamplingParams(**params)),
            lambda: anext(client.generate(prompt, SamplingParams(**params))),
        ):
            with pytest.raises(RequestError) as caught:
                await refuse()
            assert (caught.value.param, caught.value.code) == (param, code)
            assert "\n" not in str(caught.value)
        assert tokens(await collect(client, [5], max_tokens=1)) == [6]

    run(body)


def test_a_value_of_a_wrong_type_is_told_as_python_writes_both(run: Run) -> None:
    """OpenAI and vLLM take each of these."""

    async def body(client: EngineClient) -> None:
        for wrong, message in (
            ({"stop": "x"}, "stop must be of type tuple[str, ...], got 'x'."),
            (
                {"logit_bias": {5: 100}},
                "logit_bias must be of type tuple[tuple[int, float], ...], got {5: 100}.",
            ),
            (
                {"bad_words": ["the"]},
                "bad_words must be of type tuple[tuple[int, ...], ...], got ['the'].",
            ),
            ({"top_k": "5"}, "top_k must be of type int, got '5'."),
            ({"seed": 5.5}, "seed must be of type int | None, got 5.5."),
            ({"stop": "x" * 100}, f"stop must be of type tuple[str, ...], got '{'x' * 79}...."),
        ):
            with pytest.raises(RequestError) as caught:
                client.check([3], SamplingParams(**wrong))  # type: ignore[arg-type]
            assert str(caught.value) == message

    run(body)


def test_values_out_of_range_and_params_of_another_class_are_refused(run: Run) -> None:
    async def body(client: EngineClient) -> None:
        with pytest.raises(RequestError, match="temperature") as caught:
            client.check([3], SamplingParams(temperature=3.0))
        assert caught.value.code == "invalid_value"
        with pytest.raises(RequestError) as caught:
            client.check([3], {"temperature": 1.0})
        assert (caught.value.param, caught.value.code) == ("params", "invalid_type")

    run(body)


def test_a_prompt_that_just_fits_gets_one_token(run: Run) -> None:
    async def body(client: EngineClient) -> None:
        outputs = await collect(client, [3] * (MAX_MODEL_LEN - 1))
        assert [(output.token, output.finish_reason) for output in outputs] == [(4, "length")]

    run(body)


def test_a_request_that_the_engine_cannot_answer_ends_with_an_error(run: Run) -> None:
    async def body(client: EngineClient) -> None:
        arrived: list[None] = []
        stream = client.generate([13, 1], FOREVER, on_token=lambda: arrived.append(None))
        answer = asyncio.create_task(collect(client, [1, 13], max_tokens=1))
        failed = [output async for output in stream]
        assert failed == [Output(failed[0].request_id, None, "error", "13 brings bad luck.")]
        assert not arrived, "an error is no token"
        assert tokens(await answer) == [14]

    run(body)


def test_a_request_that_waits_for_a_place_ends_with_the_engine() -> None:
    async def body(client: EngineClient) -> None:
        running = [asyncio.create_task(collect(client, [1], ignore_eos=True)) for _ in range(2)]
        await until(lambda: client.stats.num_running == 2)
        late = anext(client.generate([5], FOREVER, wait=True))
        waiting = asyncio.create_task(late)
        await asyncio.sleep(0)
        client.kill()
        for end in await asyncio.gather(*running, waiting, return_exceptions=True):
            assert isinstance(end, EngineDead)

    run_with_engine(body, max_num_seqs=1, max_queue=1)


def test_the_queue_is_bounded() -> None:
    async def body(client: EngineClient) -> None:
        waiting = [asyncio.create_task(collect(client, [1], ignore_eos=True)) for _ in range(5)]
        await until(lambda: client.stats.num_running == 5)
        with pytest.raises(QueueFull) as caught:
            await collect(client, [1])
        assert (caught.value.param, caught.value.code) == (None, "queue_full")
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        assert tokens(await collect(client, [5], max_tokens=1)) == [6]
        for task in waiting:
            task.cancel()
        assert client.max_in_flight == 5

    run_with_engine(body, max_num_seqs=2, max_queue=3)
