"""What happens with keys that nobody here has heard of: one warning, or an error. Imports no JAX.

The warning goes through `logging`, not `warnings`: the user can do nothing about the file, and a
command line and a notebook without a logging configuration show exactly the sentence.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cache

from llama_jax.config.errors import ConfigError

_SHOWN = 8  # names in a message

log = logging.getLogger("llama_jax")


def report_unknown(where: str, unknown: Mapping[str, Sequence[str]], strict: bool = False) -> None:
    """Warns of unknown keys, once in a process for the same keys at the same place.

    Args:
      where: the checkpoint.
      unknown: file name → its unknown keys.
      strict: whether they are an error instead.

    Raises:
      ConfigError: there are some, and `strict` is set.
    """
    listed = "; ".join(f"{_listed(keys)} ({file})" for file, keys in unknown.items() if keys)
    if not listed:
        return
    if strict:
        raise ConfigError(
            f"{where} has settings that llama-jax does not know: {listed}; delete those that you "
            "know to be harmless, or do without strict_config."
        )
    _warn_once(
        f"{where} has settings that llama-jax does not know and ignores: {listed}. If one of them "
        "changes what the model computes, its answers will be wrong."
    )


def _listed(keys: Sequence[str]) -> str:
    shown = [key if len(key) <= 60 else f"{key[:57]}..." for key in keys[:_SHOWN]]
    more = [f"and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else []
    return ", ".join(shown + more)


@cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)
