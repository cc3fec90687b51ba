"""Every test that makes a mesh finds eight virtual CPU devices, whatever runs before it."""

import os

# For this process and the engines that it starts. JAX reads it when it is imported.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
