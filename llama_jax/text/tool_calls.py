"""Finds the calls of functions in an answer while it is written, in the formats of Llama 3.

Llama 3.1 calls a function with `{"name": "f", "parameters": {...}}` and nothing else
(https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/prompt_format.md). The parser
also takes what models write beside that: `arguments` for `parameters`, keys in another order, a
"type" as in the definition of a tool, the call inside {"function": ...}, several calls (one after
the other, with `;` or a line break between them, or in a JSON list), <function=f>{...}</function>,
and <|python_tag|> before a call.

Calls stand at the beginning of an answer, or after <|python_tag|>. What only looks like a call at
first is text, of which nothing is lost. A call is certain when its function is known and its
arguments begin, so that they can be passed on while they grow; they are the model's own text.
"""

from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

PYTHON_TAG = "<|python_tag|>"
# Stands for <|python_tag|> in the text of an answer: an unpaired surrogate, which no text contains.
TAG = "\udfff"

_SPACE = " \t\r\n"
_BETWEEN_CALLS = _SPACE + ";,"
_MAX_KEY = 64  # characters of a key or of a function's name

R = TypeVar("R")
Reader = Generator[None, str, R]


@dataclass(frozen=True, slots=True)
class CallDelta:
    """The next part of a call.

    Attributes:
      index: of the call in the answer.
      name: of the function, in the first part of a call; else None.
      arguments: the next part of the arguments, as the model writes them.
    """

    index: int
    name: str | None
    arguments: str


class Parsed(NamedTuple):
    """What a piece of an answer adds: text, and parts of calls, each call at most once."""

    text: str
    calls: list[CallDelta]


class _NotACallError(Exception):
    """The answer goes on with something else than a call."""


