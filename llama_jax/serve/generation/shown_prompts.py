"""What a response says about its prompts: their text, and log-probabilities of their tokens."""

import functools
import itertools
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from llama_jax.engine.interface import TokenLogprobs
from llama_jax.engine.prompt_logprobs import PromptLogprobs, ScoredToken
from llama_jax.serve.errors import ApiError
from llama_jax.serve.generation.choices import ChoiceDelta
from llama_jax.serve.generation.logprobs import LEAST, TokenNames, completion_logprobs, token_text
from llama_jax.serve.generation.text_offsets import TextOffsets
from llama_jax.serve.protocol.response_types import CompletionLogprobs

MAX_PROMPT_LOGPROBS = 2**20  # in one response, alternatives included: about 70 MB of JSON
_ROWS = 1024  # tokens that are encoded at a time: the encoder stops all other threads


@dataclass(frozen=True, kw_only=True)
class ShownPrompts:
    """How the choices of a request show their prompts.

    Attributes:
      names: the names of tokens in log-probabilities.
      prompts: the token ids of each prompt.
      choices: the number of choices of each prompt; those of one prompt are adjacent.
      num_added: how many tokens of each prompt are not in its text: BOS, if the server has added
        it. Only needed to echo.
      echo: whether the text of a choice begins with its prompt.
      logprobs: the number of alternatives in `logprobs`, which then begins with the prompt, too;
        None for no log-probabilities.
      prompt_logprobs: the number of alternatives in `prompt_logprobs`; None if it is not returned.
      answer: whether the answer follows, or only the prompt is shown.
    """

    names: TokenNames
    prompts: Sequence[list[int]]
    choices: int
    num_added: Sequence[int] = ()
    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    answer: bool = True

    def check(self) -> None:
        """Refuses log-probabilities that are too many for a response."""
        asked = {"logprobs": self._echoed, "prompt_logprobs": self.prompt_logprobs}
        each = sum(1 + count for count in asked.values() if count is not None)
        total = self.choices * each * sum(map(len, self.prompts))
        if total > MAX_PROMPT_LOGPROBS:
            raise ApiError(
                400,
                f"A response may have {MAX_PROMPT_LOGPROBS:,} log-probabilities of prompt tokens, "
                f"alternatives included, but this one would have {total:,}: ask for fewer "
                "alternatives or send fewer prompts.",
                param=next(name for name, count in asked.items() if count is not None),
                code="invalid_value",
            )

    async def follow(
        self, deltas: AsyncGenerator[ChoiceDelta, None]
    ) -> AsyncGenerator[ChoiceDelta, None]:
        """Yields the deltas as they are to be shown. Closes them at its end.

        A prompt is scored once, with its first choice. The other choices wait for its scores, and
        each of them gets them with its first delta. Without an answer, that delta has no text.
        """
        known: dict[int, PromptLogprobs | None] = {}
        held: dict[int, list[ChoiceDelta]] = defaultdict(list)
        if self._echoed is None and self.prompt_logprobs is None:
            known = dict.fromkeys(range(len(self.prompts)))
        async with aclosing(deltas):
            async for delta in deltas:
                prompt = delta.choice // self.choices
                if delta.prompt_logprobs is not None:
                    known[prompt] = delta.prompt_logprobs
                held[prompt].append(delta)
                if prompt in known:
                    for each in held.pop(prompt):
                        yield self._shown(each, known[prompt])

    def chunk(self, first: ChoiceDelta) -> dict[str, Any]:
        """Returns the entry of `choices` that shows the prompt in a stream, partly encoded.

        It may take seconds, like `add`.

        Args:
          first: the first delta of the choice, from `follow`.
        """
        choice: dict[str, Any] = {
            "index": first.choice,
            "text": "",
            "logprobs": None,
            "finish_reason": None if self.answer else "length",
        }
        self._prepend(choice, first)
        return choice

    def add(self, body: dict[str, Any], firsts: Sequence[ChoiceDelta]) -> None:
        """Adds the prompts to a whole response, partly encoded. It may take seconds.

        Args:
          body: the response.
          firsts: the first delta of each of its choices, from `follow`.
        """
        encoded: dict[int, msgspec.Raw] = {}
        for choice, first in zip(body["choices"], firsts, strict=True):
            if self.echo:
                self._prepend(choice, first)
            if self.prompt_logprobs is not None and first.prompt_logprobs is not None:
                prompt = first.choice // self.choices
                if prompt not in encoded:
                    encoded[prompt] = self._encoded(prompt, first.prompt_logprobs)
                owner = choice if "text" in choice else body  # a chat has one prompt
                owner["prompt_logprobs"] = encoded[prompt]

    @property
    def _echoed(self) -> int | None:
        """The number of alternatives of the tokens of the prompt in `logprobs`."""
        return self.logprobs if self.echo else None

    def _prepend(self, choice: dict[str, Any], first: ChoiceDelta) -> None:
        """Puts the prompt before the text of a choice, and its log-probabilities before others."""
        prompt, scores = first.choice // self.choices, first.prompt_logprobs
        tokens, added = self.prompts[prompt], self.num_added[prompt]
        text = self.names.tokenizer.decode(tokens[added:], skip_special_tokens=False)
        choice["text"] = text + choice["text"]
        if self._echoed is None or scores is None:
            return
        joined: dict[str, Any] = {**_prompt_part(self.names, tokens, added, scores, self._echoed)}
        for name, values in (choice["logprobs"] or {}).items():
            shifted = [len(text) + at for at in values] if name == "text_offset" else values
            joined[name] = [*joined[name], *shifted]
        choice["logprobs"] = {name: _encode(values) for name, values in joined.items()}

    def _shown(self, delta: ChoiceDelta, scores: PromptLogprobs | None) -> ChoiceDelta:
        if not self.answer:
            delta = delta._replace(text="", tokens=0, finish_reason="length", logprobs=None)
        return delta._replace(prompt_logprobs=scores)

    def _encoded(self, prompt: int, scores: PromptLogprobs) -> msgspec.Raw:
        """Encodes `prompt_logprobs` in the shape of vLLM, a part at a time."""
        text = functools.cache(functools.partial(token_text, self.names.tokenizer))
        return _encode(
            None
            if scored is None
            else {
                token: {"logprob": max(logprob, LEAST), "rank": rank, "decoded_token": text(token)}
                for token, logprob, rank in self._ranked(own, scored)
            }
            for own, scored in zip(self.prompts[prompt], scores, strict=True)
        )

    def _ranked(self, own: int, scored: ScoredToken) -> list[tuple[int, float, int]]:
        """The token itself and the most likely ones, each with its rank."""
        top = scored.top[: self.prompt_logprobs]
        others = [(token, logprob, rank) for rank, (token, logprob) in enumerate(top, 1)]
        return [(own, scored.logprob, scored.rank), *others]


def _prompt_part(
    names: TokenNames,
    tokens: list[int],
    num_added: int,
    scores: PromptLogprobs,
    alternatives: int,
) -> CompletionLogprobs:
    """Returns `logprobs` of a completion for the tokens of its prompt."""
    offsets = TextOffsets(names.tokenizer, skip_special_tokens=False)
    first, *others = tokens
    begin = 0 if num_added else offsets.add(first)
    scored = [
        TokenLogprobs(each.logprob, each.top[:alternatives]) for each in scores if each is not None
    ]
    found = completion_logprobs(names, list(zip(others, scored, strict=True)), offsets)
    return {
        "tokens": [names[first], *found["tokens"]],
        "token_logprobs": [None, *found["token_logprobs"]],
        "top_logprobs": [None, *found["top_logprobs"]],
        "text_offset": [begin, *found["text_offset"]],
    }


def _encode(values: Iterable[object]) -> msgspec.Raw:
    """Encodes a long list, a part at a time."""
    parts, rest = [], iter(values)
    while part := list(itertools.islice(rest, _ROWS)):
        parts.append(msgspec.json.encode(part)[1:-1])
    return msgspec.Raw(b"[" + b",".join(parts) + b"]")
