"""A plan as a table on the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from llama_jax.plan.plan import Plan


def show_plan(plan: Plan) -> None:
    """Prints the layouts."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("layout")
    for layout in plan.layouts:
        table.add_row(str(layout))
    Console().print(table)
