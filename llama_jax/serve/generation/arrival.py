"""What happens to every request for text before its prompts are tokenized."""

import asyncio
from collections.abc import Sequence
from typing import TypeVar

from starlette.requests import Request

from llama_jax.serve.protocol.generation import GenerationRequest
from llama_jax.serve.protocol.request_body import read
from llama_jax.serve.served_model import ServedModel

R = TypeVar("R", bound=GenerationRequest)

# More than in any language that tokenizers are made for: prompts that fit are not to be refused by
# an estimate, and those that do not are refused when their tokens are known.
CHARACTERS_PER_TOKEN = 8


async def read_admitted(served: ServedModel, kind: type[R], request: Request) -> R:
    """Reads the body of a request, unless there is no place for it.

    Args:
      served: the model.
      kind: a class of `protocol`.
      request: a request whose whole body has been received.

    Raises:
      ApiError: no requests are accepted, there is no place, the body has an error, or it asks for
        another model.
    """
    served.check_available()
    with served.admission.reserve([0]):  # a long body is read in a thread, in which others wait
        body = await read(kind, request)
    served.check_name(body.model)
    return body


def estimate_tokens(prompt: str | bytes | Sequence[int]) -> int:
    """Returns the number of tokens of a prompt of ids, or about as many as a text has at least."""
    return len(prompt) // CHARACTERS_PER_TOKEN if isinstance(prompt, str | bytes) else len(prompt)


def deadline_of(served: ServedModel, timeout: float | None, arrived: float) -> float | None:
    """Returns the event loop's time at which a request is aborted, or None.

    Args:
      served: the model.
      timeout: seconds from its arrival; None for the server's default.
      arrived: when it arrived, by the clock of the metrics.
    """
    timeout = served.request_timeout if timeout is None else timeout
    if timeout is None:
        return None
    elapsed = served.metrics.clock() - arrived
    return asyncio.get_running_loop().time() + timeout - elapsed
