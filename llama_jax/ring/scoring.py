"""The compiled program that scores prompts: log-probabilities of the tokens of one tile.

A tick computes logits only at the last token of each segment. But the activations of every token of
the chunk that has just left are still there: `sharding.ring` sends them to stage 0, where they stay
until the next tick overwrites them. `score_step` turns those of one tile into log-probabilities. It
runs between two ticks, once for each tile of a prompt that is scored, so ticks and their programs
are the same for those who ask for no scores.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.model.logprobs import scores
from llama_jax.ring.sizes import RingSizes
from llama_jax.ring.tick import State, local_logits
from llama_jax.weights.placement import Params, param_specs
from sharding.axes import STAGE
from sharding.collectives import psum, rank
from sharding.mesh import mesh_shape
from sharding.program import MeshProgram


class TileScores(NamedTuple):
    """The scores of the tokens of one tile.

    Attributes:
      logprobs: `[tile]` float32, of the target tokens.
      ranks: `[tile]` int32, how many tokens are likelier than the target, plus 1.
      tokens: `[tile, MAX_LOGPROBS]` int32, the most likely tokens, as in `Logprobs`.
      top: `[tile, MAX_LOGPROBS]` float32, theirs.
    """

    logprobs: Any
    ranks: Any
    tokens: Any
    top: Any


# (weights of the head, activations of the chunk, first position in it, target tokens) -> scores
ScoreStep = Callable[[Params, jax.Array, Any, Any], TileScores]


def score_step(config: LlamaConfig, mesh: Mesh, sizes: RingSizes) -> ScoreStep:
    """The jitted program that scores a tile of the chunk that has just left the ring.

    Its arguments are those of `score_inputs`, the position in the chunk at which the tile begins,
    `[]` int32, and the token that follows each of its tokens, `[tile]` int32.
    """

    def score(params: Params, chunk: jax.Array, first: jax.Array, targets: jax.Array) -> TileScores:
        tile = lax.dynamic_slice_in_dim(chunk[0], first, sizes.tile)
        x = psum(jnp.where(rank(STAGE) == 0, tile, 0), STAGE)
        found, ranks = scores(local_logits(config, params, x), targets)
        return TileScores(found.chosen, ranks, found.tokens, found.top)

    head = param_specs(config, *mesh_shape(mesh))._replace(layers=())
    specs = TileScores(P(), P(), P(), P())
    return MeshProgram(score, mesh, (head, P(STAGE), P(), P()), specs, name="score_step")


def score_inputs(params: Params, state: State) -> tuple[Params, jax.Array]:
    """The arguments of `score_step` after a tick, given the state that the tick returned."""
    _, chunk = state.ring.activations
    return params._replace(layers=()), chunk  # flattening all layers would take most of the call
