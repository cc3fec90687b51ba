"""The chat template of a checkpoint: turns messages into the text of a prompt. Imports no JAX.

A template is a program that comes with the checkpoint. It may fail for all messages or for some,
and it may read the content of a message as a string or as a list of parts. `ChatTemplate` tries it
out when it is loaded, so that a server knows before its first request.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.text.conversation import (
    Turn,
    map_strings,
    one_call_at_a_time,
    read_turns,
    text_before_calls,
)
from llama_jax.text.errors import ChatVariableError, TokenizerError, check_text
from llama_jax.text.template_variables import template_variables
from llama_jax.text.tool_support import ToolSupport, try_tools

# Chats to try a template with: some demand a system message, some refuse it.
_PROBES = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
)
# The roles whose content a template may read as parts: usually none, or those that may have images.
_ROLES_AS_PARTS: tuple[tuple[str, ...], ...] = (
    (),
    ("user",),
    ("user", "assistant"),
    ("user", "system"),
    ("system", "user", "assistant"),
)
_END_OF_REASONING = "</think>"
_LONGEST_REASON = 200  # characters of an error in another program that a message quotes


class ChatOptions(NamedTuple):
    """How to render a chat, as in `apply_chat_template` of transformers.

    Attributes:
      add_generation_prompt: end with the header of the assistant's next answer.
      continue_final_message: leave the last message open, for the model to continue it. Not both.
      variables: what the template's own variables are, by name: strings and booleans.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, str | bool] = {}


NEXT_ANSWER = ChatOptions()


class Piece(NamedTuple):
    """A part of a rendered chat.

    Attributes:
      text: the text.
      plain: whether `text` is a control token that a message spells. It must be encoded as text.
    """

    text: str
    plain: bool


class ChatTemplate:
    """Renders chats with the template of a tokenizer.

    Attributes:
      problem: one sentence on why no chat can be rendered; None if chats can be.
      tools: what the template does with tools.
      variables: names of the variables that `ChatOptions` may set.
    """

    def __init__(self, tokenizer: Any, path: Path) -> None:
        """Tries the template out.

        Args:
          tokenizer: of transformers.
          path: its directory.
        """
        self._tokenizer = tokenizer
        self._as_parts: frozenset[str] = frozenset()
        self._control = re.compile("(?!)")  # matches nothing
        self.problem: str | None = None
        self.tools = ToolSupport()
        self.variables: frozenset[str] = frozenset()
        if tokenizer.chat_template is None:
            self.problem = (
                f"The tokenizer of {path.resolve().name} has no chat template: request a "
                "completion instead of a chat."
            )
            return
        results = {as_parts: self._try(as_parts) for as_parts in _ROLES_AS_PARTS}
        # On a tie, the first: a template that reads both gets strings, as transformers passes them.
        best = max(_ROLES_AS_PARTS, key=lambda as_parts: len(results[as_parts][0]))
        rendered, failure = results[best]
        if rendered:
            self._as_parts = frozenset(best)
            self.tools = try_tools(self._write_with_tools)
            self._control = _pattern(_control_tokens(tokenizer, [*rendered, *self.tools.rendered]))
            self.variables = template_variables(tokenizer)
        else:
            self.problem = (
                f"The chat template of {path.resolve().name} cannot be used "
                f"({results[()][1] or failure}): correct it, or request completions instead of "
                "chats."
            )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions = NEXT_ANSWER,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Piece]:
        """Renders a conversation.

        Args:
          messages: each {"role": one of `ROLES`, "content": text}; an assistant's may have
            "tool_calls", a list of `Call`, and a tool's "tool_call_id". Checked here.
          options: how to render it; the variables are checked here.
          tools: the functions that the model may call, as in the OpenAI API.

        Raises:
          ChatVariableError: the template does not have a variable, or its value is not allowed.
          TokenizerError: the messages are malformed, there is no chat template that works, it
            rejects the messages, or the text of a message is missing from what it writes.
        """
        if self.problem is not None:
            raise TokenizerError(self.problem)
        self._check_variables(options.variables)
        chat, tools = read_turns(messages), tools or None
        if tools or any(turn.calls or turn.role == "tool" for turn in chat):
            chat = self._with_tools(chat)
        strings = [string for turn in chat for string in turn.strings()]
        map_strings(tools, strings.append)
        mark, call_mark = _unused_characters(strings, 2)
        marked = [turn.mark_calls(call_mark) for turn in chat]
        if not any(map(self._control.search, strings)):
            written = self._apply(marked, options, tools)
        else:
            # Control tokens stay in place, between marks: some templates look for them.
            def mark_control(text: str) -> str:
                return self._control.sub(rf"{mark}\g<0>{mark}", text)

            written = self._apply(
                [turn.map(mark_control) for turn in marked],
                options,
                map_strings(tools, mark_control),
            )
        for character in (mark, call_mark):  # a template may write ASCII
            written = written.replace(json.dumps(character)[1:-1], character)
        if written.count(call_mark) != sum(len(turn.calls) for turn in chat):
            raise TokenizerError(
                "The chat template of this model leaves out a tool call: it may have no place for "
                "one in the first message."
            )
        written = written.replace(call_mark, "")
        lost = _first_lost(chat, written.replace(mark, ""))
        if lost is not None:
            raise TokenizerError(
                f"The chat template of this model leaves out the text of messages[{lost}], whose "
                f"role is {chat[lost].role!r}: remove the message, or move its text to another."
            )
        return _split(written, mark, self._control.pattern)

    def _with_tools(self, chat: list[Turn]) -> list[Turn]:
        """Rewrites calls so that the template writes them all."""
        if self.tools.problem is not None:
            raise TokenizerError(self.tools.problem)
        if not self.tools.text_beside_calls:
            chat = text_before_calls(chat)
        return chat if self.tools.several_calls else one_call_at_a_time(chat)

    def _check_variables(self, variables: Mapping[str, str | bool]) -> None:
        for name, value in variables.items():
            if name not in self.variables:
                known = ", ".join(sorted(self.variables)) or "none"
                raise ChatVariableError(
                    f"The chat template of this model has no variable {name[:40]!r} to set; it "
                    f"has {known}.",
                    name,
                )
            if isinstance(value, bool):
                continue
            check_text(value, f"The variable {name}")
            if self._control.search(value):
                raise ChatVariableError(f"The variable {name} contains a control token.", name)

    def _apply(self, chat: Sequence[Turn], options: ChatOptions, tools: Any) -> str:
        try:
            return self._write(chat, self._as_parts, options, tools)
        except Exception as error:  # raised by the template, which may do anything
            raise TokenizerError(
                f"The chat template of this model rejects the messages: {_reason(error)}."
            ) from error

    def _try(self, as_parts: Iterable[str]) -> tuple[list[str], str | None]:
        """Returns what the template writes for the probes that it accepts, and its first error."""
        rendered, failure = [], None
        for roles in _PROBES:
            # Digits: they survive a change of case and need no quoting.
            chat = [Turn(role, f"{n}7305{n}") for n, role in enumerate(roles, 1)]
            try:
                written = self._write(chat, as_parts)
            except Exception as error:  # as in `_apply`
                failure = failure or _reason(error)
                continue
            if _first_lost(chat, written) is None:
                rendered.append(written)
            else:
                failure = failure or "it leaves out the text of messages"
        return rendered, failure

    def _write(
        self,
        chat: Sequence[Turn],
        as_parts: Iterable[str],
        options: ChatOptions = NEXT_ANSWER,
        tools: Any = None,
    ) -> str:
        written: str = self._tokenizer.apply_chat_template(
            [turn.message(turn.role in as_parts) for turn in chat],
            tools=tools,
            tokenize=False,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            **options.variables,
        )
        return written

    def _write_with_tools(self, chat: Sequence[Turn], tools: Any) -> str | None:
        """Returns what the template writes; None if it rejects a chat, or leaves out a part."""
        try:
            written = self._write(chat, self._as_parts, tools=tools)
        except Exception:  # as in `_apply`
            return None
        return written if _first_lost(chat, written) is None else None


