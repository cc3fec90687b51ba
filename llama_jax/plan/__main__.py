"""Runs `python -m llama_jax.plan`, also installed as `llama-jax-plan`."""

import argparse
import json
import sys
import traceback

from llama_jax.plan.command_line import make_parser, read_question
from llama_jax.plan.modes import chosen_mode, option
from llama_jax.plan.plan import Plan, make_plan
from llama_jax.plan.recommend import Recommendation, recommend, recommendation_text
from llama_jax.terminal.output import protect_output
from sharding.errors import UserError

MET, MISSED, WRONG, DEFECT, INTERRUPTED = 0, 1, 2, 70, 130


def main(argv: list[str] | None = None) -> int:
    """Plans what the command line asks for; returns its exit code (see --help)."""
    protect_output()
    arguments = make_parser().parse_args(argv)
    try:
        if set(sys.argv[1:] if argv is None else argv) <= {"--json"}:
            return _show_reference(arguments.json)
        mode = chosen_mode(arguments)
        if mode is not None and not mode.needs_plan:
            return mode.run(arguments, None)
        question = read_question(arguments)
        fewest = recommend(question) if arguments.recommend else None
        plan = make_plan(question) if fewest is None else fewest.plan
        if mode is not None:
            if fewest is not None and fewest.gpus is None:
                text = f"{recommendation_text(fewest)} So there is nothing for {option(mode.flag)}."
                return _fail(arguments, text, MISSED)
            return mode.run(arguments, plan)
        return _show(arguments, plan, fewest)
    except UserError as error:
        return _fail(arguments, str(error), WRONG)
    except KeyboardInterrupt:
        return _fail(arguments, "Interrupted.", INTERRUPTED)
    except Exception as error:
        traceback.print_exc()
        return _fail(arguments, f"This is a defect of the program: {error!r}.", DEFECT)


def _show_reference(as_json: bool) -> int:
    """Prints the reference deployment, row by row."""
    from llama_jax.plan.report.json_text import json_text
    from llama_jax.plan.report.reference import reference_report
    from llama_jax.plan.report.text import show

    report = reference_report()
    if as_json:
        print(json_text(report), end="")
    else:
        show(report)
    return MET if report.met else MISSED


def _show(arguments: argparse.Namespace, plan: Plan, fewest: Recommendation | None) -> int:
    """Prints the arithmetic plan."""
    # What is shown is imported only now: most modes show something else.
    from llama_jax.plan.serving import serving

    server = serving(plan) if plan.best.holds else None  # or nothing is shown
    if arguments.frontier is not None:
        from llama_jax.plan.frontier import points
        from llama_jax.plan.frontier_plot import draw_frontier

        question = plan.question
        title = f"{question.model} on {question.gpus} x {question.gpu.name}, every layout"
        draw_frontier(points(plan), title, arguments.frontier)
    if arguments.json:
        from llama_jax.plan.json_text import plan_json

        content = plan_json(plan, server, arguments.cost_per_gpu_hour, fewest)
        print(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        from llama_jax.plan.table import show_plan

        show_plan(plan, server, arguments.cost_per_gpu_hour, fewest)
    return MET if plan.best.holds else MISSED


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"error": message}))
    return code


if __name__ == "__main__":
    sys.exit(main())
