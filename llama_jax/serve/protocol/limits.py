"""The limits of a request that the command line can change.

They belong to the process, as does the command line: `set_limits` is called once, before the first
request is read.
"""

from dataclasses import dataclass


@dataclass
class Limits:
    """Maxima of one request.

    Attributes:
      choices: of `n`.
      prompts: of the list `prompt`.
    """

    choices: int = 16
    prompts: int = 1024


LIMITS = Limits()


def set_limits(choices: int, prompts: int) -> None:
    """Sets the limits of all requests from now on."""
    LIMITS.choices, LIMITS.prompts = choices, prompts
