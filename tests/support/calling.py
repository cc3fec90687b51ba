"""A server whose model calls a function, and answers when it has the result."""

from tests.support.fake_client import EOT, FakeServer

ARGUMENTS = '{"city": "Paris", "days": [1, 2]}'
CALL = f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}'
OBJECT = '{"city": "Paris"}'
ANSWER = "It has 21 degrees."


def calling_server(**options) -> FakeServer:
    """Answers CALL, unless the prompt ends with a result: then ANSWER; or OBJECT to a grammar."""
    server = FakeServer(max_model_len=10_000, **options)
    tokenizer, generate = server.tokenizer, server.engine.generate

    def scripted(prompt, params, **options):
        last = tokenizer.decode(prompt, False).rsplit("<|start_header_id|>", 2)[1]
        text = OBJECT if params.grammar else CALL
        text = ANSWER if last.startswith("ipython") else text
        server.engine.script = tokenizer.encode(text + EOT, add_bos=False)
        return generate(prompt, params, **options)

    server.engine.generate = scripted
    return server
