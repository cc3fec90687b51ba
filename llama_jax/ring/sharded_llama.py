"""The model on a mesh, called like `Llama`: tokens in, logits for every position out.

The ring runs it: prompts are cut into chunks that enter in consecutive ticks, and each stage works
on a different chunk. For an engine with a scheduler and sampling, use `LLM`.
"""

import re
from collections.abc import Sequence
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
from llama_jax.model.kv_storage import choose_kv_dtype
from llama_jax.model.llama import check_tokens
from llama_jax.model.rope import check_length
from llama_jax.ring.backend import AUTO, Backend
from llama_jax.ring.kernel_check import working_backend
from llama_jax.ring.kv_cache import KVCache, dequantized
from llama_jax.ring.model_class import check_model_class
from llama_jax.ring.observation import WEIGHTS, LayerActivation, observed_step, replicas_by_axis
from llama_jax.ring.packet import encode_packet
from llama_jax.ring.sizes import TILE, Bucket, RingSizes
from llama_jax.ring.static_args import StaticArgs
from llama_jax.ring.steps import LOGITS_SPEC, init_state, state_shapes
from llama_jax.ring.tick import State, local_logits
from llama_jax.weights.axes import kv_replicas
from llama_jax.weights.placement import Params, param_specs
from sharding.axes import STAGE
from sharding.mesh import make_mesh, mesh_shape
from sharding.program import MeshProgram
from sharding.stages import round_up, split_layers

PAGE_SIZE = 16
TILES_PER_CHUNK = 2
OUTSIDE_LAYERS = ("embedding", "final_norm.output", "logits")
TRIED_LENGTH = 1024  # tokens of the prompt with whose sizes the kernels are tried


