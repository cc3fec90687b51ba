"""Shows the outcome of a command to people and to scripts."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from convert.commands import Converted, Verified
from convert.inspection import GROUPS, DeviceShare, Inspection
from llama_jax.config import Llama3Scaling, LlamaConfig, YarnScaling
from llama_jax.config.rope_scaling import rope_type
from llama_jax.terminal.units import bytes_text, count_text, duration_text

_LAYOUTS = {
    "orbax": "Orbax (this project's)",
    "huggingface": "Hugging Face",
    "meta": "Meta's original release",
    "gguf": "GGUF",
}
_MAX_DIFFERENCES = 20  # shown


def show_converted(console: Console, outcome: Converted) -> None:
    """Prints the outcome of a conversion."""
    report = outcome.report
    _say(
        console,
        f"{outcome.destination} is complete: {bytes_text(report.bytes)} of weights in "
        f"{_stored_as(report.config)}, from {bytes_text(outcome.source_bytes)}"
        f"{_with_adapter(outcome)}.",
    )
    written = report.bytes - report.resumed
    if written:
        line = f"Wrote {_pace(written, report.seconds)}"
        if report.resumed:
            line += f"; an earlier run had written {bytes_text(report.resumed)}"
        _say(console, f"{line}.")
    else:
        _say(console, "An earlier run had written everything.")
    if report.verify_seconds is not None:
        _say(console, f"Verified against the source in {duration_text(report.verify_seconds)}.")
    if report.quantization_error:
        console.print(error_table(report.quantization_error))
    if (found := outcome.divergence) is not None:
        _say(
            console,
            f"On a text of {found.tokens:,} tokens, the mean divergence from the source is "
            f"{found.mean:.5f} nats per token (maximum {found.largest:.5f}); the most likely next "
            f"token is the same for {found.agreement:.1%} of them.",
        )


def show_verified(console: Console, outcome: Verified) -> None:
    """Prints the differences between two checkpoints."""
    found = outcome.differences
    for difference in found[:_MAX_DIFFERENCES]:
        _say(console, difference)
    if len(found) > _MAX_DIFFERENCES:
        more = len(found) - _MAX_DIFFERENCES
        _say(console, f"... and {more} more (--json lists all).")
    verdict = "differs from" if found else "matches"
    _say(
        console,
        f"{outcome.destination} {verdict} {outcome.source}{_with_adapter(outcome)} (compared in "
        f"{duration_text(outcome.seconds)}).",
    )


def show_inspection(console: Console, outcome: Inspection) -> None:
    """Prints the description of a checkpoint and its distribution over a mesh."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, value in _facts(outcome):
        grid.add_row(name, Text(value))
    _say(console, f"{outcome.path}\n")
    console.print(grid)
    if outcome.quantization_error:
        console.print(error_table(outcome.quantization_error))
    if outcome.devices:
        console.print()
        console.print(_device_table(outcome.devices))


