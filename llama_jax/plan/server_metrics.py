"""What a running server reports of itself at `/metrics`. Imports no JAX."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from prometheus_client.parser import text_string_to_metric_families

from llama_jax.costs.figure import Band
from llama_jax.ring.sizes import Bucket
from sharding.errors import UserError

PREFIXES = ("llama_jax", "vllm")  # of the names, as `--metrics-prefix` of the server has them
MAX_BYTES = 32 << 20
SCRAPES = 10  # in a window
INFO = "cache_config_info"  # the metric whose labels say what is served

# (name, its labels but for the model and the engine, which only `INFO` keeps) → value
Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


class ComparisonError(UserError):
    """There is no server to compare with, or nothing to compare yet."""


@dataclass(frozen=True)
class Latency:
    """A histogram of seconds.

    Attributes:
      count: of the observations.
      mean: exact.
      p50, p99: between the bounds of the histogram's bucket; expected by linear interpolation.
    """

    count: float
    mean: float
    p50: Band
    p99: Band


@dataclass(frozen=True)
class Seen:
    """What a server did, since its start or in a window.

    Attributes:
      requests: that finished with an answer.
      seconds: of the window; since its start without one.
      prompt_tokens, output_tokens: the mean of the requests.
      ttft, tpot: None before the first request has one.
      running: sequences in the pipeline, mean of the scrapes.
      pool: share of the KV pages in use, mean of the scrapes.
      slots_used: share of the computed token slots that held a token; None before the first tick.
      stages_busy: share of the stages times ticks with work; None before the first tick.
      ticks: by program: the number of ticks, and the mean seconds of one.
      num_stages: P.
      num_devices: 0 if the server's devices report no memory.
      pool_tokens: that the KV cache has room for.
      model: what the server calls its model; "" if it does not say.
    """

    requests: float
    seconds: float
    prompt_tokens: float
    output_tokens: float
    ttft: Latency | None
    tpot: Latency | None
    running: float
    pool: float
    slots_used: float | None
    stages_busy: float | None
    ticks: Mapping[Bucket, tuple[float, float]]
    num_stages: int
    num_devices: int
    pool_tokens: int
    model: str = ""

    @property
    def rate(self) -> float:
        """Requests per second that were answered."""
        return self.requests / self.seconds if self.seconds > 0 else 0.0


def observe(
    url: str,
    api_key: str | None = None,
    window: float = 0.0,
    timeout: float = 10.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Seen:
    """Reads the metrics of a server.

    Args:
      url: of its metrics, or of the server.
      api_key: sent as a bearer token; None for none.
      window: seconds to observe it for; 0 for everything since its start.
      timeout: seconds that an answer may take.
      sleep: waits between two scrapes.

    Raises:
      ComparisonError: it cannot be reached, or is no server of this project.
    """
    url = metrics_url(url)
    scrapes = [scrape(url, api_key, timeout)]
    if window > 0:
        for _ in range(SCRAPES):
            sleep(window / SCRAPES)
            scrapes.append(scrape(url, api_key, timeout))
    return read(scrapes, url, window)


def metrics_url(url: str) -> str:
    """The address of the metrics of a server whose address is given.

    Raises:
      ComparisonError: it is not an HTTP address.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        known = parts.scheme in ("http", "https") and parts.hostname
        _ = parts.port
    except ValueError:
        known = None
    if not known:
        raise ComparisonError(
            f"{url!r} is not the address of a server: give http://HOST:PORT/metrics."
        )
    path = parts.path.rstrip("/").removesuffix("/v1") or "/metrics"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


class _NoRedirect(HTTPRedirectHandler):
    """A key must not follow a redirect to another server."""

    def redirect_request(self, *_: object) -> None:
        """Refuses every redirect."""


