"""One running engine with its tokenizer. An `LLM` has one, and another after a restart.

Imports no JAX.
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, closing
from pathlib import Path

from llama_jax.checkpoint import open_checkpoint
from llama_jax.client.blocking import BlockingClient
from llama_jax.client.client import OnProgress
from llama_jax.client.host import StartHost
from llama_jax.client.text import TextDelta, detokenizer_for, read_text
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import GenerationFailed, RequestError
from llama_jax.engine.interface import FinishReason
from llama_jax.engine.options import EngineOptions
from llama_jax.llm.completion import Completion
from llama_jax.llm.notebook.cells import cell_watch
from llama_jax.llm.notebook.progress import RequestProgress, StartProgress, make_display
from llama_jax.llm.prompts import EncodedPrompt
from llama_jax.llm.text_stream import TextStream
from llama_jax.text.grammar import GrammarError, check_grammar
from llama_jax.text.tokenizer import Tokenizer


class Session:
    """A running engine. It ends when `engine` is closed or this object is garbage collected.

    Attributes:
      engine: the engine's client.
      options: the options that the engine was started with.
      tokenizer: the checkpoint's tokenizer.
      defaults: the sampling parameters of generation_config.json.
    """

    def __init__(
        self,
        options: EngineOptions,
        start_host: StartHost,
        progress: bool | None,
        on_progress: OnProgress | None,
    ) -> None:
        """Starts an engine and returns when it can generate. Raises the errors of `LLM`."""
        # Opening the checkpoint here finds most errors without starting an engine.
        with closing(open_checkpoint(options.path)) as reader:
            reader.declared.report_unknown(options.strict_config)
            self.defaults = reader.declared.generation_defaults()
            self.tokenizer = Tokenizer(options.path)
        self.options = options
        shown = None
        if on_progress is None and (display := make_display(progress)) is not None:
            shown = on_progress = StartProgress(display, Path(options.path).name)
        try:
            self.engine = BlockingClient(options, on_progress, start_host)
            weakref.finalize(self, self.engine.begin_close)
        except BaseException:
            if shown is not None:
                shown.failed()
            raise
        cell_watch.watch(self.engine)
        if shown is not None:
            shown.ready(self.engine.client.info)

    def complete(
        self,
        prompts: Sequence[EncodedPrompt],
        params: Sequence[SamplingParams],
        progress: bool | None,
    ) -> list[Completion]:
        """Answers every prompt with its params, and returns the completions in the same order."""
        requests = list(zip(prompts, params, strict=True))
        self._check(requests)
        count = RequestProgress(make_display(progress), len(requests))

        async def answer_all() -> list[Completion]:
            with count.shown():
                return await asyncio.gather(*(self._answer(*each, count) for each in requests))

        return self.engine.run(answer_all())

    def stream(self, prompt: EncodedPrompt, params: SamplingParams) -> TextStream:
        """Streams the answer to one prompt."""
        self._check([(prompt, params)])
        return TextStream(self.engine, self._deltas(prompt.token_ids, params))

    def _check(self, requests: Sequence[tuple[EncodedPrompt, SamplingParams]]) -> None:
        for prompt, params in requests:
            self.engine.client.check(prompt.token_ids, params)
        for grammar in {params.grammar for _, params in requests if params.grammar}:
            try:
                check_grammar(grammar)
            except GrammarError as error:
                raise RequestError(str(error), "grammar") from None

    async def _answer(
        self, prompt: EncodedPrompt, params: SamplingParams, count: RequestProgress
    ) -> Completion:
        deltas: list[TextDelta] = []
        reason: FinishReason = "error"
        error = None
        try:
            async for delta in self._deltas(prompt.token_ids, params):
                deltas.append(delta)
                reason = delta.finish_reason or reason
                count.tokens += 1
        except (GenerationFailed, RequestError) as failure:
            error = str(failure)
        count.done += 1
        text = "".join(delta.text for delta in deltas)
        tokens = [delta.token for delta in deltas]
        found = [delta.output.logprobs for delta in deltas if delta.output.logprobs is not None]
        logprobs = None if params.logprobs is None else found
        scores = deltas[0].output.prompt_logprobs if deltas else None
        return Completion(
            text, tokens, reason, prompt.token_ids, error, prompt.text, logprobs, scores
        )

    async def _deltas(
        self, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[TextDelta, None]:
        outputs = self.engine.client.generate(prompt, params, wait=True)
        detokenizer = detokenizer_for(self.tokenizer, params)
        async with aclosing(read_text(outputs, detokenizer)) as deltas:
            async for delta in deltas:
                yield delta
