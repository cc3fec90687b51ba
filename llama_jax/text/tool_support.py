"""What a chat template does with tools, found out by trying it. Imports no JAX."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llama_jax.text.conversation import Call, Turn

_NO_TOOLS = (
    "The chat template of this model does not know tools: leave out tools and tool messages, or "
    "serve a model whose template does, such as Llama 3.1."
)
# Digits and the letter x: they survive a change of case and need no quoting. Mistral's templates
# want ids of nine characters.
_NAME, _ID = "x17305", ("x12345678", "x87654321")
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "x27305",
        "parameters": {
            "type": "object",
            "properties": {"x37305": {"type": "string"}},
            "required": ["x37305"],
        },
    },
}
_DEFINITION = (_NAME, "x27305", "x37305")
_ARGUMENTS = (("x47305", "x57305"), ("x67305", "x77305"))

Write = Callable[[Sequence[Turn], Any], str | None]


class ToolSupport(NamedTuple):
    """What a chat template does with tools.

    Attributes:
      problem: one sentence on why no tool can be used; None if tools can be.
      several_calls: whether a message may have more than one call.
      text_beside_calls: whether a message with calls keeps its text.
      rendered: what the template wrote with tools.
    """

    problem: str | None = _NO_TOOLS
    several_calls: bool = False
    text_beside_calls: bool = False
    rendered: tuple[str, ...] = ()


def try_tools(write: Write) -> ToolSupport:
    """Tries out a template.

    Args:
      write: returns what the template writes for a chat and tools; None if it rejects them, or
        leaves out the text of a message.
    """
    for system in ([], [Turn("system", "87301")]):
        question = [*system, Turn("user", "87302")]
        asked = write(question, [_TOOL])
        called = write([*question, *_exchange("", 1)], [_TOOL])
        if not (_has(asked, _DEFINITION) and _has(called, (*_DEFINITION, *_ARGUMENTS[0]))):
            continue
        both = write([*question, *_exchange("", 2)], [_TOOL])
        beside = write([*question, *_exchange("87303", 1)], [_TOOL])
        return ToolSupport(
            problem=None,
            several_calls=_has(both, (*_ARGUMENTS[0], *_ARGUMENTS[1])),
            text_beside_calls=beside is not None,
            rendered=tuple(filter(None, (asked, called, both, beside))),
        )
    return ToolSupport()


def _exchange(text: str, calls: int) -> list[Turn]:
    """The assistant's calls at once, and their results."""
    made = tuple(
        Call(call_id, _NAME, dict([pair]))
        for call_id, pair in zip(_ID[:calls], _ARGUMENTS, strict=False)
    )
    results = [Turn("tool", f"8731{number}", (), call.id) for number, call in enumerate(made)]
    return [Turn("assistant", text, made), *results]


def _has(written: str | None, parts: Sequence[str]) -> bool:
    return written is not None and all(part in written for part in parts)
