"""The collectives of a tick: how many, of how many bytes, and their time. Imports no JAX."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from llama_jax.costs.calibration import MeasuredCollective
from llama_jax.costs.curve import Curve
from llama_jax.costs.deployment import KV_BYTES, Deployment
from llama_jax.costs.figure import Band, Evidence
from llama_jax.costs.gpus import Gpu
from llama_jax.costs.kernels import KERNEL_SETS, LINK, all_gather, all_reduce, source
from llama_jax.costs.roofline import NETWORK_BANDWIDTH, NETWORK_HOP, shares_of
from sharding.stages import positions_per_stage

_MEASURED_KINDS = {"all_reduce": "all-reduce", "ppermute": "collective-permute"}


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a tick.

    Attributes:
      what: what they are for: "layers", "embedding", "stages", "finished" or "tokens".
      kind: "all-reduce", "collective-permute" or "all-gather", as XLA names them.
      count: in a tick.
      ranks: in each of its groups.
      bytes: of each rank's array, of one collective.
      seconds: of all of them together.
      evidence: how the time is known.
      source: where it comes from.
    """

    what: str
    kind: str
    count: int
    ranks: int
    bytes: int
    seconds: Band
    evidence: Evidence
    source: str


def collectives(
    deployment: Deployment,
    tokens: int,
    segments: int,
    measured: Sequence[MeasuredCollective] = (),
) -> tuple[Collective, ...]:
    """The collectives of a tick. An axis of size 1 has none.

    Args:
      deployment: what runs.
      tokens: of the program: rows and chunk.
      segments: of the program: rows and tiles.
      measured: on these very devices; they take precedence.
    """
    config, layout, gpu = deployment.config, deployment.layout, deployment.gpu
    stages, ranks = layout.num_stages, layout.num_ranks
    width = KV_BYTES["fp32" if deployment.dtype == "float32" else "bf16"]
    activations = tokens * config.embed_dim * width
    finished = segments * config.embed_dim * width
    beyond = stages * ranks > gpu.joined  # one host
    layers = 2 * positions_per_stage(config.num_layers, stages)
    planned = (
        ("layers", "all-reduce", layers, ranks, activations),
        ("embedding", "all-reduce", 1, stages * ranks, activations),
        ("stages", "collective-permute", 1, stages, activations),
        ("finished", "all-reduce", 1, stages, finished),
        ("tokens", "all-gather", 1, stages * ranks, 8 * segments),
    )
    return tuple(
        Collective(what, kind, count, group, size, seconds * count, evidence, origin)
        for what, kind, count, group, size in planned
        if group > 1
        for seconds, evidence, origin in [
            collective_time(
                gpu,
                kind,
                group,
                size,
                measured,
                beyond and (what != "layers" or ranks > gpu.joined),
            )
        ]
    )


def collective_time(
    gpu: Gpu,
    kind: str,
    ranks: int,
    size: int,
    measured: Sequence[MeasuredCollective] = (),
    between_hosts: bool = False,
) -> tuple[Band, Evidence, str]:
    """The time of one collective, how it is known, and from where.

    Args:
      gpu: of which the devices are.
      kind: as in `Collective`.
      ranks: in the group.
      size: bytes of each rank's array.
      measured: on these very devices.
      between_hosts: whether the group spans hosts.
    """
    here = {
        float(each.bytes): each.seconds
        for each in measured
        if (each.ranks, _MEASURED_KINDS[each.kind]) == (ranks, kind)
    }
    if here:
        return Band.exactly(Curve(here).at(size)), Evidence.MEASURED_HERE, "the calibration"
    # Other links have other bandwidths and latencies.
    same_links = gpu.measured_as is not None and gpu.link_bandwidth == LINK and not between_hosts
    curves = _curves(str(gpu.measured_as), kind, ranks) if same_links else None
    if curves:
        times = sorted(curve.at(size) for curve in curves)
        seconds = Band(times[0], times[len(times) // 2], times[-1])
        return seconds, Evidence.MEASURED_ELSEWHERE, source()
    shares = shares_of(gpu.platform, gpu.link)
    link, hops = gpu.link_bandwidth, shares.hop
    if between_hosts:
        link, hops = NETWORK_BANDWIDTH, NETWORK_HOP
    steps, moved = _STEPS[kind](ranks, size)
    seconds = Band(
        *(
            steps * hop + moved / (link * share)
            for hop, share in zip(hops, shares.link, strict=True)
        )
    )
    what = "a network of 400 Gbit/s a GPU" if between_hosts else "the links"
    return seconds, Evidence.ASSUMED, f"bytes over the bandwidth of {what}, at assumed shares"


# Kind → steps along the ring, and bytes that each device sends. Small arrays go to all at once.
_STEPS: dict[str, Callable[[int, int], tuple[float, float]]] = {
    "all-reduce": lambda ranks, size: (_steps(ranks), 2 * (ranks - 1) / ranks * size),
    "all-gather": lambda ranks, size: (_steps(ranks), (ranks - 1) * size),
    "collective-permute": lambda ranks, size: (2, size),
}


def _steps(ranks: int) -> float:
    return float(max(1, (ranks - 1).bit_length()))


@lru_cache
def _curves(system: str, kind: str, ranks: int) -> list[Curve] | None:
    """The measured curves of a collective; None if it was not measured."""
    if kind == "collective-permute":
        return None
    names = (*KERNEL_SETS, "nccl") if kind == "all-reduce" else KERNEL_SETS
    found = [all_reduce(system, name, ranks) for name in names]
    if kind == "all-gather":  # of a few bytes: between the fastest all-reduce and NCCL's own
        found = [*found[:1], all_gather(ranks)]
    curves = [curve for curve in found if curve is not None]
    return curves or None
