"""The request log: one JSON object per request that generates text."""

import dataclasses
import json
import logging
from datetime import UTC, datetime
from typing import Any

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.serve.monitoring.logs import REQUESTS
from llama_jax.serve.monitoring.request_record import RequestRecord
from llama_jax.serve.monitoring.request_timer import RequestTimer

# Parameters that quote the request, which the log has only with its prompt.
_TEXTS = frozenset({"stop", "cache_salt", "grammar", "bad_words"})

log = logging.getLogger(REQUESTS)


class RequestLog:
    """Writes requests that have ended to the logger `REQUESTS`."""

    def __init__(self, prompts: bool = False) -> None:
        """Writes the bodies of requests too if `prompts` is true."""
        self._prompts = prompts

    def __call__(self, record: RequestRecord) -> None:
        """Writes the line of a request, if it asked to generate."""
        if record.params is None:
            return
        # ASCII: a terminal obeys some other characters.
        log.info("%s", json.dumps(self._fields(record, record.params), ensure_ascii=True))

    def _fields(self, record: RequestRecord, params: SamplingParams) -> dict[str, Any]:
        choices = record.choices
        fields = {
            "time": datetime.fromtimestamp(record.began_ns / 1e9, UTC).isoformat(),
            "request_id": record.id,
            "client": record.client,
            "key": record.key_id,
            "path": record.handler,
            "status": record.status,
            "error": record.error,
            "model": record.model,
            "stream": record.stream,
            "n": record.choices_per_prompt,
            "params": _set(params),
            "prompt_tokens": sum(
                timer.prompt_tokens for timer in choices[:: record.choices_per_prompt]
            ),
            "cached_tokens": sum(
                timer.cached_tokens for timer in choices[:: record.choices_per_prompt]
            ),
            "completion_tokens": sum(timer.tokens for timer in choices),
            "choices": [_choice(timer) for timer in choices],
            "seconds": round(record.seconds, 6),
        }
        if self._prompts:
            fields["body"] = record.body.decode("utf-8", "replace")
        return fields


def _choice(timer: RequestTimer) -> dict[str, Any]:
    return {
        "finish_reason": timer.reason,
        "tokens": timer.tokens,
        "queue_seconds": _rounded(timer.queue_seconds),
        "first_token_seconds": _rounded(timer.first - timer.arrived if timer.tokens else None),
        "last_token_seconds": _rounded(timer.last - timer.arrived if timer.tokens else None),
    }


def _set(params: SamplingParams) -> dict[str, Any]:
    """The parameters that differ from the defaults of their type, without texts of the request."""
    return {
        field.name: value
        for field in dataclasses.fields(params)
        if (value := getattr(params, field.name)) != field.default and field.name not in _TEXTS
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
