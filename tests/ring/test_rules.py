"""The rules of the ring. Most tests break one, to prove that breaking it is noticed.

   1  Order        every packet visits the stages in the same order; pages are free once the last
                   packet that refers to them has entered
   2  Snapshot     a packet keeps the metadata that it entered with
   3  Metadata     is replicated; stage s reads that of the packet at stage s
   4  Program      fits the largest packet at any stage, not only the entering one
   5  Chunks       enter in consecutive ticks; a microbatch takes no more than its share
   6  Records      match results to the request and epoch of their packet
   7  Lengths      nothing is dispatched beyond a limit; tokens after a stop are dropped
   8  Nowhere      is an index past the pool
   9  Garbage      is masked in the values as well as in the scores
  10  No branch    the cache never passes through one
  12  Empty        packets change nothing
  13  Size 1       an axis of size 1 issues no collective (in test_compiled_program.py)
  14  Padding      layers are the identity

A broken rule gives wrong answers in silence. So a crowded scenario (pages that run out, prompts of
several chunks, results read late, slots and pages used again) runs unchanged, where every token
must be the best one by transformers, and with a rule broken, where at least one must not be.
"""

import dataclasses
from functools import partial
from types import MethodType

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.executor import Executor
from llama_jax.engine.programs import Choice
from llama_jax.engine.scheduler import Scheduler
from llama_jax.model.adjustments import encode_adjustments
from llama_jax.model.controls import encode_controls
from llama_jax.ring import kv_cache, steps
from llama_jax.ring.packet import PAGES, SLOT, encode_packet
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.stage import make_layer
from llama_jax.ring.static_args import StaticArgs
from sharding.mesh import make_mesh
from sharding.ring import RingState, ring_tick
from tests.support.reference import (
    drive,
    make_loop,
    make_model,
    reference_logits,
    restart,
    save_model,
)

VOCAB = 64
MESH = "4x1"


@pytest.fixture(scope="module")
def model():
    sizes = dict(embed_dim=32, mlp_dim=48, num_layers=4, num_heads=4, num_kv_heads=2)
    return make_model(vocab_size=VOCAB, **sizes)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return save_model(model, tmp_path_factory.mktemp("rules"))


def new_loop(path, **options):
    """Eight slots, and pages for two of the longest sequences."""
    sizes = dict(max_num_seqs=8, max_chunk=128, page_size=4, num_pages=80)
    return make_loop(path, MESH, **sizes, **options)


@pytest.fixture(scope="module")
def compiled(path):
    return new_loop(path)


@pytest.fixture
def loop(compiled):
    """An empty ring, with the programs of the others."""
    return restart(compiled, 5)


def crowd():
    rng = np.random.default_rng(7)
    lengths = (150, 3, 70, 90, 10, 40, 130, 5, 64, 20, 9, 33)
    return [
        (
            number,
            2 * number,
            rng.integers(0, VOCAB, length).tolist(),
            SamplingParams(temperature=0, max_tokens=6 + 5 * (number % 4)),
        )
        for number, length in enumerate(lengths)
    ]


def faults(model, loop, requests=None):
    """Requests that end early, or with a token that is not the best one by transformers."""
    requests = requests or crowd()
    try:
        run = drive(loop, requests, keep_logits=False)
    except (AssertionError, IndexError) as error:
        return [repr(error)]
    found = []
    for number, _, prompt, params in requests:
        tokens = run.tokens[number]
        if len(tokens) != params.max_tokens:
            found.append(f"request {number} has {len(tokens)} of {params.max_tokens} tokens")
            continue
        logits = reference_logits(model, prompt + tokens)[len(prompt) - 1 : -1]
        behind = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
        if (behind > 1e-3).any():
            found.append(f"request {number} goes wrong at token {np.argmax(behind > 1e-3)}")
    return found


def test_the_crowded_scenario_goes_right(model, loop):
    buckets, run = set(), loop.executor.run

    def run_and_note(bucket, *rest):
        buckets.add(bucket)
        return run(bucket, *rest)

    loop.executor.run = run_and_note
    assert not faults(model, loop)
    del loop.executor.run
    assert loop.scheduler.num_preemptions >= 2
    assert {bucket.chunk for bucket in buckets} == set(loop.sizes.chunk_buckets)


