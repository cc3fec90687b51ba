"""Compares the attention that this platform chooses with float64 on the host.

Sequences have lengths around the borders of pages and blocks. Their keys and values are written as
the ring writes them: chunk by chunk, in tiles, into a pool that is otherwise full of NaN, with
garbage in the entries of the page tables that no token needs. So every tile of every sequence is
compared, and then a decode row for each of them, beside rows that are empty.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from bench.attention_program import Attention, attention_program
from bench.one_device import PAGE_SIZE
from bench.result import Row, Target
from llama_jax.config import LlamaConfig
from llama_jax.model.kv_storage import KV_DTYPES
from llama_jax.ring.kv_cache import cache_shapes, init_cache
from llama_jax.ring.packet import encode_packet
from llama_jax.ring.sizes import TILE, Bucket, RingSizes
from sharding.mesh import make_mesh

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 513, 1023, 1024, 1025, 1600, 2049)
SMALL_LENGTHS = (1, 17, 64, 130)
TILES = 4  # in a chunk
EMPTY_ROWS = 2
# KV cache dtype → the greatest norm of the error, as a share of the norm of the reference. In 8
# bits it is the rounding of the keys and values that counts.
TOLERANCES = {"bf16": 0.01, "int8": 0.02, "fp8": 0.08}
RUNS = 20


class Sequences(NamedTuple):
    """The inputs: for each sequence, q `[T, H, h]` and k, v `[T, K, h]`, bfloat16."""

    q: list[np.ndarray]
    k: list[np.ndarray]
    v: list[np.ndarray]


def check(
    config: LlamaConfig, kinds: Iterable[str], small: bool
) -> Iterator[tuple[list[Row], list[Target]]]:
    """Checks attention with the heads of a config; yields the rows and targets of each kind.

    Args:
      config: the model.
      kinds: dtypes of the KV cache, keys of `TOLERANCES`.
      small: whether to take few short sequences.
    """
    config = replace(config, num_layers=1)
    sequences = random_sequences(config, SMALL_LENGTHS if small else LENGTHS)
    # Once for all kinds: at full size, it takes seconds in which the GPU waits.
    expected = [reference(q, k, v) for q, k, v in zip(*sequences, strict=True)]
    for kind in kinds:
        yield check_kind(config, kind, sequences, expected)


def check_kind(
    config: LlamaConfig, kind: str, sequences: Sequences, expected: list[np.ndarray]
) -> tuple[list[Row], list[Target]]:
    """The rows and targets of one dtype of the KV cache, given what `reference` expects."""
    programs: dict[Bucket, Attention] = {}
    tiles, rows, changed = attend(config, kind, sequences, programs, seed=0)
    again = attend(config, kind, sequences, programs, seed=1)
    moved = count_different((tiles, rows), again[:2])
    empty, limit = rows[len(expected) :], TOLERANCES[kind]
    errors = {
        "tiles": max(map(relative_error, tiles, expected)),
        "decode rows": max(relative_error(r, e[-1]) for r, e in zip(rows, expected, strict=False)),
    }
    found: list[Row] = [
        {"kv_cache": kind, "compared with float64": name, "error": error, "limit": limit}
        for name, error in errors.items()
    ]
    counts = {
        f"of {RUNS} runs, those that differ in a bit": changed + again[2],
        "sequences that differ in a bit when they lie in other pages": moved,
        "empty rows that are not zero": int(sum(np.any(row != 0) for row in empty)),
    }
    found += [{"kv_cache": kind, "what": what, "count": count} for what, count in counts.items()]
    targets = [Target(f"{kind}: error of {n}", e, limit, "max") for n, e in errors.items()]
    return found, targets + [Target(f"{kind}: {n}", c, 0, "max") for n, c in counts.items()]


def random_sequences(config: LlamaConfig, lengths: Sequence[int]) -> Sequences:
    """Normal random numbers, rounded to bfloat16."""
    rng = np.random.default_rng(0)

    def draw(heads: int) -> list[np.ndarray]:
        shapes = [(length, heads, config.head_dim) for length in lengths]
        return [
            rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for shape in shapes
        ]

    return Sequences(draw(config.num_heads), *(draw(config.num_kv_heads) for _ in range(2)))


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of one sequence in float64: `[T, H, h]`."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.empty_like(q)
    group = q.shape[1] // k.shape[1]
    future = np.triu(np.ones((len(q), len(q)), bool), 1)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(q.shape[2])
        scores[future] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights @ v[:, head // group] / weights.sum(axis=1, keepdims=True)
    return out


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over that of the expected values; infinite instead of NaN."""
    error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)
    return float(error) if np.isfinite(error) else float("inf")


