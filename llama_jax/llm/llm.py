"""Llama 3 in a notebook or a script, on the same engine that serves HTTP.

    with LLM("demo/checkpoint", mesh="4x2") as llm:
        print(llm.generate("2 + 2 =").text)
        for piece in llm.stream_chat([{"role": "user", "content": "What is a stage?"}]):
            print(piece, end="", flush=True)

Imports no JAX: the devices belong to the engine's process, unless `in_process` is set.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from llama_jax.client.client import OnProgress
from llama_jax.client.engine_process import ENGINE_COMMAND, process_host
from llama_jax.client.in_process import in_process_host
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import EngineDead, RequestError
from llama_jax.engine.interface import EngineInfo, Stats
from llama_jax.engine.options import OPTIONS, EngineOptions, lists_options
from llama_jax.llm.completion import Completion
from llama_jax.llm.notebook.html import llm_html
from llama_jax.llm.prompts import (
    EncodedPrompt,
    encode_conversation,
    encode_prompt,
    is_prompt,
    with_python_numbers,
)
from llama_jax.llm.session import Session
from llama_jax.llm.text_stream import TextStream
from llama_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama_jax.engine.core import Engine
    from llama_jax.model import Llama
    from llama_jax.ring.sharded_llama import ShardedLlama

Prompt = str | Sequence[int]
Message = Mapping[str, str]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A checkpoint on a mesh, served by an engine in its own process or in this one.

    The engine ends with `close`, at the end of a `with` block, or when the object is garbage
    collected. Several threads may use one `LLM`; their requests are batched together. Ctrl-C, or a
    notebook's interrupt, ends only the requests of the call or cell that it interrupts. An engine
    process that hangs is killed after ten minutes; the calls that wait for it raise `EngineDead`.
    """

    @lists_options
    def __init__(
        self,
        path: str | Path,
        mesh: str = "1x1",
        *,
        in_process: bool = False,
        model_class: "type[Llama] | None" = None,
        progress: bool | None = None,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> None:
        """Starts an engine and returns when it can generate.

        Args:
          path: a checkpoint directory, in Hugging Face layout or this project's Orbax layout, or a
            GGUF file.
          {options}
          in_process: run the engine in a thread of this process, where `engine` and `model` reach
            it. The tokens are the same. The engine shares JAX with your own programs: JAX keeps the
            devices that it has already chosen, and float32 on a GPU sets
            `jax_default_matmul_precision` for both.
          model_class: a subclass of `Llama` to run; requires `in_process`.
          progress: whether to show the progress of the start; None means only in notebooks.
          on_progress: called with each step of the start, in another thread, instead of showing it.

        Raises:
          OptionError: an option has a wrong type or is out of range.
          CheckpointError, ConfigError, TokenizerError: this checkpoint cannot be served.
          EngineStartError: the engine cannot start.
          RequestError: `model_class` is given without `in_process`.
          TypeError: there is no option of this name.
        """
        _check_names(options)
        engine_options = EngineOptions(path=str(path), mesh=mesh, **_with_texts(options))
        engine_options.check()
        self._start(engine_options, in_process, model_class, progress, on_progress)

    def restart(
        self,
        *,
        in_process: bool | None = None,
        model_class: "type[Llama] | None" = None,
        progress: bool | None = None,
        on_progress: OnProgress | None = None,
        **changes: Any,
    ) -> None:
        """Ends the engine, if it still runs, and starts another.

        Args:
          in_process, model_class: as for the constructor; None keeps the present value.
          progress, on_progress: as for the constructor.
          changes: the options that change, and `path` if it does.

        Raises:
          The errors of the constructor. If the new engine cannot start, the `LLM` stays closed, and
          `restart` may be called again.
        """
        _check_names(changes, "path", "mesh")
        options = dataclasses.replace(self._session.options, **_with_texts(changes))
        if in_process is None:
            in_process = self._in_process
        if model_class is None and in_process:
            model_class = self._model_class
        options.check()
        _check_class(model_class, in_process)
        self.close()
        self._start(options, in_process, model_class, progress, on_progress)

    def _start(
        self,
        options: EngineOptions,
        in_process: bool,
        model_class: "type[Llama] | None",
        progress: bool | None,
        on_progress: OnProgress | None,
    ) -> None:
        _check_class(model_class, in_process)
        host = in_process_host(model_class) if in_process else process_host(ENGINE_COMMAND)
        self._session = Session(options, host, progress, on_progress)
        self._in_process, self._model_class = in_process, model_class

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self._session.tokenizer

    @property
    def defaults(self) -> SamplingParams:
        """The sampling parameters of calls without any, from generation_config.json.

        To change some of them: `dataclasses.replace(llm.defaults, max_tokens=20)`.
        """
        return self._session.defaults

    @property
    def info(self) -> EngineInfo:
        """The engine's devices, sizes and limits."""
        return self._session.engine.client.info

    @property
    def stats(self) -> Stats:
        """The engine's latest report, four a second while it works."""
        return self._session.engine.client.stats

    @property
    def pid(self) -> int:
        """The id of the process that the engine runs in."""
        return self._session.engine.client.pid

    @property
    def engine(self) -> "Engine":
        """The live engine, if `in_process`: `.loop` (the tick loop), `.loop.scheduler`,
        `.loop.executor`.

        It works in another thread: read its state, but do not change it while it runs. A reference
        to it keeps its device memory allocated.

        Raises:
          RequestError: the engine runs in its own process.
          EngineDead: the engine has ended.
        """
        if not self._in_process:
            raise RequestError(
                "The engine runs in its own process: start it in this one with "
                "llm.restart(in_process=True) or LLM(..., in_process=True)."
            )
        client = self._session.engine.client
        engine: Engine | None = client.host.engine
        if engine is None:
            raise EngineDead(client.ended or "The engine has ended.") from client.host.cause
        return engine

    @property
    def model(self) -> "ShardedLlama":
        """The model of `engine`, for `llama_jax.interpret`. Raises the errors of `engine`."""
        from llama_jax.ring.sharded_llama import ShardedLlama

        executor = self.engine.loop.executor
        programs = executor.programs
        return ShardedLlama(
            programs.config,
            programs.mesh,
            executor.params,
            programs.dtype,
            programs.model_class,
            programs.cache_dtype,
            programs.attention_backend,
        )

    @overload  # a string is also a sequence of strings, but this overload comes first
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str | Sequence[int], params: Params = None, *, progress: bool | None = None
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: Params = None, *, progress: bool | None = None
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        progress: bool | None = None,
    ) -> Completion | list[Completion]:
        """Completes one prompt, or a list of any length.

        Args:
          prompts: one prompt or a list. A prompt is a text, which gets BOS in front, or a sequence
            of token ids, which is used as it is. Arrays of token ids [T] or [B, T] work, too.
          params: for all prompts, or a list with one per prompt; None means `defaults`.
          progress: whether to show the progress of a list that takes more than a second; None means
            only in notebooks.

        Returns:
          A completion for one prompt, or a list of them in the order of the prompts. A request that
          fails while it runs has an `error` in its completion; the others go on.

        Raises:
          RequestError, TokenizerError: a request can never be answered; none was started.
          EngineDead: the engine has ended, or ends before the answer.
        """
        prompts = with_python_numbers(prompts)
        if is_prompt(prompts):
            return self._complete([encode_prompt(self.tokenizer, prompts)], params, False)[0]
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        return self._complete(encoded, params, progress)

    @overload
    def chat(
        self, messages: Sequence[Message], params: Params = None, *, progress: bool | None = None
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        params: Params = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]: ...
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        progress: bool | None = None,
    ) -> Completion | list[Completion]:
        """Generates the assistant's next message in one conversation, or in each of a list.

        Args:
          messages: one conversation or a list. A conversation is a list of messages
            {"role": "system", "user" or "assistant", "content": text}.
          params, progress: as for `generate`.

        Returns:
          One completion or a list, as `generate`.

        Raises:
          RequestError, EngineDead: as `generate`.
          TokenizerError: there is no chat template, or it rejects the messages.
        """
        given: list[Any] = list(messages)  # a look at the first of an iterator would take it
        if given and isinstance(given[0], Mapping):
            return self._complete([encode_conversation(self.tokenizer, given)], params, False)[0]
        encoded = [encode_conversation(self.tokenizer, conversation) for conversation in given]
        return self._complete(encoded, params, progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> TextStream:
        """Streams the completion of one prompt.

        Iterate over the result to read the text as it arrives, or make it the last expression of a
        notebook cell, which then shows it. Leaving the loop early ends the request.

        Raises:
          RequestError, TokenizerError: the request can never be answered.
          EngineDead: the engine has ended.
        """
        return self._stream(encode_prompt(self.tokenizer, with_python_numbers(prompt)), params)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> TextStream:
        """Streams the assistant's next message; otherwise like `stream`."""
        return self._stream(encode_conversation(self.tokenizer, messages), params)

    def close(self) -> None:
        """Ends the engine. Calls in other threads raise `EngineDead`. May be repeated.

        An engine in this process ends after its tick. If that takes more than half a minute, a
        warning is logged, and the engine's memory is free only when the tick has ended.
        """
        self._session.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        stats, info = self.stats, self.info
        now = self._ended or (
            f"{stats.num_running} running, {stats.num_waiting} waiting, "
            f"{stats.pages_free} of {stats.pages_total} pages free"
        )
        about = f"{info.platform}, {info.dtype}, {self._place}"
        return f"<LLM {info.model} on the mesh {info.mesh} ({about}): {now}>"

    def _repr_html_(self) -> str:
        return llm_html(self.info, self.stats, ended=self._ended, place=self._place)

    @property
    def _ended(self) -> str | None:
        return self._session.engine.client.ended

    @property
    def _place(self) -> str:
        return "in this process" if self._in_process else "in its own process"

    def _complete(
        self, prompts: list[EncodedPrompt], params: Params, progress: bool | None
    ) -> list[Completion]:
        if params is None:
            params = self.defaults
        if not isinstance(params, Sequence):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(
                f"There are {len(prompts)} prompts but {len(params)} params: give one for each "
                "prompt, or one for all.",
                "params",
            )
        return self._session.complete(prompts, with_python_numbers(params), progress)

    def _stream(self, prompt: EncodedPrompt, params: SamplingParams | None) -> TextStream:
        params = self.defaults if params is None else params
        return self._session.stream(prompt, with_python_numbers(params))


def _check_names(options: Mapping[str, Any], *others: str) -> None:
    known = [*others, *(option.name for option in OPTIONS if option.name != "mesh")]
    for name in options:
        if name not in known:
            raise TypeError(f"There is no option {name!r}; the options are {', '.join(known)}.")


def _with_texts(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with paths as texts."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}


def _check_class(model_class: "type[Llama] | None", in_process: bool) -> None:
    if model_class is not None and not in_process:
        name = getattr(model_class, "__name__", "model_class")  # an instance has none
        raise RequestError(
            f"{name} can only run in this process: add in_process=True.",
            "model_class",
        )
