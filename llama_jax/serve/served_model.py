"""The model that a server offers, and the checks that every route makes."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llama_jax.client.client import EngineClient
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.serve.errors import (
    ApiError,
    engine_dead,
    prompt_too_long,
    shutting_down,
    unavailable,
)
from llama_jax.serve.generation.admission import MAX_QUEUE_TOKENS, Admission
from llama_jax.serve.generation.grammar_check import GrammarCheck
from llama_jax.serve.monitoring.metrics import Metrics
from llama_jax.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(kw_only=True)
class ServedModel:
    """One model as it is offered over HTTP.

    Attributes:
      name: the model name in answers.
      root: the checkpoint's path, as given on the command line.
      engine: the client of the engine.
      tokenizer: the checkpoint's tokenizer.
      metrics: the metrics of this server.
      defaults: the sampling parameters that a request does not set.
      aliases: other names that requests may use.
      created: when the server started, in seconds since 1970.
      max_queue_tokens: maximum tokens of prompts that wait for their first token.
      request_timeout: seconds after which a request that sets no timeout is aborted, or None.
      draining: whether the server is shutting down and accepts no new requests.
      keep_alive_seconds: the time without an event after which a stream gets a comment; None for no
        comments.
      grammars: checks the grammars of requests.
      admission: admits requests while the engine has room.
    """

    name: str
    root: str
    engine: EngineClient
    tokenizer: Tokenizer
    metrics: Metrics
    defaults: SamplingParams
    aliases: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))
    max_queue_tokens: int = MAX_QUEUE_TOKENS
    request_timeout: float | None = None
    draining: bool = False
    keep_alive_seconds: float | None = 15.0
    grammars: GrammarCheck = field(default_factory=GrammarCheck)
    admission: Admission = field(init=False)

    def __post_init__(self) -> None:
        self.admission = Admission(self.engine, self.metrics, self.max_queue_tokens)

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may use."""
        return (self.name, *self.aliases)

    def check_available(self) -> None:
        """Raises `ApiError` 503 if the server accepts no requests."""
        if self.draining or self.engine.draining:
            raise shutting_down()
        if not self.engine.alive:
            raise engine_dead()
        if not self.engine.responds:
            silence = self.engine.seconds_since_report
            raise unavailable(
                f"The engine has sent no report for {silence:.0f} seconds.", "engine_silent"
            )

    def check_name(self, name: str | None) -> None:
        """Raises `ApiError` 404 if a request names another model; None means this one."""
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"The model {name[:100]!r} does not exist; this server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    def check_text_length(self, texts: list[str], param: str) -> None:
        """Raises `ApiError` 400 if the texts cannot fit the context, however they are tokenized.

        This spares tokenizing megabytes that would be refused afterwards.
        """
        # Even an empty message has tokens around it.
        fewest = max(len(texts), sum(map(len, texts)) // self.tokenizer.max_token_length)
        if fewest >= self.engine.info.max_model_len:
            raise prompt_too_long(self.engine.info, param, fewest, at_least=True)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Runs work of the tokenizer without blocking the streams of other requests."""
        return await asyncio.to_thread(function, *args)
