"""Writes and checks the grammar of a request before any of its answers is generated."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from llama_jax.serve.errors import ApiError
from llama_jax.serve.protocol.generation import GenerationRequest
from llama_jax.serve.protocol.structured_output import WantedGrammar
from llama_jax.text.grammar import GrammarError, check_grammar

# Of their own: the checks of many large grammars must not delay the tokenizing of other requests.
_THREADS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="check-grammar")


async def grammar_of(body: GenerationRequest) -> str:
    """Returns the grammar that the answers to a request must match; "" for none.

    Raises:
      ApiError: 400, the grammar cannot be used.
    """
    if (wanted := body.wanted_grammar) is None:
        return ""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, _write, wanted)


def _write(wanted: WantedGrammar) -> str:
    try:
        grammar = wanted.write()
        check_grammar(grammar)
    except GrammarError as error:
        raise ApiError(400, str(error), param=wanted.param, code="invalid_value") from None
    return grammar
