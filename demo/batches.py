"""Turns dialogues into training batches: tokens, loss mask, and packing into rows.

Dialogues have 25 to 250 tokens. Several are packed into one row, so that few tokens are padding.
A mask hides the dialogues of a row from each other, and positions start at 0 in each, so a packed
dialogue is computed exactly as it would be alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from demo.corpus import Corpus, Message
from demo.tokenizer import BOS, END_HEADER, EOT, PAD, START_HEADER

IGNORE = -100  # label of a token that has no loss


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens: packed dialogues."""

    tokens: torch.Tensor  # [B, T] int64
    labels: torch.Tensor  # [B, T] int64: the token to predict at each position, or IGNORE
    positions: torch.Tensor  # [B, T] int64, from 0 in each dialogue
    visible: torch.Tensor  # [B, 1, T, T] bool: query (row) may look at key (column)


def encode(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Returns the token ids of a dialogue, and for each whether the assistant says it.

    The ids equal those of the chat template (a test checks this). They are built message by
    message, because the loss needs to know which tokens are the assistant's.
    """
    bos, start, end, eot = (tokenizer.token_to_id(t) for t in (BOS, START_HEADER, END_HEADER, EOT))

    def plain(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    ids, spoken = [bos], [False]
    for message in messages:
        header = [start, *plain(message["role"]), end, *plain("\n\n")]
        content = [*plain(message["content"].strip()), eot]
        ids += header + content
        spoken += [False] * len(header) + [message["role"] == "assistant"] * len(content)
    return ids, spoken


def pack(
    dialogues: list[tuple[list[int], list[bool]]], rows: int, length: int, pad: int
) -> tuple[Batch, int]:
    """Packs encoded dialogues into `rows` rows, first fit; also returns how many were placed."""
    tokens = torch.full((rows, length), pad)
    labels = torch.full((rows, length), IGNORE)
    positions = torch.zeros((rows, length), dtype=torch.long)
    owner = torch.full((rows, length), -1)  # which dialogue a token belongs to; -1: padding
    used = [0] * rows
    placed = 0
    for number, (ids, spoken) in enumerate(dialogues):
        row = next((r for r in range(rows) if used[r] + len(ids) <= length), None)
        if row is None:
            continue
        here = slice(used[row], used[row] + len(ids))
        tokens[row, here] = torch.tensor(ids)
        # The label of a position is the next token, if the assistant says it.
        next_label = [t if s else IGNORE for t, s in zip(ids[1:], spoken[1:], strict=True)]
        labels[row, here] = torch.tensor([*next_label, IGNORE])
        positions[row, here] = torch.arange(len(ids))
        owner[row, here] = number
        used[row] += len(ids)
        placed += 1
    same = owner[:, :, None] == owner[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return Batch(tokens, labels, positions, (same & causal)[:, None]), placed


def batch(tokenizer: Tokenizer, seed: int, step: int, rows: int, length: int) -> Batch:
    """The batch of one step. It depends on seed and step alone, so a resumed run repeats it.

    Rows of 128 tokens hold short dialogues; longer rows hold dialogues of up to six turns.
    """
    corpus = Corpus(f"{seed}/{step}")
    dialogues: list[tuple[list[int], list[bool]]] = []
    total = 0
    while total < 1.3 * rows * length:  # somewhat more than fits, to fill the gaps
        ids, spoken = encode(tokenizer, corpus.dialogue(max_turns=2 if length <= 128 else 6))
        if len(ids) <= length:
            dialogues.append((ids, spoken))
            total += len(ids)
    return pack(dialogues, rows, length, tokenizer.token_to_id(PAD))[0]
