"""What the server shows while it starts and when it is ready: on a terminal in colour and with
bars that move, elsewhere as plain lines."""

from collections.abc import Callable
from itertools import groupby
from types import TracebackType

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from llama_jax.engine.interface import DeviceInfo, EngineInfo, Progress

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_TITLES = {
    "starting": "Starting the engine",
    "loading": "Loading weights",
    "compiling": "Compiling programs",
}


class StartDisplay:
    """How far the start has come. Used as a context manager; call it with each `Progress`."""

    def __init__(self, console: Console) -> None:
        self._show: Callable[[Progress], None]
        self._bars: Bars | None = None
        if console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description:<20}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[detail]}"),
                console=console,
            )
            self._show = _MovingBars(self._bars)
        else:
            self._show = _PlainLines(console)

    def __enter__(self) -> "StartDisplay":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Shows one step."""
        self._show(progress)


class _MovingBars:
    """A bar for each phase; the phases follow one another."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.phase not in self._tasks:
            for earlier in self._bars.tasks:
                self._bars.update(earlier.id, completed=earlier.total, detail="")
            self._tasks[progress.phase] = self._bars.add_task(
                _TITLES[progress.phase], total=progress.total, detail=""
            )
        self._bars.update(
            self._tasks[progress.phase],
            completed=progress.done,
            total=progress.total,
            detail=progress.detail,
        )


class _PlainLines:
    """A line for each phase, and for each program, which takes seconds to minutes to compile."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""

    def __call__(self, progress: Progress) -> None:
        begins = progress.phase != self._phase
        self._phase = progress.phase
        title = _TITLES[progress.phase]
        if progress.phase == "compiling" and progress.done < progress.total:
            count = f"{progress.done + 1:.0f} of {progress.total:.0f}"
            self._line(f"{title}: {count} ({progress.detail}) ...")
        elif begins:
            about = progress.detail or f"{progress.total:.0f}"
            self._line(f"{title} ({about}) ...")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_ready(
    console: Console,
    info: EngineInfo,
    *,
    model: str,
    address: str,
    seconds: float,
    chat: bool,
    key: bool,
) -> None:
    """Prints what there is to know of a server that is ready: the mesh as a picture, memory, the
    KV pool, how long the start took, and a command to try.

    Args:
      console: where to.
      info: what the engine turned out to be.
      model: the name that it serves.
      address: "http://..." under which it is reached.
      seconds: since this process started.
      chat: whether the model can chat.
      key: whether requests must bring a key.
    """
    stages = [list(devices) for _, devices in groupby(info.devices, lambda d: d.stage)]
    shape = f"{_count(len(stages), 'stage')} x {_count(len(stages[0]), 'rank')}"
    text = Text("\n").append(model, "bold")
    text.append(f" in {info.dtype} on the mesh {info.mesh} ({shape}, {info.platform})")
    console.print(text)
    for index, devices in enumerate(stages):
        console.print(_stage(devices, next_stage=(index + 1) % len(stages)))
    console.print(_pool(info))
    console.print(_seconds(info, seconds))
    console.print()
    console.print(Text.assemble(("Ready", "bold green"), " at ", (address, "bold"), ". Try:"))
    console.print()
    # Left to the terminal to wrap: a line break of our own could not be pasted.
    command = curl_line(address, chat=chat, key=key)
    console.print(command, "\n", sep="", markup=False, highlight=False, soft_wrap=True)


def curl_line(address: str, *, chat: bool, key: bool) -> str:
    """A command for a shell that asks for a streamed answer."""
    if chat:
        path = "/v1/chat/completions"
        question = '"messages": [{"role": "user", "content": "What is a pipeline stage?"}]'
    else:
        path = "/v1/completions"
        question = '"prompt": "Once upon a time"'
    lines = [f"curl -N {address}{path}", "-H 'Content-Type: application/json'"]
    if key:
        lines.append("-H 'Authorization: Bearer YOUR-KEY'")
    lines.append(f"-d '{{\"stream\": true, {question}}}'")
    return " \\\n  ".join(lines)


def _stage(devices: list[DeviceInfo], next_stage: int) -> Panel:
    """One stage of the picture: its layers, its devices, and where its output goes."""
    width = max(len(device.name) for device in devices)
    lines = [
        Text.assemble(
            (f"{device.name:<{width}}", "bold"),
            f"   weights {size_text(device.weight_bytes):>10}",
            f"   KV pool {size_text(device.kv_bytes):>10}",
        )
        for device in devices
    ]
    onwards = f"↓ stage {next_stage}" if next_stage else "↑ sampled, and back to stage 0"
    return Panel(
        Text("\n").join(lines),
        title=f"stage {devices[0].stage}: {_layers(devices[0].layers)}",
        title_align="left",
        subtitle=onwards,
        subtitle_align="left",
        expand=False,
    )


def _layers(layers: list[int]) -> str:
    if not layers:
        return "no layers"
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {layers[0]} to {layers[-1]}"


def _pool(info: EngineInfo) -> Text:
    tokens = info.num_pages * info.page_size
    whole = tokens // info.max_model_len
    return Text(
        f"KV pool: {tokens:,} tokens, {_count(whole, 'sequence')} of full length "
        f"({info.max_model_len:,} tokens)"
    )


def _seconds(info: EngineInfo, seconds: float) -> Text:
    return Text(
        f"Started in {seconds:.1f} s (loading weights {info.load_seconds:.1f}, compiling "
        f"{_count(info.num_programs, 'program')} {info.compile_seconds:.1f})"
    )


def size_text(number: int) -> str:
    """Bytes with a unit of 1024: "1.5 GiB"."""
    power = 0
    while number >= 1024 ** (power + 1) and power < len(_BYTE_UNITS) - 1:
        power += 1
    return f"{number / 1024**power:.1f} {_BYTE_UNITS[power]}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")
