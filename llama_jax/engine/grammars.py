"""The grammars of requests: compiled, and followed token by token, in background threads.

llguidance releases the interpreter's lock while it compiles a grammar and computes a mask, so
neither delays the ticks. It is imported by a thread; without it only requests with a grammar fail.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.engine.errors import RequestError
from llama_jax.text.grammar import describe_error, parser_limits

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KNOWN = 64  # compiled grammars that are kept
_COMPILERS, _FOLLOWERS = 2, 4  # threads


class Grammars:
    """Compiles grammars for the tokenizer of a checkpoint."""

    def __init__(self, path: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Begins to load the tokenizer, in a thread.

        Args:
          path: the checkpoint.
          vocab_size: V of the model.
          eos_token_ids: the tokens that may follow a complete answer.
        """
        self._vocab_size = vocab_size
        self._compilers = ThreadPoolExecutor(_COMPILERS, "compile-grammar")
        self._followers = ThreadPoolExecutor(_FOLLOWERS, "follow-grammar")
        self._known: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        # At once: llguidance holds the interpreter's lock for a second for 128,256 tokens.
        self._tokenizer = self._compilers.submit(
            _load_tokenizer, path, vocab_size, list(eos_token_ids)
        )

    def compile(self, grammar: str) -> "Future[Matcher]":
        """Compiles a grammar, and computes the first mask; fails with `RequestError`."""
        return self._compilers.submit(self._compile, grammar)

    def _compile(self, grammar: str) -> "Matcher":
        from llguidance import LLMatcher

        with self._lock:
            known = self._known.get(grammar)
            if known is not None:
                self._known.move_to_end(grammar)
        if known is None:
            try:
                tokenizer = self._tokenizer.result()
            except Exception as error:
                raise RequestError(
                    f"The tokenizer of this model cannot be used with a grammar: {error}", "grammar"
                ) from error
            known = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
            with self._lock:
                self._known[grammar] = known
                if len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)
        return Matcher(known.deep_copy(), self._vocab_size, self._followers)


class Matcher:
    """The place of one answer in its grammar."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int, threads: ThreadPoolExecutor) -> None:
        """Computes the first mask.

        Args:
          matcher: at the beginning of the grammar, and not used by anyone else.
          vocab_size: V.
          threads: compute the other masks.
        """
        self._matcher = matcher
        self._words = -(-vocab_size // 32)
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
        mask = np.empty(self._words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            reason = describe_error(self._matcher.get_error())
            raise RequestError(f"The grammar cannot be followed: {reason}.", "grammar")
        return mask


def _load_tokenizer(path: str, vocab_size: int, eos_token_ids: list[int]) -> "LLTokenizer":
    from llguidance import LLTokenizer

    from llama_jax.gguf.tokenizer import tokenizer_files

    with tokenizer_files(Path(path)) as folder:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return LLTokenizer(text, n_vocab=vocab_size, eos_token=eos_token_ids)
