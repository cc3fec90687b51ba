"""Finds the GPU in the table that a device of this machine is. Imports no JAX."""

import re

from llama_jax.costs.gpus import GPUS, Gpu

# Words of the names that drivers report, such as "NVIDIA H100 80GB HBM3"; the first line whose
# words are all there names the GPU.
_WORDS = (
    ("h100 pcie", "h100-pcie"),
    ("h100 nvl", "h100-nvl"),
    ("h100", "h100-sxm"),
    ("h200", "h200"),
    ("a100 80gb", "a100-80gb"),
    ("a100 40gb", "a100-40gb"),
    ("l40s", "l40s"),
    ("b200", "b200"),
    ("rtx pro 6000", "rtx-6000-pro"),
    ("tpu v5 lite", "tpu-v5e"),
    ("tpu v5e", "tpu-v5e"),
    ("tpu v6 lite", "tpu-v6e"),
    ("tpu v6e", "tpu-v6e"),
)


def gpu_of_device(kind: str) -> Gpu | None:
    """The GPU in the table that JAX or a driver calls by this name; None if there is none.

    Args:
      kind: such as "NVIDIA H100 80GB HBM3", from `jax.Device.device_kind` or NVML.
    """
    words = set(re.split(r"[^a-z0-9]+", kind.lower()))
    for wanted, name in _WORDS:
        if words.issuperset(wanted.split()):
            return GPUS.get(name)
    return None
