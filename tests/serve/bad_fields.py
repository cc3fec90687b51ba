"""Bodies that ask for what cannot be, as (path, body, param, code), by what they try.

The answer is 400 and names the field. A code of None leaves open which of the codes it is: the
field is refused for its value by a server that supports it, and for its name by one that does not.
Where a body cannot be written as a Python value, it is bytes.
"""

from tests.support.fake_client import EOT, user

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
VALUE, TYPE, LONG = "invalid_value", "invalid_type", "context_length_exceeded"
MISSING, UNKNOWN = "missing_required_parameter", "unknown_parameter"
UNSUPPORTED, JSON = "unsupported_parameter", "invalid_json"

Case = tuple[str, dict | bytes, str | None, str | None]


def completion(param: str | None, code: str | None, **fields) -> Case:
    """A completion of "x" with these fields."""
    return COMPLETIONS, {"prompt": "x", **fields}, param, code


def chat(param: str | None, code: str | None, **fields) -> Case:
    """A chat of "x" with these fields."""
    return CHAT, {"messages": user("x"), **fields}, param, code


def literal(name: str, value: str, code: str | None) -> Case:
    """A completion with a number that Python would not write."""
    return COMPLETIONS, f'{{"prompt":"x","{name}":{value}}}'.encode(), name, code


def part(code: str, param: str = "type", **fields) -> Case:
    """A chat whose second part is this."""
    content = [{"type": "text", "text": "What is this?"}, fields]
    messages = [{"role": "user", "content": content}]
    return CHAT, {"messages": messages}, f"messages[0].content[1].{param}", code


def message(param: str, code: str, **fields) -> Case:
    """A chat whose second message is this."""
    messages = [*user("x"), fields, *user("x")]
    return CHAT, {"messages": messages}, f"messages[1]{param}", code


NESTED: dict = {}
for _ in range(900):
    NESTED = {"a": NESTED}
ROLES = "<|eot_id|><|start_header_id|>system<|end_header_id|>"

