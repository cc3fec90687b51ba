"""What a request makes of its tools: a prompt, a constraint, and a parser of the answer."""

import uuid
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from llama_jax.client.text import TextDelta
from llama_jax.serve.errors import ApiError
from llama_jax.serve.protocol.chat import ChatRequest
from llama_jax.serve.protocol.response_types import (
    AnswerEnd,
    FunctionCall,
    FunctionCallDelta,
    ToolCall,
    ToolCallDelta,
)
from llama_jax.serve.protocol.responses import ResponsesRequest
from llama_jax.serve.protocol.structured_output import WantedGrammar
from llama_jax.serve.protocol.tools import ToolChoice
from llama_jax.serve.served_model import ServedModel
from llama_jax.text.tool_calls import PYTHON_TAG, TAG, CallDelta, ToolCallParser
from llama_jax.text.tool_grammar import Function, calls_or_json


class ToolUse(NamedTuple):
    """The tools of one request, whose choice is not "none".

    Attributes:
      definitions: of all tools, for the prompt.
      functions: those that may be called.
      choice: what the model is to do with them.
      parallel: whether an answer may have several calls; None if the client does not say.
      answer: what an answer without calls must match.
    """

    definitions: list[dict[str, Any]]
    functions: list[Function]
    choice: ToolChoice
    parallel: bool | None
    answer: WantedGrammar | None

    @property
    def wanted_grammar(self) -> WantedGrammar | None:
        """What answers must match, if anything.

        An answer that must be a call is one call, as Llama 3.1 was trained, unless the client asks
        for several: a model that knows no end would go on calling.
        """
        required = self.choice.mode == "required"
        strict = any(function.strict for function in self.functions)
        if self.answer is not None and not required:
            return calls_or_answer(self.functions, self.answer)
        if not (required or strict or self.choice.names):
            return None
        several = self.parallel is True or (self.parallel is None and not required)
        return WantedGrammar("tools", "tools", [self.functions, required, several])

    def parser(self) -> ToolCallParser:
        """Returns a parser for one answer."""
        names = {function.name for function in self.functions}
        return ToolCallParser(names, several=self.parallel is not False)


def tool_use(served: ServedModel, body: ChatRequest | ResponsesRequest) -> ToolUse | None:
    """Returns what a request makes of its tools; None if it has none or must not use them.

    Raises:
      ApiError: the chat template of the model does not know tools.
    """
    choice = body.tool_choice or ToolChoice()
    if not body.tools or choice.mode == "none":
        return None
    if served.tokenizer.tools_problem is not None:
        raise ApiError(
            400, served.tokenizer.tools_problem, param="tools", code="unsupported_parameter"
        )
    functions = [tool.function for tool in body.tools]
    if choice.names is not None:
        functions = [function for function in functions if function.name in choice.names]
    definitions = [tool.definition for tool in body.tools]
    return ToolUse(definitions, functions, choice, body.parallel_tool_calls, body.wanted_grammar)


def calls_or_answer(functions: Sequence[Function], answer: WantedGrammar) -> WantedGrammar:
    """Returns what an answer must match that is a call, or matches something itself."""
    if answer.kind != "json_schema":
        raise ApiError(
            400,
            f"{answer.param} cannot be combined with tools that the model may or may not call: "
            "leave one of them out, use a JSON schema, or set tool_choice to required or none.",
            param=answer.param,
            code="invalid_value",
        )
    return answer._replace(value=calls_or_json(functions, answer.value))


class ParsedDelta(NamedTuple):
    """What a token adds to an answer: text, parts of calls, and why the answer ends with it."""

    text: str
    calls: Sequence[CallDelta]
    finish_reason: AnswerEnd | None


def parse_delta(parser: ToolCallParser, delta: TextDelta) -> ParsedDelta:
    """Adds a token to an answer."""
    text, calls = parser.push(delta.text)
    reason: AnswerEnd | None = delta.finish_reason
    if reason is not None:
        text += parser.finish().text  # nothing held back is a part of a call
    if parser.ended or (reason == "stop" and parser.complete):
        reason = "tool_calls"
    return ParsedDelta(text, calls, reason)


def whole_calls(deltas: Iterable[CallDelta]) -> list[ToolCall]:
    """Joins the parts of calls."""
    calls: list[ToolCall] = []
    for delta in deltas:
        if delta.name is not None:
            function: FunctionCall = {"name": delta.name, "arguments": ""}
            calls.append({"id": new_call_id(), "type": "function", "function": function})
        calls[delta.index]["function"]["arguments"] += delta.arguments
    return calls


def call_deltas(deltas: Iterable[CallDelta]) -> list[ToolCallDelta]:
    """Returns parts of calls as a stream has them.

    An event has one part of a call: the OpenAI SDK takes two for two calls.
    """
    parts: list[ToolCallDelta] = []
    for delta in deltas:
        function: FunctionCallDelta = {"arguments": delta.arguments}
        part: ToolCallDelta = {"index": delta.index, "function": function}
        if delta.name is not None:
            part |= {"id": new_call_id(), "type": "function"}
            function["name"] = delta.name
        parts.append(part)
    return parts


def new_call_id() -> str:
    """Returns an id that no other call has."""
    return f"call_{uuid.uuid4().hex[:24]}"  # as OpenAI's look


def tag_marks(served: ServedModel) -> dict[int, str]:
    """Returns what stands for <|python_tag|> in the text of an answer, by its token id."""
    token = served.tokenizer.special_token_id(PYTHON_TAG)
    return {} if token is None else {token: TAG}
