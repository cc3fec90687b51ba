"""What the server prints when it is ready: the mesh, its memory, and a command to try."""

import shlex
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from llama_jax.engine.interface import DeviceInfo, EngineInfo
from llama_jax.terminal.units import bytes_text, count_text, duration_text, layers_text


def show_ready(
    console: Console,
    info: EngineInfo,
    *,
    model: str,
    address: str,
    seconds: float,
    chat: bool,
    key: bool,
    unix_socket: Path | None = None,
) -> None:
    """Prints the mesh as a picture, its memory, the start-up time, and a command to try.

    Args:
      console: where to print.
      info: the engine's description of itself.
      model: the name that requests give the model.
      address: the server's URL, "http://...".
      seconds: time since this process started.
      chat: whether the model has a chat template.
      key: whether requests need an API key.
      unix_socket: the socket that the server listens on, if it is not one of TCP.
    """
    stages = [list(devices) for _, devices in groupby(info.devices, lambda d: d.stage)]
    shape = f"{count_text(len(stages), 'stage')} x {count_text(len(stages[0]), 'rank')}"
    text = Text("\n").append(model, "bold")
    text.append(f" in {info.dtype} on the mesh {info.mesh} ({shape}, {info.platform})")
    console.print(text)
    for index, devices in enumerate(stages):
        onwards = (index + 1) % len(stages)
        console.print(_stage(devices, onwards, ascii_only=console.options.ascii_only))
    console.print(_pool(info))
    console.print(_seconds(info, seconds))
    console.print()
    console.print(
        Text.assemble(
            ("Ready", "bold green"),
            " at ",
            (str(unix_socket or address), "bold"),
            ". Try:" if unix_socket else " (open it in a browser). Or try:",
        )
    )
    console.print()
    # The terminal wraps it: with a line break of our own it could not be pasted.
    command = curl_line(address, chat=chat, key=key, unix_socket=unix_socket)
    console.print(command, "\n", sep="", markup=False, highlight=False, soft_wrap=True)


def curl_line(address: str, *, chat: bool, key: bool, unix_socket: Path | None = None) -> str:
    """A shell command that asks the server for a streamed answer."""
    if chat:
        path = "/v1/chat/completions"
        question = '"messages": [{"role": "user", "content": "What is a pipeline stage?"}]'
    else:
        path = "/v1/completions"
        question = '"prompt": "Once upon a time"'
    where = f"--unix-socket {shlex.quote(str(unix_socket))} " if unix_socket else ""
    lines = [f"curl -N {where}{address}{path}", "-H 'Content-Type: application/json'"]
    if key:
        lines.append("-H 'Authorization: Bearer YOUR-KEY'")
    lines.append(f"-d '{{\"stream\": true, {question}}}'")
    return " \\\n  ".join(lines)


def _stage(devices: list[DeviceInfo], next_stage: int, ascii_only: bool) -> Panel:
    """Draws one stage: its layers, its devices, and where its output goes."""
    width = max(len(device.name) for device in devices)
    lines = [
        Text.assemble(
            (f"{device.name:<{width}}", "bold"),
            f"   weights {bytes_text(device.weight_bytes):>10}",
            f"   KV pool {bytes_text(device.kv_bytes):>10}",
        )
        for device in devices
    ]
    down, up = ("v", "^") if ascii_only else ("↓", "↑")
    onwards = f"{down} stage {next_stage}" if next_stage else f"{up} sampled, and back to stage 0"
    return Panel(
        Text("\n").join(lines),
        title=f"stage {devices[0].stage}: {layers_text(devices[0].layers)}",
        title_align="left",
        subtitle=onwards,
        subtitle_align="left",
        expand=False,
    )


def _pool(info: EngineInfo) -> Text:
    tokens = info.num_pages * info.page_size
    whole = tokens // info.max_model_len
    return Text(
        f"KV pool: {tokens:,} tokens in {info.kv_cache_dtype}, {count_text(whole, 'sequence')} of "
        f"full length ({info.max_model_len:,} tokens)"
    )


def _seconds(info: EngineInfo, seconds: float) -> Text:
    return Text(
        f"Started in {duration_text(seconds)} (loading weights {duration_text(info.load_seconds)}, "
        f"compiling {info.programs_at_start} of {count_text(info.num_programs, 'program')} "
        f"{duration_text(info.compile_seconds)})"
    )