def error_table(errors: dict[str, float]) -> Table:
    """Returns a table of quantization errors by kind of matrix."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("quantized")
    table.add_column("relative error", justify="right")
    for kind, error in errors.items():
        table.add_row(kind, f"{error:.3%}")
    return table


def converted_json(outcome: Converted) -> dict[str, Any]:
    """Returns the outcome of a conversion as JSON."""
    report = outcome.report
    return {
        "source": outcome.source,
        "adapter": outcome.adapter,
        "destination": str(outcome.destination),
        "dtype": report.config.dtype,
        "quantization": report.config.quantization and report.config.quantization.format,
        "source_bytes": outcome.source_bytes,
        "bytes": report.bytes,
        "resumed_bytes": report.resumed,
        "seconds": report.seconds,
        "verify_seconds": report.verify_seconds,
        "quantization_error": report.quantization_error,
        "divergence": outcome.divergence and asdict(outcome.divergence),
    }


def verified_json(outcome: Verified) -> dict[str, Any]:
    """Returns the outcome of a comparison as JSON."""
    return {
        "source": outcome.source,
        "adapter": outcome.adapter,
        "destination": str(outcome.destination),
        "differences": outcome.differences,
        "seconds": outcome.seconds,
    }


def inspection_json(outcome: Inspection) -> dict[str, Any]:
    """Returns the description of a checkpoint as JSON."""
    config = outcome.config
    return {
        "path": str(outcome.path),
        "layout": outcome.layout,
        "formats": outcome.formats,
        "num_files": outcome.num_files,
        "config": config.to_dict(),
        "quantization": config.quantization and asdict(config.quantization),
        "quantized_by": outcome.quantized_by,
        "quantization_error": outcome.quantization_error,
        "num_parameters": outcome.num_parameters,
        "bytes": sum(outcome.bytes.values()),
        "bytes_by_dtype": outcome.bytes,
        "devices": [
            {
                "stage": share.stage,
                "rank": share.rank,
                "layers": list(share.layers),
                "padding_layers": share.padding_layers,
                "heads": list(share.heads),
                "kv_heads": list(share.kv_heads),
                "bytes": sum(share.bytes.values()),
                "bytes_by_group": share.bytes,
            }
            for share in outcome.devices
        ],
    }


def _with_adapter(outcome: Converted | Verified) -> str:
    return f" with the adapter {outcome.adapter}" if outcome.adapter else ""


def _facts(outcome: Inspection) -> Iterator[tuple[str, str]]:
    config = outcome.config
    yield "layout", _LAYOUTS[outcome.layout]
    formats = outcome.formats.items()
    yield "formats", ", ".join(f"{name} {version or ''}".strip() for name, version in formats)
    total = bytes_text(sum(outcome.bytes.values()))
    yield "weights", f"{total} in {count_text(outcome.num_files, 'file')}"
    yield "dtypes", ", ".join(f"{bytes_text(size)} {name}" for name, size in outcome.bytes.items())
    if config.quantization is not None:
        yield "quantization", _quantization(outcome)
    yield "parameters", f"{outcome.num_parameters:,}"
    yield "layers", str(config.num_layers)
    yield "width", f"{config.embed_dim:,}, MLP {config.mlp_dim:,}"
    yield (
        "heads",
        f"{config.num_heads} of size {config.head_dim}, sharing {config.num_kv_heads} KV heads",
    )
    tied = "tied embedding and head" if config.tie_embeddings else "separate embedding and head"
    yield "vocabulary", f"{config.vocab_size:,} ({tied})"
    yield "context", f"{config.max_context:,} tokens"
    yield "rotary", _rotary(config)
    yield "norms", f"epsilon {config.norm_eps:g}"
    yield "EOS ids", ", ".join(map(str, config.eos_token_ids)) or "none"


def _quantization(outcome: Inspection) -> str:
    quantization = outcome.config.quantization
    assert quantization is not None
    text = f"{quantization.format}, all matrices of the layers"
    if quantization.plain:
        text += f" but {len(quantization.plain)}"
    if quantization.format not in ("int8", "fp8"):
        size = quantization.group_size
        text += ", one group per row" if size == -1 else f", groups of up to {size}"
    return text + (f" (by {outcome.quantized_by})" if outcome.quantized_by else "")


def _rotary(config: LlamaConfig) -> str:
    text = f"base {config.rope_theta:,.0f}"
    scaling = config.rope_scaling
    if scaling is None:
        return text
    text += f", {rope_type(scaling)} scaling by {scaling.factor:g}"
    if isinstance(scaling, Llama3Scaling | YarnScaling):
        text += f" from {scaling.original_max_position_embeddings:,} tokens"
    return text


def _device_table(devices: list[DeviceShare]) -> Table:
    largest = max(sum(share.bytes.values()) for share in devices)
    power, unit = (9, "GB") if largest >= 10**9 else (6, "MB")
    caption = f"weights in {unit}"
    if any(share.padding_layers for share in devices):
        caption += "; +1: one padding layer of zeros"
    # No padding, so that the table fits into 80 columns.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption=caption)
    for name in ("stage", "rank", "layers", "heads", "KV", *GROUPS, "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for share in devices:
        padding = f" +{share.padding_layers}" if share.padding_layers else ""
        sizes = (*share.bytes.values(), sum(share.bytes.values()))
        table.add_row(
            str(share.stage),
            str(share.rank),
            _numbers(share.layers) + padding,
            _numbers(share.heads),
            _numbers(share.kv_heads),
            *(f"{size / 10**power:.3f}" if size else "-" for size in sizes),
        )
    return table


def _numbers(numbers: range) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers)) or "none"
    return f"{numbers[0]}-{numbers[-1]}"


def _stored_as(config: LlamaConfig) -> str:
    if config.quantization is None:
        return config.dtype
    return f"{config.quantization.format} and {config.dtype}"


def _pace(size: int, seconds: float) -> str:
    rate = f" ({bytes_text(size / seconds)}/s)" if seconds else ""
    return f"{bytes_text(size)} in {duration_text(seconds)}{rate}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
