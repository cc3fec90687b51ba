"""Responses with the files of the page, which are read once and kept in memory."""

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import PurePath

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from llama_jax.serve.errors import ApiError

INDEX = "index.html"
KEY_FORM = "key_form.html"  # not a file of `/page/`: it is what a 401 looks like
MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# No string becomes HTML or code: with Trusted Types, the browser refuses innerHTML.
_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",  # kept, but revalidated: the files have no version in their names
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class StaticFile:
    """One file, ready to be sent."""

    def __init__(self, name: str, content: bytes, policy: str = _POLICY) -> None:
        self._content = content
        self._media_type = MEDIA_TYPES[PurePath(name).suffix]
        self._etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        self._policy = policy

    def response(self, request: Headers) -> Response:
        """The file, or 304 if the client has it."""
        headers = {**_HEADERS, "Content-Security-Policy": self._policy, "ETag": self._etag}
        if _lists(request.get("if-none-match", ""), self._etag):
            return Response(status_code=304, headers=headers)
        return Response(self._content, headers=headers, media_type=self._media_type)

    def refusal(self, error: ApiError) -> Response:
        """The file as the body of an error, which no cache keeps."""
        headers = {**_HEADERS, **error.headers, "Content-Security-Policy": self._policy}
        headers |= {"Cache-Control": "no-store"}
        return Response(self._content, error.status, headers, self._media_type)


@cache
def static_files() -> Mapping[str, StaticFile]:
    """The files of the page by name. A name is looked up here and nowhere else: it is no path."""
    folder = files("llama_jax.serve.page") / "browser"
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    return {name: StaticFile(name, data, _policy(name, data)) for name, data in contents.items()}


def key_form(scope: Scope, headers: Headers, error: ApiError) -> Response | None:
    """A page that asks for the API key: the 401 that a browser gets where it expected the page.

    Everything else needs the key, the page's own files too. The form's script therefore fetches
    them with the key, and runs them.

    Args:
      scope: the request.
      headers: its headers.
      error: why it is refused.

    Returns:
      None if this is not a browser that opens the page without a key.
    """
    opens = scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
    if error.status != 401 or not opens or "text/html" not in headers.get("accept", ""):
        return None
    return static_files()[KEY_FORM].refusal(error)


def _policy(name: str, content: bytes) -> str:
    """The content security policy of a file: the key form is all in one file, and loads blobs."""
    if name != KEY_FORM:
        return _POLICY
    script, style = (
        base64.b64encode(hashlib.sha256(_inside(tag, content)).digest()).decode()
        for tag in (b"script", b"style")
    )
    return (
        f"{_POLICY}; script-src 'self' 'sha256-{script}' blob:; style-src 'self' 'sha256-{style}'"
    )


def _inside(tag: bytes, content: bytes) -> bytes:
    (inside,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), content, re.DOTALL)
    return bytes(inside)


def _lists(if_none_match: str, etag: str) -> bool:
    """Whether a client has the current file (RFC 9110, section 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or tags == ["*"]
