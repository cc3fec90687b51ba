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
from llama_jax.serve.generation.admission import Admission
from llama_jax.serve.monitoring.metrics import Metrics
from llama_jax.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(kw_only=True)
class ServedModel:
    """One model as it is offered over HTTP.

    Attributes:
      name: the model name in answers.
      aliases: other names that requests may use.
      root: the checkpoint's path, as given on the command line.
      engine: the client of the engine.
      tokenizer: the checkpoint's tokenizer.
      metrics: the metrics of this server.
      defaults: the sampling parameters that a request does not set.
      created: when the server started, in seconds since 1970.
      draining: whether the server is shutting down and accepts no new requests.
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
    draining: bool = False
    admission: Admission = field(init=False)

    def __post_init__(self) -> None:
        self.admission = Admission(self.engine, self.metrics)

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

    def check_room(self, prompts: int, choices: int) -> None:
        """Raises `ApiError` 400 if the server never has room for a request.

        Args:
          prompts: the number of its prompts.
          choices: the number of choices for each prompt.
        """
        room = self.engine.max_in_flight
        if prompts * choices > room:
            raise ApiError(
                400,
                f"The request needs {prompts * choices} sequences, but this server has room for "
                f"{room}: split it into several requests.",
                param="n" if choices > 1 else "prompt",
                code="invalid_value",
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
