"""What latency targets do to the reference deployment, by simulation: Llama-3-70B, 4x2 H100."""

from dataclasses import replace

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import GPUS
from llama_jax.costs.tick_time import TickModel
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.tick_times import REFRESH
from llama_jax.plan.simulation.figures import Figures, figures
from llama_jax.plan.simulation.lengths import Lengths
from llama_jax.plan.simulation.load import Draw, Load
from llama_jax.plan.simulation.replicas import simulate
from llama_jax.plan.simulation.server import Server, server_for
from llama_jax.plan.targets import Targets

MODEL = TickModel(Deployment(LlamaConfig.llama3_70b(), GPUS["h100-sxm"], Layout(4, 2)))
KV_CACHE = 20 * 10**9
NOISE = 1.03


def server(level: str = "expected", **options: object) -> Server:
    chosen = EngineOptions(path="", max_num_seqs=256, max_model_len=4096, **options)
    return server_for(MODEL, chosen, KV_CACHE, level)


def run(
    served: Server, rate: float, requests: int, tpot: float, prompt: int = 1024, answer: int = 256
) -> Figures:
    draw = Draw(
        rate=rate,
        num_requests=requests,
        prompt=Lengths.parse(str(prompt)),
        answer=Lengths.parse(str(answer)),
    )
    return figures(simulate(served, Load(draw.requests())), Targets(0.5, tpot))


def largest_chunks(served: Server) -> Server:
    """A server that always takes the largest chunk, as if --max-chunk set its size."""
    return replace(served, chunks=lambda: None)


def test_targets_keep_what_a_large_chunk_misses():
    """10 requests/s of 1,024/256, inside 500 ms and 50 ms."""
    by_hand = run(largest_chunks(server(max_chunk=512)), 10, 200, 0.05)
    chosen = run(server(max_chunk=512, tpot_slo=0.05, ttft_slo=0.5), 10, 200, 0.05)
    free = run(server(tpot_slo=0.05, ttft_slo=0.5), 10, 200, 0.05)
    assert by_hand.inside < 0.8
    assert min(chosen.inside, free.inside) >= 0.99


LOADS = [
    # level of the ticks, requests/s, prompt, answer, target for output tokens
    ("expected", 10, 1024, 256, 0.05),
    ("high", 10, 1024, 256, 0.05),
    ("high", 15, 1024, 256, 0.05),  # more than can be kept
    ("expected", 10, 2048, 128, 0.05),
    ("low", 40, 128, 128, 0.05),
    ("expected", 10, 1024, 256, 0.03),  # a target that no tick keeps
]


@pytest.mark.slow
@pytest.mark.parametrize(("level", "rate", "prompt", "answer", "tpot"), LOADS)
def test_targets_never_make_output_tokens_slower_than_they_must(level, rate, prompt, answer, tpot):
    def p99(served: Server) -> float:
        found = run(served, rate, 200, tpot, prompt, answer).tpot
        assert found is not None
        return found.p99

    largest = p99(largest_chunks(server(level, max_chunk=512)))
    free = p99(server(level, max_chunk=512))
    strict = p99(server(level, max_chunk=512, tpot_slo=tpot))
    both = p99(server(level, max_chunk=512, tpot_slo=tpot, ttft_slo=0.5))
    assert strict <= NOISE * max(tpot, free)
    assert both <= NOISE * max(tpot, largest)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "rate", "prompt", "answer", "tpot"), LOADS)
def test_targets_keep_at_least_as_many_requests_as_none(level, rate, prompt, answer, tpot):
    free = run(server(level, max_chunk=512), rate, 200, tpot, prompt, answer)
    both = run(
        server(level, max_chunk=512, tpot_slo=tpot, ttft_slo=0.5), rate, 200, tpot, prompt, answer
    )
    assert both.inside >= free.inside - 0.01
    assert both.ttft.p99 <= max(0.5, NOISE * free.ttft.p99)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_table_that_is_wrong_by_two_is_corrected_by_the_ticks(factor):
    """Of the devices of a loop that reads results late; the engine believes its table at first."""
    served = server(tpot_slo=0.05, ttft_slo=0.5)

    def tick_time(work):
        return replace(served.tick_time(work), seconds=factor * MODEL.expected(work))

    made = []

    def chunks():
        made.append(served.chunks())
        return made[-1]

    run(replace(served, tick_time=tick_time, chunks=chunks, host_seconds=0.0), 3, 30, 0.05)
    [chooser] = made
    seen = [tick for tick in chooser.times.table() if tick.seen >= REFRESH]
    assert any(tick.chunk for tick in seen) and any(not tick.chunk for tick in seen)
    for tick in seen:
        assert tick.seconds == pytest.approx(factor * tick.modeled, rel=0.1)
