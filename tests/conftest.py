"""Every test finds eight virtual CPU devices, and a compilation cache that is the tests' own."""

import os
from pathlib import Path

# For this process and the engines that it starts. JAX reads them when it is imported.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
