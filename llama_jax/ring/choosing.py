"""The compiled programs that may follow a tick, and choose other tokens than the most likely ones.

A tick ends with the greedy choices. `sample_step` replaces them if a row is sampled.
`adjusted_step` takes its place if the logits of a row change first, and keeps the history of each
slot for that (`llama_jax.model.adjustments`). `mask_step` runs before both if a row may not choose
every token (`llama_jax.model.token_masks`). `logprobs_step` runs if log-probabilities are wanted.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.model.adjustments import adjust, count_tokens, extend_history
from llama_jax.model.logprobs import Logprobs, log_probabilities
from llama_jax.model.sampling import NO_TOKEN
from llama_jax.model.token_masks import apply_masks
from llama_jax.ring.sizes import RingSizes
from llama_jax.ring.steps import LOGITS_SPEC
from llama_jax.ring.tick import StepOutput
from sharding.axes import AXES
from sharding.partition import round_up
from sharding.program import MeshProgram

HISTORY_SPEC = P(None, AXES)  # [slots, V']
_OUTPUT_SPEC = StepOutput(LOGITS_SPEC, P(), P())

# (tokens of State, output of the step, packed controls) -> (tokens of State, tokens [segments])
SampleStep = Callable[[jax.Array, StepOutput, Any], tuple[jax.Array, jax.Array]]
# (tokens of State, history, output, packed controls, packed adjustments)
# -> (tokens of State, history, tokens [segments])
AdjustedStep = Callable[
    [jax.Array, jax.Array, StepOutput, Any, Any], tuple[jax.Array, jax.Array, jax.Array]
]
# (tokens of State, output of the step, rows, packed masks) -> (tokens of State, output)
MaskStep = Callable[[jax.Array, StepOutput, Any, Any], tuple[jax.Array, StepOutput]]
# (history, slot, tokens, whether they are the first, how many of them are of the prompt) -> history
HistoryStep = Callable[[jax.Array, Any, Any, Any, Any], jax.Array]
# (logits, chosen tokens) -> log-probabilities
LogprobsStep = Callable[[jax.Array, jax.Array], Logprobs]


def sample_step(mesh: Mesh, model_class: type[Llama] = Llama) -> SampleStep:
    """The jitted program for packets with a row that is not greedy.

    Replaces the greedy choices of such rows before the next tick reads them. Donates the tokens.
    """

    def replace_tokens(tokens: jax.Array, output: StepOutput, controls: jax.Array) -> Any:
        chosen = model_class.sampler.sample(output.logits, output.tokens, controls)
        return tokens.at[output.slots].set(chosen, mode="drop"), chosen

    in_specs = (P(), _OUTPUT_SPEC, P())
    return MeshProgram(replace_tokens, mesh, in_specs, (P(), P()), name="sample_step", donate=(0,))


def adjusted_step(mesh: Mesh, model_class: type[Llama] = Llama) -> AdjustedStep:
    """The jitted program for packets with a row whose logits are adjusted.

    Chooses all tokens of the packet anew, and adds them to the history. Donates tokens and history.
    """
    sampler = model_class.sampler

    def replace_tokens(
        tokens: jax.Array,
        history: jax.Array,
        output: StepOutput,
        controls: jax.Array,
        adjustments: jax.Array,
    ) -> Any:
        before = history.at[output.slots].get(mode="fill", fill_value=0)
        logits = adjust(output.logits, before, adjustments)
        best = sampler.greedy(logits)
        # The collectives of `sample` must depend on that of `greedy` (`sharding.collectives`).
        logits = jnp.where((best == NO_TOKEN)[:, None], 0, logits)
        chosen = sampler.sample(logits, best, controls)
        tokens = tokens.at[output.slots].set(chosen, mode="drop")
        return tokens, count_tokens(history, output.slots, chosen), chosen

    return MeshProgram(
        replace_tokens,
        mesh,
        (P(), HISTORY_SPEC, _OUTPUT_SPEC, P(), P()),
        (P(), HISTORY_SPEC, P()),
        name="adjusted_step",
        donate=(0, 1),
    )


def mask_step(mesh: Mesh, model_class: type[Llama] = Llama) -> MaskStep:
    """The jitted program for packets with a row that may not choose every token.

    Replaces the logits and greedy choices of such rows. Donates the tokens.
    """
    sampler = model_class.sampler

    def replace_output(
        tokens: jax.Array, output: StepOutput, rows: jax.Array, masks: jax.Array
    ) -> Any:
        # Only of the rows with a mask: over a large vocabulary the choice of a token takes longer.
        masked = apply_masks(output.logits.at[rows].get(mode="clip"), masks)
        best = sampler.greedy(masked)
        slots = output.slots.at[rows].get(mode="fill", fill_value=len(tokens))
        return tokens.at[slots].set(best, mode="drop"), StepOutput(
            output.logits.at[rows].set(masked, mode="drop"),
            output.tokens.at[rows].set(best, mode="drop"),
            output.slots,
        )

    in_specs = (P(), _OUTPUT_SPEC, P(), P(None, AXES))
    out_specs = (P(), _OUTPUT_SPEC)
    return MeshProgram(replace_output, mesh, in_specs, out_specs, name="mask_step", donate=(0,))


def history_step(mesh: Mesh) -> HistoryStep:
    """The jitted program that adds known tokens to the history of a slot. Donates the history."""
    in_specs = (HISTORY_SPEC, P(), P(), P(), P())
    return MeshProgram(
        extend_history, mesh, in_specs, HISTORY_SPEC, name="history_step", donate=(0,)
    )


def logprobs_step(mesh: Mesh) -> LogprobsStep:
    """The jitted program that computes the log-probabilities of a packet."""
    specs: Any = Logprobs(*[P()] * 3)  # type: ignore[arg-type]
    in_specs = (LOGITS_SPEC, P())
    return MeshProgram(log_probabilities, mesh, in_specs, specs, name="logprobs_step")


def history_shape(config: LlamaConfig, mesh: Mesh, sizes: RingSizes) -> jax.ShapeDtypeStruct:
    """The history of all slots, `[slots, V']` int32, split over all ranks."""
    shape = (sizes.num_slots, round_up(config.vocab_size, mesh.size))
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, HISTORY_SPEC))
