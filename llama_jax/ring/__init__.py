"""The compiled tick: its sizes, its packets, the KV cache, and the steps.

Exports nothing, because the scheduler imports `sizes` and must not load JAX.
"""