class ShardedLlama:
    """A checkpoint on a mesh, without an engine.

    Attributes:
      config: the architecture.
      mesh: the mesh.
      params: the weights on the mesh.
      dtype: of the activations.
      model_class: `Llama` or a subclass, whose layers run.
      cache_dtype: of the KV cache.
    """

    def __init__(
        self,
        config: LlamaConfig,
        mesh: Mesh,
        params: Params,
        dtype: jnp.dtype,
        model_class: type[Llama] = Llama,
        cache_dtype: jnp.dtype | None = None,
        attention_backend: str | Backend = AUTO,
    ):
        """Uses weights that are already on a mesh; `from_pretrained` loads them.

        Args:
          config: the architecture.
          mesh: the mesh.
          params: the weights, from `load_params`.
          dtype: that `load_params` was called with.
          model_class: `Llama` or a subclass.
          cache_dtype: of the KV cache; None for that of the activations.
          attention_backend: "auto", "plain" or "hopper", as for the engine, whose kernels are then
            tried; or the backend of an engine, which has tried them.

        Raises:
          UserError: the ring cannot run `model_class`, or `attention_backend` on these devices.
        """
        check_model_class(model_class, config)
        self.config, self.mesh, self.params = config, mesh, params
        self.model_class = model_class
        self.dtype, self.cache_dtype = dtype, cache_dtype or dtype
        tried, _ = _sizes(1, TRIED_LENGTH)
        self._backend = working_backend(
            attention_backend, config, mesh, tried, dtype, self.cache_dtype, model_class
        )
        self._state: tuple[RingSizes, State] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        mesh: str | Mesh = "1x1",
        dtype: str = "auto",
        model_class: type[Llama] = Llama,
        kv_cache_dtype: str = "auto",
        attention_backend: str = AUTO,
    ) -> Self:
        """Loads a checkpoint (Hugging Face or Orbax layout, or GGUF) onto a mesh.

        Args:
          path: the directory, or the GGUF file.
          mesh: "stages x tensor-parallel ranks", such as "2x2", or a mesh from `make_mesh`.
          dtype: "auto" (float32 on CPU, else the checkpoint's own), "float32" or "bfloat16".
          model_class: `Llama` or a subclass, whose layers run.
          kv_cache_dtype: "auto" (that of the activations), "bf16", "fp8" or "int8".
          attention_backend: "auto", "plain" or "hopper"; as for the engine.

        Raises:
          CheckpointError, ConfigError: the checkpoint cannot be read.
          MeshError, ShardingError: the mesh cannot be made, or cannot split the model.
          UserError: `dtype`, `model_class`, `kv_cache_dtype` or `attention_backend` is not
            supported.
        """
        with closing(open_checkpoint(path)) as reader:
            check_model_class(model_class, reader.config)
            reader.declared.report_unknown()
            mesh = mesh if isinstance(mesh, Mesh) else make_mesh(mesh)
            kind = choose_dtype(dtype, reader.config, mesh.devices.flat[0].platform)
            cache_kind = choose_kv_dtype(kv_cache_dtype, kind)
            # Before the weights take the memory that this needs.
            tried, _ = _sizes(1, TRIED_LENGTH)
            backend = working_backend(
                attention_backend, reader.config, mesh, tried, kind, cache_kind, model_class
            )
            params = load_params(reader, mesh, kind)
            return cls(reader.config, mesh, params, kind, model_class, cache_kind, backend)

    def __repr__(self) -> str:
        size = f"{self.config.num_layers} layers of width {self.config.embed_dim}"
        mesh = "{}x{}".format(*mesh_shape(self.mesh))
        about = f"{self.mesh.devices.flat[0].platform}, {self.dtype}"
        return f"<{type(self).__name__} of {size} on the mesh {mesh} ({about})>"

    @property
    def cache(self) -> KVCache | None:
        """The KV cache on the mesh, with the keys and values of the last call; None before it."""
        return self._state and self._state[1].cache

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] int32 in [0, V) -> logits [B, T, V] float32.

        Raises:
          ValueError: a token is out of range, or this is inside `jax.jit` or `jax.grad`.
        """
        return self.observe(tokens, ())[0]

    def unembed(self, x: jax.Array) -> jax.Array:
        """Output of a layer [..., D] -> logits [..., V] float32: final norm and LM head.

        Raises:
          ValueError: this is inside `jax.jit` or `jax.grad`.
        """
        _check_outside_jit(x)
        rows = jnp.asarray(x).reshape(-1, x.shape[-1])
        logits = np.asarray(_unembed(self.config, self.mesh)(self.params, np.asarray(rows)))
        return jnp.asarray(logits[:, : self.config.vocab_size]).reshape(*x.shape[:-1], -1)

    def observe(
        self, tokens: jax.Array, names: Sequence[str]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs tokens through the ring and returns activations.

        Args:
          tokens: `[B, T]` int32 in [0, V).
          names: full names of activations, as in `interpret.activation_shapes`.

        Returns:
          Logits `[B, T, V]` float32, and the activations by name, in the shapes of `Llama`.

        Raises:
          ValueError: a token is out of range, the sequence is too long for dynamic rope scaling,
            there is no activation of a name, or this is inside `jax.jit` or `jax.grad`.
        """
        _check_outside_jit(tokens)
        check_tokens(tokens, self.config.vocab_size)
        check_length(self.config, np.shape(tokens)[1])
        values = np.asarray(tokens, np.int32)
        found = {name: _Collected() for name in names}
        logits = self._run(values, found)
        return jnp.asarray(logits), {
            name: jnp.asarray(logits if name == "logits" else collected.whole)
            for name, collected in found.items()
        }

    def kv_cache(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Runs tokens `[B, T]` through the ring, and reads their keys and values from the cache.

        Returns:
          Keys and values as attention reads them, each `[L, B, T, K, h]`, in `dtype`.
        """
        self.observe(tokens, ())
        assert self._state is not None
        sizes, state = self._state
        num_tokens = np.shape(tokens)[1]
        stages = split_layers(self.config.num_layers, mesh_shape(self.mesh)[0])
        replicas = kv_replicas(self.config, mesh_shape(self.mesh)[1])
        keys_and_values = []
        for arrays in dequantized(state.cache, self.dtype):
            # [P, K, num_pages, page_size, h]
            host = [array[:, ::replicas] for array in arrays]
            layers = []
            for stage, stage_layers in enumerate(stages):
                for position, layer in enumerate(stage_layers):
                    if layer is None:
                        continue
                    pages = host[position][stage].transpose(1, 2, 0, 3)
                    by_sequence = pages.reshape(sizes.num_slots, -1, *pages.shape[2:])
                    layers.append(by_sequence[:, :num_tokens])
            keys_and_values.append(jnp.asarray(np.stack(layers)))
        keys, values = keys_and_values
        return keys, values

    def _run(self, tokens: np.ndarray, found: "dict[str, _Collected]") -> np.ndarray:
        """Runs tokens `[B, T]`; fills in `found` and returns the logits `[B, T, V]`."""
        sizes, bucket = _sizes(*tokens.shape)
        places = {name: self._place(name) for name in found if name not in OUTSIDE_LAYERS}
        activations = tuple(sorted({activation for _, activation in places.values()}))
        static = StaticArgs(self.config, sizes, bucket, self.model_class, self._backend)
        step = _step(static, self.mesh, activations)
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
            state, observed = step(self.params, state, packed)
            observed = jax.device_get(observed)
            if 0 <= tick - last:
                leaving = packets[tick - last]
                logits.put(tokens.shape, leaving, observed.logits[:, : self.config.vocab_size])
                if "final_norm.output" in found:
                    found["final_norm.output"].put(tokens.shape, leaving, observed.final_norm)
            if entering and "embedding" in found:
                found["embedding"].put(tokens.shape, entering, observed.entered[0])
            for name, (stage, activation) in places.items():
                if 0 <= tick - stage < len(packets):
                    value = observed.layers[activation][stage]
                    found[name].put(tokens.shape, packets[tick - stage], value)
        self._state = (sizes, state)
        if kv_replicas(self.config, mesh_shape(self.mesh)[1]) > 1:
            for name, (_, activation) in places.items():
                steps = replicas_by_axis(static, self.mesh, activation.name)
                one_of_each = (slice(None, None, step) for step in steps)
                found[name].whole = found[name].whole[:, *one_of_each]
        for name in found:
            if name.endswith(WEIGHTS):  # [B, T, H, S], where S is T rounded up to whole pages
                whole = found[name].whole[..., : tokens.shape[1]]
                found[name].whole = whole.swapaxes(1, 2)
        return logits.whole

    def _place(self, name: str) -> tuple[int, LayerActivation]:
        """The stage that computes an activation of a layer, and its name there.

        Raises:
          ValueError: there is no such layer. Its own names are checked when they are traced.
        """
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if match is None or int(match[1]) >= self.config.num_layers:
            raise ValueError(
                f"There is no activation {name!r}: the layers are layers.0 to "
                f"layers.{self.config.num_layers - 1}, and outside of them are "
                f"{', '.join(OUTSIDE_LAYERS)}."
            )
        number, inside = int(match[1]), match[2]
        stages = split_layers(self.config.num_layers, self.mesh.shape[STAGE])
        stage = next(s for s, layers in enumerate(stages) if number in layers)
        return stage, LayerActivation(stages[stage].index(number), inside)

    def _state_for(self, sizes: RingSizes) -> State:
        """The state to run with: that of the previous run if the sizes are the same, or a new one.

        A run leaves the ring empty, and no result depends on the contents of unused pages.
        """
        previous, self._state = self._state, None
        if previous is not None and previous[0] == sizes:
            return previous[1]
        shapes = state_shapes(self.config, self.mesh, sizes, self.dtype, self.cache_dtype)
        return init_state(shapes, sizes)


# Cached here and not per object, because `LLM.model` creates a new object each time.
_step = lru_cache(maxsize=64)(observed_step)


@lru_cache(maxsize=64)
def _unembed(config: LlamaConfig, mesh: Mesh) -> MeshProgram:
    """The final norm and LM head: (weights, `[n, D]`) -> `[n, V']` float32."""
    specs = (param_specs(config, *mesh_shape(mesh)), P())
    return MeshProgram(partial(local_logits, config), mesh, specs, LOGITS_SPEC, name="unembed")


def _check_outside_jit(value: Any) -> None:
    """Raises ValueError inside `jax.jit` or `jax.grad`, where a value is not known."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            "A model on a mesh cannot be called inside jax.jit or jax.grad, because it runs "
            "compiled programs and is not differentiable: use Llama on one device."
        )


