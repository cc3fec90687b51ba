"""Unknown keys in a checkpoint's JSON files: one warning, or an error. Imports no JAX.

The warning uses `logging`, not `warnings`. Terminals and notebooks then show the bare message, even
if logging is not configured, and not a line of this package's source.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cache

from llama_jax.config.errors import ConfigError
from sharding.errors import list_text

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
    listed = "; ".join(f"{list_text(keys)} ({file})" for file, keys in unknown.items() if keys)
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


@cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)
