"""Reads the Mosaic GPU kernels in a lowered program."""

import re
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.interpreters import mlir
from jax._src.lib import mosaic_gpu_dialect
from jax._src.lib.mlir import ir

CORE_BYTES = 228 * 1024  # of shared memory, on each multiprocessor of an H100 or H200
BLOCK_BYTES = 1024  # that CUDA takes of them for each thread block


def shared_memory(lowered: jax.stages.Lowered) -> list[int]:
    """The bytes of shared memory that each kernel of a program asks for, per thread block."""
    module = lowered.compiler_ir("stablehlo")
    calls = [op for op in _operations(module.operation) if op.name == "stablehlo.custom_call"]
    kernels = [op for op in calls if "mosaic_gpu" in str(op.attributes["call_target_name"])]
    return [_dynamic_shared_memory(_text(op)) for op in kernels]


def blocks_per_core(shared_bytes: int) -> int:
    """The thread blocks that fit on a multiprocessor."""
    return CORE_BYTES // (shared_bytes + BLOCK_BYTES)


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _operations(inner.operation)


def _text(call: Any) -> str:
    code = ir.StringAttr(call.attributes["mhlo.backend_config"]["module"]).value_bytes
    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    with context:
        mosaic_gpu_dialect.register_dialect(context)
        return str(ir.Module.parse(code))


def _dynamic_shared_memory(kernel: str) -> int:
    """The last operand of `gpu.launch` is the size, a constant."""
    (operands,) = re.findall(r'gpu\.launch"\(([^)]*)\)', kernel)
    name = operands.split(", ")[-1]
    (size,) = re.findall(rf'{name} = "[\w.]*constant"\(\).*?value = (\d+) : i32', kernel)
    return int(size)