# --- 1: order ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mesh", ["4x1", *(pytest.param(m, marks=pytest.mark.slow) for m in ("1x1", "2x1", "2x2"))]
)
def test_packets_visit_the_stages_in_order_with_what_they_entered_with(mesh):
    """Rules 1 to 3, on the bare ring: stage s sees packet t in tick t + s, with the metadata that
    the packet entered with."""
    mesh = make_mesh(mesh)
    num_stages, num_ticks = mesh.shape["stage"], 11

    def tick(state, entering, cache):
        def run_stage(x, metadata, cache):
            now, seen = cache
            seen = seen.at[0, now].set(jnp.concatenate([x[0, :1], metadata]))
            history = x[:, 1:] * 10 + lax.axis_index("stage") + 1
            return jnp.concatenate([x[:, :1], history], axis=1), (now + 1, seen)

        return ring_tick(
            state,
            entering,
            (1, 1),
            cache,
            enter=lambda entering: jnp.stack([entering, entering]) * jnp.array([1, 0]),
            run_stage=run_stage,
            select=lambda x, metadata: jnp.concatenate([x[0], metadata]),
        )

    ring = RingState(P(), P(), (P("stage"), P("stage")))
    cache = (P(), P("stage"))
    step = jax.jit(
        jax.shard_map(
            tick,
            mesh=mesh,
            in_specs=(ring, P(), cache),
            out_specs=(ring, cache, P(), P()),
            check_vma=False,
        )
    )
    part = jnp.full((num_stages, 3, 2), -1)  # of which a tick uses the first row
    state = RingState(jnp.int32(0), jnp.full((num_stages, 2), -1), (part, part))
    cache = (jnp.int32(0), jnp.zeros((num_stages, num_ticks, 3), jnp.int32))
    for t in range(num_ticks):
        entering = jnp.array([100 + t, 100 + t])
        state, cache, left, metadata = step(state, entering, cache)
        number = 100 + t - (num_stages - 1)
        if number >= 100:
            history = int("1234"[:num_stages])  # every stage once, in order
            assert left.tolist() == [number, history, number, number]
            assert metadata.tolist() == [number, number]
    seen = np.asarray(cache[1])
    for stage in range(num_stages):
        for t in range(stage, num_ticks):
            assert seen[stage, t].tolist() == [100 + t - stage] * 3


def test_pages_are_freed_too_early(model, loop, monkeypatch):
    """Rule 1, broken: pages are freed before the last packet that refers to them has entered."""

    def too_early(self, packet, microbatch, *arguments):
        for sequence in [s for s in microbatch if s.fully_sent]:
            self._roster.release(sequence)
        fill(self, packet, microbatch, *arguments)

    fill = type(loop.scheduler.prefill).fill
    monkeypatch.setattr("llama_jax.engine.prefill.Prefill.fill", too_early)
    assert faults(model, loop)


# --- 2: snapshot ---------------------------------------------------------------------------------


def test_stages_read_current_page_tables(model, loop, monkeypatch):
    """Rule 2, broken: stages read the current page table of a slot."""
    run = Executor.run

    def with_tables_of_now(self, *arguments):
        metadata = np.array(self.state.ring.metadata)
        owned = metadata[..., SLOT] < self.sizes.num_slots
        metadata[owned, PAGES:] = loop.scheduler.page_tables[metadata[owned, SLOT]]
        metadata = jax.device_put(metadata, self.state.ring.metadata.sharding)
        state = self.state._replace(ring=self.state.ring._replace(metadata=metadata))
        self._arrays = self._arrays._replace(state=state)
        return run(self, *arguments)

    monkeypatch.setattr(Executor, "run", with_tables_of_now)
    assert faults(model, loop)


def test_a_packet_is_a_copy():
    """Rule 2: the host may change its tables as soon as the packet is encoded."""
    sizes = small_sizes()
    tables = np.arange(sizes.num_slots * 8, dtype=np.int32).reshape(-1, 8)
    packed = encode_packet(sizes, Bucket(2, 4), tables, [1], [5], [(2, 0, True, [7, 8])])
    before = packed.copy()
    tables[:] = -7
    np.testing.assert_array_equal(packed, before)


