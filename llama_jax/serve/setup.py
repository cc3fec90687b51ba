"""Turns the command line into what the server needs before its engine starts."""

import argparse
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from llama_jax.checkpoint.directory import servable_layout
from llama_jax.config.huggingface import read_checkpoint_config
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.options import EngineOptions
from llama_jax.serve.command_line.arguments import DEMO_CHECKPOINT, DEMO_NAME, engine_options
from llama_jax.serve.command_line.quantization import check_quantization
from llama_jax.serve.command_line.sampling_defaults import sampling_defaults
from llama_jax.serve.transport.api_keys import read_key_file
from llama_jax.serve.transport.http_server import listen, listen_unix
from llama_jax.serve.transport.tls import TlsFiles
from llama_jax.text.tokenizer import Tokenizer
from sharding.errors import UserError

log = logging.getLogger("llama_jax.serve")


class CheckpointMissing(UserError):
    """The path on the command line is not a directory, or there is no demo checkpoint."""


class TemplateError(UserError):
    """The file of a chat template cannot be read."""


@dataclass(frozen=True)
class Setup:
    """A checked command line: everything that the server needs before the engine starts.

    `load_tokenizer` takes a second, and raises `TokenizerError`.
    """

    arguments: argparse.Namespace
    options: EngineOptions
    names: tuple[str, ...]
    load_tokenizer: Callable[[], Tokenizer]
    defaults: SamplingParams
    listener: socket.socket
    keys: Sequence[str]
    tls: ssl.SSLContext | None


def prepare(arguments: argparse.Namespace, path: Path, name: str, listener: socket.socket) -> Setup:
    """Checks what can be checked before anything is loaded.

    Raises:
      ConfigError: it cannot be served.
    """
    keys = list(arguments.api_keys)
    if arguments.api_key_file is not None:
        keys += read_key_file(arguments.api_key_file)
    tls = _tls(arguments)
    declared = read_checkpoint_config(path)
    declared.report_unknown(arguments.strict_config)
    check_quantization(declared, path, arguments.quantization)
    defaults = sampling_defaults(
        declared,
        arguments.generation_config,
        arguments.override_generation_config,
    )
    template = _chat_template(arguments.chat_template)

    def load_tokenizer() -> Tokenizer:
        tokenizer = Tokenizer(path, template)
        if tokenizer.chat_problem is not None:
            log.warning(tokenizer.chat_problem)
        return tokenizer

    return Setup(
        arguments=arguments,
        options=engine_options(arguments, path),
        names=tuple(arguments.served_model_name or (name,)),
        defaults=defaults,
        load_tokenizer=load_tokenizer,
        listener=listener,
        keys=keys,
        tls=tls,
    )


def open_listener(arguments: argparse.Namespace) -> AbstractContextManager[socket.socket]:
    """Opens the socket that the command line names.

    Raises:
      ListenError: it cannot be opened.
    """
    if arguments.uds is None:
        return listen(arguments.host, arguments.port)
    return _unix_listener(arguments.uds)


@contextlib.contextmanager
def _unix_listener(path: Path) -> Iterator[socket.socket]:
    with listen_unix(path) as listener:
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def find_checkpoint(path: Path | None) -> tuple[Path, str]:
    """Returns the checkpoint's directory or GGUF file, and its name for requests."""
    if path is None:
        if not DEMO_CHECKPOINT.is_dir():
            raise CheckpointMissing(
                "No checkpoint was given, and there is no demo checkpoint beside this package: "
                "give the path of a checkpoint."
            )
        return DEMO_CHECKPOINT, DEMO_NAME
    path = path.expanduser()  # `make serve MODEL=~/...` quotes it
    servable_layout(path)
    if path.is_file():
        return path, path.stem
    return path, path.resolve().name


def _tls(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    if arguments.ssl_certfile is None:
        return None
    return TlsFiles(
        certificate=arguments.ssl_certfile,
        key=arguments.ssl_keyfile,
        password=arguments.ssl_keyfile_password,
        client_authorities=arguments.ssl_ca_certs,
    ).context()


def _chat_template(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"--chat-template {file} cannot be read as text.") from error
