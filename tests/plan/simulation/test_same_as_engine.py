"""The simulator is the scheduler: a real engine and the simulation decide the same in every tick.

A real ring on the CPU runs requests that arrive by a clock, which advances by the measured time of
each tick. The simulation gets the same arrivals and these times, and nothing else.
"""

from typing import NamedTuple

import numpy as np
import pytest

import llama_jax.plan.simulation.engine as simulation_engine
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.costs.rule_of_thumb import CPU_COST
from llama_jax.engine.chunk_choice import ChunkChoice
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.tick_loop import TickLoop
from llama_jax.engine.tick_times import TickTimes
from llama_jax.plan.simulation.clock import Clock
from llama_jax.plan.simulation.load import Load, Request, Run
from llama_jax.plan.simulation.server import Server, TickTime
from llama_jax.plan.simulation.simulation import Simulation
from tests.support.reference import make_loop, make_model, save_model

MAX_MODEL_LEN = 400
VOCAB_SIZE = 256


class Decision(NamedTuple):
    """What one step of an engine did."""

    bucket: tuple[int, int]
    rows: tuple[tuple[int, int], ...]  # request, position
    tiles: tuple[tuple[int, int, int], ...]  # request, position, length
    running: int
    waiting: int
    free_pages: int
    preemptions: int
    cached_tokens: int


@pytest.fixture(
    scope="module",
    params=["two programs", pytest.param("all programs", marks=pytest.mark.slow)],
)
def executor(request, tmp_path_factory):
    model = make_model(num_layers=2, embed_dim=32, mlp_dim=32, head_dim=4)
    path = save_model(model, tmp_path_factory.mktemp("model"))
    # So few pages that six requests do not fit.
    few = {"max_num_seqs": 6, "num_pages": 30, "page_size": 16, "max_model_len": MAX_MODEL_LEN}
    return make_loop(path, "2x2", largest_only=request.param == "two programs", **few).executor


def make_requests(count: int, gap: float) -> list[Request]:
    """Half of them begin alike; some clients go away."""
    rng = np.random.default_rng(7)
    requests, at = [], 0.0
    for number in range(count):
        at += float(rng.exponential(gap)) if number % 5 else 0.0
        shared, own = int(rng.choice([40, 100])), int(rng.choice([1, 5, 63, 64, 65, 150]))
        runs = (Run(shared % 3, shared),) if number % 2 else ()
        runs += (Run(10 + number, own),)
        patience = 8 * gap if number % 6 == 4 else float("inf")
        length = sum(run.tokens for run in runs)
        requests.append(Request(at, length, int(rng.integers(1, 60)), runs, patience))
    return requests


def prompt_tokens(request: Request) -> list[int]:
    """Token ids of the tiny model that begin alike where the runs do."""
    return [
        token
        for run in request.runs
        for token in np.random.default_rng(run.text).integers(0, VOCAB_SIZE, run.tokens).tolist()
    ]


def make_chunks(sizes, chosen: bool) -> ChunkChoice | None:
    return ChunkChoice(sizes, TickTimes(CPU_COST.seconds, sizes)) if chosen else None


def listen(loop: TickLoop) -> tuple[list[Decision], list[float]]:
    """Records what a loop decides, and the time of its ticks."""
    decisions: list[Decision] = []
    seconds: list[float] = []

    def keep(tick) -> None:
        entered, scheduler = tick.in_flight[-1], loop.scheduler
        seconds.append(tick.seconds)
        decisions.append(
            Decision(
                tick.bucket,
                tuple((row.sequence.request_id, row.position) for row in entered.rows),
                tuple((t.sequence.request_id, t.position, t.length) for t in entered.tiles),
                scheduler.num_running,
                len(scheduler.waiting),
                scheduler.pool.num_free,
                scheduler.num_preemptions,
                scheduler.num_cached_tokens,
            )
        )

    loop.on_tick.append(keep)
    return decisions, seconds


def run_engine(loop: TickLoop, requests: list[Request]):
    """Runs requests through a real engine; returns decisions, ends and the seconds of its ticks."""
    decisions, seconds = listen(loop)
    now, number, ends, left = 0.0, 0, [], {}
    while number < len(requests) or loop.has_work:
        if not loop.has_work:
            now = max(now, requests[number].at)
        while number < len(requests) and requests[number].at <= now:
            request = requests[number]
            loop.scheduler.add(
                number,
                prompt_tokens(request),
                SamplingParams(temperature=0, max_tokens=request.output_tokens),
                max_model_len=MAX_MODEL_LEN,
                seed=0,
                stop_ids=frozenset(),
            )
            if request.patience < float("inf"):
                left[number] = request.at + request.patience
            number += 1
        for gone in [request_id for request_id, due in left.items() if due <= now]:
            del left[gone]
            loop.scheduler.abort(gone)
            if gone not in [request_id for request_id, _ in ends]:
                ends.append((gone, "gone"))
        ticks = len(seconds)
        outputs = loop.step()
        now += sum(seconds[ticks:])
        ends += [(o.request_id, "completed") for o in outputs if o.finish_reason]
    return decisions, ends, seconds


@pytest.mark.parametrize(
    ("count", "gap", "caching", "late", "chosen"),
    [
        (40, 0.004, True, 0, True),  # a crowd: pages run out
        pytest.param(40, 0.004, False, 2, True, marks=pytest.mark.slow),
        pytest.param(40, 0.004, True, 2, False, marks=pytest.mark.slow),
        (12, 0.05, True, 1, True),  # seldom more than two at a time
    ],
)
def test_the_simulation_decides_as_the_engine_does(
    executor, monkeypatch, count, gap, caching, late, chosen
):
    executor.reset(float("nan"))
    sizes, stages = executor.sizes, executor.mesh.shape["stage"]
    scheduler = Scheduler(sizes, stages, prefix_caching=caching, chunks=make_chunks(sizes, chosen))
    requests = make_requests(count, gap)
    decisions, ends, seconds = run_engine(TickLoop(scheduler, executor, late), requests)
    if count == 40:
        assert decisions[-1].preemptions > 0 and {end for _, end in ends} == {"completed", "gone"}
        assert max(decision.waiting for decision in decisions) > 3
    assert (decisions[-1].cached_tokens > 0) == caching

    class Replay(Clock):
        """Its ticks take the times that were recorded."""

        times = iter(seconds)

        def _slowest(self, bucket):
            return TickTime(next(self.times))

    monkeypatch.setattr(simulation_engine, "Clock", Replay)
    server = Server(
        num_stages=stages,
        sizes=sizes,
        max_model_len=MAX_MODEL_LEN,
        tick_time=lambda work: TickTime(0.0),
        chunks=lambda: make_chunks(sizes, chosen),
        prefix_caching=caching,
        results_late=late,
        host_seconds=0.0,
        waits=True,
    )
    simulation = Simulation(server, Load(requests))
    simulated, _ = listen(simulation.engine.loop)
    result = simulation.run()
    assert simulated == decisions
    assert [(number, sample.outcome) for number, sample in simulation.samples] == ends
    assert next(Replay.times, None) is None, "the engine ran more ticks"
    assert result.preemptions == decisions[-1].preemptions
    assert result.cached_tokens == decisions[-1].cached_tokens
