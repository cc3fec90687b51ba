"""What must hold of a compiled deployment, and what does not."""

from typing import NamedTuple

from llama_jax.costs import memory as arithmetic
from llama_jax.plan.compiled.collectives import Collective
from llama_jax.plan.compiled.deployment import CompiledDeployment
from llama_jax.plan.compiled.tick_figures import TickFigures
from llama_jax.plan.report.quantities import program_text

BYTES_SHARE = 0.001  # by how much the arithmetic may miss weights and cache
PAYLOAD_SHARE = 0.01  # by how much the collectives may carry more than they must
# Of the memory that may be taken, what results and temporaries may need. Llama-3-70B on 8 H100
# needs 0.1 % or less; a program that needs 1 % more has changed.
WORKING_SHARE = 0.005


class Difference(NamedTuple):
    """Bytes on each GPU, by arithmetic and as compiled."""

    arithmetic: int
    compiled: int

    @property
    def bytes(self) -> int:
        """Arithmetic minus compiler."""
        return self.arithmetic - self.compiled

    @property
    def share(self) -> float:
        """The difference, relative to what was compiled."""
        return abs(self.bytes) / max(1, self.compiled)


def differences(compiled: CompiledDeployment) -> dict[str, Difference]:
    """The arithmetic of `llama_jax.costs` beside the compiler's figures."""
    deployment, programs = compiled.deployment, compiled.programs
    sizes, memory = programs.sizes, compiled.memory
    largest = max(compiled.ticks, key=lambda tick: sum(tick.bucket)).bucket
    page = arithmetic.page_bytes(deployment, sizes.page_size)
    temporaries = arithmetic.temporary_bytes(
        deployment, largest.rows + largest.chunk, sizes.num_segments(largest)
    )
    return {
        "weights": Difference(sum(arithmetic.weight_bytes(deployment).values()), memory.weights),
        "kv_cache": Difference(sizes.num_pages * page, memory.kv_cache),
        "temporaries": Difference(temporaries, memory.temporaries),
    }


def missed(compiled: CompiledDeployment) -> list[str]:
    """What does not hold, a sentence each; nothing if all does."""
    found = [problem for tick in compiled.ticks for problem in missed_by_tick(tick)]
    for what in ("weights", "kv_cache"):
        difference = differences(compiled)[what]
        if difference.share > BYTES_SHARE:
            found.append(
                f"The {what.replace('_', ' ').replace('kv', 'KV')} of a GPU takes "
                f"{difference.compiled:,} bytes, by arithmetic {difference.arithmetic:,}."
            )
    memory, allowed = compiled.memory, compiled.allowed
    working = memory.results + memory.temporaries
    if working > WORKING_SHARE * allowed:
        found.append(
            f"Results and temporaries take {working / 1e9:.3f} GB of each GPU, more than "
            f"{WORKING_SHARE:.1%} of the {allowed / 1e9:.1f} GB that may be taken."
        )
    if sum(memory) > allowed:
        found.append(
            f"Everything takes {sum(memory) / 1e9:.2f} GB of each GPU, more than the "
            f"{allowed / 1e9:.2f} GB that may be taken."
        )
    return found


def missed_by_tick(tick: TickFigures) -> list[str]:
    """What does not hold of one program, a sentence each."""
    name = program_text(*tick.bucket)
    found = [f"With {name}, {text}." for text in wrong_collectives(tick)]
    if tick.copies:
        found.append(
            f"With {name}, {len(tick.copies)} kernels write weights or cache anew in every tick, "
            f"such as {tick.copies[0]}."
        )
    return found


def wrong_collectives(tick: TickFigures) -> list[str]:
    """How the collectives of a program differ from those that its mesh needs."""
    has = {each[:2]: each for each in tick.collectives}
    needs = {each[:2]: each for each in tick.expected}
    found = []
    for key in sorted({*has, *needs}):
        kind, group = key
        none = Collective(kind, group, 0, 0)
        is_, must = has.get(key, none), needs.get(key, none)
        if is_.calls != must.calls:
            found.append(f"there are {is_.calls} {kind}s over {group} GPUs instead of {must.calls}")
        elif is_.payload > must.payload * (1 + PAYLOAD_SHARE):
            found.append(
                f"the {kind}s over {group} GPUs carry {is_.payload:,} bytes instead of "
                f"{must.payload:,}"
            )
    return found
