"""The ring over time: an example of its packets in the steady state. Imports no JAX."""

from llama_jax.plan.candidate import Candidate
from llama_jax.plan.report import drawing
from llama_jax.plan.report.document import Plot, Section
from llama_jax.terminal.units import count_text

TICKS = 24
ARRIVES = 5  # the tick in which the prompt's first chunk enters


def timeline_section(candidate: Candidate) -> Section:
    """A prompt enters a ring in which sequences decode."""
    num_stages, chunk = candidate.layout.num_stages, candidate.chunk
    prompt = candidate.replica.workload.prompt_tokens
    live = candidate.state().live
    rows = round(live / num_stages) if live < candidate.replica.max_live else 1
    chunks = [min(chunk, prompt - start) for start in range(0, prompt, chunk)]
    packets = []
    for tick in range(1 - num_stages, TICKS):
        first = tick % num_stages * rows
        entering = tick - ARRIVES
        tiles = [(-1, chunks[entering])] if 0 <= entering < len(chunks) else []
        packets.append((list(range(first, first + rows)), tiles))
    last = ARRIVES + len(chunks) + num_stages - 2
    plot = Plot(
        "ring",
        "Which packet is in which stage",
        {
            "stages": num_stages,
            "rows_per_packet": rows,
            "chunk_tokens_by_tick": [sum(t for _, t in tiles) for _, tiles in packets][-TICKS:],
        },
        drawing.draw("timeline of the ring", lambda: drawing.ring(num_stages, packets)),
    )
    return Section(
        "ring",
        "The ring over time",
        (
            f"A ring of {count_text(num_stages, 'packet')}, each with about "
            f"{count_text(rows, 'decode row')}. A prompt of {prompt:,} tokens enters in "
            f"{count_text(len(chunks), 'chunk')} from tick {ARRIVES} on, one in each tick. While a "
            f"stage holds one, in ticks {ARRIVES} to {last}, all stages run the program with a "
            "chunk; no stage waits, and the rows decode on.",
        ),
        (),
        (plot,),
    )
