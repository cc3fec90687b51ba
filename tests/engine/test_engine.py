"""The engine, on a tiny checkpoint and 4 × 2 virtual devices."""

import dataclasses
import itertools
import json
import threading
import time
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from llama_jax.checkpoint import CheckpointError
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.core import Engine, seed_source
from llama_jax.engine.options import EngineOptions, OptionError
from llama_jax.engine.sizing import SizingError
from llama_jax.weights.split import ShardingError
from sharding.errors import UserError
from sharding.mesh import MeshError
from tests.support.hlo import count_ops
from tests.support.programs import compile_few
from tests.support.reference import make_model, reference_logits, save_model
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.xla_options import PRODUCTION

VOCAB, EMBED, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 250, 32, 48, 4, 2, 8, 6
EOS = VOCAB - 1


@pytest.fixture(scope="module")
def model():
    return make_model(
        vocab_size=VOCAB,
        embed_dim=EMBED,
        mlp_dim=MLP,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_layers=LAYERS,
    )


PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def greedy_token(model):
    """The first token of the greedy answer to PROMPT. It is an EOS token of the checkpoint."""
    return int(reference_logits(model, PROMPT)[-1].argmax())


@pytest.fixture(scope="module")
def path(model, greedy_token, tmp_path_factory):
    path = save_model(model, tmp_path_factory.mktemp("engine") / "tiny-llama")
    for file in (path / "config.json", path / "generation_config.json"):
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"eos_token_id": [EOS, greedy_token]}))
    return path


def options_for(path, **changes) -> EngineOptions:
    sizes = dict(mesh="4x2", max_num_seqs=4, max_queue=3, max_chunk=64, page_size=8)
    return EngineOptions(path=str(path), **(sizes | {"kv_cache_memory": 1 << 16} | changes))


@pytest.fixture(scope="module")
def progress():
    return []


@pytest.fixture(scope="module")
def engine(path, progress):
    engine = Engine(options_for(path), progress.append)
    engine.warm_up.every_program.result()  # the counts of compilations stand still from here on
    return engine


@pytest.fixture
def idle(engine):
    """The engine, without requests of another test."""
    yield engine
    for request_id in range(100):
        engine.abort(request_id)
    while engine.has_work:
        engine.step()


def run(engine: Engine) -> dict[int, list]:
    """Runs the engine until it is idle; returns the outputs by request."""
    outputs: dict[int, list] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def test_greedy_answers_are_those_of_transformers(idle, model):
    prompts = {1: [5, 6, 7], 2: list(range(90)), 3: [9]}
    for request_id, prompt in prompts.items():
        idle.add(request_id, prompt, GREEDY)
    outputs = run(idle)
    for request_id, prompt in prompts.items():
        tokens = [output.token for output in outputs[request_id]]
        assert [o.finish_reason for o in outputs[request_id]] == [None] * 7 + ["length"]
        logits = reference_logits(model, prompt + tokens)[len(prompt) - 1 : -1]
        assert (logits.max(axis=1) - logits[np.arange(8), tokens] < 1e-3).all()


