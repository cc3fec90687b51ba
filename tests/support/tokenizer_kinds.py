"""Small tokenizers of the kinds that checkpoints come with, each in a directory of its own."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, processors

from demo.tokenizer import BOS, CHAT_TEMPLATE, EOT, train_tokenizer
from tests.support.tiny_tokenizer import TEXT

SETTINGS = {"bos_token": BOS, "eos_token": EOT, "tokenizer_class": "PreTrainedTokenizerFast"}

LLAMA_3_1 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# The same with tools: they stand in the first message, a message has one call and no text beside
# it, and results are quoted.
LLAMA_3_1_TOOLS = """
{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{%- endif %}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with a call of a function.\\n\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- rest[0]['content'] | trim + "<|eot_id|>" }}
    {%- set rest = rest[1:] %}
{%- endif %}
{%- for message in rest %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception("One call.") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == 'tool' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {{- message.content | tojson }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Raises unless roles alternate, and writes the system message into the last question.
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in turns %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Roles must alternate') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system is defined %}"
    "{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
# Marks what the assistant writes, for training, and leaves out its earlier reasoning.
REASONING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% generation %}<|Assistant|>"
    "{{ message['content'].split('</think>')[-1] }}<|eot_id|>{% endgeneration %}"
    "{% else %}<|User|>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
_PART = "{% for part in message['content'] %}{{ part['text'] | trim }}{% endfor %}"
PARTS = CHATML.replace("message['content']", "message_text").replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% set message_text %}" + _PART + "{% endset %}",
)
# As for models that see images: only a question may hold any.
_TEXT = "{% else %}{{ message['content'] }}{% endif %}"
PARTS_OF_USER = PARTS.replace(_PART, "{% if message['role'] == 'user' %}" + _PART + _TEXT)


@functools.cache
def _trained() -> str:
    return train_tokenizer(TEXT * 3, vocabulary=300).to_str()


def write_tokenizer(
    folder: Path,
    *,
    added: Sequence[str | AddedToken] = (),
    special: Sequence[str | AddedToken] = (),
    bos: bool = True,
    normalizer: normalizers.Normalizer | None = None,
    settings: dict[str, Any] | None = SETTINGS,
    template: Any = None,
    **files: Any,
) -> Path:
    """Writes tokenizer.json and the files beside it, and returns `folder`.

    Args:
      folder: created if it does not exist.
      added: tokens to add that are not special.
      special: tokens to add that are.
      bos: whether the post-processor adds BOS to a prompt.
      normalizer: of the tokenizer.
      settings: the contents of tokenizer_config.json; None for no such file.
      template: the chat template in `settings`.
      files: contents of more files, by their name with `_` for the dot: text, or JSON.
    """
    tokenizer = Tokenizer.from_str(_trained())
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if not bos:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings is not None:
        if template is not None:
            settings = settings | {"chat_template": template}
        files = files | {"tokenizer_config_json": settings}
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / ".".join(name.rsplit("_", 1))).write_text(text, encoding="utf-8")
    return folder


IM_START, IM_END = "<|im_start|>", "<|im_end|>"
_CHATML_SETTINGS = SETTINGS | {"eos_token": IM_END}
_FLAGS = dict(
    special=[
        AddedToken("<l>", lstrip=True, normalized=False),
        AddedToken("<r>", rstrip=True, normalized=False),
        AddedToken("<w>", single_word=True, normalized=False),
    ],
    added=["ä", "đ", "đđ", AddedToken("für", single_word=True), AddedToken("<N>", normalized=True)],
)

# Arguments of `write_tokenizer`.
KINDS: dict[str, dict[str, Any]] = {
    "llama 3": dict(template=CHAT_TEMPLATE),
    "llama 3.1": dict(template=LLAMA_3_1),
    "only tokenizer.json": dict(settings=None),
    "template in a file": dict(chat_template_jinja=CHAT_TEMPLATE),
    "template without bos_token": dict(settings=None, chat_template_jinja=CHAT_TEMPLATE),
    "template in a file, no settings": dict(settings=None, chat_template_jinja=LLAMA_3_1),
    "named templates": dict(
        template=[
            {"name": "default", "template": CHATML},
            {"name": "tool_use", "template": "{{ raise_exception('tools') }}"},
        ]
    ),
    "no post-processor": dict(bos=False, template=CHAT_TEMPLATE),
    "add_bos_token": dict(bos=False, settings=SETTINGS | {"add_bos_token": True}),
    "no add_bos_token": dict(settings=SETTINGS | {"add_bos_token": False}, template=CHATML),
    "special_tokens_map.json": dict(
        settings={"tokenizer_class": "LlamaTokenizer"},
        template=CHATML,
        special_tokens_map_json={"bos_token": BOS, "eos_token": {"content": IM_END}},
        special=[IM_END],
    ),
    "chatml": dict(special=[IM_START, IM_END], settings=_CHATML_SETTINGS, template=CHATML),
    "chatml, not special": dict(added=[IM_START, IM_END], template=CHATML),
    "mistral": dict(special=["[INST]", "[/INST]"], template=MISTRAL),
    "reasoning": dict(
        added=["<|User|>", "<|Assistant|>", "<think>", "</think>"], template=REASONING
    ),
    "flags": dict(**_FLAGS, template=CHATML),
    "flags, normalizer": dict(**_FLAGS, normalizer=normalizers.Lowercase(), template=CHAT_TEMPLATE),
    "normalizer": dict(normalizer=normalizers.NFC(), template=CHAT_TEMPLATE),
}
