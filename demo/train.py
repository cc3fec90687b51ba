"""Train the demo checkpoint and write it in the Hugging Face layout.

    python demo/train.py --work /somewhere/demo --out demo/checkpoint --compile

Training uses `LlamaForCausalLM` of transformers, on PyTorch. The checkpoint therefore comes from
the reference implementation and not from the engine that it demonstrates, so a right answer from
the engine says something about the engine.

A stopped run resumes from the last state in `--work` when it is started again. `corpus.py`
generates the text; nothing is downloaded. A step takes half a second on 2 CPU cores, or a second
and a half without `--compile`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file runs as a script

from demo.batches import IGNORE, Batch, batch, encode
from demo.corpus import SUM_QUESTIONS, Corpus, held_out_pairs, sum_answer
from demo.tokenizer import BOS, EOM, EOS, EOT, PAD, save_tokenizer, train_tokenizer

MAX_LENGTH = 1024  # positions
# Every fourth step has long rows, for dialogues of many turns: (rows, tokens per row).
SHORT_ROWS, LONG_ROWS = (16, 128), (8, 256)


@dataclass(frozen=True)
class Plan:
    """How to train. Progress runs from 0 to 1 over `steps`, or over `minutes` if given."""

    minutes: float | None = None
    steps: int = 2400
    peak_rate: float = 1.5e-3
    warmup_steps: int = 100
    seed: int = 0
    short_rows: tuple[int, int] = SHORT_ROWS
    long_rows: tuple[int, int] = LONG_ROWS

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is done after `step` steps and `seconds` of training."""
        return min(1.0, seconds / (60 * self.minutes) if self.minutes else step / self.steps)

    def rate(self, step: int, seconds: float) -> float:
        """Returns the learning rate: linear warm-up, then a cosine down to 1/50 of the peak."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress(step, seconds)))
        return self.peak_rate * min(1.0, (step + 1) / self.warmup_steps) * (0.02 + 0.98 * cosine)


def demo_config(tokenizer: Tokenizer) -> LlamaConfig:
    """A Llama 3 of 4 M parameters, with eight layers and four KV heads to fit a 4 x 2 mesh."""
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_theta": 500000.0,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=[tokenizer.token_to_id(t) for t in (EOS, EOM, EOT)],
        pad_token_id=tokenizer.token_to_id(PAD),
        attention_bias=False,
        mlp_bias=False,
    )


def demo_tokenizer(seed: int = 0, dialogues: int = 20_000) -> Tokenizer:
    """Trains the tokenizer on the messages of `dialogues` dialogues of the corpus."""
    corpus = Corpus(f"tokenizer/{seed}")
    messages = [m for _ in range(dialogues) for m in corpus.dialogue()]
    return train_tokenizer(f"{m['role']}\n\n{m['content']}" for m in messages)


def kept_tokenizer(path: Path) -> Tokenizer:
    """The run's tokenizer, trained once: a resumed run must not see its token ids change."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        demo_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))


def loss_of(model: LlamaForCausalLM, body: torch.nn.Module, data: Batch) -> torch.Tensor:
    """Mean cross-entropy over the assistant's tokens; only their logits are computed."""
    hidden = body(
        input_ids=data.tokens,
        attention_mask=data.visible,
        position_ids=data.positions,
        use_cache=False,
    ).last_hidden_state
    counted = data.labels != IGNORE
    return F.cross_entropy(model.lm_head(hidden[counted]), data.labels[counted])


