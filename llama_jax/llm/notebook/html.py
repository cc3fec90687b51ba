"""The HTML of `LLM` and `Completion` in a notebook.

All text is escaped. Text has the page's own color and nothing has a background, so that it is
readable on light and dark pages.
"""

from html import escape
from itertools import groupby

from llama_jax.engine.interface import DeviceInfo, EngineInfo, Stats
from llama_jax.terminal.units import bytes_text, layers_text

_LINE = "1px solid rgba(128, 128, 128, 0.5)"
_CELL = f"border: {_LINE}; padding: 0.3em 0.7em; text-align: left; vertical-align: top"
_FAINT = "opacity: 0.7"
_TEXT = "white-space: pre-wrap; overflow-wrap: anywhere"
_BOX = f"border-left: 3px solid currentColor; padding-left: 0.7em; margin: 0.3em 0; {_TEXT}"


def completion_html(
    *,
    prompt: str | None,
    num_prompt_tokens: int,
    text: str,
    num_tokens: int,
    finish_reason: str,
    error: str | None,
) -> str:
    """The HTML of a `Completion`. The arguments are its attributes, with counts for token ids."""
    asked = f"{num_prompt_tokens:,} token ids" if prompt is None else prompt
    facts = f"{num_tokens:,} tokens after {num_prompt_tokens:,} of prompt, finish reason "
    failure = "" if error is None else f'<div role="alert"><b>Error:</b> {escape(error)}</div>'
    return (
        f'<div style="max-width: 60em"><div style="{_FAINT}; {_TEXT}">{escape(asked)}</div>'
        f'<div style="{_BOX}">{escape(text)}</div>{failure}'
        f'<small style="{_FAINT}">{facts}<code>{escape(finish_reason)}</code></small></div>'
    )


def llm_html(info: EngineInfo, stats: Stats, *, ended: str | None, place: str) -> str:
    """The HTML of an `LLM`: state, limits, counters, and the layers and bytes of each device.

    Args:
      info: the engine's description of itself.
      stats: the engine's latest report.
      ended: one sentence on why the engine has ended; None while it runs.
      place: where the engine runs.
    """
    used = stats.pages_total - stats.pages_free
    now = (
        f"{stats.num_running:,} running, {stats.num_waiting:,} waiting, {used:,} of "
        f"{stats.pages_total:,} pages in use"
    )
    rows = {
        "state": ended or "ready",
        "engine": f"{place}; {info.dtype} on {info.platform}",
        "limits": f"{info.max_model_len:,} tokens per sequence, {info.max_num_seqs:,} sequences at "
        f"once, KV cache of {info.num_pages:,} pages of {info.page_size} tokens",
        "now": "" if ended else now,
        "so far": f"{stats.prompt_tokens:,} prompt tokens, {stats.generation_tokens:,} "
        f"generated, {stats.preemptions:,} preemptions",
    }
    facts = "".join(
        f'<tr><th style="{_CELL}">{name}</th><td style="{_CELL}">{escape(value)}</td></tr>'
        for name, value in rows.items()
        if value
    )
    return (
        f"<div><div><b>{escape(info.model)}</b> on the mesh {escape(info.mesh)}</div>"
        f'<table style="border-collapse: collapse; margin: 0.4em 0">{facts}</table>'
        f"{_mesh(info.devices)}</div>"
    )


def _mesh(devices: list[DeviceInfo]) -> str:
    """The devices as a table of stages and ranks."""
    stages = [list(group) for _, group in groupby(devices, lambda device: device.stage)]
    ranks = "".join(f'<th style="{_CELL}">rank {device.rank}</th>' for device in stages[0])
    rows = "".join(
        f'<tr><th style="{_CELL}">stage {stage[0].stage}<br>{layers_text(stage[0].layers)}</th>'
        + "".join(f'<td style="{_CELL}">{_device(device)}</td>' for device in stage)
        + "</tr>"
        for stage in stages
    )
    return (
        f'<table style="border-collapse: collapse"><tr><th style="{_CELL}"></th>{ranks}</tr>'
        f"{rows}</table>"
    )


def _device(device: DeviceInfo) -> str:
    return (
        f"{escape(device.name)}<br>"
        f'<span style="{_FAINT}">weights {bytes_text(device.weight_bytes)}<br>'
        f"KV cache {bytes_text(device.kv_bytes)}</span>"
    )
