"""The pages of the KV cache by request over time."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from llama_jax.engine.recording import Recording
from llama_jax.pictures.ring_timeline import choose_ticks, time_axis
from llama_jax.pictures.style import GRAY, PALETTE, WIDTH, Picture, drawing, wrapped

MAX_AREAS = len(PALETTE)  # further requests share one area
MIN_PEAK = 0.2  # of the pool: if the peak is lower, the axis ends above the peak, not the pool


def page_occupancy(
    recording: Recording, ticks: slice | None = None, *, save: str | Path | None = None
) -> Picture:
    """Draws the KV-cache pages of each request, stacked, and the size of the pool as a line.

    The requests with the most pages get a color of their own; the others share one.

    Args:
      recording: from `llama_jax.engine.recording.record`.
      ticks: a slice of ticks, counted from the start of the recording; None for all.
      save: a file to write.

    Raises:
      ValueError: the slice has a step, or selects no ticks.
    """
    chosen = choose_ticks(recording, slice(None) if ticks is None else ticks)
    records = [recording.ticks[tick] for tick in chosen]
    total = records[0].pages_total
    peak = max(total - record.pages_free for record in records)
    areas = _areas([record.pages for record in records])
    # A tick is a step of width 1 around its number, so there is one more edge than ticks.
    edges = np.arange(chosen.start, chosen.stop + 1) - 0.5
    heights = [np.append(counts, counts[-1]) for _, counts, _ in areas]
    with drawing(WIDTH, 3.8, save) as picture:
        axes = picture.add_subplot()
        axes.set(xlim=(edges[0], edges[-1]), xlabel="tick of the recording", ylabel="pages")
        time_axis(axes, recording, chosen, WIDTH - 2)
        if areas:
            axes.stackplot(
                edges,
                *heights,
                step="post",
                labels=[name for name, _, _ in areas],
                colors=[color for *_, color in areas],
                edgecolor=GRAY,
                linewidth=0.4,
            )
        if peak >= MIN_PEAK * total:
            axes.set_ylim(0, 1.06 * total)
        else:
            axes.set_ylim(0, max(1.25 * peak, 1))
            note = f"the pool of {total:,} pages is off the scale"
            axes.annotate(f"↑ {note}", (0.99, 0.97), xycoords="axes fraction", ha="right", va="top")
        axes.axhline(total, color=GRAY, linestyle="--", label=f"pool: {total:,} pages")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        title = f"KV-cache pages by request: at most {peak:,} of {total:,} in use"
        picture.suptitle(wrapped(title, WIDTH))
        picture.legend(loc="outside right upper")
    return picture


def _areas(pages: list[dict[int, int]]) -> list[tuple[str, np.ndarray, str]]:
    """(name, pages in each tick, color) of each area, from the bottom up."""
    counts = {
        request_id: np.array([held.get(request_id, 0) for held in pages])
        for request_id in dict.fromkeys(r for held in pages for r in held)
    }
    named = list(counts)
    if len(named) > MAX_AREAS:
        largest = sorted(named, key=lambda r: -int(counts[r].sum()))[:MAX_AREAS]
        named = [request_id for request_id in named if request_id in set(largest)]
    areas = [
        (f"request {request_id}", counts[request_id], color)
        for request_id, color in zip(named, PALETTE, strict=False)
    ]
    others = [held for request_id, held in counts.items() if request_id not in named]
    if others:
        areas.append((f"{len(others)} other requests", np.sum(others, axis=0), GRAY))
    return areas
