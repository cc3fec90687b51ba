"""Runs tasks of lm_eval_tasks with lm-evaluation-harness, and prints the results as JSON.

Arguments: the address of a server, the directory of its checkpoint, and the tasks. The server is
driven by `local-completions`; the backend `hf` reads the same checkpoint in float32.
"""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager


def evaluate(model: str, tasks: list[str], **model_args: object) -> dict:
    """The metrics of each task, and what the model answered to each request."""
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=tasks,
        task_manager=TaskManager(include_path="lm_eval_tasks", include_defaults=False),
        bootstrap_iters=0,
    )
    return {
        "metrics": results["results"],
        "answers": {
            task: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
            for task, samples in results["samples"].items()
        },
    }


def main(url: str, checkpoint: str, *tasks: str) -> None:
    """Prints the results of each backend."""
    run = {
        "hf": dict(model="hf", pretrained=checkpoint, dtype="float32", device="cpu"),
        "local tokenizer": dict(
            model="local-completions",
            base_url=f"{url}/v1/completions",
            tokenizer=checkpoint,
            tokenizer_backend="huggingface",
            num_concurrent=4,
            max_length=1024,
        ),
        "remote tokenizer": dict(
            model="local-completions",
            base_url=f"{url}/v1/completions",
            tokenizer_backend="remote",
            batch_size=3,
            max_length=1024,
        ),
    }
    print(json.dumps({name: evaluate(tasks=list(tasks), **args) for name, args in run.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
