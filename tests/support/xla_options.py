"""Options of XLA's CPU compiler for tests: they compile thousands of programs and run each briefly.

Most of a compilation is the generation of machine code. With these options, that takes a third of
the time. The programs then run more slowly, except for their matrix products, which are Eigen's.
"""

from importlib.metadata import version

# jaxlib 0.11 has no such option, and one that XLA does not know ends the process.
_HAS_FUSION_EMITTERS = version("jaxlib").startswith("0.10.")

# For `XLA_FLAGS`.
CHEAP_CODE = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        *(["--xla_cpu_use_fusion_emitters=false"] if _HAS_FUSION_EMITTERS else []),
    )
)

# For `lower(...).compile(PRODUCTION)`, in tests that read the compiled program: of the options
# above, the only one that changes the optimized HLO and the memory has XLA's default. The machine
# code, which such tests do not run, stays cheap.
PRODUCTION: dict[str, bool | int] = (
    {"xla_cpu_use_fusion_emitters": True} if _HAS_FUSION_EMITTERS else {}
)
