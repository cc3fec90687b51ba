"""A tick that also returns activations, for interpretability.

This is a separate program from the one that serves requests. The layers, the cache and the ring are
the same, but `nnx.capture` collects the values that the modules tap (`llama_jax.model.tap`), and
every position of a chunk gets logits.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llama_jax.model import DecoderLayer
from llama_jax.model.attention import ScoreMod, Tap, paged_weights
from llama_jax.model.tap import captured_by_name, each_by_name
from llama_jax.ring.gpu_options import product_options
from llama_jax.ring.kv_cache import KVCache
from llama_jax.ring.stage import MeshReduce, PagedAttend, make_layer, run_layers
from llama_jax.ring.static_args import StaticArgs
from llama_jax.ring.steps import LOGITS_SPEC, state_specs
from llama_jax.ring.tick import State, advance_ring, final_norm, local_logits
from llama_jax.weights.placement import (
    Params,
    param_shapes,
    param_specs,
    unsharded_placements,
)
from sharding.axes import MODEL, STAGE
from sharding.collectives import rank
from sharding.mesh import mesh_shape
from sharding.program import MeshProgram
from sharding.settings import default_settings

WEIGHTS = "attention.weights"  # the name, in a layer, of the softmax weights


class LayerActivation(NamedTuple):
    """Names an activation: the position of its layer in the stage, and its name in the layer.

    If the layer taps a name several times, each value has one of its own (`tap.each_by_name`).
    """

    position: int
    name: str


class Observation(NamedTuple):
    """The results of an observed tick, for chunks of C tokens on P stages.

    Attributes:
      logits: `[C, V']` float32, at every position of the packet that left the last stage.
      final_norm: `[C, D]`, the output of the final norm for the same packet.
      entered: `[P, C, D]`, the input of each stage.
      layers: `[P, C, ...]` for each requested activation, of the packet at each stage.
    """

    logits: Any
    final_norm: Any
    entered: Any
    layers: dict[LayerActivation, Any]


# (params, state, packed packet) -> (state, observation)
ObservedStep = Callable[[Params, State, Any], tuple[State, Observation]]


def observed_step(
    static: StaticArgs, mesh: Mesh, activations: tuple[LayerActivation, ...]
) -> ObservedStep:
    """The jitted tick that also returns activations. Donates the state.

    Args:
      static: with a chunk and no decode rows.
      mesh: the mesh.
      activations: those of the layers to return.

    Raises:
      ValueError: the layers tap no value of such a name.
    """
    specs = state_specs()
    layers = {each: _spec(static, mesh, each.name) for each in activations}
    shown = Observation(LOGITS_SPEC, P(), P(STAGE), layers)
    in_specs = (param_specs(static.config, *mesh_shape(mesh)), specs, P())
    function = partial(_observed_tick, static, activations)
    return MeshProgram(
        function, mesh, in_specs, (specs, shown), name="observed_step", donate=(1,),
        options=product_options(static.config, static.bucket),
    )  # fmt: skip


def _observed_tick(
    static: StaticArgs,
    activations: tuple[LayerActivation, ...],
    params: Params,
    state: State,
    packed: jax.Array,
) -> tuple[State, Observation]:
    attend_class = (
        _TappedPagedAttend if any(each.name == WEIGHTS for each in activations) else PagedAttend
    )

    def run_stage(x: jax.Array, metadata: jax.Array, cache: KVCache) -> tuple[jax.Array, Any]:
        found: dict[LayerActivation, jax.Array] = {}

        def call(
            position: int,
            layer: DecoderLayer,
            x: jax.Array,
            positions: jax.Array,
            attend: PagedAttend,
            reduce: MeshReduce,
        ) -> jax.Array:
            with jax.named_scope(f"layer_{position}"):
                x, captured = nnx.capture(layer, nnx.Intermediate)(x, positions, attend, reduce)
            for name, value in each_by_name(captured_by_name(captured)).items():
                found[LayerActivation(position, name)] = value
            return x

        # The ring passes on all that a stage returns with its activations, not just the cache.
        entered = x
        x, cache = run_layers(static, params.layers, x, metadata, cache, attend_class, call)
        return x, (cache, entered[None], {each: found[each][None] for each in activations})

    def all_positions(x: jax.Array, metadata: jax.Array) -> jax.Array:
        return x

    ring, (cache, entered, layers), finished, _ = advance_ring(
        static, params, state, packed, run_stage, all_positions
    )
    normed = final_norm(static.config, params, finished)
    logits = local_logits(static.config, params, finished)
    return State(ring, state.tokens, cache), Observation(logits, normed, entered, layers)


class _TappedPagedAttend(PagedAttend):
    """`PagedAttend` that also computes and taps the softmax weights."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, score_mod: ScoreMod, tap: Tap
    ) -> jax.Array:
        out = super().__call__(q, k, v, score_mod=score_mod, tap=tap)
        weights = self._by_segment(
            q,
            lambda q, tables, positions, lengths: paged_weights(
                q, self.k_pages, tables, positions, lengths,
                score_mod, rank(MODEL) * q.shape[2], self.k_scale,
            ),
        )  # fmt: skip
        tap("weights", weights.astype(v.dtype))  # the dtype of `causal_attention`'s
        return out


