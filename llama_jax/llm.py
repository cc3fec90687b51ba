"""Llama 3 in a notebook or a script: text in, text out, from the same engine that serves HTTP.

    with LLM("demo/checkpoint", mesh="4x2") as llm:
        print(llm.generate("2 + 2 =").text)
        for piece in llm.stream_chat([{"role": "user", "content": "What is a stage?"}]):
            print(piece, end="", flush=True)

Imports no JAX: the devices belong to the engine's process.
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from llama_jax.checkpoint import open_checkpoint
from llama_jax.config import generation_defaults
from llama_jax.detokenizer import Detokenizer
from llama_jax.engine.client import OnProgress
from llama_jax.engine.errors import GenerationFailed, RequestError
from llama_jax.engine.launch import ENGINE_COMMAND, process_host
from llama_jax.engine.messages import EngineInfo, FinishReason, Stats
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.thread import EngineThread
from llama_jax.generation import Piece, read_text
from llama_jax.sampling_params import SamplingParams
from llama_jax.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, str]
Params = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
      text: without special tokens, and without the stop string that ended it.
      token_ids: all that were generated, an EOS or stop token included.
      finish_reason: "stop" (an EOS or stop token, or a stop string), "length", or "error".
      prompt_token_ids: the prompt as the model saw it.
      error: one sentence where the reason is "error"; what came before it is in `text`.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    error: str | None = None


class LLM:
    """A checkpoint on a mesh, in an engine process of its own.

    `close` ends it, as do leaving its `with` block and forgetting it. Several threads may use it at
    once; their requests are batched together. Ctrl-C ends the requests of the call that it
    interrupts, and nothing else.

    Attributes:
      tokenizer: the checkpoint's own.
      defaults: sampling parameters where a call gives none, from generation_config.json. For some
        of them, `msgspec.structs.replace(llm.defaults, max_tokens=20)`.
    """

    def __init__(
        self,
        path: str | Path,
        mesh: str = "1x1",
        *,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> None:
        """Starts an engine and returns when it can generate.

        Args:
          path: a checkpoint directory, Hugging Face layout or this project's Orbax layout.
          mesh: "stages x tensor-parallel ranks", such as "4x2".
          on_progress: called in another thread with each step of the start.
          options: dtype, max_model_len, max_num_seqs, kv_cache_memory and the other fields of
            `EngineOptions`, by name.

        Raises:
          CheckpointError, ConfigError, TokenizerError: this checkpoint cannot be served.
          EngineStartError: the engine cannot start. The message of each is one sentence.
        """
        engine_options = EngineOptions(path=str(path), mesh=mesh, **options)
        with closing(open_checkpoint(path)):  # for its checks: no process is needed to fail them
            self.defaults = generation_defaults(path)
            self.tokenizer = Tokenizer(path)
        self._engine = EngineThread(engine_options, on_progress, process_host(ENGINE_COMMAND))
        weakref.finalize(self, self._engine.begin_close)
        # The engine would refuse more than these; the rest waits here.
        self._places = asyncio.Semaphore(self._engine.client.max_in_flight)

    @property
    def info(self) -> EngineInfo:
        """What the engine turned out to be: devices, sizes, limits."""
        return self._engine.client.info

    @property
    def stats(self) -> Stats:
        """The engine's latest report; it makes four a second while it works."""
        return self._engine.client.stats

    @overload  # a text is a sequence of texts, too, but this comes first
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str | Sequence[int], params: Params = None
    ) -> Completion: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], params: Params = None) -> list[Completion]: ...
    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None
    ) -> Completion | list[Completion]:
        """Completes one prompt, or a list of any length.

        Args:
          prompts: a prompt is a text, which gets BOS in front, or a sequence of token ids, which
            are taken as they are.
          params: for all, or a list with one for each; None for `defaults`.

        Returns:
          For one prompt its completion, for a list a list in the same order. A request that goes
          wrong while it runs has an `error` in its completion; the others go on.

        Raises:
          RequestError: a request can never be answered, and nothing was begun.
          EngineDead: the engine has ended, or ends before the answer does.
        """
        if _is_prompt(prompts):
            return self._complete([self._encode(prompts)], params)[0]
        return self._complete([self._encode(prompt) for prompt in prompts], params)

    @overload
    def chat(self, messages: Sequence[Message], params: Params = None) -> Completion: ...
    @overload
    def chat(
        self, messages: Sequence[Sequence[Message]], params: Params = None
    ) -> list[Completion]: ...
    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], params: Params = None
    ) -> Completion | list[Completion]:
        """The assistant's next message in one conversation, or in each of a list.

        Args:
          messages: a conversation is a list of {"role": "system", "user" or "assistant",
            "content": text}.
          params: as for `generate`.

        Returns, raises:
          As `generate`; and TokenizerError where there is no chat template, or it refuses.
        """
        if isinstance(next(iter(messages), None), Mapping):
            return self._complete([self._encode_chat(messages)], params)[0]
        return self._complete([self._encode_chat(each) for each in messages], params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Completes one prompt; yields the text in pieces, as it comes.

        Leaving the loop early ends the request.

        Raises:
          RequestError: at the call.
          GenerationFailed: the request went wrong while it ran.
          EngineDead: as `generate`.
        """
        return self._stream(self._encode(prompt), params)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """As `stream`, of the assistant's next message."""
        return self._stream(self._encode_chat(messages), params)

    def close(self) -> None:
        """Ends the engine. Calls in other threads get `EngineDead`. May be repeated."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            _check_text(prompt)
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, Sequence):
            return list(prompt)
        raise RequestError(
            f"A prompt is a text or a list of token ids, not of type {type(prompt).__name__}."
        )

    def _encode_chat(self, messages: Any) -> list[int]:
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise RequestError('A message is a dict, {"role": ..., "content": ...}.')
            _check_text(message["role"])
            _check_text(message["content"])
        return self.tokenizer.encode_chat(messages)

    def _complete(self, prompts: list[list[int]], params: Params) -> list[Completion]:
        if params is None:
            params = self.defaults
        if not isinstance(params, Sequence):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts need as many params, got {len(params)}.")
        requests = list(zip(prompts, params, strict=True))
        for request in requests:
            self._engine.client.check(*request)

        async def every() -> list[Completion]:
            return await asyncio.gather(*(self._answer(*request) for request in requests))

        return self._engine.run(every())

    async def _answer(self, prompt: list[int], params: SamplingParams) -> Completion:
        pieces: list[Piece] = []
        reason: FinishReason = "error"
        error = None
        try:
            async for piece in self._pieces(prompt, params):
                pieces.append(piece)
                reason = piece.finish_reason or reason
        except GenerationFailed as failure:
            error = str(failure)
        text = "".join(piece.text for piece in pieces)
        return Completion(text, [piece.token for piece in pieces], reason, prompt, error)

    def _stream(self, prompt: list[int], params: SamplingParams | None) -> Iterator[str]:
        params = self.defaults if params is None else params
        self._engine.client.check(prompt, params)
        return self._read(self._pieces(prompt, params))

    def _read(self, pieces: AsyncGenerator[Piece, None]) -> Iterator[str]:
        # If this ends early `pieces` is forgotten, and asyncio then closes it on the engine's loop.
        # To close it here would be to wait, in whichever thread the garbage collector runs.
        while piece := self._engine.run(_next(pieces)):
            if piece.text:
                yield piece.text

    async def _pieces(
        self, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[Piece, None]:
        async with self._places:
            outputs = self._engine.client.generate(prompt, params)
            detokenizer = Detokenizer(self.tokenizer, params.stop)
            async with aclosing(read_text(outputs, detokenizer)) as pieces:
                async for piece in pieces:
                    yield piece


async def _next(pieces: AsyncGenerator[Piece, None]) -> Piece | None:
    return await anext(pieces, None)


def _is_prompt(prompts: Any) -> bool:
    """Whether it is one prompt, not a list of them; what is neither is a prompt that is wrong."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], int)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise RequestError(f"A text must be a string, not of type {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("Half of a surrogate pair in a text is not a character.") from None
