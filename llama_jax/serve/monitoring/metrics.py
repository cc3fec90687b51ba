"""The metrics of /metrics, under vLLM's names, which dashboards and load generators know.

The engine's counters come from its latest report at the time of the scrape. Latencies are measured
here, from the arrival of a request to the arrival of its tokens from the engine. How fast a client
reads them makes no difference.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama_jax.engine.interface import PACKET_TOKENS, PREEMPTIONS, EngineInfo, Stats
from llama_jax.serve.monitoring.http_metrics import HttpMetrics
from llama_jax.serve.monitoring.recent import RecentValues
from llama_jax.serve.monitoring.request_record import RequestRecord, current_record
from llama_jax.serve.monitoring.request_timer import RequestTimer
from llama_jax.serve.monitoring.ring_metrics import ring_families
from llama_jax.serve.monitoring.token_histogram import TokenHistogram, histogram_family

PREFIXES = ("llama_jax", "vllm")
FINISHED = ("stop", "length", "abort", "error")
REJECTED = ("queue_full", "queue_tokens")

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80, 160, 640, 2560),
)
TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80),
)
LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960),
    *(1920, 7680),
)
CHOICE_BUCKETS = (1, 2, 5, 10, 20)
COUNT_BUCKETS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))

# Name, help text, and the value in a report of the engine.
_Report = tuple[str, str, Callable[[Stats], float]]
_GAUGES: tuple[_Report, ...] = (
    (
        "num_requests_running",
        "Sequences in the pipeline.",
        lambda s: s.num_running,
    ),
    ("num_requests_waiting", "Sequences in the queue.", lambda s: s.num_waiting),
    ("kv_cache_usage_perc", "Fraction of KV-cache pages in use.", lambda s: s.kv_usage),
    ("kv_pages", "KV-cache pages.", lambda s: s.pages_total),
    ("kv_pages_free", "Free KV-cache pages.", lambda s: s.pages_free),
    ("programs_ready", "Buckets whose programs are compiled.", lambda s: s.programs_ready),
)
_COUNTERS: tuple[_Report, ...] = (
    (
        "prompt_tokens",
        "Prompt tokens, computed or found in the cache.",
        lambda s: s.prompt_tokens + s.cached_tokens,
    ),
    ("prompt_tokens_cached", "Prompt tokens found in the cache.", lambda s: s.cached_tokens),
    (
        "prefix_cache_queries",
        "Prompt tokens looked up in the cache.",
        lambda s: s.prompt_tokens + s.cached_tokens,
    ),
    ("prefix_cache_hits", "Prompt tokens found in the cache.", lambda s: s.cached_tokens),
    ("generation_tokens", "Tokens generated.", lambda s: s.generation_tokens),
    ("num_preemptions", "Sequences preempted for lack of pages.", lambda s: s.preemptions),
    ("ticks", "Pipeline ticks.", lambda s: s.ticks),
    ("stage_ticks", "Ticks times stages.", lambda s: s.stage_ticks),
    ("stage_ticks_busy", "Stage ticks with work.", lambda s: s.stage_ticks_busy),
    ("token_slots", "Token slots computed.", lambda s: s.token_slots),
    ("token_slots_used", "Token slots with a token.", lambda s: s.token_slots_used),
    ("compilations", "Programs compiled.", lambda s: s.compilations),
    ("tick_seconds", "Time spent in ticks.", lambda s: s.tick_seconds),
    ("host_seconds", "Time of ticks outside the compiled program.", lambda s: s.host_seconds),
)


class Metrics:
    """The metrics of one server, in their own registry.

    Attributes:
      clock: returns the time in seconds, from any origin.
      recent_first_tokens, recent_tokens: the latest times to the first token, and between tokens.
    """

    def __init__(
        self,
        model: str,
        stats: Callable[[], Stats],
        up: Callable[[], bool],
        prefix: str,
        clock: Callable[[], float] = time.perf_counter,
        info: EngineInfo | None = None,
    ) -> None:
        """Creates all metrics, at zero.

        Args:
          model: the value of the label `model_name`.
          stats: returns the engine's latest report; called at each scrape.
          up: returns whether the engine runs and answers; called at each scrape.
          prefix: one of `PREFIXES`; metrics are named `prefix:name`.
          clock: returns the time in seconds.
          info: the engine's description of itself, for `cache_config_info`.
        """
        self.clock = clock
        self.recent_first_tokens, self.recent_tokens = RecentValues(), RecentValues()
        self._labels = {"model_name": model, "engine": "0"}
        self._prefix = prefix
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(prefix, self._labels, stats, up))
        ProcessCollector(registry=self._registry)

        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Time from arrival to the first token.", TTFT_BUCKETS
        )
        self.inter_token = TokenHistogram(
            f"{prefix}:inter_token_latency_seconds",
            "Time between two tokens of a sequence.",
            self._labels,
            TOKEN_BUCKETS,
        )
        self._registry.register(self.inter_token)
        self.time_per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean inter-token time.", TOKEN_BUCKETS
        )
        self.latency = self._histogram(
            "e2e_request_latency_seconds", "Time from arrival to the last token.", LATENCY_BUCKETS
        )
        self.prompt = self._histogram("request_prompt_tokens", "Prompt tokens.", COUNT_BUCKETS)
        self.generation = self._histogram(
            "request_generation_tokens", "Generated tokens.", COUNT_BUCKETS
        )
        self.queue = self._histogram(
            "request_queue_time_seconds", "Time in the engine's queue.", LATENCY_BUCKETS
        )
        self.prefill = self._histogram(
            "request_prefill_time_seconds",
            "Time from the end of the queue to the first token.",
            LATENCY_BUCKETS,
        )
        self.decode = self._histogram(
            "request_decode_time_seconds",
            "Time from the first token to the last.",
            LATENCY_BUCKETS,
        )
        self.inference = self._histogram(
            "request_inference_time_seconds",
            "Time from the end of the queue to the last token.",
            LATENCY_BUCKETS,
        )
        self.computed = self._histogram(
            "request_prefill_kv_computed_tokens",
            "Prompt tokens that were not found in the cache.",
            COUNT_BUCKETS,
        )
        self.choices = self._histogram("request_params_n", "The parameter n.", CHOICE_BUCKETS)
        self.max_tokens = self._histogram(
            "request_params_max_tokens", "The parameter max_tokens, if it is set.", COUNT_BUCKETS
        )
        self.longest = self._histogram(
            "request_max_num_generation_tokens",
            "Generated tokens of the longest choice of a request.",
            COUNT_BUCKETS,
        )
        self.corrupted = self._plain_counter(
            "corrupted_requests", "Sequences ended because the model's output was not a number."
        )
        self.http = HttpMetrics(self._registry)
        if info is not None:
            self._show_cache(info)
        self._finished = self._counter(
            "request_success", "Finished sequences by reason.", "finished_reason", FINISHED
        )
        self._rejected = self._counter(
            "admission_rejections", "Requests refused by reason.", "reason", REJECTED
        )

    def request(
        self, arrived: float, prompt_tokens: int, on_first: Callable[[], None] = lambda: None
    ) -> "RequestTimer":
        """Measures one sequence of a request that arrived at this time of `clock`.

        Calls `on_first` when its first token arrives.
        """
        timer = RequestTimer(self, arrived, prompt_tokens, on_first)
        if record := current_record():
            record.choices.append(timer)
        return timer

    def observe(self, record: RequestRecord) -> None:
        """Measures an HTTP request that has ended."""
        self.http.observe(record)
        if record.params is None or not record.choices:
            return
        self.choices.observe(record.choices_per_prompt)
        if record.params.max_tokens is not None:
            self.max_tokens.observe(record.params.max_tokens)
        self.longest.observe(max(timer.tokens for timer in record.choices))

    def finished(self, reason: str) -> None:
        """Counts a finished sequence; `reason` is one of `FINISHED`."""
        self._finished.labels(**self._labels, finished_reason=reason).inc()

    def rejected(self, reason: str) -> None:
        """Counts a refused request; `reason` is one of `REJECTED`."""
        self._rejected.labels(**self._labels, reason=reason).inc()

    def text(self) -> bytes:
        """Returns all metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        full = f"{self._prefix}:{name}"
        family = Histogram(full, about, self._labels, buckets=buckets, registry=self._registry)
        return family.labels(**self._labels)

    def _plain_counter(self, name: str, about: str) -> Counter:
        family = Counter(f"{self._prefix}:{name}", about, self._labels, registry=self._registry)
        return family.labels(**self._labels)

    def _show_cache(self, info: EngineInfo) -> None:
        """Exports the sizes of the cache as labels of a gauge that is 1, as vLLM does."""
        labels = {
            **self._labels,
            "block_size": str(info.page_size),
            "num_gpu_blocks": str(info.num_pages),
            "cache_dtype": info.kv_cache_dtype,
            "enable_prefix_caching": str(info.prefix_caching),
        }
        name = f"{self._prefix}:cache_config_info"
        gauge = Gauge(name, "The KV cache.", list(labels), registry=self._registry)
        gauge.labels(**labels).set(1)

    def _counter(self, name: str, about: str, label: str, values: tuple[str, ...]) -> Counter:
        full = f"{self._prefix}:{name}"
        family = Counter(full, about, [*self._labels, label], registry=self._registry)
        for value in values:  # so that a dashboard shows zero, not a gap
            family.labels(**self._labels, **{label: value})
        return family


