"""Tools with the OpenAI client, langchain, LiteLLM, pydantic-ai and instructor."""

import pytest

from llama_jax.text.tokenizer import Tokenizer
from tests.support.clients import run_client
from tests.support.fake_client import FakeServer
from tests.support.listening import listening
from tests.support.server_process import REAL_SERVER, ServerProcess
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

pytestmark = pytest.mark.slow

CALL = '{"name": "get_weather", "parameters": {"city": "Paris", "days": [1, 2]}}'
ANSWER = "It has 21 degrees."


def test_round_trips():
    server = FakeServer(max_model_len=10_000)
    tokenizer, generate = server.tokenizer, server.engine.generate

    def scripted(prompt, params, **options):
        """Calls the tool, unless the prompt ends with its result."""
        last = tokenizer.decode(prompt, False).rsplit("<|start_header_id|>", 2)[1]
        text = ANSWER if last.startswith("ipython") else CALL
        server.engine.script = tokenizer.encode(f"{text}<|eot_id|>", add_bos=False)
        return generate(prompt, params, **options)

    server.engine.generate = scripted
    with listening(server) as address:
        assert run_client("drive_round_trips.py", address).count("done") == 4
    assert server.engine.running == 0


def test_arguments_are_those_of_the_schema(tmp_path):
    """Of a model with random weights."""
    path = make_tokenizer(tmp_path)
    tokenizer = Tokenizer(path)
    [eos] = tokenizer.encode("<|eot_id|>", add_bos=False)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=eos)
    write_checkpoint(path, vocab_size=tokenizer.vocab_size, max_position_embeddings=4096, **ids)
    options = ("--mesh=2x2", "--max-num-seqs=8", "--max-model-len=4096")
    with ServerProcess(REAL_SERVER, str(path), *options) as server:
        server.wait_ready()
        assert run_client("drive_structured_tools.py", server.url).count("done") == 5
