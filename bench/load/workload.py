"""What a load test sends: when each request arrives, its prompt, and how long its answer is.

Everything is drawn before the first request is sent, from a seed. So no answer, however late, can
delay a later request, and two servers can be given exactly the same load.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sharding.errors import UserError

ARRIVALS = ("poisson", "constant")
MAX_TOKENS = 1_000_000  # in a prompt or an answer
MAX_REQUESTS = 1_000_000
MAX_PROMPT_TOKENS = 200_000_000  # of all requests together
# Short and common: with the space before it, each is one token of most vocabularies.
WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law "
    "car city name team minute idea body back parent face others level office door health person "
    "art war history party result change morning reason research girl guy moment air teacher force"
).split()


class WorkloadError(UserError):
    """The load that is asked for makes no sense."""


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, each at least 1.

    Attributes:
      kind: "constant", "uniform", "normal" or "lognormal".
      numbers: the length; the least and the greatest; the mean and the standard deviation; the
        median and the standard deviation of the logarithm.
    """

    kind: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Parses `256`, `64-512`, `normal:256,64` or `lognormal:256,0.6`.

        Raises:
          WorkloadError: the text has another form, or a number is out of range.
        """
        number = r"(\d+(?:\.\d+)?)"
        forms = {
            "constant": r"(\d+)",
            "uniform": r"(\d+)-(\d+)",
            "normal": f"normal:{number},{number}",
            "lognormal": f"lognormal:{number},{number}",
        }
        for kind, form in forms.items():
            if match := re.fullmatch(form, text.strip(), re.ASCII):
                numbers = tuple(map(float, match.groups()))
                lengths = numbers if kind == "uniform" else numbers[:1]
                if (
                    min(lengths) < 1
                    or max(lengths) > MAX_TOKENS
                    or list(lengths) != sorted(lengths)
                ):
                    raise WorkloadError(
                        f"{text!r} is no range of lengths: they are between 1 and {MAX_TOKENS} "
                        "tokens, the least before the greatest."
                    )
                return cls(kind, numbers)
        raise WorkloadError(
            f"{text!r} is no length: write 256, 64-512, normal:256,64 (mean, standard deviation) "
            "or lognormal:256,0.6 (median, standard deviation of the logarithm)."
        )

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Draws lengths `[size]` int64."""
        a, b = (*self.numbers, 0.0)[:2]
        values = {
            "constant": lambda: np.full(size, a),
            "uniform": lambda: rng.integers(int(a), int(b) + 1, size),
            "normal": lambda: rng.normal(a, b, size),
            "lognormal": lambda: a * np.exp(np.minimum(rng.normal(0, b, size), 100)),
        }[self.kind]()
        return np.clip(np.rint(values), 1, MAX_TOKENS).astype(np.int64)


class LoadRequest(NamedTuple):
    """A request to send.

    Attributes:
      at: seconds from the start of the test to its arrival.
      prompt: a text, or token ids.
      max_tokens: the length of the answer.
    """

    at: float
    prompt: str | list[int]
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A load, from which `requests` draws.

    Attributes:
      rate: requests per second; infinite if all arrive at once.
      arrivals: "poisson" (exponential gaps) or "constant".
      num_requests: how many; None if `duration` is given.
      duration: seconds in which requests arrive; None if `num_requests` is given.
      prompt, answer: the lengths; that of the prompt is without the shared prefix.
      prefix_tokens, prefixes: each prompt starts with one of `prefixes` shared ones of this length.
      vocab_size: prompts are token ids below it; None for English words, about one token each.
      seed: of all random numbers.
    """

    rate: float
    arrivals: str = "poisson"
    num_requests: int | None = None
    duration: float | None = None
    prompt: Lengths
    answer: Lengths
    prefix_tokens: int = 0
    prefixes: int = 1
    vocab_size: int | None = None
    seed: int = 0

    def requests(self) -> list[LoadRequest]:
        """Draws the requests, in the order of their arrival."""
        # A stream of random numbers each: the same arrivals with other lengths, and so on.
        seeds = np.random.SeedSequence(self.seed).spawn(5)
        times, prompts, answers, prefixes, tokens = map(np.random.default_rng, seeds)
        at = self._arrivals(times)
        lengths = self.prompt.draw(prompts, len(at))
        if int(lengths.sum()) + self.prefix_tokens * (len(at) + self.prefixes) > MAX_PROMPT_TOKENS:
            raise WorkloadError(
                f"All prompts together would be longer than {MAX_PROMPT_TOKENS} tokens: ask for "
                "fewer or shorter ones."
            )
        chosen = prefixes.integers(0, self.prefixes, len(at))
        shared = [self._tokens(tokens, self.prefix_tokens) for _ in range(self.prefixes)]
        limits = self.answer.draw(answers, len(at))
        return [
            LoadRequest(
                float(time), self._prompt(shared[prefix] + self._tokens(tokens, length)), int(limit)
            )
            for time, prefix, length, limit in zip(at, chosen, lengths, limits, strict=True)
        ]

    def _arrivals(self, rng: np.random.Generator) -> np.ndarray:
        """The times of arrival, from 0 on."""
        gap = 1 / self.rate
        if self.num_requests is not None:
            gaps = self._gaps(rng, gap, self.num_requests)
            gaps[0] = 0
            return np.cumsum(gaps)
        assert self.duration is not None
        if self.rate * self.duration > MAX_REQUESTS:
            raise WorkloadError(
                f"{self.rate:g} requests per second for {self.duration:g} seconds are more than "
                f"{MAX_REQUESTS}: ask for fewer."
            )
        at = np.zeros(1)
        while at[-1] < self.duration:
            more = self._gaps(rng, gap, 1 + int(self.rate * self.duration))
            at = np.concatenate([at, at[-1] + np.cumsum(more)])
        return at[at < self.duration]

    def _gaps(self, rng: np.random.Generator, gap: float, size: int) -> np.ndarray:
        return np.full(size, gap) if self.arrivals == "constant" else rng.exponential(gap, size)

    def _tokens(self, rng: np.random.Generator, size: int) -> list[int]:
        limit = len(WORDS) if self.vocab_size is None else self.vocab_size
        return rng.integers(0, limit, size).tolist()

    def _prompt(self, tokens: list[int]) -> str | list[int]:
        if self.vocab_size is not None:
            return tokens
        return " ".join(WORDS[token] for token in tokens)
