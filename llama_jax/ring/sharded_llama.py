"""The model on a mesh, called like the plain one: tokens in, logits for every position out.

What runs is the ring: prompts are cut into chunks that enter in consecutive ticks, and each stage
works on another one. There is no engine, no scheduler and no sampling; `LLM` has those.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import lru_cache, partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.load import choose_dtype, load_params
from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.model.llama import check_model_class, check_tokens
from llama_jax.ring.observation import WEIGHTS, LayerActivation, observed_step
from llama_jax.ring.packet import encode_packet
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.steps import LOGITS_SPEC, init_state, on_mesh, state_shapes
from llama_jax.ring.tick import Program, State, local_logits
from llama_jax.weights.placement import Params, param_specs
from sharding.axes import STAGE
from sharding.mesh import make_mesh, mesh_shape
from sharding.partition import split_layers

PAGE_SIZE = 16
TILE = 64  # most tokens of a prompt in one segment
TILES_PER_CHUNK = 2


class ShardedLlama:
    """A checkpoint on a mesh, without an engine.

    Attributes:
      config: the architecture.
      mesh: where it lies.
      params: its weights there.
      dtype: of activations and cache.
      model_class: whose layers run.
    """

    def __init__(
        self,
        config: LlamaConfig,
        mesh: Mesh,
        params: Params,
        dtype: jnp.dtype,
        model_class: type[Llama] = Llama,
    ):
        """Takes over weights that are on a mesh; `from_pretrained` reads them.

        Args:
          config: the architecture.
          mesh, params, dtype: as given to and got from `load_params`.
          model_class: `Llama`, or a subclass of it.
        """
        check_model_class(model_class)
        self.config, self.mesh, self.params = config, mesh, params
        self.model_class = model_class
        self.dtype = dtype
        self._state: tuple[RingSizes, State] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        mesh: str | Mesh = "1x1",
        dtype: str = "auto",
        model_class: type[Llama] = Llama,
    ) -> Self:
        """Opens a checkpoint directory (Hugging Face or Orbax layout) onto a mesh.

        Args:
          path: the directory.
          mesh: "stages x tensor-parallel ranks", such as "2x2", or one from `make_mesh`.
          dtype: "auto" (float32 on CPU, the checkpoint's own elsewhere), "float32", "bfloat16".
          model_class: a subclass of `Llama` whose layers shall run.

        Raises:
          CheckpointError, ConfigError, MeshError, ShardingError, ValueError: one sentence says why.
        """
        check_model_class(model_class)
        with closing(open_checkpoint(path)) as reader:
            mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
            kind = choose_dtype(dtype, reader.config, mesh.devices.flat[0].platform)
            return cls(reader.config, mesh, load_params(reader, mesh, kind), kind, model_class)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] int32 in [0, V) -> logits [B, T, V] float32.

        Raises:
          ValueError: if a token is out of range.
        """
        return self.observe(tokens, ())[0]

    def unembed(self, x: jax.Array) -> jax.Array:
        """Activations of a layer [..., D] -> the logits that they lead to, [..., V] float32."""
        rows = jnp.asarray(x).reshape(-1, x.shape[-1])
        scores = np.asarray(_unembed(self.config, self.mesh)(self.params, np.asarray(rows)))
        return jnp.asarray(scores[:, : self.config.vocab_size]).reshape(*x.shape[:-1], -1)

    def observe(
        self, tokens: jax.Array, names: Sequence[str]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs tokens [B, T] through the ring.

        Args:
          tokens: int32 in [0, V).
          names: of activations, in full; they must exist.

        Returns:
          Logits [B, T, V] float32, and name → activation, in the shapes of the plain model.

        Raises:
          ValueError: if a token is out of range.
        """
        if isinstance(tokens, jax.core.Tracer):
            raise ValueError(
                "A model on a mesh cannot be called inside jax.jit or jax.grad: its programs are "
                "compiled, and it is not differentiable; use Llama on one device there."
            )
        check_tokens(tokens, self.config.vocab_size)
        values = np.asarray(tokens, np.int32)
        found = {name: _Collected() for name in names}
        logits = self._run(values, found)
        return jnp.asarray(logits), {
            name: jnp.asarray(logits if name == "logits" else collected.whole)
            for name, collected in found.items()
        }

    def kv_cache(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Runs tokens [B, T] and reads what the pages of the cache then hold.

        Returns:
          Keys and values, each `[L, B, T, K, h]`.
        """
        self.observe(tokens, ())
        assert self._state is not None
        sizes, state = self._state
        batch, num_tokens = np.shape(tokens)
        stages = split_layers(self.config.num_layers, mesh_shape(self.mesh)[0])
        both = []
        for arrays in (state.cache.keys, state.cache.values):
            host = [np.asarray(array) for array in arrays]  # [P, K, num_pages, page_size, h]
            layers = []
            for stage, stage_layers in enumerate(stages):
                for position, layer in enumerate(stage_layers):
                    if layer is None:
                        continue
                    pages = host[position][stage].transpose(1, 2, 0, 3)
                    by_sequence = pages.reshape(sizes.num_slots, -1, *pages.shape[2:])
                    layers.append(by_sequence[:batch, :num_tokens])
            both.append(jnp.asarray(np.stack(layers)))
        return both[0], both[1]

    def _run(self, tokens: np.ndarray, found: "dict[str, _Collected]") -> np.ndarray:
        """Sends tokens [B, T] through the ring; fills in `found` and returns the logits."""
        sizes, bucket = _sizes(*tokens.shape)
        places = {name: self._place(name) for name in found if name.startswith("layers.")}
        activations = tuple(sorted({activation for _, activation in places.values()}))
        step = _step(Program(self.config, sizes, bucket, self.model_class), self.mesh, activations)
        packets = _packets(tokens, sizes, bucket)
        tables = np.arange(sizes.num_pages, dtype=np.int32).reshape(sizes.num_slots, -1)
        state = self._state_for(sizes)
        num_stages = self.mesh.shape[STAGE]
        last = num_stages - 1
        logits = _Collected()
        for tick in range(len(packets) + last):  # until the last packet has left
            entering = packets[tick] if tick < len(packets) else []
            segments = [(tile.row, tile.first, False, tile.tokens) for tile in entering]
            packed = encode_packet(sizes, bucket, tables, [], [], segments)
            state, shown = step(self.params, state, packed)
            shown = jax.device_get(shown)
            if 0 <= tick - last:
                leaving = packets[tick - last]
                logits.put(tokens.shape, leaving, shown.logits[:, : self.config.vocab_size])
                if "final_norm.output" in found:
                    found["final_norm.output"].put(tokens.shape, leaving, shown.final_norm)
            if entering and "embedding" in found:
                found["embedding"].put(tokens.shape, entering, shown.entered[0])
            for name, (stage, activation) in places.items():
                if 0 <= tick - stage < len(packets):
                    value = shown.layers[activation][stage]
                    found[name].put(tokens.shape, packets[tick - stage], value)
        self._state = (sizes, state)
        for name in found:
            if name.endswith(WEIGHTS):  # [B, T, H, S], in whole pages
                whole = found[name].whole[..., : tokens.shape[1]]
                found[name].whole = whole.swapaxes(1, 2)
        return logits.whole

    def _place(self, name: str) -> tuple[int, LayerActivation]:
        """The stage that computes an activation of a layer, and what to ask of it."""
        _, number, inside = name.split(".", 2)
        stages = split_layers(self.config.num_layers, self.mesh.shape[STAGE])
        stage = next(s for s, layers in enumerate(stages) if int(number) in layers)
        return stage, LayerActivation(stages[stage].index(int(number)), inside)

    def _state_for(self, sizes: RingSizes) -> State:
        """The state of the run before, where it fits: the ring is empty, and pages may hold
        anything."""
        previous, self._state = self._state, None
        if previous is not None and previous[0] == sizes:
            return previous[1]
        return init_state(state_shapes(self.config, self.mesh, sizes, self.dtype), sizes)


# Kept here and not in the object: `LLM.model` makes a new one each time.
_step = lru_cache(maxsize=64)(observed_step)


@lru_cache(maxsize=64)
def _unembed(config: LlamaConfig, mesh: Mesh) -> Callable[[Params, Any], jax.Array]:
    """(weights, [n, D]) -> `[n, V']`."""
    specs = (param_specs(config, *mesh_shape(mesh)), P())
    return jax.jit(on_mesh(partial(local_logits, config), mesh, specs, LOGITS_SPEC))


class _Tile(NamedTuple):
    """A run of one prompt's tokens.

    Attributes:
      row: the prompt's, in the batch.
      first: the position of the first token.
      tokens: their ids.
      size: the places that a tile has in its chunk; only the last of a prompt has some to spare.
    """

    row: int
    first: int
    tokens: list[int]
    size: int


class _Collected:
    """An activation of all tokens, put together from those of each packet."""

    whole: np.ndarray

    def put(self, shape: tuple[int, ...], packet: list[_Tile], value: np.ndarray) -> None:
        """Takes in the value [C, ...] of a packet, for tokens of `shape` [B, T]."""
        if not hasattr(self, "whole"):
            self.whole = np.zeros((*shape, *value.shape[1:]), value.dtype)
        for number, tile in enumerate(packet):
            rows = value[number * tile.size : number * tile.size + len(tile.tokens)]
            self.whole[tile.row, tile.first : tile.first + len(rows)] = rows


def _sizes(batch: int, num_tokens: int) -> tuple[RingSizes, Bucket]:
    """Sizes that hold so many prompts; few different ones, since each is compiled."""
    tile = min(TILE, -(-num_tokens // PAGE_SIZE) * PAGE_SIZE)
    tiles_each = -(-num_tokens // tile)
    chunk = tile * min(TILES_PER_CHUNK, batch * tiles_each)
    pages_each = tiles_each * tile // PAGE_SIZE
    sizes = RingSizes(
        num_slots=batch,
        num_pages=batch * pages_each,
        page_size=PAGE_SIZE,
        pages_per_sequence=pages_each,
        row_buckets=(0,),
        chunk_buckets=(chunk,),
        tile=tile,
    )
    return sizes, Bucket(0, chunk)


def _packets(tokens: np.ndarray, sizes: RingSizes, bucket: Bucket) -> list[list[_Tile]]:
    """The tiles of every prompt in order, as many in a packet as its chunk holds."""
    tiles = [
        _Tile(row, first, prompt[first : first + sizes.tile].tolist(), sizes.tile)
        for row, prompt in enumerate(tokens)
        for first in range(0, len(prompt), sizes.tile)
    ]
    each = bucket.chunk // sizes.tile
    return [tiles[first : first + each] for first in range(0, len(tiles), each)]
