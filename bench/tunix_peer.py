"""tunix, a JAX library with a Llama 3 and a sampler: the JAX peer of `python -m bench peers`.

It generates greedily from the same checkpoint, shapes and prompts. Its sampler runs the whole
generation in one compiled loop. `pip install google-tunix`, into an environment of its own: it
wants other versions of some packages.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class TokenIds:
    """What the sampler takes for a tokenizer: a text is token ids with spaces between them."""

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """The ids."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        """The text."""
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        """No prompt begins with it."""
        return 0

    def eos_id(self) -> int:
        """No vocabulary has it, so every answer has its full length."""
        return 1 << 30

    def pad_id(self) -> int:
        """No prompt has it."""
        return 1


def generator(path: str, rows: list[list[int]], dtype: str) -> Callable[[int], float]:
    """Makes a function that generates so many tokens for each prompt, and returns the seconds.

    The first call with a number of tokens compiles nothing if the sampler has generated before, but
    for the buffer, which has room for prompt and answer: so each call runs twice, and the second
    counts.
    """
    import jax
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.llama3 import model, params

    found = json.loads((Path(path) / "config.json").read_text())
    head_dim = found["hidden_size"] // found["num_attention_heads"]
    config = model.ModelConfig(
        num_layers=found["num_hidden_layers"],
        vocab_size=found["vocab_size"],
        embed_dim=found["hidden_size"],
        hidden_dim=found["intermediate_size"],
        num_heads=found["num_attention_heads"],
        head_dim=head_dim,
        num_kv_heads=found["num_key_value_heads"],
        rope_theta=10_000,
        norm_eps=found["rms_norm_eps"],
        weight_tying=True,
    )
    llama = params.create_model_from_safe_tensors(path, config, dtype=jax.numpy.dtype(dtype))
    room = len(rows[0]) + 128
    cache = CacheConfig(room, config.num_layers, config.num_kv_heads, head_dim)
    sampler = Sampler(llama, TokenIds(), cache)
    texts = [" ".join(map(str, row)) for row in rows]

    def generate(new_tokens: int) -> float:
        for _ in range(2):
            start = time.perf_counter()
            output = sampler(texts, new_tokens, max_prompt_length=len(rows[0]))
            seconds = time.perf_counter() - start
        assert all(len(tokens) == new_tokens for tokens in output.tokens)
        return seconds

    return generate