# --- 4: program ----------------------------------------------------------------------------------


def test_the_program_fits_the_entering_packet_only(model, loop):
    """Rule 4, broken: the program fits the entering packet, but not those at the other stages."""

    class ByEntering(RingSizes):
        def bucket(self, rows, chunk, ready):
            entering = loop._in_flight[-1]
            return super().bucket(max(len(entering.rows), 1), len(entering.tiles) * self.tile)

    fields = {f.name: getattr(loop.sizes, f.name) for f in dataclasses.fields(RingSizes)}
    loop.sizes = ByEntering(**fields)
    assert faults(model, loop)


# --- 5: chunks -----------------------------------------------------------------------------------


def small_sizes(**changes):
    sizes = dict(
        num_slots=16, num_pages=64, page_size=4, pages_per_sequence=8, row_buckets=(8,),
        chunk_buckets=(0, 16), tile=4,
    )  # fmt: skip
    return RingSizes(**(sizes | changes))


def add(scheduler, request_id, length, max_tokens=8):
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    prompt = [1] * length
    scheduler.add(request_id, prompt, params, max_model_len=32, seed=0, stop_ids=frozenset())


def test_chunks_enter_in_consecutive_ticks():
    scheduler = Scheduler(small_sizes(chunk_buckets=(0, 4)), 4)
    add(scheduler, 0, 18)
    lengths = [[tile.length for tile in scheduler.schedule().tiles] for _ in range(6)]
    assert lengths == [[4], [4], [4], [4], [2], []]
    assert [len(microbatch) for microbatch in scheduler.microbatches] == [1, 0, 0, 0]


@pytest.mark.parametrize("fair", [True, False])
def test_a_burst_spreads_over_the_microbatches(fair, monkeypatch):
    """Rule 5, and the same rule broken: a sequence takes any free row."""
    if not fair:
        monkeypatch.setattr("llama_jax.engine.prefill.Prefill._rows_to_share", lambda self: 8)
    scheduler = Scheduler(small_sizes(chunk_buckets=(0, 32)), 4)
    for request_id in range(8):
        add(scheduler, request_id, 3)
    for _ in range(8):
        scheduler.schedule()
    loads = [len(microbatch) for microbatch in scheduler.microbatches]
    assert loads == ([2, 2, 2, 2] if fair else [8, 0, 0, 0])


# --- 6: records ----------------------------------------------------------------------------------


def take(scheduler, results):
    """Gives each sequence its token."""
    for s, token in results:
        s.tokens.append(token)
        yield scheduler._look(s, token)


def by_slot(self, packet, tokens, bucket_rows, logprobs):
    """Gives a result to the current owner of its slot."""
    owners, results = {s.slot: s for s in self._sequences.values()}, packet.results(bucket_rows)
    return list(take(self, [(owners[s.slot], tokens[i]) for i, s in results if s.slot in owners]))


def without_epochs(self, packet, tokens, bucket_rows, logprobs):
    """Gives a result to its sequence, even if that was preempted in the meantime."""
    results = [(s.sequence, tokens[i]) for i, s in packet.results(bucket_rows)]
    return list(take(self, [each for each in results if each[0].request_id in self._sequences]))


@pytest.mark.parametrize("process", [Scheduler.process, by_slot, without_epochs])
def test_results_are_matched_through_the_record_of_their_packet(process, model, loop):
    """Rule 6, and two ways to break it: a sequence enters again before its results arrive."""
    scheduler, schedule = loop.scheduler, loop.scheduler.schedule

    def schedule_after_preempting(now):
        if loop.ticks in (20, 40):
            scheduler.roster.preempt(max(scheduler.roster.live, key=lambda s: s.arrival))
        return schedule(now)

    scheduler.schedule = schedule_after_preempting
    scheduler.process = MethodType(process, scheduler)
    requests = [request for request in crowd() if len(request[2]) < 50]
    assert bool(faults(model, loop, requests)) == (process is not Scheduler.process)
    assert scheduler.num_preemptions >= 2