class _Tile(NamedTuple):
    """A segment of one prompt.

    Attributes:
      row: of the prompt in the batch.
      first: position of the first token.
      tokens: token ids, at most `size`.
      size: positions of the chunk that the tile occupies.
    """

    row: int
    first: int
    tokens: list[int]
    size: int


class _Collected:
    """Assembles an activation of all tokens, `[B, T, ...]`, from those of the packets."""

    whole: np.ndarray

    def put(self, shape: tuple[int, ...], packet: list[_Tile], value: np.ndarray) -> None:
        """Adds the value `[C, ...]` of a packet; `shape` is that of the tokens, (B, T)."""
        if not hasattr(self, "whole"):
            self.whole = np.zeros((*shape, *value.shape[1:]), value.dtype)
        for number, tile in enumerate(packet):
            rows = value[number * tile.size : number * tile.size + len(tile.tokens)]
            self.whole[tile.row, tile.first : tile.first + len(rows)] = rows


def _sizes(batch: int, num_tokens: int) -> tuple[RingSizes, Bucket]:
    """Sizes for a batch of prompts, rounded so that few programs are compiled."""
    tile = min(TILE, round_up(num_tokens, PAGE_SIZE))
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
    """Cuts the prompts `[B, T]` into tiles, and the tiles into packets."""
    tiles = [
        _Tile(row, first, prompt[first : first + sizes.tile].tolist(), sizes.tile)
        for row, prompt in enumerate(tokens)
        for first in range(0, len(prompt), sizes.tile)
    ]
    each = bucket.chunk // sizes.tile
    return [tiles[first : first + each] for first in range(0, len(tiles), each)]
