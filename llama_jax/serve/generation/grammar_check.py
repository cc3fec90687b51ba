"""Writes and checks the grammar of a request before any of its answers is generated."""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import msgspec

from llama_jax.serve.errors import ApiError
from llama_jax.serve.protocol.structured_output import WantedGrammar
from llama_jax.text.grammar import GrammarError
from llama_jax.text.grammar_worker import GrammarWorker

MAX_KNOWN = 64


class GrammarCheck:
    """Checks one grammar after another, and remembers the latest that were good."""

    def __init__(self) -> None:
        self._worker = GrammarWorker()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="check-grammar")
        self._known: OrderedDict[bytes, str] = OrderedDict()

    async def grammar(self, wanted: WantedGrammar | None) -> str:
        """Returns the grammar that the answers to a request must match; "" for none.

        Raises:
          ApiError: 400, the grammar cannot be used.
        """
        if wanted is None:
            return ""
        key = msgspec.json.encode((wanted.kind, wanted.value))
        if key in self._known:  # it does not wait for the checks of others
            self._known.move_to_end(key)
            return self._known[key]
        loop = asyncio.get_running_loop()
        try:
            grammar = await loop.run_in_executor(
                self._thread, self._worker.write, wanted.kind, wanted.value
            )
        except GrammarError as error:
            raise ApiError(400, str(error), param=wanted.param, code="invalid_value") from None
        self._known[key] = grammar
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return grammar