# --- 7: lengths ----------------------------------------------------------------------------------


LATE = [0, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 5))]


@pytest.mark.parametrize("results_late", LATE)
def test_no_packet_passes_the_limit_and_no_token_a_stop(model, compiled, results_late):
    loop = restart(compiled, results_late)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6], [5] * 70]
    tokens = drive(loop, requests_for(prompts, 9), keep_logits=False).tokens
    stop = tokens[0][4]

    loop = restart(compiled, results_late)
    packets, schedule = [], loop.scheduler.schedule
    loop.scheduler.schedule = lambda now: packets.append(schedule(now)) or packets[-1]
    run = drive(loop, requests_for(prompts, 9), stop_ids=frozenset({stop}), keep_logits=False)
    for number, prompt in enumerate(prompts):
        full = tokens[number]
        until = full.index(stop) + 1 if stop in full else len(full)
        assert run.tokens[number] == full[:until]
        assert run.reasons[number] == ("stop" if stop in full else "length")
        rows = [r for p in packets for r in p.rows if r.sequence.request_id == number]
        last = len(prompt) + len(full) - 2  # the token after it is the last one allowed
        assert max(row.position for row in rows) <= last
    assert loop.scheduler.pool.num_free == loop.sizes.num_pages


def requests_for(prompts, max_tokens):
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return [(number, 0, prompt, params) for number, prompt in enumerate(prompts)]


# --- 8: nowhere ----------------------------------------------------------------------------------


def test_writes_to_nowhere_are_dropped():
    pages = jnp.arange(2 * 3 * 4 * 5, dtype=jnp.float32).reshape(2, 3, 4, 5)
    new = jnp.full((2, 2, 5), jnp.nan)
    written = kv_cache.write(pages, new, jnp.array([3, 3]), jnp.array([0, 3]))
    np.testing.assert_array_equal(written, pages)


@pytest.mark.parametrize("nowhere", [-1, pytest.param(0, marks=pytest.mark.slow)])
def test_nowhere_is_a_page_of_the_pool(nowhere, path, model, monkeypatch):
    """Rule 8, broken: 0 is the first page of the pool and -1, as an index in JAX, the last."""
    write = kv_cache.write

    def write_somewhere(pages, new, page, offset):
        return write(pages, new, jnp.where(page >= pages.shape[1], nowhere, page), offset)

    monkeypatch.setattr(kv_cache, "write", write_somewhere)
    assert faults(model, new_loop(path, largest_only=True))


# --- 9: garbage ----------------------------------------------------------------------------------


