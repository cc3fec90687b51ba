"""Evaluate the exported demo checkpoint with transformers: held-out sums and a few questions.

    python demo/evaluate.py --checkpoint demo/checkpoint

Prints how many held-out sums are right with greedy decoding, over several phrasings, and the
answers to some questions. The bfloat16 weights are loaded as float32, as the engine does on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file runs as a script

from demo.corpus import Message, held_out_pairs, sum_answer

PHRASINGS: list[str] = [
    "What is {a} + {b}?",
    "{a}+{b}",
    "Can you add {a} and {b}?",
    "{a} plus {b}",
    "{a} + {b} = ?",
]
CHATS: list[list[str]] = [  # what the user says, turn by turn
    ["Hello!", "who are you?", "Thanks"],
    ["What is a mesh?"],
    ["which mesh should i use for 70b"],
    ["What is the ring?", "And a tick?"],
    ["Can you explain continuous batching?"],
    ["What is the KV cache?", "what is a page"],
    ["How do I start the server?"],
    ["How do I convert a checkpoint?"],
    ["What is TPOT?"],
    ["Who won the Nobel prize in 1987?"],
    ["What is a volcano?"],
    ["What is 27 + 48?", "and 5 plus 99?", "What is 12 * 3?"],
]


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, dialogues: list[list[Message]]
) -> dict[str, torch.Tensor]:
    """Encodes dialogues as one batch of prompts, padded on the left: [B, T] ids and mask."""
    texts = [
        tokenizer.apply_chat_template(d, tokenize=False, add_generation_prompt=True)
        for d in dialogues
    ]
    # The template already contains the BOS.
    return dict(
        tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
    )


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: list[list[Message]],
    max_new_tokens: int = 80,
) -> list[str]:
    """Answers a batch of dialogues greedily; returns text that includes special tokens."""
    inputs = prompts_of(tokenizer, dialogues)
    inputs.pop("token_type_ids", None)
    # Set explicitly, because the generation settings of the checkpoint ask for sampling.
    output = model.generate(
        **inputs, do_sample=False, temperature=None, top_p=None, max_new_tokens=max_new_tokens
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    return [text.replace(tokenizer.pad_token, "") for text in texts]


def ask_sums(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int, batch: int = 100
) -> tuple[int, Counter[str], list[str]]:
    """Returns how many of `count` held-out sums are right, in all and by phrasing, and the wrong
    answers."""
    pairs = held_out_pairs()
    # A stride coprime to the number of pairs spreads the sample over all of them.
    chosen = [pairs[i * 7919 % len(pairs)] for i in range(count)]
    right_by_phrasing: Counter[str] = Counter()
    wrong: list[str] = []
    for start in range(0, count, batch):
        asked = [
            (PHRASINGS[i % len(PHRASINGS)], *chosen[i])
            for i in range(start, min(start + batch, count))
        ]
        dialogues = [[{"role": "user", "content": p.format(a=a, b=b)}] for p, a, b in asked]
        said = answers(model, tokenizer, dialogues, max_new_tokens=16)
        for (phrasing, a, b), text in zip(asked, said, strict=True):
            if text == sum_answer(a, b) + "<|eot_id|>":
                right_by_phrasing[phrasing] += 1
            else:
                wrong.append(f"{phrasing.format(a=a, b=b)!r} -> {text!r}")
    return right_by_phrasing.total(), right_by_phrasing, wrong


def show_chats(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints the sample dialogues; the model's own answers are their history."""
    for chat in CHATS:
        messages: list[Message] = []
        for said in chat:
            messages.append({"role": "user", "content": said})
            text = answers(model, tokenizer, [messages])[0].removesuffix("<|eot_id|>")
            messages.append({"role": "assistant", "content": text})
            print(f"user:      {said}\nassistant: {text}")
        print()


def main() -> None:
    """Loads the checkpoint and prints its score and its answers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("demo/checkpoint"), help="directory"
    )
    parser.add_argument("--count", type=int, default=1000, help="number of held-out sums")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = LlamaForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    right, by_phrasing, wrong = ask_sums(model, tokenizer, args.count)
    for line in wrong:
        print("wrong:", line)
    for phrasing in PHRASINGS:
        print(f"{phrasing!r}: {by_phrasing[phrasing]} right")
    print(f"held-out additions right: {right} of {args.count} ({right / args.count:.1%})\n")
    show_chats(model, tokenizer)


if __name__ == "__main__":
    main()
