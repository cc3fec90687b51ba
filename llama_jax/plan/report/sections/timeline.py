"""The ring over time: an example of its packets in the steady state. Imports no JAX."""

from llama_jax.plan.candidate import Candidate
from llama_jax.plan.report import drawing
from llama_jax.plan.report.document import Plot, Section

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
    until = ARRIVES + min(len(chunks), TICKS) + num_stages - 1
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
            f"{num_stages} packets circulate, each with about {rows} decode rows. A prompt of "
            f"{prompt:,} tokens enters in {len(chunks)} chunks from tick {ARRIVES} on, one in each "
            f"tick. While a stage holds one, in ticks {ARRIVES} to {until - 1}, all stages run the "
            "program with a chunk; no stage waits, and the rows decode on.",
        ),
        (),
        (plot,),
    )
