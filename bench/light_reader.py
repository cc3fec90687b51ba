"""Reads many streams at once with as little of the machine as a client can: for `bench.streaming`.

The clients of a server run on other machines, while this one shares the server's cores. A client
that wakes up for each event would take about as much time as the server, and would measure itself.
So it asks the kernel to be woken once `WAKE_BYTES` of a stream have come, or its end, and it counts
the events only when all streams have ended. When the server sends an event does not depend on it.
"""

import selectors
import socket
import time
import urllib.parse
from contextlib import ExitStack

WAKE_BYTES = 4096  # about 20 events
READ_BYTES = 1 << 18


def read_streams(address: str, path: str, body: str, streams: int) -> dict[str, float]:
    """Sends one request over each of several connections, and reads all answers to their ends.

    Args:
      address: of the server.
      path: of the route.
      body: the JSON of the request, which asks for a stream.
      streams: the number of connections.

    Returns:
      "events" of all streams without [DONE], "seconds" from the first connection to the last end,
      and "cpu_seconds" of this process meanwhile.
    """
    url = urllib.parse.urlsplit(address)
    request = (
        f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
    answers: list[list[bytes]] = []
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(streams):
            connection = socket.create_connection((url.hostname, url.port))
            stack.enter_context(connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, WAKE_BYTES)
            connection.sendall(request)
            answers.append([])
            selector.register(connection, selectors.EVENT_READ, (connection, answers[-1]))
        while selector.get_map():
            for key, _ in selector.select():
                connection, answer = key.data
                if data := connection.recv(READ_BYTES):
                    answer.append(data)
                else:
                    selector.unregister(connection)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    events = sum(b"".join(answer).count(b"data: {") for answer in answers)
    return {"events": events, "seconds": seconds, "cpu_seconds": cpu_seconds}
