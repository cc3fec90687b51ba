"""What the project promises beside figures, and what no plan covers. Imports no JAX."""

from llama_jax.plan.reasons import OUT_OF_SCOPE
from llama_jax.plan.report.document import Section, Table

_PROMISES = (
    (
        "dynamic batching",
        "Requests join and leave the ring at any tick; no request waits for a batch to end.",
        "docs/ring.md",
    ),
    (
        "no out-of-memory error while serving",
        "Weights and cache are allocated before the first request. A request without pages waits.",
        "`--compile` shows the bytes; metric `device_memory_bytes`",
    ),
    (
        "graceful degradation",
        "A full queue answers 429 with `Retry-After`; when pages run out, the youngest sequence "
        "gives its pages up and continues later.",
        "docs/http.md; `--simulate` counts both",
    ),
    (
        "scaling out",
        "Replicas share no state; a load balancer in front of them is enough.",
        "`--replicas`, `--recommend`",
    ),
    (
        "hardware validation",
        "The server can refuse to start on a machine that is not as planned.",
        "`--validate`; `python -m llama_jax.serve --preflight`",
    ),
    (
        "monitoring with alerts",
        "Prometheus metrics, alert rules and a dashboard.",
        "docs/alerts.yaml, docs/grafana.json; `--compare`",
    ),
    (
        "operational documentation",
        "Keys, TLS, logs, metrics, traces, configuration files.",
        "docs/operations.md",
    ),
)


def compliance_section() -> Section:
    """What was promised beside figures."""
    return Section(
        "compliance",
        "Compliance",
        ("What was promised beside the figures above, and where to check it.",),
        (Table("promises", ("promised", "how it is kept", "check it"), _PROMISES),),
    )


def assumptions_section(assumptions: tuple[tuple[str, str], ...]) -> Section:
    """What every figure rests on: (what, value) each."""
    return Section(
        "assumptions",
        "Assumptions and scope",
        (OUT_OF_SCOPE,),
        (Table("assumptions", ("assumed", "value"), assumptions),),
    )