class _EngineCollector(Collector):
    """Exports the latest report of the engine."""

    def __init__(
        self,
        prefix: str,
        labels: dict[str, str],
        stats: Callable[[], Stats],
        up: Callable[[], bool],
    ) -> None:
        self._prefix = prefix
        self._labels = labels
        self._stats = stats
        self._up = up

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape."""
        stats = self._stats()
        up = ("engine_up", "1 while the engine runs and answers.", lambda _: float(self._up()))
        for reports, family in (
            ((*_GAUGES, up), GaugeMetricFamily),
            (_COUNTERS, CounterMetricFamily),
        ):
            for name, about, value in reports:
                metric = family(f"{self._prefix}:{name}", about, labels=list(self._labels))
                metric.add_metric(list(self._labels.values()), value(stats))
                yield metric
        name = f"{self._prefix}:prompt_tokens_by_source"
        by_source = CounterMetricFamily(
            name, "Prompt tokens by where their keys come from.", labels=[*self._labels, "source"]
        )
        for source, tokens in (
            ("local_compute", stats.prompt_tokens),
            ("local_cache_hit", stats.cached_tokens),
        ):
            by_source.add_metric([*self._labels.values(), source], tokens)
        yield by_source
        by_reason = GaugeMetricFamily(
            f"{self._prefix}:num_requests_waiting_by_reason",
            "Sequences in the queue: for lack of capacity; none is deferred for another reason.",
            labels=[*self._labels, "reason"],
        )
        for reason, waiting in (("capacity", stats.num_waiting), ("deferred", 0)):
            by_reason.add_metric([*self._labels.values(), reason], waiting)
        yield by_reason
        yield histogram_family(
            f"{self._prefix}:iteration_tokens_total",
            "Tokens of a packet: the prompt and answer tokens that enter in one tick.",
            self._labels,
            PACKET_TOKENS,
            stats.packets_by_tokens,
            stats.packet_tokens,
        )
        yield histogram_family(
            f"{self._prefix}:request_num_preemptions",
            "Times that a sequence was preempted, over those that have ended.",
            self._labels,
            PREEMPTIONS,
            stats.requests_by_preemptions,
            stats.request_preemptions,
        )
        yield from ring_families(self._prefix, self._labels, stats)