def test_the_facts_about_the_engine(engine, path):
    info = engine.info
    assert (info.model, info.mesh, info.platform, info.dtype) == (
        "tiny-llama", "4x2", "cpu", "float32",
    )  # fmt: skip
    assert (info.vocab_size, info.max_num_seqs, info.page_size) == (VOCAB, 4, 8)
    assert info.num_programs == 2  # one row; no chunk, or one of 64
    assert info.load_seconds > 0 and info.compile_seconds > 0

    # Six layers on four stages: two positions each, and the last two stages pad one.
    assert [d.layers for d in info.devices] == [[0, 1]] * 2 + [[2, 3]] * 2 + [[4]] * 2 + [[5]] * 2
    assert [(d.stage, d.rank) for d in info.devices] == [(s, r) for s in range(4) for r in range(2)]
    heads, kv_heads, mlp = HEADS // 2, KV_HEADS // 2, MLP // 2
    layer = EMBED * HEAD_DIM * 2 * (heads + kv_heads) + 3 * EMBED * mlp + 2 * EMBED
    vocabulary = 2 * EMBED * (256 // 8)  # 250 padded, embedding and head, over all eight
    assert {d.weight_bytes for d in info.devices} == {4 * (2 * layer + vocabulary + EMBED)}

    page = 2 * 2 * kv_heads * 8 * HEAD_DIM * 4  # two layers, keys and values, float32
    assert info.num_pages == (1 << 16) // page
    assert {d.kv_bytes for d in info.devices} == {info.num_pages * page}
    assert info.max_model_len == min(512, info.num_pages * 8)
    assert engine.loop.results_late == 0  # on CPU


def test_progress_is_reported_as_it_is_made(engine, progress):
    phases = [p.phase for p in progress]
    assert phases == sorted(phases, key=("loading", "compiling").index)
    for phase in ("loading", "compiling"):
        steps = [p for p in progress if p.phase == phase]
        assert [p.done for p in steps] == sorted(p.done for p in steps)
        assert steps[-1].done == steps[-1].total > 0


def test_a_program_can_be_read_without_touching_it(idle):
    executor = idle.loop.executor
    text = {
        bucket: executor.programs.lowered(bucket).compile(PRODUCTION).as_text()
        for bucket in executor.sizes.buckets()
    }
    for bucket, program in text.items():
        counts = count_ops(program)
        # Two layer positions per stage, two all-reduces per layer, and two for the vocabulary.
        assert counts["all-reduce"] == 2 * 2 + 2 and counts["collective-permute"] == 1
        assert f"f32[{bucket.rows + bucket.chunk},{EMBED}]" in program
    before = idle.stats().compilations
    idle.add(1, [5, 6, 7], SamplingParams(temperature=0, max_tokens=3))
    assert len(run(idle)[1]) == 3
    assert idle.stats().compilations == before


def test_counters_and_gauges(idle):
    before = idle.stats()
    for request_id, length in enumerate((3, 20, 70)):
        idle.add(request_id, list(range(length)), GREEDY)
    queued = idle.stats()
    assert (queued.num_running, queued.num_waiting) == (0, 3)
    idle.step()
    running = idle.stats()
    assert running.num_running > 0 and running.pages_free < running.pages_total
    run(idle)
    after = idle.stats()
    assert (after.num_running, after.num_waiting) == (0, 0)
    assert after.pages_free == after.pages_total == idle.info.num_pages
    cached = after.cached_tokens - before.cached_tokens  # the prompts begin alike
    assert cached >= 16 and cached % idle.info.page_size == 0
    assert after.prompt_tokens - before.prompt_tokens == 93 - cached
    assert after.generation_tokens - before.generation_tokens == 24
    ticks = after.ticks - before.ticks
    assert after.stage_ticks - before.stage_ticks == 4 * ticks > 0
    assert 0 < after.stage_ticks_busy - before.stage_ticks_busy <= 4 * ticks
    # Each token but the last of an answer goes through all stages once.
    used = after.token_slots_used - before.token_slots_used
    assert used == 4 * (93 - cached + 24 - 3) <= after.token_slots - before.token_slots
    assert after.compilations == before.compilations


def test_the_time_of_ticks_and_of_the_host(idle, monkeypatch):
    """With a clock that advances by one second whenever it is read."""
    seconds = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    monkeypatch.setattr("llama_jax.engine.executor.time", clock)
    monkeypatch.setattr(idle.loop, "clock", clock.perf_counter)
    before = idle.stats()
    idle.add(1, [5], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert len(run(idle)[1]) == 3
    after = idle.stats()
    # Three turns of four stages. A step reads the clock at its start and end, around the call of
    # the program, and around the wait for the result, if its packet is not empty.
    assert after.ticks - before.ticks == 12
    assert after.tick_seconds - before.tick_seconds == 12 * 3 + 3 * 2
    assert after.host_seconds - before.host_seconds == 12 * 2 + 3 * 1


def test_an_aborted_request_yields_nothing_more_and_frees_its_pages(idle):
    idle.add(1, [1, 2, 3], SamplingParams(temperature=0, max_tokens=100))
    idle.add(2, [4, 5], GREEDY)
    for _ in range(12):
        idle.step()
    idle.abort(1)
    assert {output for output in run(idle)} == {2}
    assert idle.stats().pages_free == idle.info.num_pages


def test_only_requests_with_the_same_salt_find_what_was_computed(idle):
    cached = []
    for salt in ("one", "two", "one"):
        idle.add(1, list(range(20, 50)), SamplingParams(max_tokens=2, cache_salt=salt))
        cached.append(run(idle)[1][0].cached_tokens)
    assert cached == [0, 0, 24]  # whole pages of 8


def test_the_time_in_the_queue_is_counted_from_the_arrival(idle):
    before = time.perf_counter()
    idle.add(1, [5], SamplingParams(max_tokens=2))
    outputs = run(idle)[1]
    assert all(0 <= o.queue_seconds <= time.perf_counter() - before for o in outputs)


def test_a_request_that_is_aborted_while_it_waits_for_its_grammar_never_runs(idle):
    idle.add(1, [5], SamplingParams(max_tokens=2, grammar="start: /a+/"))
    assert idle.stats().num_waiting == 1
    idle.abort(1)
    assert idle.stats().num_waiting == 0 and not idle.has_work


def test_stop_tokens_end_an_answer(idle, greedy_token):
    stop = SamplingParams(temperature=0, stop_token_ids=(greedy_token,), ignore_eos=True)
    idle.add(1, PROMPT, stop)
    (output,) = run(idle)[1]
    assert (output.token, output.finish_reason) == (greedy_token, "stop")


def test_eos_ends_an_answer_unless_it_is_ignored(idle, greedy_token):
    idle.add(1, PROMPT, SamplingParams(temperature=0, max_tokens=8))
    idle.add(2, PROMPT, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    outputs = run(idle)
    assert [(o.token, o.finish_reason) for o in outputs[1]] == [(greedy_token, "stop")]
    assert len(outputs[2]) == 8 and outputs[2][-1].finish_reason == "length"


def test_a_seed_fixes_the_answer_and_no_seed_does_not(idle):
    def draw(seed) -> list[int]:
        params = SamplingParams(temperature=2.0, max_tokens=20, seed=seed, ignore_eos=True)
        idle.add(1, [1, 2, 3], params)
        return [output.token for output in run(idle)[1]]

    assert draw(7) == draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_the_seed_of_an_engine_fixes_those_of_its_requests():
    one, two, other = seed_source(7), seed_source(7), seed_source(8)
    seeds = [one.getrandbits(64) for _ in range(3)]
    assert seeds == [two.getrandbits(64) for _ in range(3)]
    assert seeds != [other.getrandbits(64) for _ in range(3)]
    assert len(set(seeds)) == 3
    assert seed_source(None).getrandbits(64) != seed_source(None).getrandbits(64)


@pytest.mark.parametrize(
    ("prompt", "stop"), [([1, VOCAB], ()), ([-1], ()), ([1], (VOCAB,)), ([1], (-1,)), ([], ())]
)
def test_a_request_that_the_client_should_have_refused_is_a_defect(idle, prompt, stop):
    with pytest.raises(AssertionError):
        idle.add(1, prompt, SamplingParams(stop_token_ids=stop))
    assert not idle.has_work


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"mesh": "4by2"}, MeshError, "4by2"),
        ({"mesh": "2x8"}, MeshError, "16 devices"),
        ({"mesh": "8x1"}, SizingError, "8 stages"),
        ({"mesh": "1x3"}, ShardingError, "KV heads"),
        ({"dtype": "int8"}, UserError, "int8"),
        ({"page_size": 0}, OptionError, "page_size"),
        ({"max_model_len": 10_000}, SizingError, "max_model_len"),
        ({"gpu_memory_utilization": 0.9}, SizingError, "gpu_memory_utilization"),
        ({"kv_cache_memory": 4000, "max_model_len": 256}, SizingError, "kv_cache_memory"),
        ({"path": "/nowhere/at/all"}, CheckpointError, "/nowhere/at/all"),
    ],
)
def test_options_that_do_not_work(engine, path, changes, error, named):
    steps = []
    with pytest.raises(error, match=named) as caught:
        Engine(dataclasses.replace(options_for(path), **changes), steps.append)
    assert "\n" not in str(caught.value)
    assert not steps, "it began to load"


