"""The time of a tick of a deployment. Imports no JAX."""

from dataclasses import replace
from typing import NamedTuple

from llama_jax.costs.attention import RankAttention
from llama_jax.costs.calibration import Calibration
from llama_jax.costs.collectives import Collective, collectives
from llama_jax.costs.correction import Correction, Example
from llama_jax.costs.deployment import Deployment
from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.costs.products import Known, RankProducts
from llama_jax.costs.roofline import band, shares_of
from llama_jax.costs.work import Work

Times = tuple[float, float, float]  # low, expected, high
# Seconds: a calibration may add a multiple of these to every tick, and for every token of it.
_CONSTANT, _TOKEN = 1e-3, 1e-6


class Fixed(NamedTuple):
    """What depends only on the sizes of a program, in seconds.

    Attributes:
      times: of all parts but attention.
      communication: of these, that of the collectives.
      products: the expected time of the layers' products.
      rest: the expected time of small kernels, head and choice.
    """

    times: Times
    communication: Times
    products: float
    rest: float


class TickModel:
    """How long the ticks of a deployment take.

    All stages run in lockstep, so that the tick of the ring is that of its slowest stage. Making a
    model takes milliseconds; `expected` and `times` take microseconds, since what depends only on
    the sizes of a program is kept.

    Args:
      deployment: what runs.
      calibration: what was measured on this very deployment: its ticks correct the model.

    Raises:
      BadCalibration: the calibration holds for something else.
    """

    def __init__(self, deployment: Deployment, calibration: Calibration | None = None) -> None:
        if calibration is not None:
            calibration.check(deployment)
        self.deployment, self.calibration = deployment, calibration
        modeled = _at_measured_rates(deployment, calibration)
        self.products = RankProducts(modeled)
        self._converted = self.products  # which multiply in the dtype of the activations
        if deployment.fp8_activations:
            self._converted = RankProducts(replace(modeled, fp8_activations=False))
        self.attention = RankAttention(modeled)
        self._shares = shares_of(deployment.gpu.platform)
        self._fixed: dict[tuple[int, int], Fixed] = {}
        self._correction: Correction | None = None
        self._whole = True  # whether measured ticks have their collectives
        if calibration is not None and calibration.ticks:
            self._whole = calibration.with_collectives
            self._correction = Correction(
                [
                    Example(tick.work, self._vector(tick.work), tick.seconds)
                    for tick in calibration.ticks
                ]
            )

    def parts(self, work: Work) -> dict[str, Band]:
        """Seconds by what they are spent on.

        "products" of the layers, "attention", "small" kernels between them, "communication", the
        "head" with the choice of tokens, and "launch": waiting for the host.
        """
        parts = {"attention": self._attention(work), **self._fixed_parts(work.rows, work.chunk)}
        if self._correction is None:
            return parts
        whole = Band(*self.times(work))
        apart = {} if self._whole else {"communication": parts.pop("communication")}
        for each in apart.values():
            whole += each * -1
        modeled = sum(part.expected for part in parts.values())
        return apart | {name: whole * (part.expected / modeled) for name, part in parts.items()}

    def _fixed_parts(self, rows: int, chunk: int) -> dict[str, Band]:
        """The parts that depend only on the sizes of the program."""
        work = Work(rows, chunk)
        sampling = band(self._shares.sampling)
        communication = Band.exactly(0.0)
        for collective in self.collectives(work):
            communication += collective.seconds
        return {
            "products": self.products_of(work).time(work.tokens),
            "small": self._small(work.tokens),
            "communication": communication,
            "head": self.products.head_time(work.segments) + sampling,
            "launch": band(self._shares.launch),
        }

    def products_of(self, work: Work) -> RankProducts:
        """The products of a tick: an engine multiplies fp8 by fp8 only in ticks with a chunk."""
        return self.products if work.chunk else self._converted

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
        measured = self.calibration.collectives if self.calibration else ()
        return collectives(self.deployment, work.tokens, work.segments, measured)

    def seconds(self, work: Work) -> Band:
        """Seconds of a tick in which the slowest stage has this work."""
        return Band(*self.times(work))

    def times(self, work: Work) -> Times:
        """As `seconds`, without its class: for loops over many ticks."""
        fixed = self._fixed_of(work)
        if self._correction is not None:
            seconds, doubt = self._correction.seconds(work, self._vector(work)), self._doubt
            low, expected, high = (seconds * factor for factor in (1 - doubt, 1.0, 1 + doubt))
            if not self._whole:
                low, expected, high = (
                    low + fixed.communication[0],
                    expected + fixed.communication[1],
                    high + fixed.communication[2],
                )
            return low, expected, high
        low, expected, high = fixed.times
        if work.rows:
            curves, context = self.attention.decode_curves(work.rows), work.row_keys / work.rows
            low += curves[0].at(context)
            expected += curves[1].at(context)
            high += curves[2].at(context)
        if work.chunk:
            low += self.attention.prefill_time(0, work.chunk_pairs, work.chunk_keys)
            expected += self.attention.prefill_time(1, work.chunk_pairs, work.chunk_keys)
            high += self.attention.prefill_time(2, work.chunk_pairs, work.chunk_keys)
        return low, expected, high

    def expected(self, work: Work) -> float:
        """The expected seconds of a tick; the fastest way to ask."""
        if self._correction is not None:
            return self.times(work)[1]
        fixed = self._fixed_of(work).times[1]
        return fixed + self._expected_rows(work) + self._expected_chunk(work)

    @property
    def _doubt(self) -> float:
        assert self._correction is not None
        return self._correction.doubt

    def _expected_rows(self, work: Work) -> float:
        """Seconds of the attention of the rows."""
        if not work.rows:
            return 0.0
        curve = self.attention.decode_curves(work.rows)[1]
        return curve.at(work.row_keys / work.rows)

    def _expected_chunk(self, work: Work) -> float:
        """Seconds of the attention of the chunk."""
        if not work.chunk:
            return 0.0
        return self.attention.prefill_time(1, work.chunk_pairs, work.chunk_keys)

    def _vector(self, work: Work) -> tuple[float, ...]:
        """The expected seconds of a tick, in the parts to which a calibration gives factors."""
        fixed = self._fixed_of(work)
        rest = fixed.rest + (fixed.communication[1] if self._whole else 0.0)
        return (
            fixed.products,
            self._expected_rows(work),
            self._expected_chunk(work),
            rest,
            work.tokens * _TOKEN,
            _CONSTANT,
        )

    def _fixed_of(self, work: Work) -> "Fixed":
        """The parts that depend only on the sizes of the program."""
        key = (work.rows, work.chunk)
        fixed = self._fixed.get(key)
        if fixed is None:
            parts = self._fixed_parts(*key)
            total = Band.exactly(0.0)
            for part in parts.values():
                total += part
            communication = parts["communication"]
            fixed = self._fixed[key] = Fixed(
                times=(total.low, total.expected, total.high),
                communication=(communication.low, communication.expected, communication.high),
                products=parts["products"].expected,
                rest=parts["small"].expected + parts["head"].expected,
            )
        return fixed

    def floor(self, work: Work) -> float:
        """The least seconds of a tick on this device, by its data sheet.

        The bytes of weights and cache at the full bandwidth, or the arithmetic at the full rate; no
        communication. Whatever a tick is said to take, it cannot take less.
        """
        keys = self.attention.decode_floor(work.row_keys)
        pairs = self.attention.prefill_floor(work.chunk_pairs)
        head = self.products.head_floor(work.segments)
        return self.products_of(work).floor(work.tokens) + keys + pairs + head

    def figures(self, work: Work) -> dict[str, Figure]:
        """The parts of a tick, with how each is known and where it comes from."""
        known = self._known(work)
        return {
            name: Figure(seconds, "s", *known[name]) for name, seconds in self.parts(work).items()
        }

    def _known(self, work: Work) -> dict[str, Known]:
        used = self.collectives(work)
        if self.calibration is not None and self._correction is not None:
            here = Known(Evidence.MEASURED_HERE, f"ticks of {self.calibration.source}")
            whole = dict.fromkeys(self.parts(work), here)
            apart = max(used, key=lambda each: each.seconds.expected, default=None)
            if apart is not None and not self._whole:
                whole["communication"] = Known(apart.evidence, apart.source)
            return whole
        assumed = Evidence.ASSUMED
        # The largest part decides.
        first = max(used, key=lambda collective: collective.seconds.expected, default=None)
        alone = Known(Evidence.ARITHMETIC, "one device has no collectives")
        least, _, most = self._shares.launch
        return {
            "products": self.products_of(work).known,
            "attention": self.attention.known,
            "small": Known(assumed, "a fixed time for each kernel, and bytes at assumed shares"),
            "communication": Known(first.evidence, first.source) if first else alone,
            "head": self.products.head_known,
            "launch": Known(assumed, f"{1e3 * least:g} to {1e3 * most:g} ms a tick"),
        }


def _at_measured_rates(deployment: Deployment, calibration: Calibration | None) -> Deployment:
    """The deployment on a CPU as fast as the one that was measured.

    CPUs have no data sheet here. The measured rates are taken for the highest share of its peak
    that a kernel reaches.
    """
    gpu = deployment.gpu
    if calibration is None or gpu.platform != "cpu":
        return deployment
    shares = shares_of(gpu.platform)
    bandwidth = calibration.copy_bytes_per_second
    flops = {
        dtype: rate / shares.flops[0] for dtype, rate in calibration.matrix_flops_per_second.items()
    }
    measured = replace(
        gpu,
        bandwidth=bandwidth / shares.bandwidth[0] if bandwidth else gpu.bandwidth,
        flops={**gpu.flops, **flops},
    )
    return replace(deployment, gpu=measured)
