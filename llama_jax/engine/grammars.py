"""The grammars of requests: compiled, and followed token by token, in background threads.

llguidance releases the interpreter's lock while it compiles a grammar and computes a mask, so
neither delays the ticks. It is imported by a thread; without it only requests with a grammar fail.
It does hold the lock while it loads a vocabulary: a second, and 260 MB, for 128,256 tokens.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llama_jax.engine.bit_mask import make_mask
from llama_jax.engine.errors import RequestError
from llama_jax.text.grammar import describe_error, parser_limits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KNOWN = 64  # compiled grammars that are kept
_COMPILERS, _FOLLOWERS = 2, 4  # threads


class _Vocabulary(NamedTuple):
    """The tokens of a model, as llguidance knows them.

    Attributes:
      tokenizer: the tokenizer.
      texts: the mask of every token but those that the tokenizer takes for EOS.
      ends: the mask of the model's own EOS ids, which may not be in the tokenizer at all.
    """

    tokenizer: "LLTokenizer"
    texts: np.ndarray
    ends: np.ndarray


class Grammars:
    """Compiles grammars for the tokenizer of a checkpoint."""

    def __init__(self, path: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Loads nothing yet.

        Args:
          path: the checkpoint.
          vocab_size: V of the model.
          eos_token_ids: the tokens that may follow a complete answer.
        """
        self._compilers = ThreadPoolExecutor(_COMPILERS, "compile-grammar")
        self._followers = ThreadPoolExecutor(_FOLLOWERS, "follow-grammar")
        self._known: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._load = partial(_load_vocabulary, path, vocab_size, list(eos_token_ids))
        self._vocabulary: Future[_Vocabulary] | None = None

    def load(self) -> "Future[_Vocabulary]":
        """Begins to load the vocabulary, in a thread, unless that has begun."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._compilers.submit(self._load)
            return self._vocabulary

    def compile(self, grammar: str) -> "Future[Matcher]":
        """Compiles a grammar, and computes the first mask; fails with `RequestError`."""
        self.load()  # before the grammar takes one of the threads
        return self._compilers.submit(self._compile, grammar)

    def _compile(self, grammar: str) -> "Matcher":
        from llguidance import LLMatcher

        try:
            vocabulary = self.load().result()
        except Exception as error:
            raise RequestError(
                f"The tokenizer of this model cannot be used with a grammar: {error}", "grammar"
            ) from error
        with self._lock:
            known = self._known.get(grammar)
            if known is not None:
                self._known.move_to_end(grammar)
        if known is None:
            known = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=parser_limits())
            with self._lock:
                self._known[grammar] = known
                if len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)
        return Matcher(known.deep_copy(), vocabulary, self._followers)


class Matcher:
    """The place of one answer in its grammar."""

    def __init__(
        self, matcher: "LLMatcher", vocabulary: _Vocabulary, threads: ThreadPoolExecutor
    ) -> None:
        """Computes the first mask.

        Args:
          matcher: at the beginning of the grammar, and not used by anyone else.
          vocabulary: of the model.
          threads: compute the other masks.
        """
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._threads = threads
        self._mask: Future[np.ndarray] = Future()
        self._mask.set_result(self._compute_mask())

    def take(self, token: int) -> None:
        """Goes on by a token that the last mask allowed; computes the next mask in a thread."""
        self._mask = self._threads.submit(self._compute_mask, token)

    def mask(self) -> np.ndarray:
        """Waits for the mask of the next token, `[V / 32]` int32.

        Raises:
          RequestError: the grammar became too complex.
        """
        return self._mask.result()

    def _compute_mask(self, token: int | None = None) -> np.ndarray:
        if token is not None:
            self._matcher.consume_token(token)
        mask = np.empty_like(self._vocabulary.texts)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            reason = describe_error(self._matcher.get_error())
            raise RequestError(f"The grammar cannot be followed: {reason}.", "grammar")
        mask &= self._vocabulary.texts
        if self._matcher.is_accepting():
            mask |= self._vocabulary.ends
        return mask


def _load_vocabulary(path: str, vocab_size: int, eos_token_ids: list[int]) -> _Vocabulary:
    from llguidance import LLTokenizer

    from llama_jax.gguf.tokenizer import tokenizer_files

    with tokenizer_files(Path(path)) as folder:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = LLTokenizer(text, n_vocab=vocab_size)
    texts = make_mask(vocab_size, range(vocab_size))
    texts &= ~make_mask(vocab_size, tokenizer.eos_tokens)
    return _Vocabulary(tokenizer, texts, make_mask(vocab_size, eos_token_ids))
