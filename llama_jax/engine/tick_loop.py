"""The tick loop: it dispatches ticks, and reads their results some ticks later.

In each `step`, the scheduler chooses the packet that enters, the packet is encoded and dispatched,
and the results that are due are read and passed to the scheduler. The loop waits for a result only
when more results are unread than `results_late` allows.
"""

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from llama_jax.engine.errors import RequestError
from llama_jax.engine.executor import Executor
from llama_jax.engine.interface import (
    PACKET_TOKENS,
    Output,
    ProgramStats,
    StageStats,
    TokenLogprobs,
)
from llama_jax.engine.packets import Packet
from llama_jax.engine.programs import GREEDY, Choice, TickResult
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.tick_timer import TickTimer
from llama_jax.model.adjustments import encode_adjustments
from llama_jax.model.controls import encode_controls
from llama_jax.model.logprobs import Logprobs
from llama_jax.ring.packet import encode_packet
from llama_jax.ring.scoring import TileScores
from llama_jax.ring.sizes import Bucket, RingSizes


class Tick(NamedTuple):
    """A dispatched tick, as passed to the listeners in `TickLoop.on_tick`.

    Attributes:
      number: its index among the ticks of the loop.
      start: the time when its step began, by the clock of the loop.
      seconds: the duration of its step, including the wait for results that were due.
      bucket: the bucket of the program that ran.
      in_flight: the packet at each stage, the last stage first; the last packet entered now.
    """

    number: int
    start: float
    seconds: float
    bucket: Bucket
    in_flight: tuple[Packet, ...]


