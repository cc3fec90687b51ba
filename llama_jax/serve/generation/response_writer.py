"""Builds the response of /v1/responses item by item, and the events of its stream with it.

A response that is not streamed is what the last event of its stream would contain.
"""

import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal, cast

from llama_jax.serve.errors import ApiError
from llama_jax.serve.protocol.response_types import AnswerEnd, ChatLogprob
from llama_jax.serve.protocol.responses_types import (
    FunctionCallItem,
    ItemStatus,
    OutputMessage,
    OutputText,
    Response,
    ResponseUsage,
    StreamEvent,
)


class ResponseWriter:
    """One response while it grows. Each method makes a change and yields its events on the way.

    An event refers to the items themselves, so it must be encoded before the next one is asked for.

    Attributes:
      response: the response so far.
    """

    def __init__(self, response: Response) -> None:
        """Starts with a response that has no output."""
        self.response = response
        self._number = 0
        # The last of `output`, while it grows.
        self._item: OutputMessage | FunctionCallItem | None = None
        self._pieces: list[str] = []  # of the open item's text or arguments
        self._logprobs: list[ChatLogprob] = []

    @property
    def in_message(self) -> bool:
        """Whether the last item is a message that may still grow."""
        return self._item is not None and self._item["type"] == "message"

    def start(self) -> Iterator[StreamEvent]:
        """Tells that the response exists."""
        yield self._of_response("response.created")
        yield self._of_response("response.in_progress")

    def text(self, delta: str, logprobs: list[ChatLogprob]) -> Iterator[StreamEvent]:
        """Adds what one token adds to the text; begins a message if none is open."""
        if not self.in_message:
            yield from self._end_item("completed")
            yield from self._begin_message()
        self._pieces.append(delta)
        self._logprobs += logprobs
        kind = "response.output_text.delta"
        yield self._event(kind, **self._part, delta=delta, logprobs=logprobs)

    def call(self, name: str, call_id: str) -> Iterator[StreamEvent]:
        """Begins a call of a function."""
        yield from self._end_item("completed")
        item: FunctionCallItem = {
            "id": _id("fc"),
            "type": "function_call",
            "call_id": call_id,
            "name": name,
            "arguments": "",
            "status": "in_progress",
        }
        yield self._begin(item)

    def arguments(self, delta: str) -> Iterator[StreamEvent]:
        """Adds to the arguments of the call that was begun last."""
        self._pieces.append(delta)
        yield self._event("response.function_call_arguments.delta", **self._place, delta=delta)

    def finish(self, reason: AnswerEnd | None, usage: ResponseUsage) -> Iterator[StreamEvent]:
        """Ends the response. One without any item gets an empty message."""
        if not self.response["output"]:
            yield from self._begin_message()
        status: Literal["completed", "incomplete"] = "completed"
        if reason == "length":
            status = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        yield from self._end_item(status)
        self.response["status"] = status
        self.response["completed_at"] = int(time.time()) if status == "completed" else None
        self.response["usage"] = usage
        yield self._of_response(f"response.{status}")

    def fail(self, error: ApiError) -> Iterator[StreamEvent]:
        """Ends the response with an error."""
        yield from self._end_item("incomplete")
        self.response["status"] = "failed"
        self.response["error"] = {
            "code": "server_error" if error.status >= 500 else "invalid_prompt",
            "message": error.message,
        }
        yield self._of_response("response.failed")

    def _begin_message(self) -> Iterator[StreamEvent]:
        item: OutputMessage = {
            "id": _id("msg"),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        yield self._begin(item)
        part: OutputText = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._event("response.content_part.added", **self._part, part={**part})
        item["content"].append(part)

    def _begin(self, item: OutputMessage | FunctionCallItem) -> StreamEvent:
        self._item = item
        self._pieces, self._logprobs = [], []
        self.response["output"].append(item)
        return self._of_item("response.output_item.added")

    def _end_item(self, status: ItemStatus) -> Iterator[StreamEvent]:
        item = self._item
        if item is None:
            return
        if item["type"] == "message":
            [part] = item["content"]
            part["text"], part["logprobs"] = "".join(self._pieces), self._logprobs
            yield self._event(
                "response.output_text.done",
                **self._part,
                text=part["text"],
                logprobs=part["logprobs"],
            )
            yield self._event("response.content_part.done", **self._part, part=part)
        else:
            item["arguments"] = "".join(self._pieces)
            yield self._event(
                "response.function_call_arguments.done",
                **self._place,
                name=item["name"],
                arguments=item["arguments"],
            )
        item["status"] = status
        yield self._of_item("response.output_item.done")
        self._item = None

    @property
    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self.response["output"]) - 1}

    @property
    def _part(self) -> dict[str, Any]:
        return {**self._place, "content_index": 0}

    def _of_item(self, kind: str) -> StreamEvent:
        index = len(self.response["output"]) - 1
        return self._event(kind, output_index=index, item=self._item)

    def _of_response(self, kind: str) -> StreamEvent:
        return self._event(kind, response=self.response)

    def _event(self, kind: str, **fields: Any) -> StreamEvent:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return cast(StreamEvent, event)


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
