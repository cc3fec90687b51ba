"""An engine with latency targets: it times its own ticks, and chooses among what it compiled."""

import pytest

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.core import Engine
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.tick_times import BELIEF
from tests.support.reference import make_model, save_model

pytestmark = pytest.mark.slow  # each compiles an engine


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    model = make_model(num_layers=2, embed_dim=32, mlp_dim=32, head_dim=4)
    return str(save_model(model, tmp_path_factory.mktemp("model")))


def run(engine: Engine, prompts: int, length: int) -> None:
    for number in range(prompts):
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        engine.add(number, [number + 1] * length, params)
    while engine.has_work:
        engine.step()


def test_it_measures_its_ticks_and_chooses_among_its_programs(path):
    sizes = dict(max_num_seqs=1, max_chunk=128, max_model_len=400, wait_for_programs=True)
    engine = Engine(EngineOptions(path=path, tpot_slo=0.0001, ttft_slo=1.0, **sizes))
    table = {(tick.rows, tick.chunk): tick for tick in engine.stats().latency.ticks}
    assert len(table) == engine.info.num_programs == 3
    for bucket in engine.loop.sizes.largest():  # timed before the first request
        assert table[bucket].seen > BELIEF
        assert table[bucket].seconds != table[bucket].modeled
    compiled = engine.stats().compilations
    run(engine, 3, 300)
    stats = engine.stats()
    assert stats.compilations == compiled
    assert (stats.latency.tpot, stats.latency.ttft) == (0.0001, 1.0)
    assert stats.latency.chunk_limit in (64, 128)
    ran = {(p.rows, p.chunk) for p in stats.programs if p.ticks}
    assert all(t.seen for t in stats.latency.ticks if (t.rows, t.chunk) in ran)


def test_without_targets_nothing_is_timed_or_limited(path):
    engine = Engine(EngineOptions(path=path, max_num_seqs=2, max_chunk=128, max_model_len=256))
    latency = engine.stats().latency
    assert (latency.tpot, latency.ttft, latency.chunk_limit) == (None, None, 128)
    assert not any(tick.seen for tick in latency.ticks)
    run(engine, 3, 150)
    assert any(tick.seen for tick in engine.stats().latency.ticks)  # for whoever watches
