"""The flags of the socket, of access to it, and of TLS."""

import argparse

from llama_jax.serve.command_line import values
from llama_jax.serve.generation.admission import MAX_QUEUE_TOKENS
from llama_jax.serve.protocol.limits import LIMITS
from llama_jax.serve.transport.door import MAX_BODY_BYTES
from llama_jax.terminal.arguments import size

API_KEY_VARIABLES = ("LLAMA_JAX_API_KEY", "VLLM_API_KEY")


def add_http_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the socket, of limits, and of what lies in front of the server."""
    http = parser.add_argument_group("HTTP")
    http.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 means all networks, and :: those of IPv4 and IPv6 "
        "(default: %(default)s)",
    )
    http.add_argument(
        "--port",
        type=values.port,
        default=8000,
        metavar="PORT",
        help="port to listen on; 0 picks a free one (default: %(default)s)",
    )
    http.add_argument(
        "--uds",
        type=values.path,
        metavar="FILE",
        help="listen on a Unix socket instead, to which only this user can connect",
    )
    http.add_argument(
        "--max-body-size",
        type=size,
        default=MAX_BODY_BYTES,
        metavar="BYTES",
        help="maximum size of a request's body, such as 8MB (default: 2MB)",
    )
    http.add_argument(
        "--max-choices",
        type=values.positive,
        default=LIMITS.choices,
        metavar="N",
        help="maximum of n, the choices per prompt (default: %(default)s)",
    )
    http.add_argument(
        "--max-prompts",
        type=values.positive,
        default=LIMITS.prompts,
        metavar="N",
        help="maximum number of prompts in a request (default: %(default)s)",
    )
    http.add_argument(
        "--shutdown-timeout",
        type=values.seconds,
        default=30.0,
        metavar="SECONDS",
        help="time for running requests to finish after SIGTERM or Ctrl-C; a second signal ends "
        "them at once (default: %(default)g)",
    )
    http.add_argument(
        "--watchdog-timeout",
        type=values.seconds,
        default=120.0,
        metavar="SECONDS",
        help="an engine that has sent no report for this long, and for 20 ticks, hangs: it is "
        "killed, and the server ends with exit code 1; 0 waits for ever (default: %(default)g)",
    )
    http.add_argument(
        "--max-queue-tokens",
        "--max-num-queued-tokens",
        type=values.positive,
        default=MAX_QUEUE_TOKENS,
        metavar="TOKENS",
        help="maximum number of tokens in prompts that wait for their first token; more are "
        "refused, with HTTP status 429 (default: %(default)s)",
    )
    http.add_argument(
        "--request-timeout",
        type=values.positive_seconds,
        metavar="SECONDS",
        help="time after which a request that sets no timeout is aborted, with HTTP status 504 "
        "(default: no limit)",
    )
    http.add_argument(
        "--sse-keep-alive-interval",
        type=values.seconds,
        default=15.0,
        metavar="SECONDS",
        help="a stream that has sent nothing for this long, also while its request waits, sends a "
        "comment, so that no proxy takes it for dead; 0 sends none (default: %(default)g)",
    )
    http.add_argument(
        "--write-timeout",
        type=values.positive_seconds,
        default=60.0,
        metavar="SECONDS",
        help="a client that reads nothing for this long, while part of its response waits, is "
        "disconnected (default: %(default)g)",
    )
    http.add_argument(
        "--root-path",
        type=values.root_path,
        default="",
        metavar="PATH",
        help="path under which a proxy offers this server, such as /llama",
    )
    http.add_argument(
        "--forwarded-allow-ips",
        type=values.networks,
        metavar="ADDRESSES",
        help="proxies whose X-Forwarded-For names the client in the logs: addresses and networks "
        "with commas between them, or * for all (default: none)",
    )
    http.add_argument(
        "--allowed-origins",
        nargs="+",
        type=values.origin,
        default=[],
        metavar="ORIGIN",
        help="web pages that may use this server from a browser (CORS), such as "
        "https://chat.example, or * for all (default: none)",
    )
    http.add_argument(
        "--allow-credentials",
        action="store_true",
        help="let these pages send cookies and client certificates",
    )


def add_security_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of API keys and TLS."""
    security = parser.add_argument_group("keys and TLS")
    security.add_argument(
        "--api-key",
        dest="api_keys",
        nargs="+",
        action=Several,
        type=values.key,
        default=[],
        metavar="KEY",
        help="keys, one of which every request needs except GET /live and /health; other users of "
        "this machine can see them on the command line, but not in a file or in "
        f"${API_KEY_VARIABLES[0]} (default: no key)",
    )
    security.add_argument(
        "--api-key-file",
        type=values.path,
        metavar="FILE",
        help="a file with one key per line; lines that start with # are comments",
    )
    security.add_argument(
        "--metrics-open", action="store_true", help="GET /metrics needs no key, for a scraper"
    )
    security.add_argument(
        "--ssl-certfile",
        type=values.path,
        metavar="FILE",
        help="speak HTTPS with this certificate, in PEM format, followed by its issuers",
    )
    security.add_argument(
        "--ssl-keyfile",
        type=values.path,
        metavar="FILE",
        help="its private key (default: in the same file)",
    )
    security.add_argument(
        "--ssl-keyfile-password", metavar="PASSWORD", help="the password of an encrypted key"
    )
    security.add_argument(
        "--ssl-ca-certs",
        type=values.path,
        metavar="FILE",
        help="demand client certificates that one of these authorities has issued",
    )


class Several(argparse.Action):
    """Collects the values of a flag that may be repeated; the first replaces the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Called for each occurrence."""
        assert isinstance(values, list)
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])
