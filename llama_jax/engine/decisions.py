"""What an engine decides and checks before it loads weights, whose loading may take minutes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.checkpoint.load import choose_dtype
from llama_jax.config import LlamaConfig
from llama_jax.costs.tick_time import TickModel
from llama_jax.engine.device_memory import allowed_bytes, choose_mesh_sizes, served_on
from llama_jax.engine.latency_targets import find_tick_model
from llama_jax.engine.memory_check import check_memory, check_weights
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.sizing import check_platform
from llama_jax.model import Llama
from llama_jax.model.kv_storage import choose_kv_dtype
from llama_jax.ring.backend import check_backend
from llama_jax.ring.sizes import RingSizes
from sharding.mesh import make_mesh, mesh_shape


class Decisions(NamedTuple):
    """What follows from the options, the checkpoint's config and the devices.

    Attributes:
      config: the model.
      mesh: the devices.
      model_class: whose layers run and whose sampler chooses tokens.
      dtype, cache_dtype: of the activations and of the KV cache.
      sizes: of the ring.
      max_model_len: maximum tokens of a sequence.
      tick_model: the times of ticks on these devices, if they are known.
    """

    config: LlamaConfig
    mesh: Mesh
    model_class: type[Llama]
    dtype: jnp.dtype
    cache_dtype: jnp.dtype
    sizes: RingSizes
    max_model_len: int
    tick_model: TickModel | None

    @property
    def num_stages(self) -> int:
        """P."""
        return mesh_shape(self.mesh)[0]

    @property
    def platform(self) -> str:
        """That of the devices, as JAX calls it."""
        platform: str = self.mesh.devices.flat[0].platform
        return platform


def decide(options: EngineOptions, config: LlamaConfig, model_class: type[Llama]) -> Decisions:
    """Makes the mesh, and decides the rest. JAX starts its devices here.

    Raises:
      UserError: an option does not fit the model, the devices or their memory.
    """
    mesh = make_mesh(options.mesh)
    device = mesh.devices.flat[0]
    check_platform(options, device.platform, getattr(device, "compute_capability", ""))
    if options.fp8_activations:
        model_class = type(model_class.__name__, (model_class,), {"fp8_activations": True})
    dtype = choose_dtype(options.dtype, config, device.platform)
    if device.platform != "cpu" and dtype == jnp.float32:  # or a GPU would multiply in TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    cache_dtype = choose_kv_dtype(options.kv_cache_dtype, dtype)
    tick_model = find_tick_model(options, config, device.device_kind, mesh_shape(mesh), str(dtype))
    deployment, allowed = served_on(options, config, mesh, dtype), allowed_bytes(options, mesh)
    check_weights(deployment, options, allowed)
    sizes, max_model_len = choose_mesh_sizes(options, config, mesh, dtype, tick_model)
    check_memory(deployment, options, sizes, allowed)
    check_backend(
        options.attention_backend, mesh, model_class, config.head_dim, sizes.page_size,
        dtype, cache_dtype,
    )  # fmt: skip
    return Decisions(
        config, mesh, model_class, dtype, cache_dtype, sizes, max_model_len, tick_model
    )
