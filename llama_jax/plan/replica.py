"""One replica in one layout: its memory, its ticks and its load. Imports no JAX."""

from dataclasses import dataclass
from functools import cached_property

from llama_jax.costs.deployment import Deployment
from llama_jax.costs.figure import Band
from llama_jax.costs.memory import kv_bytes_per_token, page_bytes, weight_bytes
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.sizing import (
    CPU_CACHE_BYTES,
    GPU_TEMPORARIES,
    choose_page_size,
    choose_results_late,
    choose_sizes,
    gpu_cache_bytes,
)
from llama_jax.plan.bisection import largest
from llama_jax.plan.steady_state import SteadyState, overloaded, steady_state
from llama_jax.plan.targets import Targets, Workload
from llama_jax.ring.sizes import TILE, RingSizes
from sharding.stages import round_up

LEVELS = ("low", "expected", "high")  # of the time of a tick
MAX_LIVE = 4096  # sequences that decode at once in a replica
LARGEST_CHUNK = 2048


@dataclass(frozen=True)
class Memory:
    """The memory of each GPU, in bytes, and what the cache holds.

    Attributes:
      weights: by kind.
      temporaries: that a running step needs.
      cache: that is left for the KV cache; 0 if even the weights do not fit.
      token: of the KV cache for each token.
      tokens: that the cache of one replica holds.
      allowed: that the target lets all of these take.
      total: of the GPU.
    """

    weights: dict[str, int]
    temporaries: int
    cache: int
    token: int
    tokens: int
    allowed: int
    total: int

    def needed(self, tokens: float) -> float:
        """The bytes that all takes with this many tokens in the cache."""
        return sum(self.weights.values()) + self.temporaries + tokens * self.token


