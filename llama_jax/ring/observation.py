"""The ring with its activations in view: ticks that also return what each stage computed.

A program of its own, beside the one that serves. The layers, the cache and the ring are the same;
`nnx.capture` collects what the modules tap (`llama_jax.model.tap`), and every position of a chunk
gets its logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llama_jax.model import DecoderLayer
from llama_jax.model.attention import ScoreMod, Tap, paged_weights
from llama_jax.model.tap import captured_by_name
from llama_jax.ring.kv_cache import KVCache
from llama_jax.ring.steps import LOGITS_SPEC, on_mesh, state_specs
from llama_jax.ring.tick import (
    PagedAttend,
    Program,
    State,
    advance_ring,
    final_norm,
    local_logits,
    make_layer,
    run_layers,
)
from llama_jax.weights.placement import Params, param_shapes, param_specs
from sharding.axes import MODEL, STAGE
from sharding.collectives import psum, rank
from sharding.mesh import mesh_shape

WEIGHTS = "attention.weights"  # inside a layer


class LayerActivation(NamedTuple):
    """What to return of a layer: its position in its stage, and a name inside it."""

    position: int
    name: str


class Observation(NamedTuple):
    """What a tick shows; C tokens of a chunk, P stages.

    Attributes:
      logits: `[C, V']` float32, of the packet that left the last stage, at every position.
      final_norm: `[C, D]`, of the same.
      entered: `[P, C, D]`, the activations that each stage began with.
      layers: `[P, C, ...]` for each `LayerActivation`, of the packet that was with each stage.
    """

    logits: Any
    final_norm: Any
    entered: Any
    layers: dict[LayerActivation, Any]


# (params, state, packed packet) -> (state, observation)
ObservedStep = Callable[[Params, State, Any], tuple[State, Observation]]


def observed_step(
    program: Program, mesh: Mesh, activations: tuple[LayerActivation, ...]
) -> ObservedStep:
    """The jitted tick that shows what it computes; donates the state.

    Args:
      program: its bucket has a chunk and no decode rows.
      mesh: where it runs.
      activations: what of the layers to return; each must be tapped by the layers of the model.
    """
    specs = state_specs(program.config, mesh)
    layers = {each: _spec(program, mesh, each.name) for each in activations}
    shown = Observation(LOGITS_SPEC, P(), P(STAGE), layers)
    in_specs = (param_specs(program.config, *mesh_shape(mesh)), specs, P())
    mapped = on_mesh(partial(_observed_tick, program, activations), mesh, in_specs, (specs, shown))
    return jax.jit(mapped, donate_argnums=1)


def _observed_tick(
    program: Program,
    activations: tuple[LayerActivation, ...],
    params: Params,
    state: State,
    packed: jax.Array,
) -> tuple[State, Observation]:
    attend_class = (
        _ShowingAttend if any(each.name == WEIGHTS for each in activations) else PagedAttend
    )

    def run_stage(x: jax.Array, metadata: jax.Array, cache: KVCache) -> tuple[jax.Array, Any]:
        found: dict[LayerActivation, jax.Array] = {}

        def call(
            position: int, layer: DecoderLayer, x: jax.Array, positions: jax.Array, attend: Any
        ) -> jax.Array:
            with jax.named_scope(f"layer_{position}"):
                reduce = partial(psum, axes=MODEL)
                x, captured = nnx.capture(layer, nnx.Intermediate)(x, positions, attend, reduce)
            for name, value in captured_by_name(captured).items():
                found[LayerActivation(position, name)] = value
            return x

        entered = x
        x, cache = run_layers(program, params.layers, x, metadata, cache, attend_class, call)
        return x, (cache, entered[None], {each: found[each][None] for each in activations})

    def all_positions(x: jax.Array, metadata: jax.Array) -> jax.Array:
        return x

    ring, (cache, entered, layers), finished, _ = advance_ring(
        program, params, state, packed, run_stage, all_positions
    )
    normed = final_norm(program.config, params, finished)
    scores = local_logits(program.config, params, finished)
    return State(ring, state.tokens, cache), Observation(scores, normed, entered, layers)


class _ShowingAttend(PagedAttend):
    """As its base, and shows the caller the weights, which paged attention never holds at once."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, score_mod: ScoreMod, tap: Tap
    ) -> jax.Array:
        out = super().__call__(q, k, v, score_mod=score_mod, tap=tap)
        weights = self._by_segment(
            q,
            lambda q, tables, positions, lengths: paged_weights(
                q, self.k_pages, tables, positions, lengths,
                score_mod, rank(MODEL) * q.shape[2],
            ),
        )  # fmt: skip
        tap("weights", weights.astype(v.dtype))  # as `causal_attention`
        return out


def _spec(program: Program, mesh: Mesh, name: str) -> P:
    """How a value of a layer, `[P, C, ...]`, lies on the mesh: an axis that is shorter on a rank
    than in the whole layer is split over the ranks."""
    weights = param_shapes(program.config, mesh, jnp.dtype(jnp.float32)).layers[0]
    whole = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), weights)
    local = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.sharding.shard_shape(a.shape)[1:], a.dtype), weights
    )
    shapes = zip(_shape(program, whole, name), _shape(program, local, name), strict=True)
    return P(STAGE, *(MODEL if total != part else None for total, part in shapes))


def _shape(program: Program, weights: dict[str, Any], name: str) -> tuple[int, ...]:
    """The shape of a value in a layer with these weights, for two tokens."""

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, *, score_mod: ScoreMod, tap: Tap
    ) -> jax.Array:
        tap("weights", jnp.zeros((*q.shape[:2], 1)))
        return q

    def tapped(weights: dict[str, Any]) -> dict[str, Any]:
        layer = make_layer(program, weights)
        x, positions = jnp.zeros((2, program.config.embed_dim)), jnp.arange(2)
        return captured_by_name(nnx.capture(layer, nnx.Intermediate)(x, positions, attend)[1])

    shape: tuple[int, ...] = jax.eval_shape(tapped, weights)[name].shape
    return shape
