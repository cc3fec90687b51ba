"""How long hostile requests stop the server's event loop: `python -m bench hostile`.

Bodies of just under the limit of 2 MB, made to be expensive, are sent one after the other to the
HTTP server, over an engine without a model. Meanwhile a task on the server's event loop wakes up
every few milliseconds. Its longest delay is how long the streams of other clients stand still; the
CPU time of the event loop's thread is what the request takes from them in all. The target for the
first is 100 ms. Each body is sent several times, and the least of the values counts, because other
programs on the machine only add to them.
"""

import argparse
import asyncio
import json
import resource
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable

from bench.result import Plot, Result, Row, Target
from llama_jax.serve.transport.door import MAX_BODY_BYTES
from llama_jax.serve.transport.http_server import HttpServer, address_of, listen
from tests.support.fake_client import FakeServer

MAX_MODEL_LEN = 131_072
REPEATS = 3  # of each body
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
TARGET_MS = 100.0
WAKE_SECONDS = 0.005


def filled(start: str, unit: str | Callable[[int], str], end: str) -> bytes:
    """Repeats a unit until the body is as long as it may be."""
    length = MAX_BODY_BYTES - len(start) - len(end)
    if isinstance(unit, str):
        return (start + unit * (length // len(unit)) + end).encode()
    parts, size = [], 0
    while size + len(part := unit(len(parts))) <= length:
        parts.append(part)
        size += len(part)
    return (start + "".join(parts) + end).encode()


def bodies() -> dict[str, tuple[str, bytes]]:
    """A path and a body for each kind of trouble."""
    message = '{"role":"user","content":"x"}'
    text = '[{"role":"user","content":"'
    return {
        "empty messages": (CHAT, filled('{"messages":[', "{},", "{}]}")),
        "empty lists as messages": (CHAT, filled('{"messages":[', "[],", "[]]}")),
        "short messages": (CHAT, filled('{"messages":[', f"{message},", f"{message}]}}")),
        "messages, the last one wrong": (CHAT, filled('{"messages":[', f"{message},", "{}]}")),
        "empty parts": (CHAT, filled('{"messages":[{"role":"user","content":[', "{},", "{}]}]}")),
        "short parts": (
            CHAT,
            filled(
                '{"messages":[{"role":"user","content":[',
                '{"type":"text","text":""},',
                '{"type":"text","text":""}]}]}',
            ),
        ),
        "one long message": (CHAT, filled('{"messages":' + text, "word ", '"}]}')),
        "a message of <": (CHAT, filled('{"messages":' + text, "<", '"}]}')),
        "a message of <|": (CHAT, filled('{"messages":' + text, "<|", '"}]}')),
        "a message of special tokens": (CHAT, filled('{"messages":' + text, "<|eot_id|>", '"}]}')),
        "a message of emoji, escaped": (
            CHAT,
            filled('{"messages":' + text, "\\ud83d\\ude00", '"}]}'),
        ),
        "a message of line breaks": (CHAT, filled('{"messages":' + text, "\\n", '"}]}')),
        "nested lists": (CHAT, filled('{"metadata":', "[" * 900 + "]" * 900 + ",", "1}")),
        "nested lists, open": (CHAT, filled('{"metadata":', "[", "")),
        "an unsupported field of lists": (CHAT, filled('{"logit_bias":[', "[],", "[]]}")),
        "unknown names": (CHAT, filled("{", lambda i: f'"{i}":null,', '"messages":[]}')),
        "unknown names in a message": (
            CHAT,
            filled('{"messages":[{', lambda i: f'"{i}":null,', '"role":"user","content":""}]}'),
        ),
        "a label of objects": (
            CHAT,
            filled('{"metadata":[', "{},", '{}],"messages":[' + message + '],"max_tokens":1}'),
        ),
        "token ids": (COMPLETIONS, filled('{"prompt":[', "5,", "5]}")),
        "token ids as 5.0": (COMPLETIONS, filled('{"prompt":[', "5.0,", "5]}")),
        "long token ids": (COMPLETIONS, filled('{"prompt":[', "9" * 4000 + ",", "9]}")),
        "empty lists as prompts": (COMPLETIONS, filled('{"prompt":[', "[],", "[]]}")),
        "200 prompts of token ids": (
            COMPLETIONS,
            json.dumps({"prompt": [[5] * 3000] * 200, "max_tokens": 1}).encode(),
        ),
        "empty prompts": (COMPLETIONS, filled('{"prompt":[', '"",', '""]}')),
        "1,000 prompts": (COMPLETIONS, json.dumps({"prompt": ["word " * 300] * 1000}).encode()),
        "one long prompt": (COMPLETIONS, filled('{"prompt":"', "word ", '"}')),
        "stop strings": (COMPLETIONS, filled('{"prompt":"x","stop":[', '"x",', '"x"]}')),
        "a long stop string": (COMPLETIONS, filled('{"prompt":"x","stop":"', "x", '"}')),
        "a long number": (COMPLETIONS, filled('{"prompt":"x","seed":', "9", "}")),
        "a long fraction": (COMPLETIONS, filled('{"prompt":"x","temperature":0.', "1", "}")),
        "spaces": (COMPLETIONS, filled("", " ", "")),
        "a text to tokenize": (TOKENIZE, filled('{"prompt":"', "word ", '"}')),
        "token ids to decode": (DETOKENIZE, filled('{"tokens":[', "5,", "5]}")),
    }


def post(address: str, path: str, body: bytes) -> int:
    """Sends a request; returns the status of its response."""
    url = urllib.parse.urlsplit(address)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((url.hostname, url.port)) as connection:
        connection.sendall(head.encode() + body)
        received = b""
        while more := connection.recv(1 << 20):
            received = received or more
    return int(received.split(b" ", 2)[1])


async def longest_delay(done: threading.Event) -> float:
    """Returns the longest time by which a task of this event loop woke up too late, in seconds.

    Time in which other programs had the CPUs does not count: a delay is at most the CPU time that
    this process used meanwhile.
    """
    longest, before, cpu_before = 0.0, time.perf_counter(), time.process_time()
    while not done.is_set():
        await asyncio.sleep(WAKE_SECONDS)
        now, cpu_now = time.perf_counter(), time.process_time()
        delay = min(now - before - WAKE_SECONDS, cpu_now - cpu_before)
        longest, before, cpu_before = max(longest, delay), now, cpu_now
    return longest


async def measure(max_model_len: int, repeats: int) -> list[Row]:
    """The cost of each body."""
    server = FakeServer(max_model_len=max_model_len, max_in_flight=288)
    listener = listen("127.0.0.1", 0)
    address = address_of(listener)
    results: list[Row] = []
    async with HttpServer(server.app, listener, write_seconds=60.0).running():
        await asyncio.to_thread(post, address, CHAT, b"{}")
        for name, (path, body) in bodies().items():
            rows = [await measure_one(address, path, body) for _ in range(repeats)]
            results.append({"body": name} | {key: min(row[key] for row in rows) for key in rows[0]})
            print(results[-1], flush=True)
    return results


async def measure_one(address: str, path: str, body: bytes) -> dict[str, float]:
    """The cost of one request."""
    memory, cpu, start = peak_megabytes(), time.thread_time(), time.perf_counter()
    done = threading.Event()
    delay = asyncio.create_task(longest_delay(done))
    status = await asyncio.to_thread(post, address, path, body)
    seconds = time.perf_counter() - start
    done.set()
    return {
        "status": status,
        "answer after": round(1000 * seconds, 1),
        "loop stopped": round(1000 * await delay, 1),
        "loop's CPU time": round(1000 * (time.thread_time() - cpu), 1),
        "memory": round(peak_megabytes() - memory, 1),
    }


def peak_megabytes() -> float:
    """The peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(args: argparse.Namespace) -> Result:
    """Sends every body."""
    rows = asyncio.run(measure(MAX_MODEL_LEN, REPEATS))
    longest = max(row["loop stopped"] for row in rows)
    return Result.measured(
        "hostile",
        f"bodies of up to {MAX_BODY_BYTES / 1e6:.0f} MB, the least of {REPEATS} values each",
        args=vars(args),
        packages=("starlette", "uvicorn", "h11", "msgspec"),
        units={
            "status": "",
            "answer after": "ms",
            "loop stopped": "ms",
            "loop's CPU time": "ms",
            "memory": "MB",
        },
        rows=rows,
        targets=[Target("longest stop of the event loop", longest, TARGET_MS, "max", "ms")],
        plots=[Plot("How long the event loop stops", "body", ("loop stopped",), kind="bar")],
    )
