"""Audits the compiled Llama-3-70B programs for 8 x H100, without a GPU: `make audit`.

XLA's GPU compiler compiles for a described target (`h100.textproto`), so these are the programs
that the machine would run. The audit checks the bytes of arguments and temporaries per device, the
collectives, and the copies as large as one layer's K. Weights and cache per device are summed from
the shapes of the shards. Nothing is timed. Needs jax[cuda12], which contains the GPU compiler.
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.hlo import count_ops, large_copies
from bench.machine import describe
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.model.controls import CONTROL_WIDTH
from llama_jax.quantization import QUANTIZERS
from llama_jax.ring.choosing import sample_step
from llama_jax.ring.kv_cache import page_bytes
from llama_jax.ring.packet import packet_size
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.steps import (
    LOGITS_SPEC,
    StepOutput,
    decode_step,
    prefill_step,
    state_shapes,
)
from llama_jax.weights.placement import Params, param_shapes
from sharding.axes import AXES
from sharding.memory import shard_bytes
from sharding.partition import round_up, split_layers

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NUM_STAGES, NUM_RANKS = 4, 2
ROWS, CHUNKS, CONTEXT, PAGE_SIZE, TILE = 64, (0, 128, 512), 4096, 16, 64
KV_BYTES = 20_000_000_000  # on each device
MAX_TEMPORARIES = 1_000_000_000
MAX_TOTAL = 68_000_000_000  # of a device's 80 GB: the deployment's claim
DTYPE = jnp.bfloat16
REPLICATED = P()
COLLECTIVES = ("all-reduce", "collective-permute", "all-gather")


def target_mesh() -> Mesh:
    """The 4 x 2 mesh over eight described devices, which need not exist."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h100",
        topology=f"1x1x{NUM_STAGES * NUM_RANKS}",
        target_config=(HERE / "h100.textproto").read_text(),
    )
    grid = np.array(topology.devices).reshape(NUM_STAGES, NUM_RANKS)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def deployment_sizes(config: LlamaConfig, mesh: Mesh) -> RingSizes:
    """The sizes of the reference deployment."""
    return RingSizes(
        num_slots=ROWS * NUM_STAGES,
        num_pages=KV_BYTES // page_bytes(config, mesh, PAGE_SIZE, DTYPE),
        page_size=PAGE_SIZE,
        pages_per_sequence=CONTEXT // PAGE_SIZE,
        row_buckets=(ROWS,),
        chunk_buckets=CHUNKS,
        tile=TILE,
    )


def weight_bytes(config: LlamaConfig, params: Params) -> dict[str, int]:
    """Bytes of weights per device, and how many of them are padding."""
    total = sum(map(shard_bytes, jax.tree.leaves(params)))
    devices = NUM_STAGES * NUM_RANKS
    tables = [table for table in (params.embedding, params.lm_head) if table is not None]
    vocab_rows = sum(table.shape[0] - config.vocab_size for table in tables)
    layers = sum(stage.count(None) for stage in split_layers(config.num_layers, NUM_STAGES))
    one_layer = sum(map(shard_bytes, jax.tree.leaves(params.layers[0])))
    return {
        "weights": total,
        "of which vocabulary padding": (
            vocab_rows * config.embed_dim * DTYPE.dtype.itemsize // devices
        ),
        "of which padding layers": layers * one_layer // NUM_STAGES,
    }


def audit_program(
    config: LlamaConfig, mesh: Mesh, sizes: RingSizes, bucket: Bucket, params: Params
) -> dict[str, Any]:
    """Compiles one program and reports its memory, collectives and copies."""
    if bucket.chunk:
        step = prefill_step(config, mesh, sizes, bucket.rows, bucket.chunk)
    else:
        step = decode_step(config, mesh, sizes, bucket.rows)
    packed = jax.ShapeDtypeStruct(
        (packet_size(sizes, bucket),),
        jnp.int32,
        sharding=NamedSharding(mesh, REPLICATED),
    )
    state = state_shapes(config, mesh, sizes, DTYPE)
    start = time.perf_counter()
    compiled = step.lower(params, state, packed).compile()
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    positions = len(params.layers)
    expected = Counter({"all-reduce": 2 * positions + 2, "collective-permute": 1, "all-gather": 1})
    found = count_ops(text)
    copies = large_copies(text, shard_bytes(state.cache.keys[0]))
    return {
        "rows": bucket.rows,
        "chunk": bucket.chunk,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "collectives": {name: found[name] for name in COLLECTIVES},
        "collectives_expected": dict(expected),
        "copies_as_large_as_one_layers_k": copies,
        "compile_seconds": round(seconds, 1),
        "holds": memory.temp_size_in_bytes <= MAX_TEMPORARIES
        and not copies
        and all(found[name] == expected[name] for name in COLLECTIVES),
    }


