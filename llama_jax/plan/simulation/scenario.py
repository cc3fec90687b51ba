"""What a command line asks to be simulated: the server that the plan proves, and its load."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from llama_jax.engine.options import EngineOptions
from llama_jax.plan.plan import Plan
from llama_jax.plan.serving import serving
from llama_jax.plan.simulation.lengths import Lengths
from llama_jax.plan.simulation.load import Draw, Load
from llama_jax.plan.simulation.server import Server, server_for
from llama_jax.plan.simulation.traces import read_trace
from llama_jax.terminal.units import count_text
from sharding.errors import UserError

SECONDS = 300.0  # in which requests arrive
MAX_DRAWN = 100_000  # requests of a closed loop


@dataclass(frozen=True)
class Scenario:
    """A plan's best layout under a load.

    Attributes:
      plan: that the layout is of.
      options: of each replica's engine.
      max_queue_tokens: of each replica's server.
      load: of all replicas together.
      draw: what the load was drawn from; None for a trace.
      words: the load in words.
    """

    plan: Plan
    options: EngineOptions
    max_queue_tokens: int
    load: Load
    draw: Draw | None
    words: str

    @property
    def replicas(self) -> int:
        """The number of replicas."""
        return self.plan.best.layout.replicas

    def server(self, level: str = "expected") -> Server:
        """One of the replicas, with ticks of this length."""
        best = self.plan.best
        cache = self.options.kv_cache_memory or best.memory.cache
        server = server_for(best.replica.model, self.options, cache, level)
        return replace(server, max_queue_tokens=self.max_queue_tokens)


def scenario(arguments: argparse.Namespace, plan: Plan) -> Scenario:
    """Reads what is to be simulated.

    Raises:
      UserError: flags contradict each other, a trace is broken, or the model does not fit.
    """
    # What starts a server is the very command line that the planner prints.
    from llama_jax.serve.command_line.arguments import engine_options, parse_arguments

    load, draw, words = _load(arguments, plan)
    found = serving(plan)
    parsed = parse_arguments([found.path, *found.arguments])
    options = engine_options(parsed, Path(found.path))
    longest = max(r.prompt_tokens + r.output_tokens for r in load.requests)
    config = plan.question.config
    if options.max_model_len is not None and longest > options.max_model_len:
        room = min(config.max_context, plan.best.memory.tokens)
        options = replace(options, max_model_len=min(longest, room))
    if load.users is not None:  # the plan is for a rate, which users do not keep
        each = min(-(-load.users // plan.best.layout.replicas), plan.best.replica.max_live)
        options = replace(options, max_num_seqs=max(each, options.max_num_seqs or 0))
    return Scenario(plan, options, parsed.max_queue_tokens, load, draw, words)


def _load(arguments: argparse.Namespace, plan: Plan) -> tuple[Load, Draw | None, str]:
    a, workload = arguments, plan.question.workload
    users = {} if a.users is None else {"users": a.users, "think": a.think or 0.0}
    if a.think is not None and a.users is None:
        raise UserError("--think is the pause of users between requests: add --users.")
    if a.trace is not None:
        for flag in ("prompt_lengths", "output_lengths", "prefix_tokens", "prefixes", "arrivals"):
            if getattr(a, flag) is not None:
                raise UserError(
                    f"--trace says what arrives, so leave --{flag.replace('_', '-')} out."
                )
        requests = read_trace(a.trace)
        if a.duration is not None:
            requests = [request for request in requests if request.at < a.duration]
        words = f"the trace {a.trace.name}" + _users(users)
        return Load(requests, **users), None, words
    if a.users is not None and a.arrivals is not None:
        raise UserError("--users send when they have their answer, so leave --arrivals out.")
    if a.prefixes is not None and a.prefix_tokens is None:
        raise UserError("--prefixes says how many beginnings are shared: add --prefix-tokens.")
    shared = a.prefix_tokens or 0
    rest = workload.prompt_tokens - shared
    if a.prompt_lengths is None and rest < 1:
        raise UserError(
            f"Prompts of {workload.prompt_tokens:,} tokens cannot begin with {shared:,} shared "
            "ones and go on: raise --prompt-tokens or lower --prefix-tokens."
        )
    prompt = a.prompt_lengths or Lengths("constant", (float(rest),))
    output = a.output_lengths or Lengths("constant", (float(workload.output_tokens),))
    draw = Draw(
        rate=workload.rate,
        arrivals=a.arrivals or "poisson",
        duration=a.duration or SECONDS,
        prompt=prompt,
        answer=output,
        prefix_tokens=shared,
        prefixes=a.prefixes or 1,
        seed=a.seed,
    )
    if users:
        requests = replace(draw, duration=None, num_requests=MAX_DRAWN).requests()
        load = Load(requests, until=a.duration or SECONDS, **users)
        return load, None, f"a closed loop{_users(users)}"
    prompts = f"{shared} shared + {prompt}" if shared else str(prompt)
    arriving = {"poisson": "Poisson", "constant": "constant"}[draw.arrivals]
    words = f"{arriving} arrivals at {workload.rate:g} requests/s, {prompts} / {output} tokens"
    return Load(draw.requests()), draw, words


def _users(users: dict[str, float]) -> str:
    if not users:
        return ""
    pause = f" with pauses of {users['think']:g} s" if users["think"] else ""
    return f" of {count_text(int(users['users']), 'user')}{pause}"
