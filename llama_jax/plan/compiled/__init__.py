"""What XLA's GPU compiler says of a deployment, without a GPU.

The programs that a server would run are compiled for a described GPU and the whole mesh, and read:
memory, collectives, copies, kernels. Importing this package loads no JAX; its modules do, except
`command` and `described_gpus`.
"""