def count_different(one: Any, other: Any) -> int:
    """The number of arrays whose bits differ."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum(a.tobytes() != b.tobytes() for a, b in pairs)


def attend(
    config: LlamaConfig,
    kind: str,
    sequences: Sequences,
    programs: dict[Bucket, Attention],
    seed: int,
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Runs all tiles of all sequences, and then a decode row for each and some empty rows.

    Args:
      config: the model, with one layer.
      kind: dtype of the KV cache.
      sequences: the inputs.
      programs: of earlier calls, so that none compiles twice.
      seed: of the places of the pages.

    Returns:
      The outputs of the tiles by sequence `[T, H, h]`, those of the rows `[H, h]`, and how many of
      `RUNS` runs of the last chunk and of the rows gave other bits.
    """
    lengths = list(map(len, sequences.q))
    rows = Bucket(len(lengths) + EMPTY_ROWS, 0)
    sizes, tables = layout(lengths, seed)
    shapes = cache_shapes(config, make_mesh("1x1"), sizes.num_pages, PAGE_SIZE, KV_DTYPES[kind])
    cache = init_cache(shapes, float("nan"))
    chunk_sizes, chunk = replace(sizes, row_buckets=(0,)), Bucket(0, sizes.max_chunk)
    row_sizes = replace(sizes, row_buckets=(rows.rows,), chunk_buckets=(0,))
    program = programs.setdefault(chunk, attention_program(config, chunk_sizes, chunk))
    outs = [np.empty(q.shape, q.dtype) for q in sequences.q]
    for tiles in chunks(lengths):
        arguments = chunk_arguments(chunk_sizes, chunk, tables, sequences, tiles)
        cache, found = program(cache, *arguments)
        by_tile = np.asarray(found).reshape(-1, TILE, *outs[0].shape[1:])
        for tile, out in zip(tiles, by_tile, strict=False):  # the last chunk may have fewer
            part = outs[tile.sequence][tile.first : tile.first + TILE]
            part[:] = out[: len(part)]
    cache, changed = rerun(program, cache, arguments)
    program = programs.setdefault(rows, attention_program(config, row_sizes, rows))
    arguments = row_arguments(row_sizes, rows, tables, sequences)
    cache, found = program(cache, *arguments)
    cache, changed_rows = rerun(program, cache, arguments)
    return outs, list(np.asarray(found)), changed + changed_rows


def rerun(program: Any, cache: Any, arguments: tuple[Any, ...]) -> tuple[Any, int]:
    """Runs a packet again and again; it writes to the cache what is there already.

    Returns:
      The cache, and the number of runs whose results differ from those of the first.
    """
    outs = []
    for _ in range(RUNS):
        cache, out = program(cache, *arguments)
        outs.append(np.asarray(out))
    return cache, sum(count_different(outs[0], out) for out in outs)


def layout(lengths: Sequence[int], seed: int) -> tuple[RingSizes, np.ndarray]:
    """The sizes of a ring for these sequences, and page tables with scattered pages.

    The entries of a table that a sequence does not need are garbage.
    """
    rng = np.random.default_rng(seed)
    needed = [-(-length // PAGE_SIZE) for length in lengths]
    sizes = RingSizes(
        num_slots=len(lengths),
        num_pages=sum(needed) + 7,
        page_size=PAGE_SIZE,
        pages_per_sequence=max(needed) + 1,
        row_buckets=(len(lengths) + EMPTY_ROWS,),
        chunk_buckets=(TILES * TILE,),
        tile=TILE,
    )
    free = rng.permutation(sizes.num_pages)
    garbage = [sizes.num_pages, sizes.num_pages + 99, -1, 0, 2**31 - 1, -(2**31)]
    tables = rng.choice(garbage, (len(lengths), sizes.pages_per_sequence)).astype(np.int32)
    for table, count in zip(tables, needed, strict=True):
        table[:count], free = free[:count], free[count:]
    return sizes, tables


class Tile(NamedTuple):
    """Up to `TILE` tokens of a sequence, from position `first` on."""

    sequence: int
    first: int


def chunks(lengths: Sequence[int]) -> Iterator[list[Tile]]:
    """All tiles of all sequences, in chunks of `TILES`."""
    tiles = [Tile(i, first) for i, length in enumerate(lengths) for first in range(0, length, TILE)]
    for start in range(0, len(tiles), TILES):
        yield tiles[start : start + TILES]


def chunk_arguments(
    sizes: RingSizes, bucket: Bucket, tables: np.ndarray, sequences: Sequences, tiles: list[Tile]
) -> tuple[np.ndarray, ...]:
    """The packet of a chunk, and its q, k, v with NaN in place of the tokens that are padding."""
    new = [
        np.full((bucket.chunk, *arrays[0].shape[1:]), np.nan, arrays[0].dtype)
        for arrays in sequences
    ]
    segments = []
    for i, tile in enumerate(tiles):
        for out, arrays in zip(new, sequences, strict=True):
            part = arrays[tile.sequence][tile.first : tile.first + TILE]
            out[i * TILE : i * TILE + len(part)] = part
        segments.append((tile.sequence, tile.first, False, [0] * len(part)))
    return encode_packet(sizes, bucket, tables, [], [], segments), *of_one_layer(*new)


def row_arguments(
    sizes: RingSizes, bucket: Bucket, tables: np.ndarray, sequences: Sequences
) -> tuple[np.ndarray, ...]:
    """The packet of a decode row for the last token of each sequence, and its q, k, v."""
    empty = ((0, EMPTY_ROWS), (0, 0), (0, 0))
    new = [
        np.pad(np.stack([array[-1] for array in arrays]), empty, constant_values=1)
        for arrays in sequences
    ]
    slots, positions = range(len(sequences.q)), [len(q) - 1 for q in sequences.q]
    return encode_packet(sizes, bucket, tables, slots, positions, []), *of_one_layer(*new)


def of_one_layer(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
    """q, k and v as `Attention` takes them: keys and values by layer, of which there is one."""
    return q, k[None], v[None]
