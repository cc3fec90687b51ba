"""The ways to lay a model on GPUs. Imports no JAX."""

import argparse
from collections.abc import Iterator

from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import Layout
from llama_jax.weights.split import ShardingError, check_split
from sharding.errors import UserError
from sharding.mesh_name import MeshError, parse_mesh

MAX_GPUS = 4096  # of a plan
HOST_GPUS = 8  # of a mesh: the engine runs on one host, and replicas on one or many


class LayoutError(UserError):
    """A layout that the model, the host or the number of GPUs does not allow."""


def mesh_argument(text: str) -> tuple[int, int]:
    """The stages and ranks of a layout on the command line, such as "4x2".

    Raises:
      ArgumentTypeError: it has another form.
    """
    try:
        return parse_mesh(text)
    except MeshError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def check_layout(config: LlamaConfig, layout: Layout) -> None:
    """Checks that a model can be laid out in a way.

    Raises:
      LayoutError: there are more stages than layers, more GPUs in the mesh than in a host, or more
        in all replicas than in a plan.
      ShardingError: the ranks cannot share the model evenly.
    """
    if layout.num_stages > config.num_layers:
        raise LayoutError(
            f"{layout.num_stages} stages are more than the model's {config.num_layers} layers: "
            f"use at most {config.num_layers} stages."
        )
    check_split(config, layout.num_ranks)
    each = layout.num_stages * layout.num_ranks
    if each > HOST_GPUS:
        raise LayoutError(
            f"A mesh of {layout.num_stages}x{layout.num_ranks} takes {each} GPUs, and a replica "
            f"runs on one host, of at most {HOST_GPUS}: use a smaller mesh, and replicas of it; if "
            "the model does not fit one, weights in fewer bits, or GPUs with more memory."
        )
    _check_number(layout.gpus)


def meshes(config: LlamaConfig, most: int = HOST_GPUS) -> Iterator[Layout]:
    """The layouts of one replica on up to `most` GPUs, by GPUs, then by stages."""
    for gpus in range(1, min(most, HOST_GPUS) + 1):
        for num_stages in range(1, gpus + 1):
            if gpus % num_stages:
                continue
            layout = Layout(num_stages, gpus // num_stages)
            if _is_possible(config, layout):
                yield layout


def layouts(config: LlamaConfig, gpus: int) -> list[Layout]:
    """Every layout that uses exactly this many GPUs.

    Raises:
      LayoutError: there is none, or there are too many GPUs.
    """
    _check_number(gpus)
    found = [
        mesh._replace(replicas=gpus // mesh.gpus)
        for mesh in meshes(config, gpus)
        if gpus % mesh.gpus == 0
    ]
    if not found:
        raise LayoutError(f"The model cannot be laid out on {gpus} GPUs.")
    return found


def _check_number(gpus: int) -> None:
    if gpus > MAX_GPUS:
        raise LayoutError(f"{gpus:,} GPUs are more than the {MAX_GPUS:,} of a plan.")


def _is_possible(config: LlamaConfig, layout: Layout) -> bool:
    try:
        check_layout(config, layout)
    except (LayoutError, ShardingError):
        return False
    return True