class TickLoop:
    """Connects a scheduler and an executor, which have the same sizes.

    Args:
      scheduler: chooses packets and processes results.
      executor: runs ticks.
      results_late: ticks that may be dispatched ahead of the oldest unread result.
      clock: returns the time in seconds; by default the real time.
      encode: turns the packet that enters into what the executor takes; by default
        `encode_entering`.

    Attributes:
      on_result: called with each packet that leaves and its result, before the result is read.
      ready: returns the buckets whose programs are compiled, the largest among them; None for all.
      on_tick: functions called at the end of each step that dispatched a tick, in the thread that
        steps.
      ticks: ticks dispatched.
      stage_ticks_busy: over these ticks, the stages that held a packet with tokens.
      token_slots_used: tokens in them, over all stages.
      packet_tokens, packets_by_tokens: as in `Stats`.
      seconds: time spent in `step`.
      wait_seconds: the part spent waiting for results.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        results_late: int,
        *,
        clock: Callable[[], float] | None = None,
        encode: Callable[[RingSizes, Bucket, np.ndarray, Packet], Any] | None = None,
    ):
        self.scheduler, self.executor = scheduler, executor
        self.clock = clock or time.perf_counter
        self._encode = encode or encode_entering
        self.sizes = scheduler.sizes
        self.num_stages = len(scheduler.microbatches)
        chunks = scheduler.prefill.chunks
        self._timer = TickTimer(self.num_stages, chunks.times.observe) if chunks else None
        self.on_result: Callable[[Packet, TickResult], None] = lambda packet, result: None
        self.ready: Callable[[], Collection[Bucket] | None] = lambda: None
        self.on_tick: list[Callable[[Tick], None]] = []
        self.results_late = results_late
        self._in_flight = deque([Packet()] * self.num_stages, maxlen=self.num_stages)
        self._unread: deque[tuple[Packet, TickResult]] = deque()
        self.ticks = self.stage_ticks_busy = self.token_slots_used = self.packet_tokens = 0
        self.packets_by_tokens = [0] * (len(PACKET_TOKENS) + 1)
        self.seconds = self.wait_seconds = 0.0
        self._programs = {b: ProgramStats(*b) for b in self.sizes.buckets()}

    @property
    def has_work(self) -> bool:
        """Whether another `step` has something to do."""
        return self._has_ticks or any(packet for packet, _ in self._unread)

    @property
    def _has_ticks(self) -> bool:
        """Whether another tick has something to do."""
        return self.scheduler.has_work or self._carries_on

    @property
    def _carries_on(self) -> bool:
        """Whether a packet in flight has yet to leave."""
        return any(islice(self._in_flight, 1, None))

    def step(self) -> list[Output]:
        """Dispatches a tick; returns the outputs of the results that are due."""
        start = self.clock()
        outputs: list[Output] = []
        bucket = None
        if self._has_ticks:
            while self._unread and self._lacks_answers():
                outputs += self._read(*self._unread.popleft())
            if self._timer and not (self._unread or self._carries_on):
                self._timer.begin(start)
            entering = self.scheduler.schedule(start)
            for tile in entering.tiles:
                if tile.sequence.queue_seconds is None:
                    tile.sequence.queue_seconds = max(0.0, start - tile.sequence.arrived_at)
            bucket = self._dispatch(entering, outputs)
            late = self.results_late
        else:
            late = 0  # nothing to dispatch: read the remaining results
        while len(self._unread) > late:
            outputs += self._read(*self._unread.popleft())
        seconds = self.clock() - start
        self.seconds += seconds
        if bucket:
            self._programs[bucket] = self._programs[bucket].plus(1, seconds)
        if bucket and self.on_tick:
            tick = Tick(self.ticks - 1, start, seconds, bucket, tuple(self._in_flight))
            for listen in tuple(self.on_tick):  # a listener may be removed meanwhile
                listen(tick)
        return outputs

    @property
    def token_slots(self) -> int:
        """Tokens that the programs had room for, over all stages."""
        return self.num_stages * sum((p.rows + p.chunk) * p.ticks for p in self.program_stats)

    @property
    def host_seconds(self) -> float:
        """Time spent in `step` outside the compiled programs and the wait for their results."""
        return self.seconds - self.executor.call_seconds - self.wait_seconds

    def _lacks_answers(self) -> bool:
        """Whether a mask of the packet that leaves in this step depends on tokens not yet read."""
        if not self.scheduler.num_special:
            return False
        if self.num_stages == 1:  # it has yet to enter
            rows = [(s, s.next_position) for s in self.scheduler.microbatches[0]]
        else:
            leaving = self._in_flight[1].rows
            rows = [(row.sequence, row.position) for row in leaving if row.current]
        return any(
            s.constraint is not None and s.constraint.follows_answer and len(s.tokens) <= position
            for s, position in rows
        )

    @property
    def program_stats(self) -> tuple[ProgramStats, ...]:
        """The ticks and seconds of each program."""
        return tuple(self._programs.values())

    @property
    def stage_stats(self) -> tuple[StageStats, ...]:
        """What the packet at each stage holds."""
        if not self.has_work:  # the last packet has left the last stage
            return (StageStats(0, 0),) * self.num_stages
        return tuple(
            StageStats(len(packet.decoding), sum(tile.length for tile in packet.tiles))
            for packet in reversed(self._in_flight)
        )

    def _dispatch(self, entering: Packet, outputs: list[Output]) -> Bucket:
        """Dispatches a tick; adds the outputs of requests that cannot go on."""
        self._in_flight.append(entering)
        tokens = [packet.num_tokens for packet in self._in_flight]
        if entering:
            self.packet_tokens += tokens[-1]
            self.packets_by_tokens[bisect_left(PACKET_TOKENS, tokens[-1])] += 1
        # The program must fit the largest packet in any stage, not just the one that enters.
        rows = max([len(packet.decoding) for packet in self._in_flight])
        tiles = max([len(packet.tiles) for packet in self._in_flight])
        bucket = self.sizes.bucket(max(rows, 1), tiles * self.sizes.tile, self.ready())
        packed = self._encode(self.sizes, bucket, self.scheduler.page_tables, entering)
        leaving = self._in_flight[0]
        choice = self._choice(leaving, bucket, outputs)
        result = self.executor.run(bucket, packed, choice)
        if leaving.tiles and (scores := self._scores(leaving)):
            result = result._replace(scores=scores)
        self._unread.append((leaving, result))
        if self._timer:
            self._timer.dispatched(bucket, entering)

        self.ticks += 1
        self.stage_ticks_busy += self.num_stages - tokens.count(0)
        self.token_slots_used += sum(tokens)
        return bucket

    def _choice(self, leaving: Packet, bucket: Bucket, outputs: list[Output]) -> Choice:
        """How to choose the tokens of the packet that leaves, in a program of this bucket."""
        if not self.scheduler.num_special:
            return GREEDY
        sampled, adjusted, masks, logprobs = [], [], [], False
        for i, segment in leaving.results(bucket.rows):
            s, params = segment.sequence, segment.sequence.params
            if params.takes_the_likeliest:
                continue
            index = segment.position + segment.length  # of the token that is chosen
            if not params.greedy:
                sampled.append((i, s.seed, index, params))
            early = s.stop_ids if index < s.num_prompt + params.min_tokens else ()
            if s.constraint is not None and segment.current:
                try:
                    masks.append((i, s.constraint.mask(s.tokens, s.num_prompt, early)))
                except RequestError as error:
                    outputs.append(Output.of_error(s.request_id, error))
                    self.scheduler.abort(s.request_id)
                early = ()
            if params.adjusts and segment.current:
                biases = dict(params.logit_bias) | dict.fromkeys(early, -math.inf)
                adjusted.append((i, params, biases))
                if params.penalizes and segment.tokens is not None:
                    known = s.tokens[s.num_prompt : s.prefill_until]
                    self.executor.set_history(segment.slot, s.tokens[: s.num_prompt], known)
            logprobs |= params.logprobs is not None
        if not (sampled or adjusted or masks or logprobs):
            return GREEDY
        n = self.sizes.num_segments(bucket)
        return Choice(
            encode_controls(n, sampled) if sampled else None,
            encode_adjustments(n, adjusted) if adjusted else None,
            masks or None,
            logprobs,
        )

    def _scores(self, left: Packet) -> dict[int, TileScores]:
        """Scores the prompts in the packet that has just left, where that is asked for."""
        scored = [
            (i, t.targets) for i, t in enumerate(left.tiles) if t.sequence.scoring is not None
        ]
        return {i: self.executor.score(i, tokens) for i, tokens in scored if tokens}

    def _read(self, packet: Packet, result: TickResult) -> list[Output]:
        if not packet:
            if self._timer:
                self._timer.passed()
            return []
        self.on_result(packet, result)
        start = self.clock()
        tokens = np.asarray(result.tokens).tolist()
        logprobs = None if result.logprobs is None else _as_lists(result.logprobs)
        scores = [(i, [np.asarray(array) for array in each]) for i, each in result.scores.items()]
        end = self.clock()
        self.wait_seconds += end - start
        if self._timer:
            self._timer.read(end)
        for i, arrays in scores:
            self.scheduler.score(packet.tiles[i], *arrays)
        return self.scheduler.process(packet, tokens, result.bucket.rows, logprobs)


def encode_entering(
    sizes: RingSizes, bucket: Bucket, page_tables: np.ndarray, packet: Packet
) -> np.ndarray:
    """Encodes a packet for the devices: see `ring.packet`."""
    return encode_packet(
        sizes,
        bucket,
        page_tables,
        packet.slots,
        packet.positions,
        [(tile.slot, tile.position, tile.ends, tile.tokens or []) for tile in packet.tiles],
    )


def _as_lists(logprobs: Logprobs) -> list[TokenLogprobs]:
    chosen, ids, values = (np.asarray(array).tolist() for array in logprobs)
    return [
        # -inf marks places past the end of a small vocabulary.
        TokenLogprobs(own, [(i, x) for i, x in zip(*row, strict=True) if x > -math.inf])
        for own, *row in zip(chosen, ids, values, strict=True)
    ]
