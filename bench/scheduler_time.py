"""The scheduler's time by the number of sequences, a part of `python -m bench engine`.

There is no device: every row is answered with the same token. Either all sequences decode in four
packets, so that a packet has a quarter of them, or 64 decode and the others wait for a slot. The
time per row must not grow with the sequences that decode, nor the time per tick with those that
wait.
"""

import argparse
import statistics
import time
from collections import deque

from bench.result import Plot, Result, Row, Target
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.packets import Packet
from llama_jax.engine.scheduler import Scheduler
from llama_jax.ring.sizes import RingSizes

SEQUENCES = (64, 128, 256, 512, 1024)
STAGES, PAGE_SIZE, PROMPT = 4, 16, 16
SLOTS = 64  # of the sequences that decode while the others wait
MOST_GROWTH = 1.5  # from the fewest sequences to the most; noise included


def measure(sequences: int, slots: int, ticks: int) -> float:
    """Seconds per tick to schedule a packet and to process one."""
    length = PROMPT + sequences + ticks  # none ends while others enter, or later
    pages = -(-length // PAGE_SIZE)
    sizes = RingSizes(
        num_slots=slots,
        num_pages=slots * pages,
        page_size=PAGE_SIZE,
        pages_per_sequence=pages,
        row_buckets=(-(-slots // STAGES),),
        chunk_buckets=(0, 512),
        tile=64,
    )
    scheduler = Scheduler(sizes, STAGES, prefix_caching=False)
    params = SamplingParams(temperature=0, ignore_eos=True)
    in_ring: deque[Packet] = deque([Packet()] * (STAGES - 1))

    def step() -> int:
        in_ring.append(scheduler.schedule())
        leaving = in_ring.popleft()
        tokens = [7] * (sizes.max_rows + len(leaving.tiles))
        return len(scheduler.process(leaving, tokens, sizes.max_rows))

    for number in range(sequences):
        scheduler.add(
            number,
            [1 + number % 100] * PROMPT,
            params,
            max_model_len=length,
            seed=0,
            stop_ids=frozenset(),
        )
    while scheduler.num_running < slots or scheduler.prefilling:
        step()
    for _ in range(STAGES):  # the last chunk leaves the ring
        step()
    seconds = []
    for _ in range(ticks):
        start = time.perf_counter()
        assert step() == slots // STAGES
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run(args: argparse.Namespace) -> Result:
    """Measures with all sequences decoding, and with all but 64 waiting."""
    ticks = min(args.ticks, 400)
    decoding = [(count, measure(count, count, ticks)) for count in SEQUENCES]
    waiting = [(count, measure(SLOTS + count, SLOTS, ticks)) for count in (0, *SEQUENCES)]
    per_row = [seconds * STAGES / count for count, seconds in decoding]
    rows: list[Row] = [
        {"decoding": count, "per tick": seconds, "per row": each}
        for (count, seconds), each in zip(decoding, per_row, strict=True)
    ]
    rows += [{"waiting": count, "per tick": seconds} for count, seconds in waiting]
    return Result.measured(
        "engine",
        f"time of the scheduler alone, medians of {ticks} ticks",
        args=vars(args),
        packages=("numpy",),
        units={"per tick": "s", "per row": "s"},
        rows=rows,
        targets=[
            Target(
                f"time per row, {SEQUENCES[-1]} sequences / {SEQUENCES[0]}",
                per_row[-1] / per_row[0],
                MOST_GROWTH,
                "max",
            ),
            Target(
                f"time per tick, {SEQUENCES[-1]} waiting / none",
                waiting[-1][1] / waiting[0][1],
                MOST_GROWTH,
                "max",
            ),
        ],
        plots=[
            Plot("The scheduler, while all sequences decode", "decoding", ("per row",), log="x"),
            Plot(f"The scheduler, while {SLOTS} sequences decode", "waiting", ("per tick",)),
        ],
    )
