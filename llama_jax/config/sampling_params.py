"""The parameters of a request: how its tokens are chosen and when it ends. Imports no JAX."""

from dataclasses import dataclass
from functools import cached_property

from llama_jax.config.errors import SamplingError

MAX_TOP_K = 2**31 - 1  # an int32 on the device
MAX_LOGIT_BIAS = 300  # entries, as in the OpenAI API
MAX_STOP_TOKEN_IDS = 256  # with `min_tokens`, which bans each of them
MAX_LOGPROBS = 20  # alternatives per token: the device computes as many for every packet that asks
MAX_ALLOWED_TOKEN_IDS = 4096
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 4096  # of all bad words together
MAX_PRIORITY = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Attributes:
      max_tokens: maximum number of tokens to generate; None for as many as fit the context.
      temperature: 0 is greedy (always the most likely token); otherwise divides the logits.
      top_k: keep the k most likely tokens; 0 keeps all. Ties with the k-th are kept.
      top_p: of the remaining tokens, keep the smallest set with this share of the probability.
      min_p: of the remaining tokens, keep those at least this likely relative to the most likely.
      typical_p: of the remaining tokens, keep the smallest set with this share of the probability
        whose information is closest to the entropy (typical sampling).
      seed: fixes the request's random numbers, whatever else is in the batch; None and -1 pick one.
      presence_penalty: subtracted from the logits of tokens that the answer contains.
      frequency_penalty: subtracted from the logits of tokens once for each time that the answer
        contains them.
      repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that
        prompt or answer contain; 1 changes nothing.
      logit_bias: (token id, number added to its logit) pairs.
      min_tokens: number of tokens before which neither an EOS id nor a stop token id is chosen.
      logprobs: how many of the most likely tokens to return with their log-probabilities, beside
        the log-probability of each token of the answer; None for neither.
      prompt_logprobs: the same for each token of the prompt after the first. The prompt is then
        computed whole, whatever of it was computed before.
      stop: strings that end the generation, if a token after the first `min_tokens` completes them.
      stop_token_ids: token ids that end the generation, in addition to the model's EOS ids.
      ignore_eos: continue after the model's EOS ids.
      include_stop_str_in_output: whether the text includes what ended it: the stop string, or the
        text of the stop token id.
      skip_special_tokens: whether special tokens have no text in the answer. The EOS or stop token
        that ends it has none in any case, unless the end is included.
      cache_salt: requests share computed prompts only with requests of the same salt, so that the
        time to the first token does not tell what others have asked.
      allowed_token_ids: the only tokens that may be chosen; empty for all.
      bad_words: token sequences that the answer will not contain. The last token of each is never
        chosen after the others.
      grammar: the grammar that the answer must match (`llama_jax.text.grammar`); "" for none.
      priority: requests with a lower number run earlier, and lose their pages later.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    cache_salt: str = ""
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""
    priority: int = 0

    def check(self) -> None:
        """Checks every range. Types are not checked, nor ids against a vocabulary.

        Raises:
          SamplingError: a value is out of range; `param` is the field.
        """
        most = MAX_TOP_K if self.max_tokens is None else self.max_tokens
        rules = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("temperature", _within(self.temperature, 0, 2), "in [0, 2]"),
            ("top_k", 0 <= self.top_k <= MAX_TOP_K, "in [0, 2**31)"),
            ("top_p", _within(self.top_p, 0, 1) and self.top_p > 0, "in (0, 1]"),
            ("min_p", _within(self.min_p, 0, 1), "in [0, 1]"),
            ("typical_p", _within(self.typical_p, 0, 1) and self.typical_p > 0, "in (0, 1]"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            ("presence_penalty", _within(self.presence_penalty, -2, 2), "in [-2, 2]"),
            ("frequency_penalty", _within(self.frequency_penalty, -2, 2), "in [-2, 2]"),
            ("repetition_penalty", _within(self.repetition_penalty, 1e-2, 1e2), "in [0.01, 100]"),
            (
                "logit_bias",
                self._biases_in_range,
                f"at most {MAX_LOGIT_BIAS} numbers in [-100, 100]",
            ),
            ("min_tokens", 0 <= self.min_tokens <= most, "in [0, max_tokens]"),
            ("stop_token_ids", self._bans_fit, f"at most {MAX_STOP_TOKEN_IDS} with min_tokens"),
            (
                "bad_words",
                self._bad_words_fit,
                f"at most {MAX_BAD_WORDS} sequences of tokens, with at most "
                f"{MAX_BAD_WORD_TOKENS} tokens in all, and none of them empty",
            ),
            (
                "allowed_token_ids",
                len(self.allowed_token_ids) <= MAX_ALLOWED_TOKEN_IDS,
                f"at most {MAX_ALLOWED_TOKEN_IDS} token ids",
            ),
            ("logprobs", 0 <= (self.logprobs or 0) <= MAX_LOGPROBS, f"in [0, {MAX_LOGPROBS}]"),
            (
                "prompt_logprobs",
                0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS,
                f"in [0, {MAX_LOGPROBS}]",
            ),
            ("stop", all(self.stop), "a list of non-empty strings"),
            ("priority", abs(self.priority) <= MAX_PRIORITY, "in (-2**31, 2**31)"),
        )
        for name, holds, allowed in rules:
            if not holds:
                value = repr(getattr(self, name))
                value = value if len(value) < 80 else f"{value[:80]}..."
                raise SamplingError(f"{name} must be {allowed}, got {value}.", name)

    def token_ids(self) -> dict[str, list[int]]:
        """Returns the token ids in each field that has any."""
        return {
            "stop_token_ids": [*self.stop_token_ids],
            "logit_bias": [token for token, _ in self.logit_bias],
            "allowed_token_ids": [*self.allowed_token_ids],
            "bad_words": [token for word in self.bad_words for token in word],
        }

    @cached_property  # like those below, asked for every token
    def greedy(self) -> bool:
        """Whether every token is the most likely one, with no random choice."""
        return self.temperature == 0

    @cached_property
    def penalizes(self) -> bool:
        """Whether the logits depend on the tokens before, other than through the model."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @cached_property
    def adjusts(self) -> bool:
        """Whether the logits may be changed before a token is chosen."""
        return self.penalizes or bool(self.logit_bias) or self.min_tokens > 0

    @cached_property
    def takes_the_likeliest(self) -> bool:
        """Whether each token is the most likely one, and nothing else is asked of it."""
        plain = self.greedy and not self.adjusts and self.logprobs is None
        return plain and not self.constrains

    @cached_property
    def constrains(self) -> bool:
        """Whether there are tokens that must not be chosen."""
        return bool(self.grammar or self.allowed_token_ids or self.bad_words)

    @property
    def _bans_fit(self) -> bool:
        return self.min_tokens == 0 or len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS

    @property
    def _bad_words_fit(self) -> bool:
        few = len(self.bad_words) <= MAX_BAD_WORDS
        return few and all(self.bad_words) and sum(map(len, self.bad_words)) <= MAX_BAD_WORD_TOKENS

    @property
    def _biases_in_range(self) -> bool:
        few = len(self.logit_bias) <= MAX_LOGIT_BIAS
        return few and all(_within(bias, -100, 100) for _, bias in self.logit_bias)


def _within(value: float, low: float, high: float) -> bool:
    return low <= value <= high  # neither NaN nor infinity is
