"""The figures of a layout, each with its unit and how it is known. Imports no JAX."""

from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.price import cost_per_million, least_cost
from sharding.stages import positions_per_stage

WEIGHTS = "the table of the weights, split as the engine splits it"
QUEUE = "Little's law, and prompts as an M/D/1 queue, over the times of the ticks"
PER_MILLION = "per million output tokens"
PARTS = ("decode", "prefill")
PER_TOKEN = ("TPOT", "TPOT while prompts never cease", "mean TPOT", "output rate of a user")


def figures(candidate: Candidate, price: float | None = None) -> dict[str, Figure]:
    """The figures of a layout by name; the names are the keys of the JSON.

    Answers of one token have none of `PER_TOKEN`.

    Args:
      candidate: the layout.
      price: of one GPU for one hour; None to leave costs out.
    """
    found = _memory(candidate)
    if candidate.fits:
        found |= _ticks(candidate) | _load(candidate)
        if price is not None:
            found |= _costs(candidate, price)
    return found


def _exactly(value: float, unit: str, source: str) -> Figure:
    return Figure(Band.exactly(value), unit, Evidence.ARITHMETIC, source)


def _memory(candidate: Candidate) -> dict[str, Figure]:
    memory = candidate.memory
    weights = sum(memory.weights.values())
    found = {
        f"weights: {kind}": _exactly(size, "bytes", WEIGHTS)
        for kind, size in memory.weights.items()
        if size
    }
    layout, config = candidate.layout, candidate.deployment.config
    positions = layout.num_stages * positions_per_stage(config.num_layers, layout.num_stages)
    return found | {
        "weights": _exactly(weights, "bytes", WEIGHTS),
        "temporaries": Figure(
            Band.exactly(memory.temporaries), "bytes", Evidence.ASSUMED, "the engine's reserve"
        ),
        "room for KV cache": _exactly(
            memory.cache, "bytes", "what the target leaves of the memory"
        ),
        "KV cache per token": _exactly(memory.token, "bytes", "its shape"),
        "KV capacity of a replica": _exactly(memory.tokens, "tokens", "the bytes of its pages"),
        "memory variance across GPUs": _exactly(0.0, "", "all shards have one shape"),
        "share of layer positions in use": _exactly(
            config.num_layers / positions, "", "stages with fewer layers compute padding"
        ),
    }


def tick_work(candidate: Candidate, chunk: int) -> Work:
    """The work of a tick with as many live rows as on average, and a chunk."""
    state = candidate.state()
    live = 1 if state.overload else max(1, round(state.live / candidate.layout.num_stages))
    return candidate.replica.work(live, chunk)


def _ticks(candidate: Candidate) -> dict[str, Figure]:
    model, found = candidate.replica.model, {}
    for name, chunk in zip(PARTS, (0, candidate.chunk), strict=True):
        work = tick_work(candidate, chunk)
        parts, seconds = model.figures(work), model.seconds(work)
        largest = max(parts.values(), key=lambda figure: figure.value.expected)
        found[f"{name} tick"] = Figure(seconds, "s", largest.evidence, largest.source)
        found |= {f"{name} tick: {part}": figure for part, figure in parts.items()}
        sent = parts["communication"]
        found[f"communication share of a {name} tick"] = Figure(
            communication(model, work), "", sent.evidence, sent.source
        )
    return found


def communication(model: TickModel, work: Work) -> Band:
    """The share of communication in a tick: each end where the rest is at the other end."""
    part, whole = model.parts(work)["communication"], model.seconds(work)
    rest = Band(whole.low - part.low, whole.expected - part.expected, whole.high - part.high)
    return Band(
        part.low / (part.low + rest.high),
        part.expected / whole.expected,
        part.high / (part.high + rest.low),
    )


def _load(candidate: Candidate) -> dict[str, Figure]:
    stages, lengths = candidate.layout.num_stages, candidate.replica.workload

    def arithmetic(band: Band, unit: str) -> Figure:
        return Figure(band, unit, Evidence.ARITHMETIC, QUEUE)

    found = {"highest rate inside the targets": arithmetic(candidate.max_rate, "requests/s")}
    if candidate.state().live == float("inf"):
        return found
    if lengths.has_tpot:
        user = candidate.band("mean_tpot")
        inverse = Band(1 / user.high, 1 / user.expected, 1 / user.low)
        bands = (candidate.band("tpot"), candidate.band("worst_tpot"), user, inverse)
        units = ("s", "s", "s", "tokens/s")
        found |= dict(zip(PER_TOKEN, map(arithmetic, bands, units), strict=True))
    made = candidate.rate * lengths.output_tokens / candidate.layout.gpus
    return found | {
        "TTFT": arithmetic(candidate.band("ttft"), "s"),
        "mean TTFT": arithmetic(candidate.band("mean_ttft"), "s"),
        "output rate of a GPU": _exactly(made, "tokens/s", "the rate that is asked for"),
        "sequences that decode in a replica": arithmetic(candidate.band("live"), "sequences"),
        "share of the time with a chunk": arithmetic(candidate.band("chunk_share"), ""),
        "microbatches in flight": _exactly(stages, "", "one for each stage"),
        "tokens in the KV cache of a replica": _exactly(candidate.kv_needed, "tokens", QUEUE),
    }


def _costs(candidate: Candidate, price: float) -> dict[str, Figure]:
    source = "the price that was given"
    now = cost_per_million(candidate, price, candidate.rate)
    found = {"cost of a million output tokens": _exactly(now, PER_MILLION, source)}
    if candidate.max_rate.expected:
        found["cost at the highest rate inside the targets"] = Figure(
            least_cost(candidate, price), PER_MILLION, Evidence.ARITHMETIC, source
        )
    return found
