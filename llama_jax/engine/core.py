"""The engine: loads a checkpoint onto a mesh, and answers requests tick by tick."""

import os
import random
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain

import jax

from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.load import load_params
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.compilation_cache import compilation_cache
from llama_jax.engine.compile_counter import CompileCounter
from llama_jax.engine.compiling import CompilingRequests
from llama_jax.engine.constraint import Constraint
from llama_jax.engine.decisions import decide
from llama_jax.engine.device_memory import memory_stats
from llama_jax.engine.executor import Executor
from llama_jax.engine.facts import engine_info
from llama_jax.engine.grammars import Grammars, Matcher
from llama_jax.engine.interface import LatencyStats, Output, Progress, Stats
from llama_jax.engine.latency_targets import choose_chunks
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.programs import Programs
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.sizing import (
    GPU_MEMORY_SHARE,
    check_options,
    check_stages,
    choose_results_late,
)
from llama_jax.engine.tick_loop import TickLoop
from llama_jax.engine.warm_up import WarmUp, wait
from llama_jax.model import Llama
from llama_jax.ring.kernel_check import working_backend
from llama_jax.ring.model_class import check_model_class
from llama_jax.ring.sizes import RingSizes
from sharding.mesh_name import parse_mesh


class Engine:
    """A checkpoint on a mesh, ready to generate when the constructor returns.

    Args:
      options: the checkpoint to serve, and how.
      progress: called with each step of loading and compiling.
      model_class: the class whose layers run and whose sampler chooses tokens.

    Attributes:
      loop: the tick loop, with its scheduler and executor.
      info: facts about the engine.

    Raises:
      UserError: the checkpoint, the mesh or an option does not work; one sentence says why.
    """

    def __init__(
        self,
        options: EngineOptions,
        progress: Callable[[Progress], None] = lambda progress: None,
        model_class: type[Llama] = Llama,
    ):
        start = time.perf_counter()
        with closing(open_checkpoint(options.path)) as reader, ExitStack() as stack:
            if options.strict_config:  # the process that the user sees has warned already
                reader.declared.report_unknown(strict=True)
            check_model_class(model_class, reader.config)
            check_options(options, reader.config)
            check_stages(parse_mesh(options.mesh)[0], reader.config)
            configure_jax(options.gpu_memory_utilization)
            decided = decide(options, reader.config, model_class)
            sizes, num_stages = decided.sizes, decided.num_stages
            stack.enter_context(compilation_cache())
            backend = working_backend(
                options.attention_backend, decided.config, decided.mesh, sizes, decided.dtype,
                decided.cache_dtype, decided.model_class,
            )  # fmt: skip
            self.compilations = CompileCounter()
            programs = Programs(
                decided.config, decided.mesh, sizes, decided.dtype, decided.model_class,
                decided.cache_dtype, backend,
            )  # fmt: skip
            self.warm_up = WarmUp(programs)  # compiles while the weights are loaded, and after that
            stop_on_error = stack.enter_context(ExitStack())
            stop_on_error.callback(self.warm_up.stop)
            params = load_params(
                reader,
                decided.mesh,
                decided.dtype,
                lambda done, total: progress(Progress("loading", done, total)),
            )
            jax.block_until_ready(params)
            loaded = time.perf_counter()
            executor = Executor(programs, params)
            self._compile(sizes, options.wait_for_programs, progress)
            executor.run_empty(sizes.largest())
            chunks = choose_chunks(options, sizes, decided.platform, decided.tick_model)
            if chunks.has_targets:  # the first ticks are then not guessed
                executor.time_empty(chunks.times)
            stop_on_error.pop_all()
        weakref.finalize(self, self.warm_up.stop).atexit = False
        vocab_size, stop_ids = decided.config.vocab_size, decided.config.eos_token_ids
        scheduler = Scheduler(
            sizes,
            num_stages,
            prefix_caching=options.prefix_caching,
            chunks=chunks,
            vocab_size=vocab_size,
        )
        late = choose_results_late(options, decided.platform)
        self.loop = TickLoop(scheduler, executor, late)
        warm_up = self.warm_up  # not this object: without a cycle, memory is freed at once
        self.loop.ready = lambda: warm_up.ready
        self._stop_ids = frozenset(stop_ids)
        self._seeds = seed_source(options.seed)
        self._grammars = Grammars(options.path, vocab_size, stop_ids)
        self._compiling = CompilingRequests(self.warm_up.every_request)
        # Not before: it would delay the start, and it is the least likely thing to be needed.
        self.warm_up.every_request.add_done_callback(partial(_load_if_done, self._grammars))
        executor.call_seconds = 0.0  # without the first runs

        self._devices = decided.mesh.devices.flatten().tolist()
        seconds = loaded - start, time.perf_counter() - loaded
        self.info = engine_info(options, decided, executor, len(self.warm_up.ready), *seconds)

    def _compile(
        self, sizes: RingSizes, everything: bool, progress: Callable[[Progress], None]
    ) -> None:
        """Waits until an engine can begin: for the largest programs, or for all."""
        total = len(sizes.buckets() if everything else sizes.largest())

        def report() -> None:
            done = min(len(self.warm_up.ready), total)
            progress(Progress("compiling", done, total))

        wait(self.warm_up.every_program if everything else self.warm_up.largest, report)
        report()

    def add(self, request_id: int, prompt: list[int], params: SamplingParams) -> None:
        """Queues a request that `client.request_check.check_request` accepts."""
        # JAX would clamp a token id that is out of range, and answer another request.
        vocab_size = self.info.vocab_size
        named = chain.from_iterable(params.token_ids().values())
        assert all(0 <= token < vocab_size for token in chain(prompt, named))
        queue = partial(
            self.loop.scheduler.add,
            request_id,
            prompt,
            params,
            max_model_len=self.info.max_model_len,
            seed=self._seeds.getrandbits(64) if params.seed in (None, -1) else params.seed,
            stop_ids=frozenset(params.stop_token_ids)
            # What follows a complete grammar is EOS, even for those who ignore it elsewhere.
            | (frozenset() if params.ignore_eos and not params.grammar else self._stop_ids),
            salt=params.cache_salt.encode(),
            arrived_at=time.perf_counter(),
        )

        def queue_with(matcher: Matcher | None) -> None:
            constraint = Constraint(params, vocab_size, matcher) if params.constrains else None
            queue(constraint=constraint)

        if params.grammar:
            self._compiling.add(request_id, queue_with, self._grammars.compile(params.grammar))
        elif _is_plain(params) or self._compiling.has_programs:
            queue_with(None)
        else:
            self._compiling.add(request_id, queue_with)

    def abort(self, request_id: int) -> None:
        """Drops a request and frees its pages; no further output comes for it."""
        self._compiling.abort(request_id)
        self.loop.scheduler.abort(request_id)

    def step(self) -> list[Output]:
        """Runs one tick of the ring; returns the outputs that are due, of earlier ticks."""
        if self._compiling and not self.loop.has_work:
            self._compiling.wait()
        return self._compiling.queue_ready() + self.loop.step()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._compiling) or self.loop.has_work

    def stats(self) -> Stats:
        """Counters since the engine was ready (`compilations`: since its start), and gauges."""
        loop, scheduler = self.loop, self.loop.scheduler
        return Stats(
            num_running=scheduler.num_running,
            num_waiting=len(scheduler.waiting) + len(self._compiling),
            pages_total=scheduler.pool.num_pages,
            pages_free=scheduler.pool.num_free,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            generation_tokens=scheduler.num_generated_tokens,
            preemptions=scheduler.num_preemptions,
            request_preemptions=scheduler.request_preemptions,
            requests_by_preemptions=tuple(scheduler.requests_by_preemptions),
            ticks=loop.ticks,
            stage_ticks=loop.ticks * loop.num_stages,
            stage_ticks_busy=loop.stage_ticks_busy,
            token_slots=loop.token_slots,
            token_slots_used=loop.token_slots_used,
            packet_tokens=loop.packet_tokens,
            packets_by_tokens=tuple(loop.packets_by_tokens),
            compilations=self.compilations.count + self.warm_up.compilations,
            programs_ready=len(self.warm_up.ready),
            tick_seconds=loop.seconds,
            host_seconds=loop.host_seconds,
            wait_reason=scheduler.prefill.wait_reason(),
            queue_tokens=scheduler.num_queued_tokens,
            pages_cached=scheduler.pool.num_cached,
            programs=loop.program_stats,
            stages=loop.stage_stats,
            memory=memory_stats(self._devices),
            latency=self._latency(),
        )

    def _latency(self) -> LatencyStats:
        prefill = self.loop.scheduler.prefill
        assert prefill.chunks is not None
        return LatencyStats(
            tpot=prefill.chunks.tpot,
            ttft=prefill.chunks.ttft,
            chunk_limit=prefill.chunk_limit,
            ticks=prefill.chunks.times.table(),
            most_running=prefill.most_running,
        )


def _load_if_done(grammars: Grammars, programs: "Future[None]") -> None:
    if programs.exception() is None:
        grammars.load()


def _is_plain(params: SamplingParams) -> bool:
    """Whether a request needs no program but those of `Programs.plain_choices`."""
    scored = params.logprobs is not None or params.prompt_logprobs is not None
    return not (params.adjusts or params.constrains or scored)


def seed_source(seed: int | None) -> random.Random:
    """Returns the source of the seeds of requests that have none: repeatable, or random if None."""
    return random.SystemRandom() if seed is None else random.Random(seed)


def configure_jax(gpu_memory_utilization: float | None = None) -> None:
    """Configures JAX for the whole process; call it before JAX initializes its devices.

    Args:
      gpu_memory_utilization: the fraction of each GPU's memory that JAX takes when it starts; None
        for what the user's environment says, or `GPU_MEMORY_SHARE`.
    """
    # Several unfinished programs with collectives starve XLA:CPU's threads and hang it.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if gpu_memory_utilization is not None:
        os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the older name, which wins
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(gpu_memory_utilization)
    elif "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_MEMORY_SHARE))