def audit_sampling(
    config: LlamaConfig, mesh: Mesh, sizes: RingSizes, bucket: Bucket
) -> dict[str, int]:
    """Compiles the second program of a tick, which runs if a row is not greedy."""
    n, devices = sizes.num_segments(bucket), NUM_STAGES * NUM_RANKS

    def array(shape: tuple[int, ...], dtype: Any, spec: P = REPLICATED) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    chosen = array((n,), jnp.int32)
    logits = array((n, round_up(config.vocab_size, devices)), jnp.float32, LOGITS_SPEC)
    tokens = array((sizes.num_slots,), jnp.int32)
    controls = array((n, CONTROL_WIDTH), jnp.int32)
    output = StepOutput(logits, chosen, chosen)
    compiled = sample_step(mesh).lower(tokens, output, controls).compile()
    return {"segments": n, "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}


def main() -> int:
    """Prints and writes the audit; returns the exit status, 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quantize", choices=QUANTIZERS, help="format of the layers' matrices")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    config, mesh = LlamaConfig.llama3_70b(), target_mesh()
    weights, file = "bfloat16", "audit_70b_8xh100"
    if args.quantize:
        weights, file = f"{args.quantize} and bfloat16", f"{file}_{args.quantize}"
        config = replace(config, quantization=Quantization(format=args.quantize))
    sizes, params = deployment_sizes(config, mesh), param_shapes(config, mesh, DTYPE)
    state = state_shapes(config, mesh, sizes, DTYPE)
    cache = sum(map(shard_bytes, jax.tree.leaves(state.cache)))
    weight_sizes = weight_bytes(config, params)
    programs = []
    for bucket in sizes.buckets():
        row = audit_program(config, mesh, sizes, bucket, params)
        programs.append(row)
        print(
            f"rows {row['rows']:>3}, chunk {row['chunk']:>4}: "
            f"temporaries {row['temporary_bytes'] / 1e9:.3f} GB, {row['collectives']}, "
            f"{len(row['copies_as_large_as_one_layers_k'])} large copies, "
            f"compiled in {row['compile_seconds']} s",
            flush=True,
        )
    sampling = audit_sampling(config, mesh, sizes, sizes.buckets()[-1])
    print(
        f"sampling {sampling['segments']} segments: "
        f"temporaries {sampling['temporary_bytes'] / 1e9:.3f} GB"
    )
    temporaries = max(row["temporary_bytes"] for row in [*programs, sampling])
    arguments = max(row["argument_bytes"] for row in programs)
    total = arguments + temporaries
    result = {
        "what": f"Llama-3-70B {weights} on 4 x 2 of 8 x H100 80 GB, compiled without a GPU",
        "versions": describe("jax", "jaxlib", "jax-cuda12-plugin")["versions"],
        "sizes": {"rows": ROWS, "context": CONTEXT, "page_size": PAGE_SIZE,
                  "pages": sizes.num_pages, "tokens": sizes.num_pages * PAGE_SIZE},
        "bytes_per_device": {**weight_sizes, "kv_cache": cache, "arguments": arguments,
                             "temporaries": temporaries, "total": total},
        "total_within_68_gb": total <= MAX_TOTAL,
        "programs": programs,
        "sampling": sampling,
        "holds": total <= MAX_TOTAL and all(row["holds"] for row in programs),
    }  # fmt: skip
    print(f"{'bytes per device':<32}")
    for name, count in result["bytes_per_device"].items():
        print(f"  {name:<28} {count / 1e9:>8.3f} GB")
    output = args.output or RESULTS / f"{file}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print("all checks passed" if result["holds"] else "a check FAILED")
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
