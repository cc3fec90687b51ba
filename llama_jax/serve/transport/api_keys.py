"""The API keys that a server accepts."""

import hashlib
import hmac
import logging
import stat
from collections.abc import Iterable
from pathlib import Path

from sharding.errors import UserError

log = logging.getLogger("llama_jax.serve")

ID_LENGTH = 8  # hexadecimal digits


class KeyFileError(UserError):
    """The file of API keys cannot be read, has no key, or a key that no client can send."""


class ApiKeys:
    """A set of keys, which are kept as hashes.

    All hashes are compared, each in constant time: how long it takes depends neither on which key
    matches nor on how much of one does.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        """Takes keys of printable ASCII characters; spaces around them do not count."""
        self._hashes = [hashlib.sha256(key.strip().encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def find(self, authorization: str) -> str | None:
        """Returns the id of a key, by which logs name it: the beginning of its hash.

        Args:
          authorization: the value of the header Authorization.

        Returns:
          None if it is not "Bearer" and one of the keys.
        """
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1")).digest()
        matches = [known for known in self._hashes if hmac.compare_digest(given, known)]
        # The name of a scheme has no case (RFC 9110, section 11.1).
        if not matches or scheme.lower() != "bearer":
            return None
        return matches[0].hex()[:ID_LENGTH]


def is_key(text: str) -> bool:
    """Returns whether a client can send this key."""
    return text.isascii() and text.isprintable() and bool(text.strip())


def read_key_file(path: Path) -> list[str]:
    """Reads the keys of a file: one per line; empty lines and those that start with # are skipped.

    Warns if other users of this machine may read the file.

    Raises:
      KeyFileError: it cannot be read, has no key, or a key that no client can send. The message
        does not quote the key.
    """
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise KeyFileError(f"--api-key-file {path} cannot be read: {reason}.") from error
    keys = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not is_key(key):
            raise KeyFileError(
                f"--api-key-file {path}: the key in line {number} may contain only printable ASCII "
                "characters."
            )
        keys.append(key)
    if not keys:
        raise KeyFileError(f"--api-key-file {path} has no key: write one per line.")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("Other users can read the API keys in %s: run chmod 600 %s.", path, path)
    return keys
