"""With P full microbatches of decode work, every stage works in every tick.

The counts are those of the dispatched packets, which the engine exports (`Stats`).
"""

import itertools

import pytest

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.tick_loop import TickLoop
from llama_jax.ring.sizes import RingSizes
from tests.support.mock_executor import MockExecutor
from tests.support.reference import make_loop, make_model, save_model

ROWS = 8  # per microbatch


def keep_full(loop: TickLoop, numbers, ticks: int, *, prompt: int, answer: int) -> None:
    """Runs with requests always waiting, so that a finished request is replaced at once."""
    for _ in range(ticks):
        while len(loop.scheduler.waiting) < 4:
            number = next(numbers)
            loop.scheduler.add(
                number,
                [14 + number % 30] * (1 + number % prompt),
                SamplingParams(temperature=0, max_tokens=1 + number * 7 % answer),
                max_model_len=512,
                seed=0,
                stop_ids=frozenset(),
            )
        loop.step()


def counters(loop: TickLoop) -> dict[str, int]:
    return {
        "stage_ticks": loop.ticks * loop.num_stages,
        "busy": loop.stage_ticks_busy,
        "slots": loop.token_slots,
        "used": loop.token_slots_used,
    }


def measure(loop: TickLoop, warm_up: int, ticks: int, **load: int) -> dict[str, float]:
    """Shares over a steady run, without its beginning."""
    numbers = itertools.count()
    keep_full(loop, numbers, warm_up, **load)
    before = counters(loop)
    keep_full(loop, numbers, ticks, **load)
    run = {name: count - before[name] for name, count in counters(loop).items()}
    assert run["stage_ticks"] == ticks * loop.num_stages
    return {"busy": run["busy"] / run["stage_ticks"], "used": run["used"] / run["slots"]}


def mock_loop(stages: int, late: int, num_pages: int) -> TickLoop:
    sizes = RingSizes(
        num_slots=ROWS * stages,
        num_pages=num_pages,
        page_size=16,
        pages_per_sequence=32,
        row_buckets=(2, ROWS),
        chunk_buckets=(0, 16, 64),
        tile=16,
    )
    scheduler = Scheduler(sizes, stages)
    return TickLoop(scheduler, MockExecutor(sizes, stages), late)  # type: ignore[arg-type]


@pytest.mark.parametrize(("stages", "late"), [(1, 3), (2, 0), (4, 0), (4, 3), (8, 3)])
def test_every_stage_works_in_every_tick(stages, late, record_property):
    loop = mock_loop(stages, late, num_pages=ROWS * stages * 16)
    shares = measure(loop, 200, 2000, prompt=60, answer=150)
    record_property("token slots used of computed", round(shares["used"], 3))
    assert shares["busy"] >= 0.99
    assert loop.scheduler.num_preemptions == 0


def test_decoding_alone_fills_every_slot_that_is_computed():
    """Without chunks, each of the P microbatches is full, so every slot of every stage is used."""
    loop = mock_loop(4, 0, num_pages=2000)
    for number in range(4 * ROWS):
        loop.scheduler.add(
            number,
            [20] * 4,
            SamplingParams(temperature=0, max_tokens=500),
            max_model_len=512,
            seed=0,
            stop_ids=frozenset(),
        )
    for _ in range(100):
        loop.step()
    before = counters(loop)
    for _ in range(1000):
        loop.step()
    run = {name: count - before[name] for name, count in counters(loop).items()}
    assert run["busy"] == run["stage_ticks"] == 4000
    assert run["used"] == run["slots"] == 4000 * ROWS


def test_a_lack_of_pages_causes_no_bubble(record_property):
    loop = mock_loop(4, 3, num_pages=150)
    shares = measure(loop, 200, 2000, prompt=60, answer=150)
    record_property("token slots used of computed", round(shares["used"], 3))
    assert loop.scheduler.num_preemptions > 50
    assert shares["busy"] >= 0.99


def test_the_counts_show_a_bubble():
    """One microbatch of four has work, as in a pipeline that is drained for each step."""
    loop = mock_loop(4, 0, num_pages=500)
    loop.scheduler.add(
        0,
        [20] * 4,
        SamplingParams(temperature=0, max_tokens=400),
        max_model_len=512,
        seed=0,
        stop_ids=frozenset(),
    )
    for _ in range(1000):
        loop.step()
    assert loop.stage_ticks_busy / (loop.ticks * loop.num_stages) == pytest.approx(0.25, abs=0.01)


@pytest.mark.slow
def test_a_real_model_on_4x2(tmp_path, record_property):
    path = save_model(make_model(num_layers=4, embed_dim=32, mlp_dim=32, head_dim=4), tmp_path)
    loop = make_loop(path, "4x2", max_num_seqs=16, max_chunk=64, kv_cache_memory=1 << 20)
    shares = measure(loop, 40, 200, prompt=40, answer=60)
    record_property("token slots used of computed", round(shares["used"], 3))
    assert shares["busy"] >= 0.99
