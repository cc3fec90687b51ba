"""JSON responses."""

from typing import Any

import msgspec
from starlette.responses import Response


class JsonResponse(Response):
    """A response with a JSON body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encodes the body."""
        return msgspec.json.encode(content)