@pytest.fixture
def no_cache_directory():
    """Makes the engine choose its own directory for compiled programs."""
    for thread in threading.enumerate():
        if thread.name == "compile-programs":  # of an earlier engine, with another setting
            thread.join()
    directory = jax.config.jax_compilation_cache_dir
    for value in (None, directory):
        jax.config.update("jax_compilation_cache_dir", value)
        reset_cache()
        if value is None:
            yield


@pytest.mark.slow
def test_the_second_start_compiles_nothing(tmp_path, monkeypatch, no_cache_directory):
    """However fast a program compiled; by default JAX caches only those that took a second."""
    compile_few(monkeypatch)
    write_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    events = Counter()

    def listen(event, **_):
        events[event.rpartition("/")[2]] += 1

    def start() -> tuple[int, int]:
        jax.clear_caches()  # as in another process
        events.clear()
        path = str(tmp_path / "checkpoint")
        Engine(EngineOptions(path=path, max_num_seqs=1, max_chunk=64, wait_for_programs=True))
        return events["cache_hits"], events["cache_misses"]

    jax.monitoring.register_event_listener(listen)
    try:
        (_, first_misses), (hits, misses) = start(), start()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert list((tmp_path / "llama-jax" / "xla").iterdir())
    assert jax.config.jax_compilation_cache_dir is None  # the setting is restored
    assert first_misses >= 4  # two steps, and the sampler for each
    assert misses == 0 and hits >= first_misses
