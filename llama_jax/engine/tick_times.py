"""The seconds of each program's ticks: a model, corrected by the ticks that were seen. No JAX.

The devices of a ring work in lockstep, so one number per program says how long a tick takes. What a
model of the devices says of it may be wrong by a factor, and the devices themselves change: a GPU
that gets hot slows down. What is kept is therefore the ratio of the seconds seen to those of the
model, for each program.
"""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from math import ceil

from llama_jax.costs.work import Work
from llama_jax.engine.interface import TickTime
from llama_jax.ring.sizes import Bucket, RingSizes

WINDOW = 31  # ticks of a program that count, the latest ones
BELIEF = 5  # ticks that the model counts for: more must be seen before anything changes
REFRESH = 16  # ticks between two corrections
RATIO_DIGITS = 3  # finer differences are noise, and would change the times of all programs
FORGET = 20_000  # ticks after which what was seen of a program no longer counts


class Window:
    """The latest ratios, also in order of size, so that their median is at hand.

    Args:
      size: how many.

    Attributes:
      ordered: the ratios, the least first.
    """

    def __init__(self, size: int) -> None:
        self._latest: deque[float] = deque(maxlen=size)
        self.ordered: list[float] = []

    def append(self, ratio: float) -> None:
        """Adds a ratio, in place of the oldest if there are too many."""
        latest, ordered = self._latest, self.ordered
        if len(latest) == latest.maxlen:
            del ordered[bisect_left(ordered, latest[0])]
        latest.append(ratio)
        insort(ordered, ratio)


class TickTimes:
    """The seconds of a tick by program, context and prefix.

    A program's ratio is the median of those of its latest ticks and of a few that stand for the
    programs of its kind, with or without a chunk. Theirs is found in the same way from all programs
    and that of all from the model. So one slow tick changes nothing, and a program that has not run
    yet profits from those that have. The same ticks always give the same times.

    Args:
      model: seconds of a tick with this work.
      sizes: of the ring, with the programs.
    """

    def __init__(self, model: Callable[[Work], float], sizes: RingSizes):
        self.model = model
        self._sizes, self._buckets = sizes, sizes.buckets()
        self._own: dict[Bucket, Window] = {}
        self._kinds = {chunk: Window(2 * WINDOW) for chunk in (False, True)}
        self._latest: dict[Bucket, int] = {}  # the number of the last tick that was seen
        self._count = 0
        self._ratios: dict[Bucket, float] = {}
        self._modeled: defaultdict[tuple[int, int], dict[Bucket, float]] = defaultdict(dict)
        self._corrected: dict[tuple[int, int, int], dict[int, float]] = {}

    def modeled(self, bucket: Bucket, context: float = 0, prefix: int = 0) -> float:
        """Seconds of a tick as the model has them.

        Args:
          bucket: of the program.
          context: keys that the rows attend to, divided by the rows of the bucket.
          prefix: tokens before the chunk.
        """
        key = _rounded(context), _rounded(prefix)
        known = self._modeled[key]
        seconds = known.get(bucket)
        if seconds is None:
            work = Work.of(bucket.rows, key[0], bucket.chunk, key[1], self._sizes.tile)
            seconds = known[bucket] = self.model(work)
        return seconds

    def seconds(self, bucket: Bucket, context: float = 0, prefix: int = 0) -> float:
        """Seconds of a tick, corrected; a program with more room is never faster.

        Args:
          bucket: of the program.
          context, prefix: as in `modeled`.
        """
        return self.by_chunk(bucket.rows, context, prefix)[bucket.chunk]

    def by_chunk(self, rows: int, context: float = 0, prefix: int = 0) -> Mapping[int, float]:
        """The `seconds` of all programs with these rows, by their chunk."""
        key = rows, _rounded(context), _rounded(prefix)
        found = self._corrected.get(key)
        if found is None:
            found = self._corrected[key] = self._correct(*key)
        return found

    def observe(self, bucket: Bucket, context: float, prefix: int, seconds: float) -> None:
        """Takes the seconds of one tick."""
        ratio = seconds / self.modeled(bucket, context, prefix)
        own = self._own.get(bucket)
        if own is None:
            own = self._own[bucket] = Window(WINDOW)
        own.append(ratio)
        self._kinds[bucket.chunk > 0].append(ratio)
        self._latest[bucket] = self._count
        self._count += 1
        if self._count % REFRESH == 0:
            self._refresh()

    def table(self) -> tuple[TickTime, ...]:
        """Every program, at no context."""
        return tuple(
            TickTime(*b, self.seconds(b), self.modeled(b), self._seen(b)) for b in self._buckets
        )

    def _seen(self, bucket: Bucket) -> int:
        return len(self._own[bucket].ordered) if bucket in self._own else 0

    def _refresh(self) -> None:
        every = _median(1.0, sorted(self._kinds[False].ordered + self._kinds[True].ordered))
        kinds = {kind: _median(every, seen.ordered) for kind, seen in self._kinds.items()}
        short = {kind: _short(ratio) for kind, ratio in kinds.items()}
        for bucket in [b for b, seen in self._latest.items() if self._count - seen > FORGET]:
            del self._own[bucket], self._latest[bucket]
        ratios = {
            bucket: _short(_median(kinds[bucket.chunk > 0], seen.ordered))
            for bucket, seen in self._own.items()
        }
        for bucket in self._buckets:  # one that has not run
            ratios.setdefault(bucket, short[bucket.chunk > 0])
        if ratios != self._ratios:
            self._ratios = ratios
            self._corrected.clear()

    def _correct(self, rows: int, context: int, prefix: int) -> dict[int, float]:
        """The longest of the programs with at most these rows and chunk, by the chunk."""
        seconds, found = 0.0, {}
        modeled = self._modeled[context, prefix]
        for bucket in self._buckets:  # in the order of chunks, and of rows
            if bucket.rows > rows:
                continue
            known = modeled.get(bucket) or self.modeled(bucket, context, prefix)
            own = self._ratios.get(bucket, 1.0) * known
            if own > seconds:
                seconds = own
            found[bucket.chunk] = seconds
        return found


def _median(believed: float, seen: Sequence[float]) -> float:
    """The median of numbers in order and of `BELIEF` times what is believed."""
    middle, below = (len(seen) + BELIEF) // 2, bisect_left(seen, believed)
    if middle < below:
        return seen[middle]
    return believed if middle < below + BELIEF else seen[middle - BELIEF]


def _short(ratio: float) -> float:
    return float(f"{ratio:.{RATIO_DIGITS}g}")


def _rounded(number: float) -> int:
    """Rounds up to four binary digits, at most 12.5 % too high, so that few contexts differ."""
    whole = ceil(number)
    shift = whole.bit_length() - 4
    return whole if shift <= 0 else -(-whole >> shift) << shift
