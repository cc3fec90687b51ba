"""What may still go wrong, from the figures. Imports no JAX."""

from collections.abc import Iterator

from llama_jax.plan.headroom import headrooms
from llama_jax.plan.numbers import amount
from llama_jax.plan.plan import Plan
from llama_jax.plan.report.document import Section, Table
from llama_jax.plan.targets import AVAILABILITY, FAULTS_A_MONTH, RESTART

CLOSE = 1.5  # a limit nearer than this factor is a risk
FULL = 0.8  # of the pool


_GROWN = {
    "rate": "the rate has",
    "prompt length": "prompts have",
    "launch gap": "ticks have",
    "memory": "the cache has",
}


def risk_section(plan: Plan) -> Section:
    """Each risk with what it rests on and what to do."""
    columns = ("risk", "because", "what to do")
    return Section("risks", "Risks", (), (Table("risks", columns, tuple(_risks(plan))),))


def _risks(plan: Plan) -> Iterator[tuple[str, str, str]]:
    best, question = plan.best, plan.question
    if not best.holds:
        yield (
            "targets are missed",
            ", ".join(missed.target for missed in best.missed),
            "see “What would help”",
        )
    elif not best.holds_surely:
        yield (
            "targets may be missed",
            "they hold as expected, but not with the slowest ticks of the band",
            "measure the ticks: `--calibrate` on the machine narrows the band",
        )
    if question.calibration is None:
        yield (
            "ticks are slower than the table says",
            "no tick of this model was measured on this machine",
            "`--validate`, then `--calibrate`",
        )
    for each in headrooms(question, best) if best.holds else ():
        if each.factor < CLOSE:
            missed = f"{each.then} is missed" if each.then else "the model's context ends"
            yield (
                f"{_GROWN[each.what]} little room to grow",
                f"beyond {amount(each.limit, each.unit)}, {each.factor:.2f} times the value of "
                f"this plan, {missed}",
                "plan for more, or watch it: docs/alerts.yaml",
            )
    if best.fits and best.kv_needed > FULL * best.memory.tokens:
        yield (
            "the KV pool fills up",
            f"the load needs {best.kv_needed / best.memory.tokens:.0%} of its tokens",
            "an 8-bit cache (`--kv-cache-dtype`), or more GPUs",
        )
    yield (
        "a GPU fails",
        f"all GPUs of a replica stop with it; {question.gpus // best.layout.replicas} of "
        f"{question.gpus} GPUs restart together. {AVAILABILITY:.1%} availability leaves "
        f"{FAULTS_A_MONTH:.0f} restarts of {RESTART:g} s a month",
        "`--outage` shows what a failure does to requests; a second replica takes its load",
    )
