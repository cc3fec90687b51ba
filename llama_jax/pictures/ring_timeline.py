"""The ring over time: which packet was in which stage."""

from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from llama_jax.engine.recording import PacketRecord, Recording
from llama_jax.pictures.cells import label_step, write_in_cell
from llama_jax.pictures.style import GRAY, PALETTE, WIDTH, Picture, drawing, inches, ink, wrapped

DEFAULT_TICKS = 40  # more leave no room for text in the cells
MAX_LEGEND = 12  # requests named in the legend


def timeline(
    recording: Recording,
    ticks: slice | None = None,
    by: Literal["microbatch", "request"] = "microbatch",
    *,
    save: str | Path | None = None,
) -> Picture:
    """Draws the packet in each stage at each tick of a recorded run.

    By microbatch, each cell shows the number of decode rows in the packet, then "+" and the prompt
    tokens of its chunk. By request, a cell has one strip for each request in the packet. The cell
    of an idle stage is empty.

    Args:
      recording: from `llama_jax.engine.recording.record`.
      ticks: a slice of ticks, counted from the start of the recording; None for the first 40.
      by: what the colors stand for.
      save: a file to write.

    Raises:
      ValueError: the slice has a step or selects no ticks, or `by` is unknown.
    """
    chosen = choose_ticks(recording, slice(0, DEFAULT_TICKS) if ticks is None else ticks)
    if by not in ("microbatch", "request"):
        raise ValueError(f'by must be "microbatch" or "request", got {by!r}.')
    stages = range(recording.num_stages)
    width = max(min(WIDTH, 0.45 * len(chosen) + 2.5), 5.0)
    with drawing(width, 0.5 * len(stages) + 2.1, save) as picture:
        axes = picture.add_subplot()
        axes.set(xlim=(chosen[0] - 0.5, chosen[-1] + 0.5), ylim=(stages[-1] + 0.5, -0.5))
        axes.set(xlabel="tick of the recording", ylabel="stage")
        axes.set_yticks(stages)
        axes.spines[:].set_visible(False)
        axes.tick_params(axis="y", length=0)
        picture.suptitle(wrapped(_title(recording, chosen, by), width))
        time_axis(axes, recording, chosen, width - 0.6)
        texts = _cells(axes, recording, chosen, by)
        _legend(picture, recording, chosen, by)
        across, down = inches(axes)
        across, down = across / len(chosen), down / len(stages)
        for x, y, text, color, part in texts:
            write_in_cell(axes, x, y, text, (across, 0.86 * down * part), color, largest=8)
    return picture


def choose_ticks(recording: Recording, ticks: slice) -> range:
    """The ticks that a slice selects.

    Raises:
      ValueError: the slice has a step, or selects no ticks.
    """
    if not isinstance(ticks, slice) or ticks.step not in (None, 1):
        raise ValueError("ticks must be a slice without a step, such as slice(10, 40).")
    chosen = range(len(recording.ticks))[ticks]
    if not chosen:
        raise ValueError(
            f"{ticks} selects none of the {len(recording.ticks)} recorded ticks: choose others, or "
            "run requests inside `with record(...)`."
        )
    return chosen


def time_axis(axes: Axes, recording: Recording, chosen: range, width: float) -> None:
    """Labels ticks by number below and by starting time above; `width` is in inches."""
    axes.set_xticks(chosen[:: label_step(len(chosen), width, 0.45)])
    if not recording.timed:
        return
    above = axes.secondary_xaxis("top")
    places = chosen[:: label_step(len(chosen), width, 0.7)]
    digits = 0 if recording.ticks[chosen[-1]].start > 0.1 else 1
    above.set_xticks(places, [f"{1e3 * recording.ticks[t].start:.{digits}f}" for t in places])
    above.set_xlabel("time since the start of the recording (ms)")
    above.spines[:].set_visible(False)


def _cells(
    axes: Axes, recording: Recording, chosen: range, by: str
) -> list[tuple[float, float, str, str, float]]:
    """Draws the cells; returns (x, y, text, color, fraction of the cell's height) of each text."""
    colors = _request_colors(recording)
    texts: list[tuple[float, float, str, str, float]] = []
    for tick in chosen:
        for stage in range(recording.num_stages):
            packet = recording.holds(stage, tick)
            if not packet:
                _box(axes, tick, stage - 0.43, 0.86, "none", linestyle=":")
            elif by == "microbatch":
                color = PALETTE[recording.microbatch(stage, tick) % len(PALETTE)]
                _box(axes, tick, stage - 0.43, 0.86, color)
                texts.append((tick, stage, packet_text(packet), ink(color), 1.0))
            else:
                requests = sorted(packet.tokens_by_request)
                part = 1 / len(requests)
                for place, request_id in enumerate(requests):
                    color = colors[request_id]
                    top = stage - 0.43 + 0.86 * place * part
                    _box(axes, tick, top, 0.86 * part, color)
                    texts.append((tick, top + 0.43 * part, f"{request_id}", ink(color), part))
    return texts


def _box(axes: Axes, tick: int, top: float, height: float, color: str, **line: Any) -> None:
    box = Rectangle((tick - 0.5, top), 1, height, facecolor=color, edgecolor=GRAY, linewidth=0.6)
    box.set(**line)
    axes.add_patch(box)


def packet_text(packet: PacketRecord) -> str:
    """For example "3" for three decode rows, "+64" for a chunk of 64 tokens, or both."""
    parts = [str(len(packet.rows))] if packet.rows else []
    if packet.tiles:
        parts.append(f"+{packet.chunk_tokens}")
    return "\n".join(parts)


def _request_colors(recording: Recording) -> dict[int, str]:
    ids = recording.request_ids
    return {request_id: PALETTE[i % len(PALETTE)] for i, request_id in enumerate(ids)}


def _legend(picture: Picture, recording: Recording, chosen: range, by: str) -> None:
    if by == "microbatch":
        named = [(f"packet {m}", PALETTE[m % len(PALETTE)]) for m in range(recording.num_stages)]
    else:
        stages = range(recording.num_stages)
        here = {r for t in chosen for s in stages for r in recording.holds(s, t).tokens_by_request}
        colors = _request_colors(recording)
        named = [(f"request {r}", colors[r]) for r in recording.request_ids if r in here]
    more = len(named) - MAX_LEGEND
    patches = [Patch(facecolor=c, edgecolor=GRAY, label=name) for name, c in named[:MAX_LEGEND]]
    if more > 0:
        patches.append(Patch(visible=False, label=f"and {more} more"))
    patches.append(Patch(facecolor="none", edgecolor=GRAY, linestyle=":", label="empty"))
    across = int(picture.get_figwidth() / 1.2)
    picture.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), across))


def _title(recording: Recording, chosen: range, by: str) -> str:
    share = recording.busy_share(slice(chosen.start, chosen.stop))
    seconds = sum(recording.ticks[t].seconds for t in chosen) / len(chosen)
    which = "1 tick" if len(chosen) == 1 else f"{len(chosen):,} ticks"
    if len(chosen) < len(recording.ticks):
        which = f"ticks {chosen[0]} to {chosen[-1]} of {len(recording.ticks):,}"
    meaning = "each cell: decode rows, + prompt tokens"
    if by == "request":
        meaning = "each cell: the requests in the packet"
    if recording.timed:
        which += f", {1e3 * seconds:.1f} ms each"
    return f"Stages busy {100 * share:.0f}% of {which}; {meaning}"
