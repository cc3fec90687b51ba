"""Reads traces: requests that somebody has seen, in three formats. Imports no JAX.

- This project's CSV: a header and lines of `arrival_s,prompt_tokens,output_tokens`, with seconds
  from the start of the trace.
- Mooncake's JSONL (github.com/kvcache-ai/Mooncake, `FAST25-release/traces`): an object a line with
  `timestamp` in milliseconds, `input_length`, `output_length` and `hash_ids`, one for each block of
  512 tokens of the prompt. The same id is the same text after the same beginning.
- Azure's CSV (github.com/Azure/AzurePublicDataset, `AzureLLMInferenceTrace`): a header and lines
  of `TIMESTAMP,ContextTokens,GeneratedTokens`, with the date and time of the arrival, in UTC unless
  a zone follows.

The columns of a CSV may be in any order.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from llama_jax.config.json_values import quoted
from llama_jax.plan.simulation.lengths import MAX_TOKENS, reason
from llama_jax.plan.simulation.load import MAX_REQUESTS, Request, Run
from sharding.errors import UserError

CSV_HEADER = ("arrival_s", "prompt_tokens", "output_tokens")
AZURE_HEADER = ("timestamp", "contexttokens", "generatedtokens")
MOONCAKE_KEYS = frozenset(("timestamp", "input_length", "output_length", "hash_ids"))
BLOCK = 512  # tokens of a Mooncake block
MAX_SECONDS = 1e9
LONGEST = 1000  # characters of a line of CSV

_TIME = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:?\d\d)?", re.ASCII)

Line = tuple[int, str]  # number in the file, from 1 on; text


class TraceError(UserError):
    """A trace cannot be read; the message has the line."""


class _Broken(Exception):
    """What is wrong with a line."""


def read_trace(path: Path) -> list[Request]:
    """Reads the requests of a trace, the earliest first; its first request arrives at 0 s.

    Raises:
      TraceError: the file cannot be read, or a line is broken.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"The trace {path} cannot be read: {reason(error)}.") from error
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise TraceError(f"The trace {path} is empty.")
    first = lines[0][1]
    parse: Callable[[str], Request]
    if first.lstrip().startswith("{"):
        parse, rows = _mooncake, lines
    else:
        header = [name.strip().lower() for name in next(csv.reader([first[:LONGEST]]))]
        parsers = {CSV_HEADER: _csv, AZURE_HEADER: _azure}
        names = next((names for names in parsers if sorted(names) == sorted(header)), None)
        if names is None:
            raise TraceError(
                f"{path}, line {lines[0][0]}: {first.strip()[:80]!r} begins no trace. A trace has "
                f"the header {','.join(CSV_HEADER)} or TIMESTAMP,ContextTokens,GeneratedTokens, or "
                "is JSONL with timestamp, input_length, output_length and hash_ids."
            )
        parse_fields, places = parsers[names], [header.index(name) for name in names]
        rows = lines[1:]

        def parse(line: str) -> Request:
            fields = _fields(line)
            return parse_fields(*(fields[place] for place in places))

    if not rows:
        raise TraceError(f"The trace {path} has a header, but no request.")
    if len(rows) > MAX_REQUESTS:
        raise TraceError(f"The trace {path} has more than {MAX_REQUESTS} requests: cut it.")
    return _from_zero(list(_requests(path, rows, parse)))


def _requests(path: Path, rows: list[Line], parse: Callable[[str], Request]) -> Iterator[Request]:
    for number, line in rows:
        try:
            yield parse(line)
        except _Broken as error:
            raise TraceError(f"{path}, line {number}: {error}") from None


def _from_zero(requests: list[Request]) -> list[Request]:
    start = min(request.at for request in requests)
    moved = [request._replace(at=request.at - start) for request in requests]
    return sorted(moved, key=lambda request: request.at)


def _csv(at: str, prompt: str, output: str) -> Request:
    return Request(_seconds(at), _tokens(prompt, "prompt"), _output(output, "output"))


def _azure(at: str, prompt: str, output: str) -> Request:
    match = _TIME.fullmatch(at.strip())
    try:
        if match is None:
            raise ValueError
        time = datetime.fromisoformat(match[1] + (match[3] or "Z"))
    except ValueError:
        raise _Broken(f"{quoted(at)} is no time such as 2023-11-16 18:15:46.6805900") from None
    seconds = time.timestamp() + float(f"0.{match[2] or 0}")
    return Request(seconds, _tokens(prompt, "context"), _output(output, "generated"))


def _mooncake(line: str) -> Request:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise _Broken("this is no JSON object")
    if unknown := content.keys() - MOONCAKE_KEYS:
        raise _Broken(
            f"{quoted(min(unknown))} is no key of Mooncake's traces: remove it, or convert it"
        )
    prompt = _tokens(content.get("input_length"), "input_length")
    output = _output(content.get("output_length"), "output_length")
    ids = content.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 - 1 for i in ids):
        raise _Broken("hash_ids must be a list of whole numbers")
    blocks = math.ceil(prompt / BLOCK)
    if len(ids) > blocks:
        raise _Broken(
            f"a prompt of {prompt} tokens has {blocks} blocks of {BLOCK}, not {len(ids)} hash_ids"
        )
    runs = tuple(Run(text, min(BLOCK, prompt - BLOCK * block)) for block, text in enumerate(ids))
    return Request(_seconds(content.get("timestamp")) / 1000, prompt, output, runs)


def _fields(line: str) -> list[str]:
    if len(line) > LONGEST:  # `csv` refuses fields of more than 131,072 characters
        raise _Broken(f"{len(line):,} characters are too many for three fields")
    fields = next(csv.reader([line]))
    if len(fields) != 3:
        raise _Broken(f"{len(fields)} fields, not 3")
    return fields


def _seconds(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= MAX_SECONDS * 1000:
        raise _Broken(f"{quoted(value)} is no time of arrival")
    return number


def _tokens(value: Any, what: str, least: int = 1) -> int:
    try:
        number = -1 if isinstance(value, bool | float) else int(value)
    except (TypeError, ValueError):
        number = -1
    if not least <= number <= MAX_TOKENS:
        limits = f"from {least} to {MAX_TOKENS}"
        raise _Broken(f"{what}: {quoted(value)} is no number of tokens {limits}")
    return number


def _output(value: Any, what: str) -> int:
    """The length of an answer. One that was cut off before its first token counts as one token."""
    return max(1, _tokens(value, what, least=0))
