"""The server to start: its command line, as the plan proves it. Imports no JAX."""

from llama_jax.plan.plan import Plan
from llama_jax.plan.report.document import Section


def server_section(plan: Plan) -> Section:
    """The command line, checked by the server's own parser, and what to do first."""
    from llama_jax.plan.serving import serving

    if not plan.best.fits:
        return Section("server", "The server", ("No server of this layout could start.",))
    found = serving(plan)
    return Section(
        "server",
        "The server",
        (
            f"`{found.command}`",
            *found.notes,
            "`--server-command` prints it, and `--kubernetes` a manifest with it.",
        ),
    )
