"""Renders results as one Markdown page with plots: `python -m bench report`.

Without arguments it renders `bench/results` to `bench/results/README.md` and `bench/results/plots`.
"""

import argparse
import shlex
from pathlib import Path

from bench.commands import MEASUREMENTS
from bench.plots import plot_paths, write_plots
from bench.result import BadResult, Result
from bench.table import tables, target_text

RESULTS = Path(__file__).parent / "results"
PAGE, PLOTS = "README.md", "plots"
NOT_RESULTS = {"calibration.json"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the folder."""
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="of JSON files")


def run(args: argparse.Namespace) -> None:
    """Writes the page and the plots."""
    results = read_all(args.folder)
    for path, result in results.items():
        write_plots(result, args.folder / PLOTS / path.name)
    target = args.folder / PAGE
    target.write_text(page(results))
    print(f"{len(results)} results written to {target}")


def read_all(folder: Path) -> dict[Path, Result]:
    """The results of a folder, in the order of `python -m bench --help`.

    Raises:
      BadResult: a file is not a result, or there is none.
    """
    paths = [path for path in folder.glob("*.json") if path.name not in NOT_RESULTS]
    if not paths:
        raise BadResult(f"{folder} holds no results; name a folder of JSON files")
    order = {name: number for number, name in enumerate(MEASUREMENTS)}
    found = {path: Result.read(path) for path in sorted(paths)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[1].name, len(order))))


def page(results: dict[Path, Result]) -> str:
    """The page in Markdown."""
    lines = [
        "# Results",
        "",
        "Written by `python -m bench report` from the JSON files in this folder. Do not edit it.",
        "",
        "| result | measured on | targets |",
        "| --- | --- | --- |",
    ]
    for path, result in results.items():
        link = f"[{path.stem}](#{path.stem})"
        lines.append(f"| {link} | {machine_text(result)} | {verdict(result)} |")
    return "\n".join(lines) + "\n" + "".join(section(path, r) for path, r in results.items())


def section(path: Path, result: Result) -> str:
    """One result: how to measure it, where it was measured, its tables, targets and plots."""
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    parts = [
        f"\n## {path.stem}\n",
        f"`{command(result)}`: {result.what.rstrip('.')}.\n",
        f"{machine_text(result)}; {versions}.\n",
        *(table.markdown() for table in tables(result)),
    ]
    if result.targets:
        parts.append("".join(f"- {target_text(target)}\n" for target in result.targets))
    for plot, file in zip(result.plots, plot_paths(result, path), strict=True):
        parts.append(f"![{plot.title}]({PLOTS}/{file.name})\n")
    return "\n".join(parts)


def command(result: Result) -> str:
    """The command that measured a result, with the options that were given or had a default."""
    words = ["python -m bench", result.name]
    for name, value in result.flags.items():
        option = f"--{name.replace('_', '-')}"
        if name.isupper():
            words.insert(0, f'{name}="{value}"')  # a variable of the environment
        elif isinstance(value, list):
            words += [option, *map(shlex.quote, map(str, value))]
        elif isinstance(value, bool):
            words += [option] if value else []
        else:
            words += [option, shlex.quote(str(value))]
    return " ".join(words)


def machine_text(result: Result) -> str:
    """The accelerators, or else the CPUs."""
    found = result.machine
    if "accelerator" in found:
        return f"{found['accelerators']} × {found['accelerator']}"
    return f"{found['cpus']} cores of {found['cpu']}" if "cpu" in found else "no device"


def verdict(result: Result) -> str:
    """How many targets are met."""
    met = sum(target.met for target in result.targets)
    return f"{met} of {len(result.targets)} met" if result.targets else "none"