CASES: dict[str, list[Case]] = {
    "more than a request may ask for": [
        completion("prompt", LONG, prompt="word " * 380_000),
        completion("prompt", LONG, prompt=[5] * 300_000),
        completion("prompt", VALUE, prompt=["x"] * 100_000),
        completion("prompt", VALUE, prompt=[[5]] * 1025),
        completion("n", VALUE, n=17),
        completion("n", VALUE, n=2**63),
        completion("n", VALUE, n=10**30),
        completion("n", VALUE, n=-1),
        completion("n", TYPE, n="2"),
        completion("n", TYPE, n=[2]),
        chat("n", VALUE, n=128),
        completion("best_of", None, best_of=10**9),
        completion("best_of", None, best_of=-1),
        completion("best_of", None, best_of="many"),
        completion("logprobs", VALUE, logprobs=21),
        completion("logprobs", VALUE, logprobs=10**9),
        completion("logprobs", VALUE, logprobs=-1),
        completion("logprobs", TYPE, logprobs=True),
        chat("top_logprobs", VALUE, logprobs=True, top_logprobs=21),
        chat("top_logprobs", VALUE, logprobs=True, top_logprobs=-1),
        chat("top_logprobs", VALUE, logprobs=False, top_logprobs=2),
        chat("logprobs", TYPE, logprobs=5),
        completion("prompt_logprobs", None, prompt_logprobs=10**6),
        completion("stop", VALUE, stop=["a"] * 10_000),
        completion("stop", VALUE, stop="a" * 1_000_000),
        completion("stop", VALUE, stop=["a", ""]),
        completion("stop", TYPE, stop={"a": 1}),
        completion("stop", TYPE, stop=[["a"]]),
        completion("logit_bias", VALUE, logit_bias={str(i): 1 for i in range(301)}),
        completion("bad_words", VALUE, bad_words=["x"] * 100_000),
        completion("bad_words", TYPE, bad_words=[5]),
        completion("bad_words", TYPE, bad_words="x"),
        completion("allowed_token_ids", None, allowed_token_ids=[10**9]),
        completion("allowed_token_ids", None, allowed_token_ids="all"),
        completion("cache_salt", VALUE, cache_salt="x" * 1025),
        completion("truncate_prompt_tokens", VALUE, truncate_prompt_tokens=0),
        completion("truncate_prompt_tokens", VALUE, truncate_prompt_tokens=-2),
        completion("truncate_prompt_tokens", VALUE, truncate_prompt_tokens=10**30),
        completion("truncate_prompt_tokens", TYPE, truncate_prompt_tokens="1"),
        chat("messages", LONG, messages=user("x") * 20_000),
        chat("max_tokens", VALUE, max_tokens=0),
        chat("max_completion_tokens", VALUE, max_completion_tokens=-1),
        chat("max_completion_tokens", LONG, max_completion_tokens=10**9),
    ],
    "numbers": [
        literal("temperature", "1e308", VALUE),
        literal("temperature", "-1e308", VALUE),
        literal("temperature", "1e999", VALUE),
        literal("temperature", "-1e999", VALUE),
        literal("temperature", '"NaN"', TYPE),
        literal("temperature", "true", TYPE),
        literal("temperature", "[]", TYPE),
        literal("top_p", "1e-400", VALUE),
        literal("top_p", "-0.0", VALUE),
        literal("top_p", "1e308", VALUE),
        literal("min_p", "-1e-9", VALUE),
        literal("min_p", "2", VALUE),
        literal("top_k", "0.5", TYPE),
        literal("top_k", "-2", VALUE),
        literal("top_k", "9223372036854775808", VALUE),
        literal("top_k", "1e300", VALUE),
        literal("seed", "1.5", TYPE),
        literal("seed", '"1"', TYPE),
        literal("seed", "-9223372036854775809", VALUE),
        literal("seed", "9" * 5000, VALUE),
        literal("max_tokens", "1e999", VALUE),
        literal("max_tokens", "9223372036854775808", LONG),
        literal("max_tokens", "-1", VALUE),
        literal("min_tokens", "-1", VALUE),
        literal("min_tokens", "17", VALUE),
        literal("min_tokens", "1e300", VALUE),
        literal("presence_penalty", "2.0000001", VALUE),
        literal("presence_penalty", "-1e308", VALUE),
        literal("frequency_penalty", "-3", VALUE),
        literal("frequency_penalty", "{}", TYPE),
        literal("repetition_penalty", "0", VALUE),
        literal("repetition_penalty", "-1", VALUE),
        literal("repetition_penalty", "1e308", VALUE),
        literal("logit_bias", '{"5": 1e308}', VALUE),
        literal("logit_bias", '{"5": 1e999}', VALUE),
        literal("stop_token_ids", "[1e300]", VALUE),
        literal("stop_token_ids", "[1.5]", TYPE),
        literal("prompt", "[5, 1e300]", VALUE),
        literal("prompt", "[5, 1e999]", VALUE),
        literal("stream", "0", TYPE),
        literal("stream", '"true"', TYPE),
        literal("ignore_eos", "1", TYPE),
        literal("skip_special_tokens", '"no"', TYPE),
        literal("include_stop_str_in_output", "[]", TYPE),
        literal("add_special_tokens", "0", TYPE),
        literal("return_token_ids", "{}", TYPE),
    ],
    "token ids that do not exist": [
        completion("prompt", VALUE, prompt=[320]),
        completion("prompt", VALUE, prompt=[[5], [2**31]]),
        completion("prompt", VALUE, prompt=[5, -(2**40)]),
        completion("stop_token_ids", VALUE, stop_token_ids=[-1]),
        completion("stop_token_ids", VALUE, stop_token_ids=[5, 10**9]),
        completion("stop_token_ids", VALUE, stop_token_ids=[2**64]),
        completion("stop_token_ids", TYPE, stop_token_ids=5),
        completion("stop_token_ids", TYPE, stop_token_ids=["5"]),
        completion("logit_bias", VALUE, logit_bias={"320": 1}),
        completion("logit_bias", VALUE, logit_bias={"-1": 1}),
        completion("logit_bias", VALUE, logit_bias={"99999999999999999999": 1}),
        completion("logit_bias", VALUE, logit_bias={"٣": 1}),
        completion("logit_bias", VALUE, logit_bias={"1.0": 1}),
        completion("logit_bias", VALUE, logit_bias={"5": 1, "05": 2}),
        completion("logit_bias", VALUE, logit_bias={"": 1}),
        completion("logit_bias", VALUE, logit_bias={"x" * 100_000: 1}),
        completion("logit_bias", TYPE, logit_bias={"5": "1"}),
        completion("logit_bias", TYPE, logit_bias=[[5, 1]]),
        (DETOKENIZE, {"tokens": [320]}, "tokens", VALUE),
        (DETOKENIZE, {"tokens": [-1]}, "tokens", VALUE),
        (DETOKENIZE, {"tokens": [2**70]}, "tokens", VALUE),
        (DETOKENIZE, {"tokens": [[5]]}, "tokens", TYPE),
        (DETOKENIZE, {"tokens": None}, "tokens", TYPE),
        (DETOKENIZE, {}, "tokens", MISSING),
    ],
    "nothing to answer": [
        completion("prompt", VALUE, prompt=[]),
        completion("prompt", VALUE, prompt=[[]]),
        completion("prompt", VALUE, prompt=[[5], []]),
        completion("prompt", VALUE, prompt="", add_special_tokens=False),
        completion("prompt", VALUE, prompt=["x", ""], add_special_tokens=False),
        completion("prompt", TYPE, prompt=None),
        completion("prompt", TYPE, prompt=[None]),
        completion("prompt_embeds", UNKNOWN, prompt_embeds="AAAA"),
        chat("messages", VALUE, messages=[]),
        chat("messages", TYPE, messages=None),
        chat("messages", TYPE, messages={"role": "user", "content": "x"}),
        (TOKENIZE, {}, "prompt", VALUE),
        (TOKENIZE, {"messages": []}, "messages", VALUE),
        (TOKENIZE, {"prompt": "x", "messages": user("x")}, "prompt", VALUE),
        (TOKENIZE, {"prompt": ["x"]}, "prompt", TYPE),
    ],
    "grammars that cannot be": [
        chat("response_format", None, response_format="json"),
        chat("response_format", None, response_format={"type": "xml"}),
        chat("response_format", None, response_format={"type": "json_schema"}),
        chat("response_format", None, response_format=["json_object"]),
        chat(
            "response_format",
            None,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": 5}},
        ),
        completion("guided_regex", None, guided_regex="("),
        completion("guided_regex", None, guided_regex=5),
        completion("guided_json", None, guided_json={"type": "nonsense"}),
        completion("guided_choice", None, guided_choice=[]),
        completion("guided_grammar", None, guided_grammar="start: ???"),
        completion("structured_outputs", None, structured_outputs={"regex": "["}),
        completion("structured_outputs", None, structured_outputs={"nonsense": 1}),
        completion("guided_json", None, guided_json="x" * 100_000),
        completion("regex", None, regex="("),
        completion("ebnf", None, ebnf="root ::= x"),
        chat("tools", None, tools=[{"type": "function"}]),
        chat("tools", None, tools=[{"type": "retrieval"}]),
        chat("tools", None, tools="all"),
        chat("tools", None, tools=[{"type": "function", "function": {"name": ""}}]),
        chat("tool_choice", None, tool_choice="sometimes"),
        chat("tool_choice", None, tool_choice="required"),
        chat("functions", None, functions=[{"name": "f", "parameters": NESTED}]),
    ],
    "the chat template": [
        chat("chat_template", UNSUPPORTED, chat_template="{{ ''.__class__ }}"),
        chat(
            "chat_template", UNSUPPORTED, chat_template="{% for i in range(10**9) %}x{% endfor %}"
        ),
        chat(
            "chat_template_kwargs.chat_template",
            VALUE,
            chat_template_kwargs={"chat_template": "{{ 7 * 7 }}"},
        ),
        chat("chat_template_kwargs.messages", TYPE, chat_template_kwargs={"messages": []}),
        chat("chat_template_kwargs.tokenize", VALUE, chat_template_kwargs={"tokenize": True}),
        chat("chat_template_kwargs.bos_token", VALUE, chat_template_kwargs={"bos_token": EOT}),
        chat("chat_template_kwargs.tools", TYPE, chat_template_kwargs={"tools": [{}]}),
        chat("chat_template_kwargs.range", VALUE, chat_template_kwargs={"range": "x"}),
        chat("chat_template_kwargs.x", TYPE, chat_template_kwargs={"x": 10**9}),
        chat("chat_template_kwargs.x", TYPE, chat_template_kwargs={"x": NESTED}),
        chat("chat_template_kwargs", TYPE, chat_template_kwargs=[1]),
        chat("chat_template_kwargs", VALUE, chat_template_kwargs={str(n): True for n in range(99)}),
        chat(
            "continue_final_message",
            VALUE,
            add_generation_prompt=True,
            continue_final_message=True,
        ),
        chat("add_generation_prompt", TYPE, add_generation_prompt="no"),
        chat("documents", UNSUPPORTED, documents=[{"title": "x", "text": ROLES}]),
        completion("chat_template", UNSUPPORTED, chat_template="{{ 7 * 7 }}"),
        (TOKENIZE, {"messages": user("x"), "chat_template": "x"}, "chat_template", UNSUPPORTED),
    ],
    "messages": [
        message(".role", VALUE, role=ROLES, content="x"),
        message(".role", VALUE, role="root", content="x"),
        message(".role", TYPE, role=5, content="x"),
        message(".role", TYPE, role=["user"], content="x"),
        message(".role", MISSING, content="x"),
        message(".role", VALUE, role="function", content="x", name="f"),
        message(".content", TYPE, role="user", content=5),
        message(".content", TYPE, role="user", content={"type": "text", "text": "x"}),
        message(".content", TYPE, role="user", content=None),
        message(".content", MISSING, role="system"),
        message(".content[0]", TYPE, role="user", content=["x"]),
        message(".nonsense", UNKNOWN, role="user", content="x", nonsense=1),
        message(".audio", UNSUPPORTED, role="assistant", content="x", audio={"id": "a"}),
        message(
            ".function_call",
            UNSUPPORTED,
            role="assistant",
            content=None,
            function_call={"name": "f", "arguments": "{"},
        ),
    ],
    "files, pictures and sounds": [
        part(VALUE, type="image_url", image_url={"url": "http://192.0.2.1/x.png"}),
        part(VALUE, type="image_url", image_url={"url": "https://[::1]:1/x.png"}),
        part(VALUE, type="image_url", image_url={"url": "file:///etc/passwd"}),
        part(VALUE, type="image_url", image_url={"url": "data:image/png;base64,iVBORw0KGgo="}),
        part(VALUE, type="image_url", image_url="http://169.254.169.254/latest/meta-data"),
        part(VALUE, type="image_url", image_url={"url": "gopher://192.0.2.1:6379/_INFO"}),
        part(VALUE, type="image", image="http://192.0.2.1/x.png"),
        part(VALUE, type="input_image", image_url="http://192.0.2.1/x.png"),
        part(VALUE, type="input_audio", input_audio={"data": "AAAA", "format": "wav"}),
        part(VALUE, type="audio_url", audio_url={"url": "http://192.0.2.1/x.wav"}),
        part(VALUE, type="video_url", video_url={"url": "http://192.0.2.1/x.mp4"}),
        part(VALUE, type="file", file={"file_id": "file-1"}),
        part(VALUE, type="file", file={"file_data": "data:application/pdf;base64,AAAA"}),
        part(VALUE, type="text\x00", text="x"),
        part(TYPE, type=5, text="x"),
        part(MISSING, param="text", type="text", text=None),
        part(MISSING, param="text", type="text"),
        part(MISSING, param="type", text="x"),
        part(UNKNOWN, param="image_url", type="text", text="x", image_url={"url": "file:///x"}),
        chat("modalities", UNSUPPORTED, modalities=["text", "audio"]),
        chat("audio", UNSUPPORTED, audio={"voice": "alloy", "format": "wav"}),
        chat("web_search_options", UNSUPPORTED, web_search_options={}),
    ],
    "what this server does not do": [
        completion("suffix", UNSUPPORTED, suffix="y"),
        completion("store", UNSUPPORTED, store=True),
        completion("use_beam_search", UNSUPPORTED, use_beam_search=True),
        completion("length_penalty", UNSUPPORTED, length_penalty=2),
        completion("lora_path", UNSUPPORTED, lora_path="../adapter"),
        completion("custom_logit_processor", UNSUPPORTED, custom_logit_processor="gASVAAAA"),
        completion("logits_processors", UNSUPPORTED, logits_processors=["os.system"]),
        completion("kv_transfer_params", UNSUPPORTED, kv_transfer_params={"remote_host": "x"}),
        completion("vllm_xargs", UNSUPPORTED, vllm_xargs={"a": 1}),
        chat("moderation", UNSUPPORTED, moderation={"model": "x"}),
        chat("reasoning_effort", UNSUPPORTED, reasoning_effort="high"),
        chat("verbosity", UNSUPPORTED, verbosity="high"),
        chat("service_tier", UNSUPPORTED, service_tier="free"),
        chat("tempreature", UNKNOWN, tempreature=1),
        chat("__proto__", UNKNOWN, __proto__={"stream": True}),
        chat("prompt", UNKNOWN, prompt="x"),
        completion("messages", UNKNOWN, messages=user("x")),
        completion("stream_options", VALUE, stream_options={"include_usage": True}),
        completion("stream_options", TYPE, stream=True, stream_options=True),
        completion(
            "stream_options.include_usage", TYPE, stream=True, stream_options={"include_usage": 1}
        ),
        completion(
            "stream_options.include_obfuscation",
            UNSUPPORTED,
            stream=True,
            stream_options={"include_obfuscation": True},
        ),
        completion("return_tokens_as_token_ids", VALUE, return_tokens_as_token_ids=True),
    ],
    "models": [
        completion("model", TYPE, model=5),
        completion("model", TYPE, model=["tiny"]),
        completion("model", TYPE, model={"id": "tiny"}),
    ],
    "text that is not Unicode": [
        completion(None, VALUE, prompt="\ud800"),
        completion(None, VALUE, prompt=["x", "\udfff"]),
        completion(None, VALUE, stop="\udc00\ud800"),
        completion(None, VALUE, user="\ud800"),
        chat(None, VALUE, messages=user("x\ud83d")),
        (TOKENIZE, {"prompt": "\ud800"}, None, VALUE),
        (COMPLETIONS, b'{"prompt":"\xed\xa0\x80"}', None, JSON),
        (COMPLETIONS, b'{"prompt":"\xff"}', None, JSON),
        (COMPLETIONS, b'{"prompt":"\xc0\x80"}', None, JSON),
        (COMPLETIONS, b'{"prompt":"\xf5\x80\x80\x80"}', None, JSON),
        (COMPLETIONS, '{"prompt":"x"}'.encode("utf-16"), None, JSON),
        (COMPLETIONS, '{"prompt":"x"}'.encode("utf-32"), None, JSON),
    ],
    "what is not JSON": [
        (COMPLETIONS, b"", None, JSON),
        (COMPLETIONS, b" ", None, JSON),
        (COMPLETIONS, b"\x00", None, JSON),
        (COMPLETIONS, b"null", None, TYPE),
        (COMPLETIONS, b"5", None, TYPE),
        (COMPLETIONS, b'"x"', None, TYPE),
        (COMPLETIONS, b"[{}]", None, TYPE),
        (COMPLETIONS, b'{"prompt":"x"', None, JSON),
        (COMPLETIONS, b'{"prompt":"x"}}', None, JSON),
        (COMPLETIONS, b'{"prompt":"x"}{"prompt":"x"}', None, JSON),
        (COMPLETIONS, b'{"prompt":"x",}', None, JSON),
        (COMPLETIONS, b"{'prompt':'x'}", None, JSON),
        (COMPLETIONS, b'{prompt:"x"}', None, JSON),
        (COMPLETIONS, b'{"prompt":"x"} // done', None, JSON),
        (COMPLETIONS, b'{"prompt":"a\nb"}', None, JSON),
        (COMPLETIONS, b'{"prompt":"\\x41"}', None, JSON),
        (COMPLETIONS, b'{"prompt":"x","n":01}', None, JSON),
        (COMPLETIONS, b'{"prompt":"x","n":+1}', None, JSON),
        (COMPLETIONS, b'{"prompt":"x","n":-}', None, JSON),
        (COMPLETIONS, b'{"prompt":"x","temperature":NaN}', None, JSON),
        (COMPLETIONS, b'{"prompt":"x","temperature":Infinity}', None, JSON),
        (COMPLETIONS, b'{"prompt":' + b"[" * 100_000, None, JSON),
        (COMPLETIONS, b'{"a":' * 100_000, None, JSON),
        (CHAT, b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, JSON),
        (CHAT, b"prompt=x&max_tokens=5", None, JSON),
        (CHAT, b"<?xml version='1.0'?><x/>", None, JSON),
    ],
}
