"""The compiled tick: its sizes, the packets that enter, the KV cache, and the steps.

Re-exports nothing: the scheduler reads `sizes` and must not load JAX.
"""
