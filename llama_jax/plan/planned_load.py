"""The load that a command line plans for. Imports no JAX."""

import argparse
import math

from llama_jax.plan.simulation.traces import read_trace
from llama_jax.plan.targets import Workload
from sharding.errors import UserError

DEFAULT_LOAD = Workload(prompt_tokens=1024, output_tokens=256, rate=8.0)
LEAST_RATE, MOST_RATE = 1e-9, 1e9  # requests/s; beyond, arithmetic overflows


def planned_load(arguments: argparse.Namespace) -> Workload:
    """The lengths and the rate to plan for.

    A flag that is given counts. Otherwise the load that is to be simulated decides: the mean
    lengths and the mean rate of a trace, or the mean of a distribution of lengths.

    Raises:
      TraceError: the trace cannot be read.
      UserError: a target would be dropped without a word, since the flags contradict each other.
    """
    load = DEFAULT_LOAD
    if arguments.trace is not None:
        load = _of_trace(arguments)
    if arguments.prompt_lengths is not None:
        prompt = (arguments.prefix_tokens or 0) + math.ceil(arguments.prompt_lengths.mean)
        load = Workload(prompt, load.output_tokens, load.rate)
    if arguments.output_lengths is not None:
        load = Workload(load.prompt_tokens, math.ceil(arguments.output_lengths.mean), load.rate)
    simulated = arguments.trace is not None or arguments.output_lengths is not None
    if simulated and arguments.output_tokens == 1 < load.output_tokens and arguments.tpot:
        raise UserError(
            "--output-tokens 1 plans for answers without a second token, which no --tpot limits, "
            "but longer ones are to be simulated: leave --output-tokens out, or add --tpot none."
        )
    return Workload(
        arguments.prompt_tokens or load.prompt_tokens,
        arguments.output_tokens or load.output_tokens,
        arguments.rate or load.rate,
    )


def is_load_given(arguments: argparse.Namespace) -> bool:
    """Whether a flag says what to plan for."""
    flags = (arguments.prompt_tokens, arguments.output_tokens, arguments.rate)
    return any(flag is not None for flag in flags)


def _of_trace(arguments: argparse.Namespace) -> Workload:
    """The mean request of a trace, and its mean rate; the default one if all come at once."""
    requests = read_trace(arguments.trace)
    if arguments.duration is not None:
        requests = [request for request in requests if request.at < arguments.duration]
    count, span = len(requests), requests[-1].at
    return Workload(
        math.ceil(sum(request.prompt_tokens for request in requests) / count),
        math.ceil(sum(request.output_tokens for request in requests) / count),
        (count - 1) / span if count - 1 <= MOST_RATE * span > 0 else DEFAULT_LOAD.rate,
    )
