"""Another user, to whom permissions apply even if the tests run as root."""

import contextlib
import os
from collections.abc import Iterator

NOBODY = 65534


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Root may read and write anywhere, so it becomes the user nobody."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(own)
