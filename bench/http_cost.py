"""What HTTP and its clients take from the ticks of a server on the same cores.

On a CPU, the server's process and the client's share the cores with the devices: what they compute
for a token, the ticks meanwhile take longer. How much depends on the machine and on the number of
streams, so it is measured: short requests are sent to the real server, one at a time and several at
once, and simulated from the same calibration. By what their tokens come later than simulated, every
tick takes longer: by the same time in each (`host_seconds_per_tick`, for what a process does once
for a tick), and by more for each token that it gives (`host_seconds_per_token`). The first tokens
come later still: by the same time for each request (`front_seconds`, its way to the engine), and by
more for each one that arrives at once (`host_seconds_per_request`).

All four are fitted to the very streams that a calibration file then shows.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bench.load.sample import Sample
from bench.load.workload import Workload
from llama_jax.costs.calibration import Calibration, MeasuredStreams
from llama_jax.plan.simulation.lengths import Lengths

STREAMS = (1, 2, 4, 8)  # at once
REPEATS = 3  # of each in a round
PROMPT, ANSWER = 32, 48  # tokens
STEPS = 6  # longer ticks hold more tokens, which makes them longer still
SOURCE = "measured here: the server with HTTP, and its clients on the same machine"


class Streams(NamedTuple):
    """Requests that are sent at once."""

    load: Workload
    samples: list[Sample]


class Latencies(NamedTuple):
    """The median seconds to the first token, and per token after it."""

    ttft: float
    tpot: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Latencies":
        """The medians of some requests, served or simulated."""
        ttft, tpot = zip(*((sample.ttft, sample.tpot) for sample in samples), strict=True)
        return cls(statistics.median(ttft), statistics.median(tpot))


def loads(seed: int, vocab_size: int) -> list[Workload]:
    """What is sent in a round, one after the other."""
    return [
        Workload(
            rate=float("inf"),
            num_requests=streams,
            prompt=Lengths.parse(str(PROMPT)),
            answer=Lengths.parse(str(ANSWER)),
            vocab_size=vocab_size,
            seed=1000 * (repeat + REPEATS * seed) + streams,
        )
        for repeat in range(REPEATS)
        for streams in STREAMS
    ]


def with_http(
    calibration: Calibration,
    num_stages: int,
    sent: Sequence[Streams],
    simulated: Callable[[Calibration, Workload], Sequence[Sample]],
) -> Calibration:
    """Adds to a calibration what HTTP takes.

    Args:
      calibration: of the engine alone.
      num_stages: P.
      sent: all streams, of several rounds.
      simulated: simulates a load with the times of a calibration.
    """
    served = {
        streams: Latencies.of(
            [s for each in sent if len(each.samples) == streams for s in each.samples]
        )
        for streams in sorted({len(each.samples) for each in sent})
    }
    some = {len(each.samples): each.load for each in sent}
    found = np.array(
        [
            calibration.host_seconds_per_tick or 0.0,
            calibration.host_seconds_per_token or 0.0,
            calibration.host_seconds_per_request or 0.0,
            0.0,
        ]
    )
    own = found.copy()  # of the engine: HTTP takes nothing away from it
    count = np.array(list(served))
    ttft, tpot = np.array(list(served.values())).T
    for _ in range(STEPS):
        calibration = _with_host(calibration, found)
        alike = {n: Latencies.of(simulated(calibration, load)) for n, load in some.items()}
        firsts, tokens = np.array([alike[n] for n in served]).T
        least = own - found
        per_tick, per_token = _line(
            count / num_stages, (tpot - tokens) / num_stages, tpot, least[0], least[1]
        )
        front, per_request = _line(count, ttft - firsts, ttft, least[3], least[2])
        found = found + np.array([per_tick, per_token, per_request, front])
    return replace(
        _with_host(calibration, found),
        host_source=SOURCE,
        streams=tuple(
            MeasuredStreams(n, PROMPT, ANSWER, latencies.ttft, latencies.tpot)
            for n, latencies in served.items()
        ),
    )


def _with_host(calibration: Calibration, found: np.ndarray) -> Calibration:
    per_tick, per_token, per_request, front = map(float, found)
    return replace(
        calibration,
        host_seconds_per_tick=per_tick,
        host_seconds_per_token=per_token,
        host_seconds_per_request=per_request,
        front_seconds=front,
    )


def _line(
    x: np.ndarray, y: np.ndarray, scale: np.ndarray, least_start: float, least_slope: float
) -> tuple[float, float]:
    """The line through these points with the least squares, each relative to its scale.

    Returns its value at 0, and its slope; neither is below its least.
    """
    columns = np.stack([np.ones(len(x)), x], axis=1) / scale[:, None]
    start, slope = np.linalg.lstsq(columns, y / scale, rcond=None)[0]
    if start < least_start:
        start, slope = least_start, _factor(x / scale, (y - least_start) / scale)
    if slope < least_slope:
        slope = least_slope
        start = max(least_start, _factor(1 / scale, (y - least_slope * x) / scale))
    return float(start), float(slope)


def _factor(x: np.ndarray, y: np.ndarray) -> float:
    """The factor with which `x` comes nearest to `y`."""
    return float(x @ y / (x @ x))
