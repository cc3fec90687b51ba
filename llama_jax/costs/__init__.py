"""What a tick costs: GPUs, memory, and times by arithmetic and by measured kernels. No JAX."""
