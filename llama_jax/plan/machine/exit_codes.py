"""The exit codes of `--validate`, one for each thing that may not be as planned."""

from enum import IntEnum


class Exit(IntEnum):
    """What failed. If several things did, the exit code is that of the first in this order.

    1 and 2 are those of any other error and of a wrong command line.
    """

    HOLDS = 0
    DRIVER = 10  # NVML, the driver or its CUDA version
    GPU_COUNT = 11
    GPU_MODEL = 12
    GPU_MIG = 13  # a GPU is divided into instances
    GPU_MEMORY = 14  # its size, or what others have taken of it
    GPU_ECC = 15  # uncorrected errors, and memory rows that wait to be replaced
    GPU_LINKS = 16  # NVLink and peer access
    JAX = 17  # its version, its devices, or it does not start
    GPU_CLOCKS = 18  # slowed down by heat or power while it worked
    COPY_RATE = 19
    MATRIX_RATE = 20
    COLLECTIVES = 21
    HOST_MEMORY = 22
    DISK = 23
