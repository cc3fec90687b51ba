"""What the routes work with: the engine, the tokenizer, and the checks at the door."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import EngineInfo, Output, Stats
from llama_jax.serve.errors import ApiError, engine_dead, unavailable
from llama_jax.serve.metrics import Metrics
from llama_jax.text.tokenizer import Tokenizer

# An engine reports at least once a second, or once a tick where a tick takes longer.
SILENCE_LIMIT_SECONDS = 10.0

T = TypeVar("T")


class Engine(Protocol):
    """What this package needs of `llama_jax.client.client.EngineClient`."""

    info: EngineInfo
    stats: Stats

    @property
    def alive(self) -> bool:
        """Whether the engine runs and takes requests."""

    @property
    def seconds_since_report(self) -> float:
        """Seconds since the engine last said anything."""

    @property
    def max_in_flight(self) -> int:
        """Most requests that may run and wait at once."""

    def generate(self, prompt: list[int], params: SamplingParams) -> AsyncGenerator[Output, None]:
        """Yields the tokens of one request."""

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Raises what `generate` would raise at once, but for a full queue."""


@dataclass(kw_only=True)
class Frontend:
    """One model, as it is offered over HTTP.

    Attributes:
      model: the name that requests give.
      root: where the checkpoint is, as it was named at the start.
      defaults: sampling parameters where a request names none.
      draining: the server is about to end and takes nothing new.
    """

    engine: Engine
    tokenizer: Tokenizer
    metrics: Metrics
    model: str
    root: str
    defaults: SamplingParams
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False

    def check_available(self) -> None:
        """Raises `ApiError` 503 if the server takes no requests."""
        if self.draining:
            raise unavailable("The server is shutting down.", "shutting_down")
        if not self.engine.alive:
            raise engine_dead()

    def check_healthy(self) -> None:
        """Raises `ApiError` 503 unless the server can generate, now.

        A silent engine makes a server unhealthy, but is no reason to refuse a request: it may be
        in a long tick, and it is not this check's business to find out.
        """
        self.check_available()
        silence = self.engine.seconds_since_report
        if silence > SILENCE_LIMIT_SECONDS:
            raise unavailable(
                f"The engine has said nothing for {silence:.0f} seconds.", "engine_silent"
            )

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` 404 for a model that is not served; None is the one that is."""
        if name not in (None, self.model):
            raise ApiError(
                404,
                f"The model {name[:100]!r} does not exist here; this server has {self.model!r}.",
                param="model",
                code="model_not_found",
            )

    def check_length(self, prompt_tokens: int, max_tokens: int | None, param: str) -> None:
        """Raises `ApiError` 400 unless prompt and answer fit in the context."""
        answer = 1 if max_tokens is None else max_tokens
        if prompt_tokens + answer > self.engine.info.max_model_len:
            raise self._too_long(f"{prompt_tokens} tokens", answer, param)

    def check_text_length(self, texts: list[str], param: str) -> None:
        """Raises `ApiError` 400 for texts that cannot fit together however they are tokenised.

        It spares the work of tokenising megabytes that would be refused afterwards.
        """
        each = self.tokenizer.max_token_length
        # A message of no text, too, has tokens around it.
        fewest = max(len(texts), sum(map(len, texts)) // each)
        if fewest + 1 > self.engine.info.max_model_len:
            raise self._too_long(f"at least {fewest} tokens", 1, param)

    def _too_long(self, prompt: str, answer: int, param: str) -> ApiError:
        return ApiError(
            400,
            f"The prompt has {prompt} and the answer needs room for {answer}, but the context of "
            f"this server holds {self.engine.info.max_model_len}: shorten the prompt or lower "
            "max_tokens.",
            param=param,
            code="context_length_exceeded",
        )

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Runs work of the tokenizer without holding up the streams of others."""
        return await asyncio.to_thread(function, *args)