@default_settings()
def _spec(static: StaticArgs, mesh: Mesh, name: str) -> P:
    """The spec of an activation of a layer, `[P, C, ...]`.

    An axis is split over the ranks if it is shorter on one rank than in the whole layer.
    """
    weights = param_shapes(static.config, mesh, jnp.dtype(jnp.float32)).layers[0]
    whole = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), weights)
    local = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.sharding.shard_shape(a.shape)[1:], a.dtype), weights
    )
    same = _with_copies(static, mesh)
    shapes = zip(_shape(same, whole, name), _shape(same, local, name), strict=True)
    return P(STAGE, *(MODEL if total != part else None for total, part in shapes))


def replicas_by_axis(static: StaticArgs, mesh: Mesh, name: str) -> tuple[int, ...]:
    """How many neighboring copies each axis of an activation of a layer, `[C, ...]`, holds.

    It is more than 1 along KV heads, if the mesh has more ranks than KV heads.
    """
    placed = param_shapes(static.config, mesh, jnp.dtype(jnp.float32)).layers[0]
    replicated = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), placed)
    single = jax.tree.map(
        lambda place: jax.ShapeDtypeStruct(place.shape, place.dtype(np.dtype(np.float32))),
        unsharded_placements(static.config).layers[0],
    )
    have = _shape(_with_copies(static, mesh), replicated, name)
    want = _shape(static, single, name)
    return tuple(copies // one for copies, one in zip(have, want, strict=True))


def _with_copies(static: StaticArgs, mesh: Mesh) -> StaticArgs:
    """Those of a model that has a KV head for each rank, as the weights on a mesh do."""
    heads = max(static.config.num_kv_heads, mesh.shape[MODEL])
    return static._replace(config=replace(static.config, num_kv_heads=heads))


def _shape(static: StaticArgs, weights: dict[str, Any], name: str) -> tuple[int, ...]:
    """The shape of an activation in a layer with these weights, for two tokens.

    Raises:
      ValueError: the layer has no activation of this name.
    """

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, *, score_mod: ScoreMod, tap: Tap
    ) -> jax.Array:
        tap("weights", jnp.zeros((*q.shape[:2], 1)))
        return q

    def tapped(weights: dict[str, Any]) -> dict[str, Any]:
        layer = make_layer(static, weights)
        x, positions = jnp.zeros((2, static.config.embed_dim)), jnp.arange(2)
        captured = nnx.capture(layer, nnx.Intermediate)(x, positions, attend)[1]
        return each_by_name(captured_by_name(captured))

    shapes = jax.eval_shape(tapped, weights)
    if name not in shapes:
        raise ValueError(
            f"There is no activation {name!r} in a layer, which has {', '.join(sorted(shapes))}."
        )
    shape: tuple[int, ...] = shapes[name].shape
    return shape
