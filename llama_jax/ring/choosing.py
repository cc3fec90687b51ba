"""The compiled programs that may follow a tick, and choose other tokens than the most likely ones.

A tick ends with the greedy choices. Each program runs only if a row of the packet asks for it, and
leaves the other rows as they are. In this order, they replace

- the logits of rows that may not choose every token: `mask_step` (`llama_jax.model.token_masks`),
  unless the tick has done it (`llama_jax.ring.tick.masked_tick`);
- the logits of rows with penalties or biases: `adjust_step` (`llama_jax.model.adjustments`), which
  reads the history of each slot;
- the logits of rows with top-k, top-p or typical-p: `filter_step` (`llama_jax.model.filters`);
- the tokens of rows with a temperature: `sample_step` (`llama_jax.model.sampling`).

`count_step` then adds the tokens to the history, and `logprobs_step` computes log-probabilities.

A token is always drawn by `sample_step`, filters or not, so that the bits of a draw do not depend
on what the other rows of the packet ask for.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.model.adjustments import adjust, count_tokens, extend_history
from llama_jax.model.filters import keep_likely
from llama_jax.model.logprobs import Logprobs, log_probabilities
from llama_jax.model.sampling import Sampler, chosen_by, draw
from llama_jax.model.token_masks import apply_masks
from llama_jax.ring.sizes import RingSizes
from llama_jax.ring.steps import LOGITS_SPEC, MASKS_SPEC, OUTPUT_SPEC
from llama_jax.ring.tick import StepOutput
from sharding.axes import AXES
from sharding.program import MeshProgram
from sharding.stages import round_up

HISTORY_SPEC = P(None, AXES)  # [slots, V']

# (tokens of State, output of the step, packed controls) -> (tokens of State, tokens [segments])
SampleStep = Callable[[jax.Array, StepOutput, Any], tuple[jax.Array, jax.Array]]
# (output of the step, packed controls) -> output
FilterStep = Callable[[StepOutput, Any], StepOutput]
# (tokens of State, history, output, packed adjustments) -> (tokens of State, output)
AdjustStep = Callable[[jax.Array, jax.Array, StepOutput, Any], tuple[jax.Array, StepOutput]]
# (history, slots, chosen tokens) -> history
CountStep = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
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
    sampler = model_class.sampler
    choose = partial(chosen_by, sampler, "sample") if _samples_its_own_way(sampler) else draw

    def replace_tokens(tokens: jax.Array, output: StepOutput, controls: jax.Array) -> Any:
        chosen = choose(output.logits, output.tokens, controls)
        return tokens.at[output.slots].set(chosen, mode="drop"), chosen

    in_specs = (P(), OUTPUT_SPEC, P())
    return MeshProgram(replace_tokens, mesh, in_specs, (P(), P()), name="sample_step", donate=(0,))


def filter_step(mesh: Mesh, model_class: type[Llama] = Llama) -> FilterStep | None:
    """The jitted program for packets with a row that has top-k, top-p or typical-p.

    None if the model has a sampler of its own, which gets the logits as they are.
    """
    if _samples_its_own_way(model_class.sampler):
        return None

    def replace_logits(output: StepOutput, controls: jax.Array) -> StepOutput:
        return output._replace(logits=keep_likely(output.logits, controls))

    return MeshProgram(replace_logits, mesh, (OUTPUT_SPEC, P()), OUTPUT_SPEC, name="filter_step")


def _samples_its_own_way(sampler: Sampler) -> bool:
    return type(sampler).sample is not Sampler.sample


def adjust_step(mesh: Mesh, model_class: type[Llama] = Llama) -> AdjustStep:
    """The jitted program for packets with a row whose logits are adjusted.

    Replaces the logits and greedy choices. Donates the tokens.
    """
    sampler = model_class.sampler

    def replace_output(
        tokens: jax.Array, history: jax.Array, output: StepOutput, adjustments: jax.Array
    ) -> Any:
        before = history.at[output.slots].get(mode="fill", fill_value=0)
        logits = adjust(output.logits, before, adjustments)
        best = chosen_by(sampler, "greedy", logits)
        tokens = tokens.at[output.slots].set(best, mode="drop")
        return tokens, StepOutput(logits, best, output.slots)

    in_specs = (P(), HISTORY_SPEC, OUTPUT_SPEC, P())
    out_specs = (P(), OUTPUT_SPEC)
    return MeshProgram(replace_output, mesh, in_specs, out_specs, name="adjust_step", donate=(0,))


def count_step(mesh: Mesh) -> CountStep:
    """The jitted program that adds chosen tokens to the history. Donates the history."""
    in_specs = (HISTORY_SPEC, P(), P())
    return MeshProgram(count_tokens, mesh, in_specs, HISTORY_SPEC, name="count_step", donate=(0,))


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
        best = chosen_by(sampler, "greedy", masked)
        slots = output.slots.at[rows].get(mode="fill", fill_value=len(tokens))
        return tokens.at[slots].set(best, mode="drop"), StepOutput(
            output.logits.at[rows].set(masked, mode="drop"),
            output.tokens.at[rows].set(best, mode="drop"),
            output.slots,
        )

    in_specs = (P(), OUTPUT_SPEC, P(), MASKS_SPEC)
    out_specs = (P(), OUTPUT_SPEC)
    return MeshProgram(replace_output, mesh, in_specs, out_specs, name="mask_step", donate=(0,))


def history_step(mesh: Mesh) -> HistoryStep:
    """The jitted program that adds known tokens to the history of a slot. Donates the history."""
    in_specs = (HISTORY_SPEC, P(), P(), P(), P())
    return MeshProgram(
        extend_history, mesh, in_specs, HISTORY_SPEC, name="history_step", donate=(0,)
    )


def logprobs_step(mesh: Mesh) -> LogprobsStep:
    """The jitted program that computes the log-probabilities of a packet."""
    in_specs, out_specs = (LOGITS_SPEC, P()), Logprobs(P(), P(), P())
    return MeshProgram(log_probabilities, mesh, in_specs, out_specs, name="logprobs_step")


def history_shape(config: LlamaConfig, mesh: Mesh, sizes: RingSizes) -> jax.ShapeDtypeStruct:
    """The history of all slots, `[slots, V']` int32, split over all ranks."""
    shape = (sizes.num_slots, round_up(config.vocab_size, mesh.size))
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, HISTORY_SPEC))
