"""The time of a tick of a deployment. Imports no JAX."""

from llama_jax.costs.attention import RankAttention
from llama_jax.costs.calibration import Calibration
from llama_jax.costs.collectives import Collective, collectives
from llama_jax.costs.deployment import Deployment
from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.costs.products import Known, RankProducts
from llama_jax.costs.roofline import band, shares_of
from llama_jax.costs.work import Work

Times = tuple[float, float, float]  # low, expected, high


class TickModel:
    """How long the ticks of a deployment take.

    All stages run in lockstep, so that the tick of the ring is that of its slowest stage. Making a
    model takes milliseconds; `expected` and `times` take microseconds, since what depends only on
    the sizes of a program is kept.

    Args:
      deployment: what runs.
      calibration: ticks measured on this very deployment, which then take precedence.
    """

    def __init__(self, deployment: Deployment, calibration: Calibration | None = None) -> None:
        self.deployment, self.calibration = deployment, calibration
        self.products = RankProducts(deployment)
        self.attention = RankAttention(deployment)
        self._shares = shares_of(deployment.gpu.platform, deployment.gpu.link)
        self._fixed: dict[tuple[int, int], Times] = {}

    def parts(self, work: Work) -> dict[str, Band]:
        """Seconds by what they are spent on.

        "products" of the layers, "attention", "small" kernels between them, "communication", the
        "head" with the choice of tokens, and "launch": waiting for the host.
        """
        return {"attention": self._attention(work), **self._fixed_parts(work.rows, work.chunk)}

    def _fixed_parts(self, rows: int, chunk: int) -> dict[str, Band]:
        """The parts that depend only on the sizes of the program."""
        work = Work(rows, chunk)
        sampling = band(self._shares.sampling)
        communication = Band.exactly(0.0)
        for collective in self.collectives(work):
            communication += collective.seconds
        return {
            "products": self.products.time(work.tokens),
            "small": self._small(work.tokens),
            "communication": communication,
            "head": self.products.head_time(work.segments) + sampling,
            "launch": band(self._shares.launch),
        }

    def _attention(self, work: Work) -> Band:
        seconds = self.attention.decode(work.rows, work.row_keys)
        if work.chunk:
            seconds += self.attention.prefill(work.chunk_pairs, work.chunk_keys)
        return seconds

    def _small(self, tokens: int) -> Band:
        """Norms, rotary embeddings, writing to the cache, and the gating of the MLP.

        In a layer, they read and write the residual stream eight times, queries, keys and values
        twice, and the three halves of the MLP's inner products once.
        """
        config, gpu, shapes = self.deployment.config, self.deployment.gpu, self.products.shapes
        width = self.products.plain_width
        numbers = 8 * config.embed_dim + 2 * shapes["qkv"].outputs + 3 * shapes["down"].inputs
        moved = tokens * numbers * width / gpu.bandwidth
        shares = self._shares
        each = zip(shares.small_kernels, shares.kernel, shares.bandwidth, strict=True)
        return Band(*(count * fixed + moved / share for count, fixed, share in each)) * (
            self.products.layers
        )

    def collectives(self, work: Work) -> tuple[Collective, ...]:
        """The collectives of a tick with this work, and their times."""
        return collectives(self.deployment, work.tokens, work.segments)

    def seconds(self, work: Work) -> Band:
        """Seconds of a tick in which the slowest stage has this work."""
        return Band(*self.times(work))

    def times(self, work: Work) -> Times:
        """As `seconds`, without its class: for loops over many ticks."""
        attention = self._attention(work)
        fixed = self._fixed_times(work)
        return (
            fixed[0] + attention.low,
            fixed[1] + attention.expected,
            fixed[2] + attention.high,
        )

    def expected(self, work: Work) -> float:
        """The expected seconds of a tick; the fastest way to ask."""
        seconds = self._fixed_times(work)[1]
        if work.rows:
            curve = self.attention.decode_curves(work.rows)[1]
            seconds += curve.at(work.row_keys / work.rows)
        if work.chunk:
            seconds += self.attention.prefill_time(1, work.chunk_pairs, work.chunk_keys)
        return seconds

    def _fixed_times(self, work: Work) -> Times:
        """The sum of the parts that depend only on the sizes of the program."""
        key = (work.rows, work.chunk)
        fixed = self._fixed.get(key)
        if fixed is None:
            total = Band.exactly(0.0)
            for part in self._fixed_parts(*key).values():
                total += part
            fixed = self._fixed[key] = (total.low, total.expected, total.high)
        return fixed

    def floor(self, work: Work) -> float:
        """The least seconds of a tick on this device, by its data sheet.

        The bytes of weights and cache at the full bandwidth, or the arithmetic at the full rate; no
        communication. Whatever a tick is said to take, it cannot take less.
        """
        keys = self.attention.decode_floor(work.row_keys)
        pairs = self.attention.prefill_floor(work.chunk_pairs)
        head = self.products.head_floor(work.segments)
        return self.products.floor(work.tokens) + keys + pairs + head

    def figures(self, work: Work) -> dict[str, Figure]:
        """The parts of a tick, with how each is known and where it comes from."""
        known = self._known(work)
        return {
            name: Figure(seconds, "s", *known[name]) for name, seconds in self.parts(work).items()
        }

    def _known(self, work: Work) -> dict[str, Known]:
        used = self.collectives(work)
        assumed = Evidence.ASSUMED
        # The largest part decides.
        first = max(used, key=lambda collective: collective.seconds.expected, default=None)
        alone = Known(Evidence.ARITHMETIC, "one device has no collectives")
        return {
            "products": self.products.known,
            "attention": self.attention.known,
            "small": Known(assumed, "a fixed time for each kernel, and bytes at assumed shares"),
            "communication": Known(first.evidence, first.source) if first else alone,
            "head": self.products.head_known,
            "launch": Known(assumed, "0 to 1 ms a tick"),
        }
