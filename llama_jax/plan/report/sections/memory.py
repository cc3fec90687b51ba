"""What lies on which GPU, and how evenly. Imports no JAX."""

from llama_jax.costs.deployment import Deployment
from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.costs.memory import KINDS, weight_bytes
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.figures import figures
from llama_jax.plan.report.document import Plot, Section, Table
from llama_jax.plan.report.drawing import draw, stacked
from llama_jax.terminal.units import count_text, layers_text
from sharding.stages import split_layers

TABLE = "the table of weights (llama_jax/weights/table.py)"
OUTSIDE = ("embedding", "head")  # the layers


def stage_section(deployment: Deployment) -> Section:
    """Which layers and heads each GPU has."""
    config, layout = deployment.config, deployment.layout
    stages = split_layers(config.num_layers, layout.num_stages)
    rows = []
    for number, positions in enumerate(stages):
        own = [layer for layer in positions if layer is not None]
        rows.append(
            (
                f"{number}",
                gpus_text(number, layout.num_ranks),
                layers_text(own),
                f"{config.num_heads // layout.num_ranks} of {config.num_heads}",
                _heads_text(config.num_kv_heads, layout.num_ranks),
                f"{config.mlp_dim // layout.num_ranks:,} of {config.mlp_dim:,}",
            )
        )
    text = [
        f"{count_text(layout.num_stages, 'stage')}, each with its layers on "
        f"{count_text(layout.num_ranks, 'GPU')}. Embedding and LM head are split over the "
        "vocabulary on all GPUs of the mesh."
    ]
    if layout.replicas > 1:
        text.append(f"The {layout.replicas} replicas are alike; the table shows the first.")
    columns = ("stage", "GPUs", "layers", "query heads", "KV heads", "MLP columns")
    table = Table("stages", columns, tuple(rows), "On each GPU of a stage:")
    return Section("stages", "Stage map", tuple(text), (table,))


def memory_section(candidate: Candidate, share: float | None) -> Section:
    """What fills each GPU.

    Args:
      candidate: the layout.
      share: of the memory that may be used; None for no limit.
    """
    deployment, found = candidate.deployment, figures(candidate)
    layout, gpu = deployment.layout, deployment.gpu
    cache, temporaries = candidate.memory.cache, found["temporaries"]
    rows, bars = [], []
    for stage in range(layout.num_stages):
        kinds = weight_bytes(deployment, stage)
        layers = sum(kinds[kind] for kind in KINDS if kind not in OUTSIDE)
        outside = sum(kinds[kind] for kind in OUTSIDE)
        total = temporaries.value + Band.exactly(layers + outside + cache)
        rows.append(
            (
                gpus_text(stage, layout.num_ranks),
                counted(layers),
                counted(outside),
                counted(cache, "bytes", "what the target leaves of the memory"),
                temporaries,
                Figure(total, "bytes", temporaries.evidence, "sum of the row"),
                Figure(total * (1 / gpu.memory_bytes), "", temporaries.evidence, "sum of the row"),
            )
        )
        bars += [(layers, outside, cache, temporaries.value.expected)] * layout.num_ranks
    cells = found["KV cache per token"], found["KV capacity of a replica"]
    names = ("layers", "embedding and head", "room for KV cache", "temporaries")
    gigabytes = {name: [round(bar[i] / 1e9, 6) for bar in bars] for i, name in enumerate(names)}
    limits = {"memory of the GPU": gpu.memory_bytes / 1e9}
    if share is not None:
        limits[f"limit ({100 * share:g} %)"] = share * gpu.memory_bytes / 1e9
    gpus = [f"GPU {number}" for number in range(len(bars))]
    plot = Plot(
        "memory_by_gpu",
        "Memory by GPU",
        {"gpus": gpus, "gigabytes": gigabytes, "limits_gigabytes": limits},
        draw("memory by GPU", lambda: stacked(gpus, gigabytes, "memory (GB)", limits)),
    )
    return Section(
        "memory",
        "Memory of each GPU",
        (
            f"Each {gpu.name} has {gpu.memory_bytes / 1e9:.1f} GB "
            f"({gpu.source_of('memory_bytes')}). The KV cache has the room that "
            "weights and temporaries leave of the allowed share; the server takes no more of it "
            "than `--max-num-seqs` sequences of `--max-model-len` tokens can fill.",
        ),
        (
            Table(
                "memory",
                ("GPUs", *names, "total", "share of memory"),
                tuple(rows),
            ),
            Table("kv", ("KV cache for each token and GPU", "capacity of a replica"), (cells,)),
        ),
        (plot,),
    )


def balance_figures(deployment: Deployment) -> dict[str, Figure]:
    """How far the GPUs differ: the largest less the smallest, as a share of the largest."""
    config, layout = deployment.config, deployment.layout
    stages = range(layout.num_stages)
    kinds = [weight_bytes(deployment, stage) for stage in stages]
    held = [sum(each.values()) for each in kinds]
    used = [sum(each.values()) - each["padding"] for each in kinds]
    layers = [
        sum(layer is not None for layer in own)
        for own in split_layers(config.num_layers, layout.num_stages)
    ]
    return {
        "memory of weights and cache": _spread(held, "equal arrays on all GPUs; padding counts"),
        "weights in use": _spread(used, TABLE),
        "layers, and so products and attention": _spread(layers, "layers of each stage"),
    }


def counted(value: float, unit: str = "bytes", source: str = TABLE) -> Figure:
    """A figure without doubt, by arithmetic."""
    return Figure(Band.exactly(value), unit, Evidence.ARITHMETIC, source)


def gpus_text(stage: int, num_ranks: int) -> str:
    """The GPUs of a stage: "0, 1"."""
    first = stage * num_ranks
    return ", ".join(str(first + rank) for rank in range(num_ranks))


def _heads_text(num_kv_heads: int, num_ranks: int) -> str:
    if num_ranks > num_kv_heads:
        return f"1 of {num_kv_heads}, in {num_ranks // num_kv_heads} copies"
    return f"{num_kv_heads // num_ranks} of {num_kv_heads}"


def _spread(values: list[int], source: str) -> Figure:
    return counted((max(values) - min(values)) / max(values), "", source)
