"""Runs a load through an engine, and what becomes of it when the engine dies."""

import gc
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from llama_jax.engine.interface import Output, ProgramStats
from llama_jax.plan.simulation.engine import Attempt, Engine, Open
from llama_jax.plan.simulation.load import Load, Request
from llama_jax.plan.simulation.server import Server
from llama_jax.plan.simulation.simulated import Moment, Outcome, Sample, Simulated

MOMENT_SECONDS = 1.0


class Outage(NamedTuple):
    """The death of an engine, as when a GPU fails, and its restart.

    Attributes:
      at: when it dies, in seconds from the start.
      seconds: until it answers again.
      retry: whether clients send again what failed or was refused meanwhile, once it answers.
    """

    at: float
    seconds: float
    retry: bool


@dataclass
class Totals:
    """Counters of engines that have died."""

    ticks: int = 0
    stage_ticks_busy: int = 0
    token_slots: int = 0
    token_slots_used: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


@dataclass
class Simulation:
    """Runs a load through one engine.

    Args:
      server: what is simulated.
      load: what it is asked.
      outage: when its engine dies, if it does.
      goes_on: called with each request that has ended; the simulation stops when it returns False.
    """

    server: Server
    load: Load
    outage: Outage | None = None
    goes_on: Callable[[Sample], bool] = lambda sample: True
    samples: list[tuple[int, Sample]] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = Engine(self.server)
        self._totals = Totals()
        self._communication = self._page_seconds = self._last = 0.0
        self._programs = {b: ProgramStats(*b) for b in self.server.sizes.buckets()}
        self._coming: list[Attempt] = []
        self._leaving: list[tuple[float, int]] = []  # when a client loses patience
        self._numbers = count()
        self._next_look = 0.0
        self._stopped = False
        requests = iter(self.load.requests)
        self._next = requests
        if self.load.users is None:
            for request in requests:
                self._come(request, request.at)
        else:
            for _ in range(self.load.users):
                self._user_asks(0.0)

    def run(self) -> Simulated:
        """Runs everything to its end."""
        collects = gc.isenabled()
        gc.disable()  # it would look at every sample again and again, and find nothing
        try:
            self._run()
        finally:
            if collects:
                gc.enable()
        return self._simulated()

    def _run(self) -> None:
        pending, coming, leaving = self.outage, self._coming, self._leaving
        while not self._stopped:
            engine, clock = self.engine, self.engine.clock
            if pending and clock.now >= pending.at:
                self._die(pending)
                pending = None
                continue
            if not engine.open and not engine.loop.has_work:
                if not coming:
                    break
                ahead = coming[0].at
                if pending and pending.at <= ahead:
                    clock.now = max(clock.now, pending.at)
                    continue
                clock.now = max(clock.now, ahead)
            if coming and coming[0].at <= clock.now:
                self._arrive(clock.now)
            if leaving and leaving[0][0] <= clock.now:
                self._leave(clock.now)
            self._step(engine)

    def _come(self, request: Request, at: float) -> None:
        attempt = Attempt(at + self.server.front_seconds, next(self._numbers), request, at)
        if request.since is not None:
            attempt = attempt._replace(since=request.since, attempts=2)
        heapq.heappush(self._coming, attempt)

    def _user_asks(self, at: float) -> None:
        request = next(self._next, None) if at < self.load.until else None
        if request is not None:
            self._come(request, at)

    def _arrive(self, now: float) -> None:
        while self._coming and self._coming[0].at <= now:
            attempt = heapq.heappop(self._coming)
            if not self.engine.add(attempt):
                self._close(attempt, "rejected", max(now, attempt.at))
            elif attempt.request.patience < float("inf"):
                due = attempt.since + attempt.request.patience
                heapq.heappush(self._leaving, (due, attempt.number))

    def _leave(self, now: float) -> None:
        while self._leaving and self._leaving[0][0] <= now:
            _, number = heapq.heappop(self._leaving)
            if number in self.engine.open:
                self._end(self.engine, number, "gone", now)

    def _step(self, engine: Engine) -> None:
        clock, begun = engine.clock, engine.begun
        before, held = clock.now, engine.pages_held
        outputs = engine.loop.step()
        now = clock.now
        self._page_seconds += (now - before) * held
        if now >= self._next_look:
            self._look(engine, now, held)
        for output in outputs:
            if output.finish_reason is None and output.request_id in begun:
                continue  # as almost all
            if output.request_id not in begun:
                begun.add(output.request_id)
                self._first(engine.open[output.request_id], output, now)
            if output.finish_reason is not None:
                self._end(engine, output.request_id, "completed", now)

    def _look(self, engine: Engine, now: float, held: int) -> None:
        scheduler = engine.loop.scheduler
        self.moments.append(Moment(now, scheduler.num_running, len(scheduler.waiting), held))
        self._next_look = now + MOMENT_SECONDS

    def _first(self, state: Open, output: Output, now: float) -> None:
        state.first = now
        state.queued, state.cached = output.queue_seconds, output.cached_tokens
        state.ticket.begun()

    def _end(self, engine: Engine, number: int, outcome: Outcome, now: float) -> None:
        state, tokens = engine.open[number], engine.num_answered(number)
        engine.remove(number)
        self._close(state.attempt, outcome, now, state, tokens)

    def _close(
        self,
        attempt: Attempt,
        outcome: Outcome,
        now: float,
        state: Open | None = None,
        tokens: int = 0,
    ) -> None:
        request = attempt.request
        waited = attempt.at - attempt.since
        queued = None if state is None or state.queued is None else waited + state.queued
        sample = Sample(
            at=attempt.since,
            queued=queued,
            first=state.first if state else None,
            last=now,
            prompt_tokens=request.prompt_tokens,
            output_tokens=tokens,
            cached_tokens=state.cached if state else 0,
            outcome=outcome,
            attempts=attempt.attempts,
        )
        self.samples.append((attempt.number, sample))
        self._stopped |= not self.goes_on(sample)
        if self.load.users is not None:
            self._user_asks(now + self.load.think)

    def _die(self, outage: Outage) -> None:
        """Loses all that the engine holds, and starts another."""
        back = outage.at + outage.seconds
        dead = self.engine
        now = dead.clock.now
        lost = sorted(dead.open.items())
        meanwhile: list[Attempt] = []
        while self._coming and self._coming[0].at < back:
            meanwhile.append(heapq.heappop(self._coming))
        self._count(dead)
        self.engine = Engine(self.server, back)
        for number, state in lost:
            if outage.retry:
                meanwhile.append(state.attempt)
            else:
                self._close(state.attempt, "failed", now, state, dead.num_answered(number))
        for attempt in meanwhile:
            if outage.retry:
                again = attempt._replace(at=back, attempts=attempt.attempts + 1)
                heapq.heappush(self._coming, again)
            else:
                self._close(attempt, "failed", attempt.at)

    def _count(self, engine: Engine) -> None:
        """Adds the counters of an engine to those before."""
        totals, loop, clock = self._totals, engine.loop, engine.clock
        totals.ticks += loop.ticks
        totals.stage_ticks_busy += loop.stage_ticks_busy
        totals.token_slots += loop.token_slots
        totals.token_slots_used += loop.token_slots_used
        totals.prompt_tokens += loop.scheduler.num_prompt_tokens
        totals.cached_tokens += loop.scheduler.num_cached_tokens
        totals.generated_tokens += loop.scheduler.num_generated_tokens
        totals.preemptions += loop.scheduler.num_preemptions
        self._communication += clock.communication_seconds
        for bucket, ran in clock.programs.items():
            self._programs[bucket] = self._programs[bucket].plus(ran.ticks, ran.seconds)

    def _simulated(self) -> Simulated:
        self._count(self.engine)
        totals = self._totals
        samples = [sample for _, sample in sorted(self.samples, key=lambda s: (s[1].at, s[0]))]
        return Simulated(
            samples=tuple(samples),
            replicas=1,
            seconds=max((sample.last for sample in samples), default=0.0),
            num_stages=self.server.num_stages,
            busy_seconds=sum(program.seconds for program in self._programs.values()),
            communication_seconds=self._communication,
            pages=self.server.sizes.num_pages,
            page_seconds=self._page_seconds,
            programs=tuple(self._programs.values()),
            moments=tuple(self.moments),
            down_seconds=self.outage.seconds if self.outage else 0.0,
            **vars(totals),
        )
