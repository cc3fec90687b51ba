"""What tokens cost at a price per GPU and hour. Imports no JAX."""

from llama_jax.costs.figure import Band
from llama_jax.plan.candidate import Candidate

HOUR, MILLION = 3600, 10**6


def cost_per_million(candidate: Candidate, price: float, rate: float) -> float:
    """The cost of a million output tokens, in the unit of `price`; the prompts are in it.

    Args:
      candidate: a layout.
      price: of one GPU for one hour.
      rate: requests/s, of all replicas together; the GPUs cost the same at any.
    """
    tokens = rate * candidate.replica.workload.output_tokens
    return candidate.layout.gpus * price / HOUR / tokens * MILLION if tokens else float("inf")


def least_cost(candidate: Candidate, price: float) -> Band:
    """The cost at the highest rate that keeps the targets."""
    rates = candidate.max_rate
    low, expected, high = (
        cost_per_million(candidate, price, rate) for rate in (rates.high, rates.expected, rates.low)
    )
    return Band(low, expected, high)
