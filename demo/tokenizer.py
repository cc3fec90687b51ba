"""The demo tokenizer: byte-level BPE as in Llama 3, except that every digit is its own token.

Llama 3 groups up to three digits into one token (`\\p{N}{1,3}`). A vocabulary of about 1,800
tokens has no room for a thousand numbers, and a model this small adds best digit by digit, so the
pre-tokenizer here has `\\p{N}`. Everything else is as in Llama 3: the other branches of the
regular expression, the full byte alphabet (any UTF-8 text round-trips), the special tokens, the
post-processor that adds `<|begin_of_text|>`, and the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 1800  # BPE tokens, including the 256 bytes but not the special tokens
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
EOM, EOT = "<|eom_id|>", "<|eot_id|>"
PAD = "<|finetune_right_pad_id|>"
SPECIAL_TOKENS: list[str] = [
    BOS,
    EOS,
    START_HEADER,
    END_HEADER,
    EOT,
    EOM,
    "<|python_tag|>",
    PAD,
    *(f"<|reserved_special_token_{i}|>" for i in range(5)),
]

PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Tools, their calls and results as in Llama 3.1, in fewer words: the context is short.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}"
    "<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n\nFunctions:\n"
    "{% for tool in tools %}{{ tool['function'] | tojson }}\n{% endfor %}"
    "<|eot_id|>"
    "{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + message['content'] | trim }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '{\"name\": \"' + call['function']['name'] + '\", \"parameters\": ' }}"
    "{{ call['function']['arguments'] | tojson + '}' + ('' if loop.last else '; ') }}"
    "{% endfor %}"
    "<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Trains the BPE merges on `texts`; the special tokens get the ids after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json (with the chat template) to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
