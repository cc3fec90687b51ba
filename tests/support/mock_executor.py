"""A device whose tokens can be computed by hand, with pages, slots and a ring like the real one.

It decodes packets as `llama_jax.ring.packet` documents them, keeps tokens in place of keys and
values, and answers each segment with a hash of what it *finds in the pages* of its sequence. So a
page that is lost, shared or read too early changes tokens, as on the device. `generate` gives the
correct tokens. A segment with a mask gets one of the tokens that it allows, by the same hash.
"""

import zlib
from collections import deque
from dataclasses import dataclass

import numpy as np

from llama_jax.engine.programs import GREEDY, Choice, TickResult
from llama_jax.ring.sizes import Bucket, RingSizes

VOCAB_SIZE = 50
POISON = VOCAB_SIZE  # a prompt with this token yields NaN
GARBAGE = -7


@dataclass
class Run:
    """A segment as the device sees it. `tokens` are those of a tile; None for a row."""

    slot: int
    position: int
    length: int
    pages: list[int]
    tokens: list[int] | None


def read_packet(
    sizes: RingSizes, bucket: Bucket, packed: np.ndarray
) -> tuple[list[Run], list[Run]]:
    """Decodes the rows and tiles of a packet, including segments of length 0."""
    words = packed.tolist()
    width = 3 + sizes.pages_per_sequence
    num_tiles = bucket.chunk // sizes.tile
    prompt = words[(bucket.rows + num_tiles) * width :]
    assert len(prompt) == bucket.chunk
    runs = []
    for i in range(bucket.rows + num_tiles):
        slot, position, length, *pages = words[i * width : (i + 1) * width]
        tile = i - bucket.rows
        tokens = prompt[tile * sizes.tile :][:length] if tile >= 0 else None
        runs.append(Run(slot, position, length, pages, tokens))
    return runs[: bucket.rows], runs[bucket.rows :]


def next_token(
    history: list[int], seed: int | None = None, allowed: list[int] | None = None
) -> int:
    """The next token: the greedy one, or a random one if there is a seed.

    Args:
      history: the tokens before.
      seed: of the request.
      allowed: the tokens to choose from, in ascending order; None for all.
    """
    if POISON in history:
        return -1
    found = zlib.crc32(np.array(history, np.int32).tobytes())
    if seed is not None:
        found = _draw(found, np.array([seed % 2**64], np.uint64).view(np.int32), len(history))
    return choose(found, allowed)


def choose(found: int, allowed: list[int] | None = None) -> int:
    """The token that a hash stands for."""
    return found % VOCAB_SIZE if allowed is None else allowed[found % len(allowed)]


def allowed_tokens(mask: np.ndarray) -> list[int]:
    """The tokens of a mask, `[V / 32]` int32."""
    words = mask.tolist()
    return [token for token in range(VOCAB_SIZE) if words[token // 32] >> (token % 32) & 1]


def generate(prompt: list[int], max_length: int, stop_ids=frozenset(), seed=None):
    """The answer to a request, computed sequentially, and its finish reason."""
    tokens = list(prompt)
    while len(tokens) < max_length:
        token = next_token(tokens, seed)
        if token < 0:
            return tokens[len(prompt) :], "error"
        tokens.append(token)
        if token in stop_ids:
            return tokens[len(prompt) :], "stop"
    return tokens[len(prompt) :], "length"


def _draw(found: int, seed_words: np.ndarray, index: int) -> int:
    return zlib.crc32(np.array([*seed_words, index], np.int32).tobytes(), found)


class MockExecutor:
    """Stands in for `llama_jax.engine.executor.Executor`.

    Attributes:
      buckets: the bucket of each tick so far.
    """

    def __init__(self, sizes: RingSizes, num_stages: int):
        self.sizes = sizes
        self.call_seconds = 0.0
        self.buckets: list[Bucket] = []
        self._pages = np.full((sizes.num_pages, sizes.page_size), GARBAGE, np.int32)
        self._slots = [GARBAGE] * sizes.num_slots  # the last token of each
        # For each packet in flight, of its rows and of its tiles: (slot, hash or -1 for NaN).
        empty: list[tuple[int, int]] = []
        self._ring = deque([(empty, empty)] * num_stages, maxlen=num_stages)

    def run(self, bucket: Bucket, packed: np.ndarray, choice: Choice = GREEDY) -> TickResult:
        controls = choice.controls
        self.buckets.append(bucket)
        self._ring.append(self._enter(*read_packet(self.sizes, bucket, packed)))
        for rows, tiles in self._ring:
            assert len(rows) <= bucket.rows, "rows that this program does not run"
            assert len(tiles) * self.sizes.tile <= bucket.chunk, "tiles that it does not run"
        rows, tiles = self._ring[0]
        masks = {i: allowed_tokens(mask) for i, mask in choice.masks or ()}
        tokens = np.full(self.sizes.num_segments(bucket), GARBAGE, np.int32)
        for i, (slot, found) in [*enumerate(rows), *enumerate(tiles, bucket.rows)]:
            if controls is not None and controls[i, 4]:  # the temperature, as bits of a float
                found = found if found < 0 else _draw(found, controls[i, :2], controls[i, 2])
            tokens[i] = found if found < 0 else choose(found, masks.get(i))
            if slot < self.sizes.num_slots:
                self._slots[slot] = int(tokens[i])
        return TickResult(tokens, np.empty(0), bucket)  # type: ignore[arg-type]

    def _enter(self, rows: list[Run], tiles: list[Run]):
        used_rows = [run for run in rows if run.length]
        used_tiles = [run for run in tiles if run.length]
        assert rows[: len(used_rows)] == used_rows and tiles[: len(used_tiles)] == used_tiles
        for run in [*used_rows, *used_tiles]:  # all write before any reads, as in a layer
            tokens = [self._slots[run.slot]] if run.tokens is None else run.tokens
            assert len(tokens) == run.length
            for position, token in enumerate(tokens, run.position):
                page, offset = divmod(position, self.sizes.page_size)
                self._pages[run.pages[page], offset] = token
        return [(r.slot, self._answer(r)) for r in used_rows], [
            (r.slot, self._answer(r)) for r in used_tiles
        ]

    def _answer(self, run: Run) -> int:
        length = run.position + run.length
        held = run.pages[: -(-length // self.sizes.page_size)]
        history = self._pages[held].ravel()[:length]
        return -1 if POISON in history else zlib.crc32(history.tobytes())