class Replica:
    """One replica of a model in one layout, for one length of prompts and answers.

    Attributes:
      model: the times of its ticks, and the deployment that it is a replica of.
      workload: whose lengths count; its rate does not.
      targets: what must hold.
      max_chunk: the largest chunk in tokens; None to choose.
      gap: seconds by which every tick is longer than the model says.
    """

    def __init__(
        self,
        model: TickModel,
        workload: Workload,
        targets: Targets,
        max_chunk: int | None = None,
        gap: float = 0.0,
    ) -> None:
        self.model = model
        self.workload = workload
        self.targets = targets
        self.max_chunk = max_chunk
        self.gap = gap
        self._ticks: dict[tuple[int, int], Band] = {}
        self._states: dict[tuple[str, float, int], SteadyState] = {}

    def variant(self, workload: Workload | None = None, gap: float = 0.0) -> "Replica":
        """The same replica with other lengths, or with longer ticks."""
        workload = workload or self.workload
        return Replica(self.model, workload, self.targets, self.max_chunk, gap)

    @property
    def deployment(self) -> Deployment:
        """The deployment that it is a replica of."""
        return self.model.deployment

    @cached_property
    def memory(self) -> Memory:
        """The memory of each GPU."""
        weights = weight_bytes(self.deployment)
        total = self.deployment.gpu.memory_bytes
        allowed = int(total * (self.targets.memory_share or 1.0))
        cache = gpu_cache_bytes([allowed], sum(weights.values()))
        if self._platform == "cpu" and cache:
            layout = self.deployment.layout
            cache = min(cache, CPU_CACHE_BYTES // (layout.num_stages * layout.num_ranks))
        tokens = cache // page_bytes(self.deployment, self.page_size) * self.page_size
        token = kv_bytes_per_token(self.deployment)
        return Memory(weights, GPU_TEMPORARIES, cache, token, tokens, allowed, total)

    @property
    def page_size(self) -> int:
        """The tokens of a page of the KV cache, as the engine chooses them."""
        return choose_page_size(EngineOptions(path=""), self._platform)

    @property
    def request(self) -> int:
        """The tokens that the pages of one request hold."""
        tokens = self.workload.prompt_tokens + self.workload.output_tokens
        return round_up(tokens, self.page_size)

    @cached_property
    def sizes(self) -> RingSizes:
        """The buckets that the engine would compile for, with room for `MAX_LIVE` sequences."""
        options = EngineOptions(
            path="", max_num_seqs=MAX_LIVE, max_chunk=self.max_chunk or LARGEST_CHUNK
        )
        stages = self.deployment.layout.num_stages
        return choose_sizes(options, self.deployment.config, stages, 1, 1 << 60, self._platform)[0]

    @property
    def _platform(self) -> str:
        return self.deployment.gpu.platform

    @property
    def chunks(self) -> tuple[int, ...]:
        """The chunks to choose from, in tokens: larger ones than a prompt hold several prompts."""
        prompt = round_up(self.workload.prompt_tokens, TILE)
        if self.max_chunk is not None:
            buckets = self.sizes.chunk_buckets[1:]
            return tuple(size for size in buckets if size >= prompt) or buckets[-1:]
        found = {1 << power for power in range(TILE.bit_length() - 1, 12)}
        found |= {3 * size // 2 for size in found if 3 * size // 2 % TILE == 0}
        return tuple(sorted(size for size in found | {prompt} if size <= LARGEST_CHUNK))

    @property
    def context(self) -> float:
        """The mean tokens of a sequence while it decodes."""
        return self.workload.prompt_tokens + self.workload.output_tokens / 2

    @property
    def max_live(self) -> int:
        """The sequences that the cache holds."""
        return min(MAX_LIVE, int(self.memory.tokens // (self.context + self.page_size)))

    def tick(self, live: int, chunk: int) -> Band:
        """Seconds of a tick in which packets have this many live rows and a chunk."""
        if (live, chunk) not in self._ticks:
            work = self.work(live, chunk)
            self._ticks[live, chunk] = self.model.seconds(work) + Band.exactly(self.gap)
        return self._ticks[live, chunk]

    def work(self, live: int, chunk: int) -> Work:
        """The work of such a tick, in the middle of an answer and of a prompt."""
        rows = next(rows for rows in self.sizes.row_buckets if rows >= live)
        own = min(chunk, round_up(self.workload.prompt_tokens, TILE))
        before = max(0, self.workload.prompt_tokens - own) // 2
        work = Work.of(rows, self.context, own, before if chunk else 0)
        prompts = chunk / own if own else 0
        return work._replace(
            chunk=chunk,
            row_keys=live * self.context,
            chunk_pairs=prompts * work.chunk_pairs,
            chunk_keys=prompts * work.chunk_keys,
        )

    def state(self, rate: float, chunk: int, level: str = "expected") -> SteadyState:
        """What it does at a rate with chunks of one size, if ticks are as long as `level` says."""
        key = level, rate, chunk
        if key not in self._states:
            self._states[key] = self._state(rate, chunk, level)
        return self._states[key]

    def _state(self, rate: float, chunk: int, level: str) -> SteadyState:
        if self.memory.tokens < self.request:
            return overloaded("sequences")

        def ticks(live: int, chunk: int) -> float:
            seconds: float = getattr(self.tick(live, chunk), level)
            return seconds

        load = Workload(self.workload.prompt_tokens, self.workload.output_tokens, rate)
        stages = self.deployment.layout.num_stages
        late = choose_results_late(EngineOptions(path=""), self._platform)
        inside = self.targets.inside
        state = steady_state(ticks, stages, load, chunk, inside, self.max_live, late)
        limited = state.overload == "sequences" and self.max_live == MAX_LIVE
        return overloaded("limit") if limited else state

    def excess(self, state: SteadyState) -> float:
        """By how much a state misses the latencies: 1 is within, 1.2 is a fifth too long."""
        ttft = state.ttft / self.targets.ttft if self.targets.ttft else 0.0
        tpot = state.tpot / self.targets.tpot if self.targets.tpot else 0.0
        return max(1.0, ttft, tpot, float("inf") if state.overload else 0.0)

    def best_chunk(self, rate: float) -> int:
        """The chunk to serve with: the one with which the latencies hold, or are missed least.

        Of several, it is one that holds even if ticks are long, then even if prompts never cease,
        as an engine chooses that knows the targets; then the one with the shortest TTFT. At a rate
        that it does not keep up with, the chunk is that of the highest rate within the targets, or
        of the highest that it can do at all.
        """
        if all(self.state(rate, chunk).overload for chunk in self.chunks):
            kept = self.max_rate() or self.max_load()
            return self.best_chunk(kept) if 0 < kept < rate else self.chunks[-1]

        def key(chunk: int) -> tuple[float, ...]:
            expected, high = (self.state(rate, chunk, level) for level in ("expected", "high"))
            worst = expected.worst_tpot / self.targets.tpot if self.targets.tpot else 0.0
            return self.excess(expected), self.excess(high), max(1.0, worst), expected.ttft

        return min(self.chunks, key=key)

    def holds(self, rate: float, level: str = "expected") -> bool:
        """Whether the targets hold at a rate, with the chunk that suits it."""
        return any(self.excess(self.state(rate, c, level)) <= 1 for c in self.chunks)

    def max_rate(self, level: str = "expected") -> float:
        """The highest rate at which the targets hold, in requests/s; 0 for none."""
        return largest(lambda rate: self.holds(rate, level), 1.0)

    def max_load(self) -> float:
        """The highest rate that it can do at all, however long the requests take."""
        return largest(lambda rate: any(not self.state(rate, c).overload for c in self.chunks), 1.0)