def scrape(url: str, api_key: str | None, timeout: float) -> Samples:
    """One scrape.

    Raises:
      ComparisonError: there is no answer, or it is not in Prometheus' text format.
    """
    headers = {"Accept": "text/plain"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        with build_opener(_NoRedirect).open(Request(url, headers=headers), timeout=timeout) as got:
            body = got.read(MAX_BYTES + 1)
    except HTTPError as error:
        raise ComparisonError(_status_text(url, error.code)) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        reason = "no answer in time" if isinstance(reason, TimeoutError) else reason
        raise ComparisonError(
            f"{url} cannot be reached ({reason}): start the server, or check the address."
        ) from error
    if len(body) > MAX_BYTES:
        raise ComparisonError(f"{url} sent more than {MAX_BYTES >> 20} MiB: is it /metrics?")
    try:
        families = list(text_string_to_metric_families(body.decode()))
        return {
            (sample.name, _own_labels(sample.name, sample.labels)): sample.value
            for family in families
            for sample in family.samples
        }
    except (ValueError, KeyError, IndexError) as error:
        raise ComparisonError(
            f"{url} is not in Prometheus' text format: give the address of /metrics."
        ) from error


def read(scrapes: Sequence[Samples], url: str, window: float = 0.0) -> Seen:
    """What a server did between the first of several scrapes and the last; since its start by one.

    Raises:
      ComparisonError: the metrics are not those of a server of this project, or it restarted.
    """
    last = scrapes[-1]
    prefix = next((p for p in PREFIXES if (f"{p}:ticks_total", ()) in last), None)
    if prefix is None:
        raise ComparisonError(
            f"{url} is not a llama-jax server (it reports no ticks): give the address of one."
        )
    first: Samples = scrapes[0] if len(scrapes) > 1 else {}
    names = {(name.removeprefix(f"{prefix}:"), labels) for name, labels in last}

    def grown(name: str, labels: tuple[tuple[str, str], ...] = ()) -> float:
        key = (f"{prefix}:{name}", labels)
        return last.get(key, 0.0) - first.get(key, 0.0)

    def gauge(name: str) -> float:
        values = [s.get((f"{prefix}:{name}", ()), math.nan) for s in scrapes]
        return sum(values) / len(values)

    if grown("ticks_total") < 0:
        raise ComparisonError(f"{url} restarted while it was observed: compare again.")
    counts = {
        Bucket(int(dict(labels)["rows"]), int(dict(labels)["chunk"])): grown(name, labels)
        for name, labels in names
        if name == "program_ticks_total"
    }
    ticks = {}
    for bucket in sorted(bucket for bucket, count in counts.items() if count):
        labels = (("chunk", str(bucket.chunk)), ("rows", str(bucket.rows)))
        seconds = grown("program_tick_seconds_total", labels)
        ticks[bucket] = counts[bucket], seconds / counts[bucket]
    answered = grown("request_generation_tokens_count") or math.nan
    sizes = next((dict(labels) for name, labels in names if name == INFO), {})
    slots, stage_ticks = grown("token_slots_total"), grown("stage_ticks_total")
    return Seen(
        requests=sum(
            grown(name, labels)
            for name, labels in names
            if name == "request_success_total"
            and dict(labels)["finished_reason"] in ("stop", "length")
        ),
        seconds=window or _age(last),
        prompt_tokens=grown("request_prompt_tokens_sum") / answered,
        output_tokens=grown("request_generation_tokens_sum") / answered,
        ttft=_latency("time_to_first_token_seconds", names, grown),
        tpot=_latency("request_time_per_output_token_seconds", names, grown),
        running=gauge("num_requests_running"),
        pool=gauge("kv_cache_usage_perc"),
        slots_used=grown("token_slots_used_total") / slots if slots else None,
        stages_busy=grown("stage_ticks_busy_total") / stage_ticks if stage_ticks else None,
        ticks=ticks,
        num_stages=sum(name == "stage_rows" for name, _ in names),
        num_devices=sum(name == "device_memory_limit_bytes" for name, _ in names),
        pool_tokens=int(sizes.get("block_size", 0)) * int(sizes.get("num_gpu_blocks", 0)),
        model=sizes.get("model_name", ""),
    )


def _own_labels(name: str, labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    common = () if name.endswith(INFO) else ("model_name", "engine")
    return tuple(sorted(item for item in labels.items() if item[0] not in common))


def _age(samples: Samples) -> float:
    """Seconds since the start of the server's process."""
    began = samples.get(("process_start_time_seconds", ()), math.nan)
    return max(0.0, time.time() - began)


def _latency(
    name: str,
    names: set[tuple[str, tuple[tuple[str, str], ...]]],
    grown: Callable[..., float],
) -> Latency | None:
    count = grown(f"{name}_count")
    if not count:
        return None
    bounds = sorted(float(dict(labels)["le"]) for n, labels in names if n == f"{name}_bucket")
    by_bound = {
        float(dict(labels)["le"]): grown(n, labels) for n, labels in names if n == f"{name}_bucket"
    }
    below = [by_bound[bound] for bound in bounds]
    return Latency(
        count,
        grown(f"{name}_sum") / count,
        quantile(bounds, below, 0.5),
        quantile(bounds, below, 0.99),
    )


def quantile(bounds: Sequence[float], below: Sequence[float], share: float) -> Band:
    """A quantile of a histogram: the bucket that it is in, and linearly interpolated.

    Args:
      bounds: `[n]`, ascending, the last infinite.
      below: `[n]`, the observations up to each bound.
      share: from 0 to 1.
    """
    rank = share * below[-1]
    at = next(i for i, count in enumerate(below) if count >= rank)
    low, start = (bounds[at - 1], below[at - 1]) if at else (0.0, 0.0)
    high = bounds[at] if math.isfinite(bounds[at]) else low
    inside = below[at] - start
    return Band(low, low + (high - low) * ((rank - start) / inside if inside else 1.0), high)


def _status_text(url: str, status: int) -> str:
    if status in (401, 403):
        return (
            f"{url} wants an API key that it knows: give --api-key, or set LLAMA_JAX_API_KEY or "
            "OPENAI_API_KEY in the environment."
        )
    if status == 404:
        return f"{url} does not exist on this server: give http://HOST:PORT/metrics."
    if status >= 500:
        return f"{url} is not ready (status {status}): try again once the server answers."
    return f"{url} answered with status {status}: give http://HOST:PORT/metrics."
