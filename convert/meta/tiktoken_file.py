"""Reads `tokenizer.model` of Llama 3, which is in tiktoken's format, and names the special tokens.

Each line is a token's bytes in base64, a space, and its rank, which is both its id and the priority
of its merge. Special tokens are not in the file but in Meta's program. Their names here are those
of the Hugging Face tokenizer of each version.
"""

import base64
from pathlib import Path

from llama_jax.checkpoint.directory import refuse_lfs_pointer
from llama_jax.checkpoint.reader import CheckpointError

TOKENIZER = "tokenizer.model"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
EOM, EOT = "<|eom_id|>", "<|eot_id|>"
NUM_SPECIAL = 256
_NAMED = {0: BOS, 1: EOS, 6: START_HEADER, 7: END_HEADER, 9: EOT}
_NAMED_SINCE_3_1 = _NAMED | {4: "<|finetune_right_pad_id|>", 8: EOM, 10: "<|python_tag|>"}
_MAX_BYTES = 64 << 20


def read_tokens(file: Path) -> list[bytes]:
    """Returns the bytes of every token by id; every single byte is a token.

    Raises:
      CheckpointError: the file is missing, damaged, or in another format.
    """
    try:
        refuse_lfs_pointer(file)
        if file.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{file} is too large to be a Llama 3 tokenizer.")
        data = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"There is no {file}, which is part of every Llama 3 release: copy it there."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from None
    if data.startswith(b"\n") and b"<unk>" in data[:64]:
        raise CheckpointError(
            f"{file} is a SentencePiece tokenizer, as in Llama 2: only Llama 3 and later can be "
            "converted."
        )
    lines = data.splitlines()
    tokens = {}
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            tokens[int(rank)] = base64.b64decode(token, validate=True)
        except ValueError:
            raise CheckpointError(
                f"{file} is damaged or not in tiktoken's format: line {number} is not a token in "
                "base64 and its rank."
            ) from None
    in_order = [tokens[rank] for rank in sorted(tokens)]
    distinct = set(in_order)
    in_ranks = sorted(tokens) == list(range(len(lines))) and len(distinct) == len(lines)
    if not in_ranks or any(bytes([byte]) not in distinct for byte in range(256)):
        raise CheckpointError(
            f"{file} is damaged: its ranks must count from 0, its tokens must be distinct, and all "
            "256 single bytes must be tokens; copy it again."
        )
    return in_order


def special_tokens(extended: bool) -> list[str]:
    """Returns the names of the special tokens, whose ids follow those of the other tokens.

    Args:
      extended: whether the model is Llama 3.1 or later.
    """
    named = _NAMED_SINCE_3_1 if extended else _NAMED
    reserved = iter(range(NUM_SPECIAL))
    return [
        named.get(index) or f"<|reserved_special_token_{next(reserved)}|>"
        for index in range(NUM_SPECIAL)
    ]


def eos_token_ids(num_tokens: int, extended: bool) -> tuple[int, ...]:
    """Returns the EOS ids: end of text, end of message (since 3.1), and end of turn."""
    names = special_tokens(extended)
    return tuple(num_tokens + names.index(name) for name in (EOS, EOM, EOT) if name in names)
