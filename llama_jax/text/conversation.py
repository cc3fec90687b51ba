"""The messages of a chat and the functions that the model may call, checked. Imports no JAX.

They are those of the OpenAI API and of `apply_chat_template` in transformers, except that the
arguments of a call are an object here and a string of JSON in the API.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from llama_jax.text.errors import TokenizerError, check_text

ROLES = ("system", "user", "assistant", "tool")


class Call(NamedTuple):
    """A function that the assistant called.

    Attributes:
      id: names the call in the message with its result.
      name: of the function.
      arguments: an object; a string if the model wrote something else.
    """

    id: str
    name: str
    arguments: dict[str, Any] | str


class Turn(NamedTuple):
    """One message of a chat.

    Attributes:
      role: one of `ROLES`.
      text: its text.
      calls: functions that the assistant calls in this message.
      answers: of a tool's message, the id of the call whose result it is.
    """

    role: str
    text: str
    calls: tuple[Call, ...] = ()
    answers: str | None = None

    def strings(self) -> list[str]:
        """Every string that a client chose."""
        found = [self.text]
        map_strings((*(tuple(call) for call in self.calls), self.answers), found.append)
        return found

    def map(self, change: Callable[[str], str]) -> "Turn":
        """Changes every string that a client chose."""
        calls = (Call(*map_strings(tuple(call), change)) for call in self.calls)
        return Turn(self.role, change(self.text), tuple(calls), map_strings(self.answers, change))

    def mark_calls(self, mark: str) -> "Turn":
        """Puts a mark before the name of each function that is called."""
        calls = (call._replace(name=mark + call.name) for call in self.calls)
        return self._replace(calls=tuple(calls))

    def message(self, as_parts: bool) -> dict[str, Any]:
        """Returns the message as a chat template reads it.

        Args:
          as_parts: whether the content is a list of parts rather than a string.
        """
        message: dict[str, Any] = {"role": self.role}
        if self.text or not self.calls:
            parts = [{"type": "text", "text": self.text}]
            message["content"] = parts if as_parts else self.text
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.calls
            ]
        if self.answers is not None:
            message["tool_call_id"] = self.answers
        return message


def read_turns(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Checks the messages of a chat.

    Raises:
      TokenizerError: they are malformed.
    """
    if not messages:
        raise TokenizerError("A chat needs at least one message.")
    return [_read_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _read_turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise TokenizerError(f'{where} must be a dict, {{"role": ..., "content": ...}}.')
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise TokenizerError(
            f"The role of {where} must be one of {', '.join(ROLES)}, got {str(role)[:40]!r}."
        )
    check_text(content, f"The content of {where}")
    calls = tuple(message.get("tool_calls") or ())
    if not all(isinstance(call, Call) for call in calls):
        raise TokenizerError(f"The tool_calls of {where} must be a list of Call.")
    turn = Turn(role, content, calls, message.get("tool_call_id"))
    for string in turn.strings():
        check_text(string, f"A string of {where}")
    return turn


def map_strings(value: Any, change: Callable[[str], Any]) -> Any:
    """Changes every string of a JSON value, the names of its objects included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): map_strings(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_strings(item, change) for item in value)
    return value


def one_call_at_a_time(turns: Sequence[Turn]) -> list[Turn]:
    """Rewrites calls that were made at once as calls that were made one after the other.

    The template of Llama 3.1 writes one call per message. A result follows its call.
    """
    left = deque(turns)
    found: list[Turn] = []
    while left:
        turn = left.popleft()
        if len(turn.calls) < 2:
            found.append(turn)
            continue
        results = []
        while left and left[0].role == "tool":
            results.append(left.popleft())
        of_call: dict[str | None, list[Turn]] = {}
        for result in results:
            of_call.setdefault(result.answers, []).append(result)
        for number, call in enumerate(turn.calls):
            found.append(Turn(turn.role, "" if number else turn.text, (call,)))
            found += of_call.pop(call.id, [])
        found += chain.from_iterable(of_call.values())  # they answer no call of this message
    return found


def text_before_calls(turns: Sequence[Turn]) -> list[Turn]:
    """Gives the text of a message that also has calls a message of its own, before it.

    The template of Llama 3.1 leaves out the text of a message with a call.
    """
    found = []
    for turn in turns:
        if turn.calls and turn.text.strip():
            found.append(Turn(turn.role, turn.text))
            turn = turn._replace(text="")
        found.append(turn)
    return found
