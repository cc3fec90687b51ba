"""A compiled deployment as JSON: the same bytes for the same compiler and inputs."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llama_jax.costs.figure import Evidence
from llama_jax.plan.compiled.checks import differences, missed
from llama_jax.plan.compiled.deployment import CONTEXT, CompiledDeployment
from llama_jax.plan.compiled.tick_figures import TickFigures

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin")
LARGEST = 5  # temporaries to show


def versions() -> dict[str, str]:
    """The versions of the compiler."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def as_json(compiled: CompiledDeployment) -> dict[str, Any]:
    """Everything that was read; sizes are bytes on each GPU."""
    deployment, sizes = compiled.deployment, compiled.programs.sizes
    return {
        "evidence": Evidence.COMPILED,
        "compiler": versions(),
        "gpu": deployment.gpu.name,
        "layout": deployment.layout.mesh,
        "weights": deployment.weights,
        "kv_cache_dtype": deployment.kv_dtype,
        "sizes": {
            "sequences": sizes.num_slots,
            "pages": sizes.num_pages,
            "page_tokens": sizes.page_size,
            "sequence_pages": sizes.pages_per_sequence,
            "row_buckets": list(sizes.row_buckets),
            "chunk_buckets": list(sizes.chunk_buckets),
        },
        "bytes_per_gpu": compiled.memory._asdict()
        | {"total": sum(compiled.memory), "allowed": compiled.allowed},
        "arithmetic_minus_compiler_bytes": {
            name: difference.bytes for name, difference in differences(compiled).items()
        },
        "kv_tokens": compiled.kv_tokens,
        "kv_tokens_that_fit": compiled.fitting_kv_tokens,
        "traffic_context_tokens": CONTEXT,
        "ticks": [tick_as_json(tick) for tick in compiled.ticks],
        "sampling_temporary_bytes": compiled.sampling,
        "missed": missed(compiled),
    }


def tick_as_json(tick: TickFigures) -> dict[str, Any]:
    """The figures of one program."""
    return {
        **tick.bucket._asdict(),
        "bytes": tick.memory._asdict(),
        "kernels": tick.kernels,
        "kernels_in_graphs": tick.kernels_in_graphs,
        "graphs": tick.graphs,
        "kernels_per_layer": tick.kernels_per_layer,
        "host_loops": tick.host_loops,
        "read_bytes": tick.read,
        "written_bytes": tick.written,
        "ideal_bytes": sum(tick.ideal),
        "collectives": [each._asdict() for each in tick.collectives],
        "collectives_expected": [each._asdict() for each in tick.expected],
        "copies": tick.copies,
        "largest_temporaries": [buffer._asdict() for buffer in tick.temporaries[:LARGEST]],
    }
