"""The programs of an engine on described GPUs, in the sizes that it would choose."""

from dataclasses import replace

from llama_jax.checkpoint.load import choose_dtype
from llama_jax.costs.deployment import Deployment
from llama_jax.engine.device_memory import choose_mesh_sizes, weight_bytes
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.programs import Programs
from llama_jax.engine.sizing import (
    check_options,
    check_platform,
    check_stages,
    gpu_cache_bytes,
)
from llama_jax.model import Llama
from llama_jax.model.kv_storage import choose_kv_dtype
from llama_jax.plan.compiled.described_gpus import find_description, target_config
from llama_jax.plan.compiled.described_mesh import described_mesh
from llama_jax.ring.backend import check_backend
from sharding.errors import UserError


def engine_programs(deployment: Deployment, options: EngineOptions, allowed: int) -> Programs:
    """Does what an engine does before it loads weights.

    Args:
      deployment: one replica of it is taken.
      options: of the engine; the dtypes of cache and activations are the deployment's.
      allowed: bytes of each GPU that everything together may take.

    Raises:
      UserError: the engine would refuse the options, or the model does not fit into the GPUs.
    """
    config, gpu, layout = deployment.config, deployment.gpu, deployment.layout
    options = replace(
        options,
        kv_cache_dtype=deployment.kv_cache_dtype,
        fp8_activations=deployment.fp8_activations,
    )
    check_options(options, config)
    check_stages(layout.num_stages, config)
    major, minor = find_description(gpu).compute_capability
    check_platform(options, "gpu", f"{major}.{minor}")
    mesh = described_mesh(layout, gpu.name, target_config(gpu, allowed))
    dtype = choose_dtype(options.dtype, config, "gpu")
    if options.kv_cache_memory is None:  # a described GPU reports no free memory
        weights = weight_bytes(config, mesh, dtype)
        cache = gpu_cache_bytes([allowed], weights)
        if not cache:
            raise UserError(
                f"On {layout}, each {gpu.name} would hold {weights / 1e9:.1f} GB of weights, and "
                f"{allowed / 1e9:.1f} GB may be taken: use more GPUs or weights in fewer bits."
            )
        options = replace(options, kv_cache_memory=cache)
    sizes, _ = choose_mesh_sizes(options, config, mesh, dtype)
    cache_dtype = choose_kv_dtype(options.kv_cache_dtype, dtype)
    model_class: type[Llama] = Llama
    if options.fp8_activations:
        model_class = type(Llama.__name__, (Llama,), {"fp8_activations": True})
    check_backend(
        options.attention_backend,
        mesh,
        model_class,
        config.head_dim,
        sizes.page_size,
        dtype,
        cache_dtype,
    )
    return Programs(
        config, mesh, sizes, dtype,
        model_class=model_class, cache_dtype=cache_dtype,
        attention_backend=options.attention_backend,
    )  # fmt: skip
