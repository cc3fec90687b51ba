"""Decoding and prefill on CPU beside other engines: `python -m bench peers`.

All have the same random weights (100 M parameters), prompts and cores, and decode greedily, in
float32 and in bfloat16: this project's engine on one device (mesh 1x1), which splits each operation
over the cores, and on two (1x2), which split the model; transformers on PyTorch; and at batch 8 the
Llama in Flax that transformers 4 had. Each runs in a process of its own, and they take turns of a
few seconds, so that other load on the machine affects all alike: a turn of prefill answers a prompt
several times, and its least time counts. A figure is the least of all rounds, a ratio is that of
two such figures, and its range is that of the rounds. The ratio of CPU times says what remains on a
busy machine.

The Flax Llama needs an environment of its own, with other versions of jax and transformers:

    make .venv-flax/installed
    python -m bench peers --flax .venv-flax/bin/python
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from bench.partial import keep
from bench.peer_engines import FLAX, LLAMA_JAX, TRANSFORMERS, Moment, Times
from bench.peer_worker import Worker
from bench.result import Plot, Result, Row, Target

DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8, 32)
PROMPT, NEW_TOKENS = 128, 32  # of decoding
LONG_PROMPT, ANSWERS = 512, 5  # of prefill, in a turn
FLAX_BATCH = 8
DECODE_TARGET, PREFILL_TARGET, FLAX_TARGET = 1.3, 1.0, 2.0  # their time over ours, at least
TOY = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
# A column for each peer, since the plot shows one of them.
RATIOS = {TRANSFORMERS: "ratio", FLAX: "ratio to Flax"}
UNITS = {
    **dict.fromkeys(("ours", "peer's"), "s"),
    **dict.fromkeys((*RATIOS.values(), "least", "greatest", "CPU ratio"), ""),
}


def write_model(path: Path, **sizes: int) -> int:
    """Saves the model, with other sizes if they are given; returns its number of parameters."""
    import torch
    import transformers

    full = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    config = transformers.LlamaConfig(
        **full | sizes,
        vocab_size=32_000,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(path)
    return int(model.num_parameters())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m bench peers`."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--toy", action="store_true", help="a tiny model")
    parser.add_argument("--flax", metavar="PYTHON", help="an interpreter that has Flax Llama")


def run(args: argparse.Namespace) -> Result:
    """Measures all engines in turns; keeps what is measured so far in a partial file."""
    rows: list[Row] = []

    def result() -> Result:
        by = ("mesh", "weights")
        plot = Plot("transformers' time over ours", "batch", ("ratio",), by, log="x")
        return Result.measured(
            "peers",
            f"seconds of one more token for the whole batch after prompts of {PROMPT}, and to the "
            f"first token after a prompt of {LONG_PROMPT}; {parameters:,} parameters, least of "
            f"{args.rounds}",
            args={**vars(args), "flax": args.flax is not None},
            packages=("jax", "flax", "torch", "transformers"),
            units=UNITS,
            rows=rows,
            targets=[target(row) for row in rows],
            plots=[plot] if args.batches else [],
        )

    with tempfile.TemporaryDirectory() as path:
        parameters = write_model(Path(path), **(TOY if args.toy else {}))
        for dtype in args.dtypes:
            for found in measure(path, dtype, args.batches, args.rounds, args.flax):
                rows += found
                keep(result(), args.output)
    return result()


def measure(
    path: str, dtype: str, batches: list[int], rounds: int, flax: str | None
) -> Iterator[list[Row]]:
    """The rows of one dtype, case by case; `flax` is the interpreter for Flax Llama, or None."""
    with ExitStack() as stack:

        def worker(engine: str, python: str) -> Worker:
            return stack.enter_context(closing(Worker(engine, path, dtype, python)))

        every = {name: worker(name, sys.executable) for name in (*LLAMA_JAX.values(), TRANSFORMERS)}
        for batch in batches:
            workers = dict(every)
            if flax and batch == FLAX_BATCH:
                workers[FLAX] = worker(FLAX, flax)
            times = in_turns(workers, rounds, batch, PROMPT, NEW_TOKENS)
            decoding = {name: [t.decode for t in each if t.decode] for name, each in times.items()}
            yield compared({"weights": dtype, "batch": batch}, decoding)
        times = in_turns(every, rounds, 1, LONG_PROMPT, 1, ANSWERS)
        prefill = {name: [t.prefill for t in each] for name, each in times.items()}
        yield compared({"weights": dtype, "prompt": LONG_PROMPT}, prefill)


def in_turns(
    workers: dict[str, Worker],
    rounds: int,
    batch: int,
    prompt: int,
    new_tokens: int,
    answers: int = 1,
) -> dict[str, list[Times]]:
    """Each engine's times, one of each per round; every other round in the opposite order.

    A time is that of the answer with the fastest prefill, of so many.
    """
    for worker in workers.values():
        worker.prepare(batch, prompt, new_tokens)
    found: dict[str, list[Times]] = {name: [] for name in workers}
    for number in range(rounds):
        for name in list(workers)[:: -1 if number % 2 else 1]:
            turn = [workers[name].answer() for _ in range(answers)]
            times = min(turn, key=lambda times: times.prefill.clock)
            found[name].append(times)
            print(
                f"batch {batch}, {name}: {1000 * (times.decode or times.prefill).clock:.1f} ms",
                flush=True,
            )
    return found


def compared(case: Row, found: dict[str, list[Moment]]) -> list[Row]:
    """A row for each mesh and peer: both times and their ratio; each by the clock but the last."""
    rows: list[Row] = []
    peers = [name for name in found if name not in LLAMA_JAX.values()]
    for mesh, name in LLAMA_JAX.items():
        for peer in peers:
            ours, theirs = found[name], found[peer]
            ratios = [their.clock / our.clock for our, their in zip(ours, theirs, strict=True)]
            our, their = (min(moment.clock for moment in each) for each in (ours, theirs))
            our_cpu, their_cpu = (min(moment.cpu for moment in each) for each in (ours, theirs))
            row = {
                "mesh": mesh,
                "peer": peer,
                "ours": our,
                "peer's": their,
                RATIOS[peer]: their / our,
                "least": min(ratios),
                "greatest": max(ratios),
                "CPU ratio": their_cpu / our_cpu,
            }
            rows.append({**case, **row})
    return rows


def target(row: Row) -> Target:
    """The target of a row."""
    decoding = "batch" in row
    what = f"decode at batch {row['batch']}" if decoding else f"prefill of {row['prompt']}"
    limit = DECODE_TARGET if decoding else PREFILL_TARGET
    if row["peer"] == FLAX:
        limit = FLAX_TARGET
    ratio = float(row[RATIOS[str(row["peer"])]])  # type: ignore[arg-type]
    name = f"{row['peer']} / {LLAMA_JAX[str(row['mesh'])]}: {what}, {row['weights']}"
    return Target(name, ratio, limit, "min")