def _control_tokens(tokenizer: Any, rendered: Iterable[str]) -> set[str]:
    """The special tokens, and the other added tokens that the template writes by itself."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    batch = tokenizer.backend_tokenizer.encode_batch(list(rendered), add_special_tokens=False)
    written = set(chain.from_iterable(encoding.ids for encoding in batch))
    return {
        token.content
        for index, token in added.items()
        if (token.special or index in written) and token.content.strip()
    }


def _pattern(strings: Iterable[str]) -> re.Pattern[str]:
    # Longest first: of two tokens with the same prefix, the tokenizer also takes the longer.
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _unused_characters(texts: Iterable[str], count: int) -> list[str]:
    used = set().union(*texts)
    private_use = map(chr, range(0xF0000, 0x10FFFE))
    return list(islice((c for c in private_use if c not in used), count))


def _split(rendered: str, mark: str, control: str) -> list[Piece]:
    """Cuts a rendered chat at marks.

    A template that cuts a text at a control token leaves single marks. They are dropped, but the
    texts beside them are not joined: they could spell a control token together.
    """
    parts = re.split(f"{mark}({control}){mark}|{mark}", rendered)
    # Texts and control tokens alternate, with None instead of a token at a single mark.
    return [Piece(part, index % 2 == 1) for index, part in enumerate(parts) if part]


def _first_lost(chat: Sequence[Turn], rendered: str) -> int | None:
    """Returns the index of the first message whose text is not in `rendered`, or None.

    Whitespace is ignored, because templates trim, and a text may be quoted as JSON. The texts must
    be in order, except that system messages may be anywhere, in any order.
    """
    haystack = _squeezed(rendered)
    read = 0  # how far the texts have been found
    systems: Counter[str] = Counter()
    systems_read: int | None = 0  # the same for system messages, while they are in order
    for index, turn in enumerate(chat):
        text = turn.text
        if turn.role == "assistant":  # templates of reasoning models leave out earlier reasoning
            text = text.rpartition(_END_OF_REASONING)[2]
        needles = (_squeezed(text), _squeezed(json.dumps(text, ensure_ascii=False)[1:-1]))
        if turn.role == "system":
            systems[text] += 1
            if systems_read is not None:
                systems_read = _end_of_first(needles, haystack, systems_read)
            # Counting looks through everything for each message.
            if systems_read is None and max(map(haystack.count, needles)) < systems[text]:
                return index
            continue
        end = _end_of_first(needles, haystack, read)
        if end is None:
            return index
        read = end
    return None


def _end_of_first(needles: Iterable[str], haystack: str, start: int) -> int | None:
    """Returns where the first of these texts ends that is found from here on; None if none is."""
    for needle in needles:
        if (at := haystack.find(needle, start)) >= 0:
            return at + len(needle)
    return None


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _reason(error: Exception) -> str:
    """The first sentence of an error's message, without its full stop."""
    sentence = re.split(r"(?<=[.!?])\s|\n", str(error).strip(), maxsplit=1)[0].rstrip(".!")
    return sentence[:_LONGEST_REASON] or type(error).__name__
