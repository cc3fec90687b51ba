"""Llama 3 in a notebook or a script: text in, text out, from the same engine that serves HTTP.

    with LLM("demo/checkpoint", mesh="4x2") as llm:
        print(llm.generate("2 + 2 =").text)
        for piece in llm.stream_chat([{"role": "user", "content": "What is a stage?"}]):
            print(piece, end="", flush=True)

Imports no JAX: the devices belong to the engine's process, unless `in_process` is asked for.
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
from llama_jax.engine.options import EngineOptions
from llama_jax.llm.completion import Completion
from llama_jax.llm.notebook.html import llm_html
from llama_jax.llm.prompts import EncodedPrompt, encode_chat, encode_prompt, is_prompt
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
    """A checkpoint on a mesh, in an engine process of its own or in this process.

    `close` ends it, as do leaving its `with` block and forgetting it. Several threads may use it at
    once; their requests are batched together. Ctrl-C, or a notebook's interrupt, ends the requests
    of the call or cell that it interrupts, and nothing else.
    """

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
          path: a checkpoint directory, Hugging Face layout or this project's Orbax layout.
          mesh: "stages x tensor-parallel ranks", such as "4x2".
          in_process: for debugging: the engine runs in a thread of this process, where `engine`
            reaches it. The tokens are the same. JAX is shared: if it has started it has chosen its
            devices, and programs of your own compete with the engine's; float32 on a GPU sets
            `jax_default_matmul_precision` for them, too.
          model_class: a subclass of `Llama` to run; only with `in_process`.
          progress: whether to show how the start gets on; None for in notebooks only.
          on_progress: called in another thread with each step of the start, which is then not
            shown.
          options: dtype, max_model_len, max_num_seqs, kv_cache_memory and the other fields of
            `EngineOptions`, by name.

        Raises:
          CheckpointError, ConfigError, TokenizerError: this checkpoint cannot be served.
          EngineStartError: the engine cannot start. The message of each is one sentence.
          RequestError: a class of one's own for an engine in another process.
          TypeError: an option that does not exist.
        """
        _check_names(options)
        engine_options = EngineOptions(path=str(path), mesh=mesh, **options)
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
        """Ends the engine, if it has not ended, and starts another; the object stays the same.

        Args:
          in_process, model_class: None for as it was.
          progress, on_progress: as for the first start.
          changes: path, mesh and options that change; the others stay.

        Raises:
          As the constructor; where no engine can be started, the LLM stays closed and `restart`
          may be called again.
        """
        _check_names(changes, "path", "mesh")
        if "path" in changes:
            changes["path"] = str(changes["path"])
        options = dataclasses.replace(self._session.options, **changes)
        if in_process is None:
            in_process = self._in_process
        if model_class is None and in_process:
            model_class = self._model_class
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
        """The checkpoint's own."""
        return self._session.tokenizer

    @property
    def defaults(self) -> SamplingParams:
        """Sampling parameters where a call gives none, from generation_config.json. For some of
        them, `dataclasses.replace(llm.defaults, max_tokens=20)`."""
        return self._session.defaults

    @property
    def info(self) -> EngineInfo:
        """What the engine turned out to be: devices, sizes, limits."""
        return self._session.engine.client.info

    @property
    def stats(self) -> Stats:
        """The engine's latest report; it makes four a second while it works."""
        return self._session.engine.client.stats

    @property
    def engine(self) -> "Engine":
        """The live engine, of `in_process`: `.loop` (the tick loop), `.loop.scheduler`,
        `.loop.executor`. It works in a thread of its own; look, and change nothing while it does.
        Whoever keeps a reference keeps its memory.

        Raises:
          RequestError: it runs in a process of its own.
          EngineDead: it has ended.
        """
        if not self._in_process:
            raise RequestError(
                "The engine runs in a process of its own, out of reach: start it in this one with "
                "llm.restart(in_process=True), or LLM(..., in_process=True)."
            )
        client = self._session.engine.client
        engine: Engine | None = client.host.engine
        if engine is None:
            raise EngineDead(client.ended or "The engine has ended.") from client.host.cause
        return engine

    @property
    def model(self) -> "ShardedLlama":
        """The weights of `engine`, to be called with tokens and looked into
        (`llama_jax.interpret`). Raises as `engine`."""
        from llama_jax.ring.sharded_llama import ShardedLlama

        executor = self.engine.loop.executor
        return ShardedLlama(
            executor.config, executor.mesh, executor.params, executor.dtype, executor.model_class
        )

    @overload  # a text is a sequence of texts, too, but this comes first
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
          prompts: a prompt is a text, which gets BOS in front, or a sequence of token ids, which
            are taken as they are.
          params: for all, or a list with one for each; None for `defaults`.
          progress: whether a list that takes more than a second shows a bar; None for in notebooks
            only.

        Returns:
          For one prompt its completion, for a list a list in the same order. A request that goes
          wrong while it runs has an `error` in its completion; the others go on.

        Raises:
          RequestError: a request can never be answered, and nothing was begun.
          EngineDead: the engine has ended, or ends before the answer does.
        """
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
        """The assistant's next message in one conversation, or in each of a list.

        Args:
          messages: a conversation is a list of {"role": "system", "user" or "assistant",
            "content": text}.
          params, progress: as for `generate`.

        Returns, raises:
          As `generate`; and TokenizerError where there is no chat template, or it refuses.
        """
        if isinstance(next(iter(messages), None), Mapping):
            return self._complete([encode_chat(self.tokenizer, messages)], params, False)[0]
        encoded = [encode_chat(self.tokenizer, conversation) for conversation in messages]
        return self._complete(encoded, params, progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> TextStream:
        """Completes one prompt; iterate over it for the text in pieces, as it comes, or let a
        notebook show it as the last expression of a cell.

        Leaving the loop early ends the request.

        Raises:
          RequestError: at the call.
          GenerationFailed: the request went wrong while it ran.
          EngineDead: as `generate`.
        """
        return self._stream(encode_prompt(self.tokenizer, prompt), params)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> TextStream:
        """As `stream`, of the assistant's next message."""
        return self._stream(encode_chat(self.tokenizer, messages), params)

    def close(self) -> None:
        """Ends the engine. Calls in other threads get `EngineDead`. May be repeated."""
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
        return "in this process" if self._in_process else "in a process of its own"

    def _complete(
        self, prompts: list[EncodedPrompt], params: Params, progress: bool | None
    ) -> list[Completion]:
        if params is None:
            params = self.defaults
        if not isinstance(params, Sequence):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts need as many params, got {len(params)}.")
        return self._session.complete(prompts, params, progress)

    def _stream(self, prompt: EncodedPrompt, params: SamplingParams | None) -> TextStream:
        return self._session.stream(prompt, self.defaults if params is None else params)


def _check_names(options: Mapping[str, Any], *others: str) -> None:
    fields = [field.name for field in dataclasses.fields(EngineOptions)]
    known = [*others, *(name for name in fields if name not in ("path", "mesh"))]
    for name in options:
        if name not in known:
            raise TypeError(f"There is no option {name!r}; there are {', '.join(known)}.")


def _check_class(model_class: "type[Llama] | None", in_process: bool) -> None:
    if model_class is not None and not in_process:
        raise RequestError(
            f"{model_class.__name__} runs only in this process: give in_process=True as well."
        )