def plain_attention(q, k_pages, v_pages, page_table, positions, lengths, *_, mask_values, **blocks):
    """Paged attention in its simplest form, at any cost."""
    batch, _, num_heads, head_dim = q.shape

    def gathered(pages):
        keys = pages.at[:, page_table].get(mode="clip").transpose(1, 2, 3, 0, 4)
        keys = keys.reshape(batch, -1, pages.shape[0], head_dim)
        return jnp.repeat(keys, num_heads // pages.shape[0], axis=2)  # [B, S, H, h]

    keys, values = gathered(k_pages), gathered(v_pages)
    where = jnp.arange(keys.shape[1])
    seen = (where <= positions[..., None]) & (where < lengths[:, None, None])  # [B, T, S]
    scores = jnp.einsum("BTHh,BSHh->BHTS", q, keys) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
    if mask_values:
        values = jnp.where((where < lengths[:, None])[..., None, None], values, 0)
    return jnp.einsum("BHTS,BSHh->BTHh", weights, values)


@pytest.mark.parametrize("mask_values", [True, False])
def test_garbage_in_pages_is_masked(mask_values, path, model, monkeypatch):
    """Rule 9: it is not enough to mask the scores, since 0 x NaN is NaN."""
    attention = partial(plain_attention, mask_values=mask_values)
    monkeypatch.setattr("llama_jax.ring.stage.paged_attention", attention)
    assert bool(faults(model, new_loop(path, largest_only=True))) == (not mask_values)


# --- 10: no branch -------------------------------------------------------------------------------


def branches(jaxpr, shape):
    """All branches, at any depth, that an array of this shape passes through."""
    found = []
    for equation in jaxpr.eqns:
        arrays = [v.aval for v in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "cond" and any(a.shape == shape for a in arrays):
            found.append(equation)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += branches(inner, shape)
    return found


@pytest.mark.parametrize("branching", [False, True])
@pytest.mark.parametrize("chunk", [0, 64])
def test_the_cache_passes_through_no_branch(chunk, branching, compiled, monkeypatch):
    """Rule 10, and the same rule broken."""
    if branching:
        write = kv_cache.write

        def maybe_write(pages, new, page, offset):
            return lax.cond(page[0] >= 0, write, lambda pages, *_: pages, pages, new, page, offset)

        monkeypatch.setattr(kv_cache, "write", maybe_write)
    step, arguments = step_and_shapes(compiled, Bucket(2, chunk))
    pages = compiled.executor.state.cache.keys[0].sharding.shard_shape(
        compiled.executor.state.cache.keys[0].shape
    )
    closed = step._jitted.trace(*arguments).jaxpr  # a program is not called inside a trace
    assert bool(branches(closed.jaxpr, pages[1:])) == branching


def step_and_shapes(loop, bucket):
    """A step that was never traced, and the shapes of its arguments."""
    executor, sizes = loop.executor, loop.sizes
    make = (executor.config, executor.mesh, sizes, bucket.rows)
    step = steps.prefill_step(*make, bucket.chunk) if bucket.chunk else steps.decode_step(*make)
    state = steps.state_shapes(executor.config, executor.mesh, sizes, jnp.float32)
    packed = encode_packet(sizes, bucket, np.zeros((sizes.num_slots, 1), np.int32), [], [], [])
    return step, (executor.params, state, packed)


# --- 12: empty packets ---------------------------------------------------------------------------


def test_empty_packets_change_nothing(loop):
    """Rule 12, bit for bit: neither the cache nor any slot's token."""
    drive(loop, crowd(), keep_logits=False)
    executor = loop.executor
    before = jax.tree.map(lambda a: np.array(a).view(np.int32), executor.state[1:])
    tables = np.zeros((loop.sizes.num_slots, loop.sizes.pages_per_sequence), np.int32)
    for bucket in loop.sizes.buckets() * loop.num_stages:
        n = loop.sizes.num_segments(bucket)
        packed = encode_packet(loop.sizes, bucket, tables, [], [], [])
        executor.run(bucket, packed)
        if bucket in loop.sizes.largest():  # each of these programs compiles for each bucket
            choice = Choice(encode_controls(n, []), encode_adjustments(n, []), logprobs=True)
            executor.run(bucket, packed, choice)
    after = jax.tree.map(lambda a: np.array(a).view(np.int32), executor.state[1:])
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert len(jax.tree.leaves(before)) == 1 + 2  # tokens, and keys and values of one layer


# --- 14: padding layers --------------------------------------------------------------------------


def test_padding_layers_are_the_identity(tmp_path):
    """Rule 14: with five layers on four stages, the last three stages have a padding layer."""
    model = make_model(vocab_size=VOCAB, embed_dim=32, num_layers=5, num_heads=4, num_kv_heads=2)
    loop = make_loop(save_model(model, tmp_path), MESH, max_num_seqs=4, page_size=4, num_pages=80)
    static = StaticArgs(loop.executor.config, loop.sizes, Bucket(1, 0))
    x = jax.random.normal(jax.random.key(0), (3, static.config.embed_dim))

    def attend(q, k, v, *, score_mod, tap):
        return q + 1.0

    run = jax.jit(lambda weights, x: make_layer(static, weights)(x, jnp.arange(3), attend))
    for position, weights in enumerate(loop.executor.params.layers):
        for stage in range(4):
            here = {name: jnp.asarray(np.asarray(a)[stage]) for name, a in weights.items()}
            y = run(here, x)
            pads = position == 1 and stage > 0
            assert np.array_equal(x, y) == pads