class Trainer:
    """The model, its optimizer, and the state that is needed to stop and resume."""

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: Tokenizer, plan: Plan, compiled: bool = False
    ) -> None:
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        self.body = torch.compile(model.model, dynamic=False) if compiled else model.model
        # Norm weights (one dimension) are not decayed.
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
        self.step, self.seconds, self.tokens = 0, 0.0, 0

    def train_step(self) -> float:
        """Trains on the batch of this step; returns the loss (nats per assistant token)."""
        began = time.monotonic()
        plan = self.plan
        rows, length = plan.long_rows if self.step % 4 == 3 else plan.short_rows
        data = batch(self.tokenizer, plan.seed, self.step, rows, length)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(self.step, self.seconds)
        loss = loss_of(self.model, self.body, data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += rows * length
        self.seconds += time.monotonic() - began
        return loss.item()

    def save(self, path: Path) -> None:
        """Writes the state atomically: a kill in the middle leaves the old one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.step, self.seconds, self.tokens),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Restores a saved state."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.tokens = state["progress"]


@torch.no_grad()
def held_out_accuracy(model: LlamaForCausalLM, tokenizer: Tokenizer, count: int = 200) -> float:
    """Share of held-out sums answered right by greedy decoding, in one forward pass.

    Greedy decoding gives the right answer exactly if each of its tokens is the most likely one
    after the right prefix. `evaluate.py` runs the actual decoding, with `generate`.
    """
    pairs = held_out_pairs()
    right = 0
    for i in range(count):
        a, b = pairs[i * 7919 % len(pairs)]
        question = SUM_QUESTIONS[i % len(SUM_QUESTIONS)].format(a=a, b=b)
        ids, spoken = encode(
            tokenizer,
            [
                {"role": "user", "content": question},
                {"role": "assistant", "content": sum_answer(a, b)},
            ],
        )
        best = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        right += all(best[k - 1] == ids[k] for k in range(len(ids)) if spoken[k])
    return right / count


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the checkpoint in bfloat16; the model in training stays float32."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    copy.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, out, MAX_LENGTH)


def main() -> None:
    """Trains for the given time or number of steps, logging and exporting along the way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=Plan.steps, help="steps to train")
    parser.add_argument("--minutes", type=float, help="minutes to train, instead of steps")
    parser.add_argument("--rate", type=float, default=Plan.peak_rate, help="peak learning rate")
    parser.add_argument("--work", type=Path, default=Path("demo-work"), help="where state is saved")
    parser.add_argument(
        "--out", type=Path, default=Path("demo/checkpoint"), help="checkpoint to write"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    plan = Plan(minutes=args.minutes, steps=args.steps, peak_rate=args.rate)
    torch.manual_seed(plan.seed)
    tokenizer = kept_tokenizer(args.work / "tokenizer.json")
    trainer = Trainer(LlamaForCausalLM(demo_config(tokenizer)), tokenizer, plan, args.compile)
    state, log = args.work / "state.pt", args.work / "log.jsonl"
    if state.exists():
        trainer.resume(state)
        print(f"resumed at step {trainer.step}")
    print(f"{trainer.model.num_parameters():,} parameters")

    losses: list[float] = []
    saved = exported = time.monotonic()
    while plan.progress(trainer.step, trainer.seconds) < 1:
        losses.append(trainer.train_step())
        if len(losses) == 25:
            row = {
                "step": trainer.step,
                "loss": round(sum(losses) / len(losses), 4),
                "minutes": round(trainer.seconds / 60, 2),
                "tokens": trainer.tokens,
            }
            losses.clear()
            if trainer.step % 250 == 0:
                row["held_out"] = held_out_accuracy(trainer.model, tokenizer, 100)
            print(json.dumps(row), flush=True)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if time.monotonic() - saved > 60:
            trainer.save(state)
            saved = time.monotonic()
        if time.monotonic() - exported > 240:
            export(trainer.model, tokenizer, args.out)
            exported = time.monotonic()
    trainer.save(state)
    export(trainer.model, tokenizer, args.out)
    print(
        f"{trainer.step} steps, {trainer.tokens:,} tokens, {trainer.seconds / 60:.1f} minutes; "
        f"held-out accuracy {held_out_accuracy(trainer.model, tokenizer, 500):.3f}"
    )


if __name__ == "__main__":
    main()
