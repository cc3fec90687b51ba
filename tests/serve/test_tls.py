"""HTTPS with certificates that OpenSSL's command makes."""

import contextlib
import json
import socket
import ssl
from pathlib import Path

import httpx
import openai
import pytest

from llama_jax.serve.transport.tls import TlsError, TlsFiles
from tests.support.certificates import make_certificate, needs_openssl
from tests.support.fake_client import FakeServer, events, ok, user
from tests.support.listening import listening
from tests.support.processes import wait_until

pytestmark = needs_openssl


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """server.pem and server.key, client.pem and client.key, locked.pem and locked.key."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificate(folder, "server")
    make_certificate(folder, "client")
    make_certificate(folder, "locked", "-passout", "pass:sesame")
    return folder


def test_clients_speak_https(files):
    server = FakeServer("Hello!", api_key="k")
    tls = TlsFiles(certificate=files / "server.pem", key=files / "server.key").context()
    trust = ssl.create_default_context(cafile=str(files / "server.pem"))
    with listening(server, tls=tls) as address, httpx.Client(verify=trust) as http:
        assert address.startswith("https://127.0.0.1:")
        headers = {"Authorization": "Bearer k"}
        body = {"prompt": "Hi", "stream": True, "n": 2}
        assert events(ok(http.post(f"{address}/v1/completions", json=body, headers=headers)))
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="k", http_client=http)
        stream = client.chat.completions.create(model="tiny", messages=user("Hi"), stream=True)
        assert "".join(chunk.choices[0].delta.content for chunk in stream) == "Hello!"
        # Plain HTTP gets no answer, and the server goes on.
        with pytest.raises(httpx.TransportError):
            httpx.get(address.replace("https", "http"))
        assert ok(http.get(f"{address}/health"))


def test_a_client_that_leaves_over_tls_ends_its_request(files):
    server = FakeServer(max_model_len=10_000_000)
    tls = TlsFiles(certificate=files / "server.pem", key=files / "server.key").context()
    trust = ssl.create_default_context(cafile=str(files / "server.pem"))
    with listening(server, tls=tls) as address, httpx.Client(verify=trust) as http:
        body = {"prompt": "Hi", "stream": True, "ignore_eos": True, "max_tokens": 9_000_000}
        with http.stream("POST", f"{address}/v1/completions", json=body) as response:
            next(response.iter_bytes())
        wait_until(lambda: server.engine.running == 0)
        assert server.engine.aborted == 1
        assert ok(http.get(f"{address}/live"))


def test_a_client_that_does_not_read_over_tls_is_disconnected(files):
    server = FakeServer(max_model_len=10_000_000)
    tls = TlsFiles(certificate=files / "server.pem", key=files / "server.key").context()
    trust = ssl.create_default_context(cafile=str(files / "server.pem"))
    body = json.dumps({"prompt": "Hi", "stream": True, "ignore_eos": True, "max_tokens": 9_000_000})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with listening(server, tls=tls, write_seconds=0.1) as address:
        port = int(address.rpartition(":")[2])
        plain = socket.create_connection(("127.0.0.1", port))
        with trust.wrap_socket(plain, server_hostname="localhost") as connection:
            request = f"{head}Content-Type: application/json\r\n\r\n{body}"
            connection.sendall(request.encode())
            wait_until(lambda: server.engine.aborted == 1)


def test_an_idle_client_over_tls_does_not_keep_the_server(files, monkeypatch, caplog):
    """It says no farewell: it does not even read that of the server."""
    monkeypatch.setattr("llama_jax.serve.transport.http_protocol.FAREWELL_SECONDS", 0.01)
    monkeypatch.setattr("llama_jax.serve.transport.http_server.CLOSING_SECONDS", 3)
    tls = TlsFiles(certificate=files / "server.pem", key=files / "server.key").context()
    trust = ssl.create_default_context(cafile=str(files / "server.pem"))
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(listening(FakeServer(), tls=tls))
        plain = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
        with trust.wrap_socket(plain, server_hostname="localhost") as connection:
            connection.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            stack.close()
    assert "timeout graceful shutdown exceeded" not in caplog.text


def test_client_certificates_can_be_demanded(files):
    tls = TlsFiles(
        certificate=files / "server.pem",
        key=files / "server.key",
        client_authorities=files / "client.pem",
    ).context()
    trust = ssl.create_default_context(cafile=str(files / "server.pem"))
    with listening(FakeServer(), tls=tls) as address:
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address}/live", verify=trust)
        trust.load_cert_chain(files / "client.pem", files / "client.key")
        assert httpx.get(f"{address}/live", verify=trust).status_code == 200


def test_a_key_may_be_encrypted_or_in_the_same_file(files, tmp_path):
    TlsFiles(
        certificate=files / "locked.pem", key=files / "locked.key", password="sesame"
    ).context()
    both = tmp_path / "both.pem"
    both.write_text((files / "server.pem").read_text() + (files / "server.key").read_text())
    TlsFiles(certificate=both).context()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"certificate": "nowhere.pem", "key": "server.key"}, "--ssl-certfile .*nowhere.pem"),
        ({"certificate": "server.pem", "key": "nowhere.key"}, "--ssl-keyfile .*nowhere.key"),
        ({"certificate": "server.pem", "key": "client.key"}, "--ssl-keyfile .*client.key"),
        ({"certificate": "server.pem"}, "--ssl-certfile .*server.pem"),
        ({"certificate": "server.key", "key": "server.key"}, "--ssl-certfile .*server.key"),
        ({"certificate": "locked.pem", "key": "locked.key"}, "--ssl-keyfile-password"),
        (
            {"certificate": "locked.pem", "key": "locked.key", "password": "x"},
            "--ssl-keyfile-password",
        ),
        (
            {"certificate": "server.pem", "key": "server.key", "client_authorities": "server.key"},
            "--ssl-ca-certs .*server.key",
        ),
        (
            {"certificate": "server.pem", "key": "server.key", "client_authorities": "nowhere"},
            "--ssl-ca-certs .*nowhere",
        ),
    ],
)
def test_what_cannot_be_used_is_named_with_its_flag(options, said, files):
    paths = {
        name: value if name == "password" else files / value for name, value in options.items()
    }
    with pytest.raises(TlsError, match=said):
        TlsFiles(**paths).context()