class ToolCallParser:
    """Separates the calls of one answer from its text. The time per character is constant.

    Attributes:
      calls: the number of calls so far.
      complete: whether there are calls, and the arguments of the last one have ended.
      ended: whether nothing more is read, because there is a call and only one was asked for.
    """

    def __init__(self, names: Collection[str], several: bool = True) -> None:
        """Begins with no text.

        Args:
          names: the functions that may be called.
          several: whether an answer may have more than one call.
        """
        self.calls = 0
        self.complete = False
        self.ended = False
        self._names = names
        self._several = several
        self._text: list[str] = []
        self._held: list[str] = []  # what is text, unless it turns out to be a call
        self._new: dict[int, tuple[str | None, list[str]]] = {}
        self._reader = self._answer()
        next(self._reader)

    def push(self, text: str) -> Parsed:
        """Adds text and returns what is now certain; `TAG` stands for <|python_tag|>."""
        for character in text:
            self._reader.send(character)
        return self._collect()

    def finish(self) -> Parsed:
        """Returns what was held back, after the last piece of text."""
        if not self.calls or "".join(self._held).strip(_BETWEEN_CALLS):
            self._release()
        return self._collect()

    def _collect(self) -> Parsed:
        calls = [
            CallDelta(index, name, "".join(parts)) for index, (name, parts) in self._new.items()
        ]
        parsed = Parsed("".join(self._text), calls)
        self._text.clear()
        self._new.clear()
        return parsed

    def _release(self) -> None:
        self._text += (character for character in self._held if character != TAG)
        self._held.clear()

    def _begin(self, name: str) -> None:
        self._held.clear()
        self._new[self.calls] = (name, [])
        self.calls += 1
        self.complete = False

    def _grow(self, arguments: str) -> None:
        self._new.setdefault(self.calls - 1, (None, []))[1].append(arguments)

    # From here on, generators that are sent one character after the other.

    def _answer(self) -> Reader[None]:
        while True:
            try:
                yield from self._calls()
            except _NotACallError:
                character = self._held[-1]
                self._release()
            while character != TAG:
                character = yield
                if character != TAG:
                    self._text.append(character)

    def _calls(self) -> Reader[None]:
        """Reads calls, one after the other, for as long as there are any."""
        character = yield from self._token()
        while character == TAG:
            character = yield from self._token()
        in_list = character == "["
        if in_list:
            character = yield from self._token()
        while True:
            if character == "{":
                yield from self._object()
            elif character == "<" and not in_list:
                yield from self._element()
            else:
                raise _NotACallError
            self._held.clear()
            while not self._several:
                self.ended = True
                yield
            character = yield from self._token()
            if character == ("," if in_list else ";"):
                character = yield from self._token()
            elif in_list and character == "]":
                self._held.clear()
                yield from self._token()
                raise _NotACallError

    def _object(self, inner: bool = False) -> Reader[None]:
        """Reads a call after its "{"; `inner` if it stands in {"function": ...}."""
        name: str | None = None
        arguments: str | None = None
        begun = False
        while True:
            yield from self._expect('"')
            key = yield from self._rest_of_string('"')
            yield from self._expect(":")
            character = yield from self._token()
            if key == "type" and character == '"':
                yield from self._rest_of_string('"')
            elif key == "function" and character == "{" and not (inner or begun or name):
                yield from self._object(inner=True)
                begun = True
            elif key in ("name", "function") and character == '"' and not (begun or name):
                name = yield from self._known(self._rest_of_string('"'))
            elif key in ("parameters", "arguments") and not begun and arguments is None:
                if character == "{" and name:
                    yield from self._begin_and_grow(name)
                    begun = True
                elif character == "{":
                    arguments = yield from self._early_arguments()
                elif character == "n":
                    yield from self._rest_of_null()
                    arguments = "{}"
                else:
                    raise _NotACallError
            else:
                raise _NotACallError
            character = yield from self._token()
            if character == "}":
                break
            if character != ",":
                raise _NotACallError
        if not begun:
            if not name:
                raise _NotACallError
            self._begin(name)
            self._grow(arguments or "{}")
            self.complete = True

    def _element(self) -> Reader[None]:
        """Reads function=NAME>{...}</function> after the first "<"."""
        for character in "function=":
            yield from self._expect(character)
        name = yield from self._known(self._rest_of_string(">"))
        yield from self._expect("{")
        yield from self._begin_and_grow(name)
        for character in "</function>":
            yield from self._expect(character)

    def _begin_and_grow(self, name: str) -> Reader[None]:
        """Reads the arguments of a known function after their "{"."""
        self._begin(name)
        self._grow("{")
        yield from self._rest_of_arguments(self._grow)
        self.complete = True

    def _early_arguments(self) -> Reader[str]:
        """Reads arguments that stand before the name, after their "{"."""
        before = len(self._held)
        yield from self._rest_of_arguments(self._held.append)
        return "{" + "".join(self._held[before:])

    def _rest_of_arguments(self, keep: Callable[[str], None]) -> Reader[None]:
        """Reads an object after its "{", and passes on each character."""
        depth, in_string, escaped = 1, False, False
        while depth:
            character = yield
            if character == TAG:
                continue
            keep(character)
            if in_string:
                in_string = escaped or character != '"'
                escaped = character == "\\" and not escaped
            elif character == '"':
                in_string = True
            elif character in "{[":
                depth += 1
            elif character in "}]":
                depth -= 1

    def _known(self, reader: Reader[str]) -> Reader[str]:
        name = yield from reader
        if name not in self._names:
            raise _NotACallError
        return name

    def _rest_of_null(self) -> Reader[None]:
        for character in "ull":
            yield from self._expect(character)

    def _rest_of_string(self, end: str) -> Reader[str]:
        """Reads up to this character. Keys and names are short and have no escapes."""
        read: list[str] = []
        while (character := (yield from self._next())) != end:
            if character == "\\" or len(read) == _MAX_KEY:
                raise _NotACallError
            read.append(character)
        return "".join(read)

    def _expect(self, wanted: str) -> Reader[None]:
        if (yield from self._token()) != wanted:
            raise _NotACallError

    def _token(self) -> Reader[str]:
        """Reads the next character that is not whitespace."""
        while (character := (yield from self._next())) in _SPACE:
            pass
        return character

    def _next(self) -> Reader[str]:
        """Reads the next character and holds it back."""
        character = yield
        self._held.append(character)
        return character
