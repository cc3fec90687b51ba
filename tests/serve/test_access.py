"""Who may use the server: keys, open paths, browsers, and what a proxy in front of it changes."""

import os
import re
import resource
import socket

import httpx
import openai
import pytest

from llama_jax.serve.app import create_app
from llama_jax.serve.protocol.limits import LIMITS
from llama_jax.serve.routes.openapi import openapi_document
from llama_jax.serve.routes.openapi_rules import EngineLimits
from llama_jax.serve.transport.api_keys import ApiKeys
from llama_jax.serve.transport.cors import Cors
from llama_jax.serve.transport.door import Door
from llama_jax.serve.transport.front import Front
from llama_jax.serve.transport.http_server import (
    MAX_OPEN_FILES,
    ListenError,
    allow_connections,
    is_loopback,
    listen_unix,
)
from tests.support.fake_client import FakeServer, error_of, ok, user
from tests.support.listening import listening

BEARER = {"Authorization": "Bearer k2"}


def rebuilt(*, keys=(), open_paths=(), origins=(), credentials=False, root_path="") -> FakeServer:
    """A fake server behind other layers."""
    server = FakeServer()
    door = Door(keys, open_paths=open_paths)
    door.open(create_app(server.served, root_path))
    inner = Cors(door, origins, credentials) if origins else door
    server.app = Front(inner, root_path=root_path)
    return server


# Keys


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("Bearer k1", True),
        ("bearer k2", True),
        ("BEARER  k2 ", True),
        ("Bearer k3", False),
        ("Bearer k", False),
        ("Bearer k11", False),
        ("Bearer", False),
        ("Basic k1", False),
        ("k1", False),
        ("", False),
        ("Bearer \xfc", False),
    ],
)
def test_each_key_is_accepted_in_any_case_of_the_scheme(given, known):
    assert (ApiKeys(["k1", " k2\n"]).find(given) is not None) == known


def test_keys_have_different_ids_that_do_not_tell_them():
    keys = ApiKeys(["k1", "k2"])
    ids = {keys.find("Bearer k1"), keys.find("Bearer k2")}
    assert len(ids) == 2 and all(re.fullmatch("[0-9a-f]{8}", each) for each in ids)


def test_every_key_is_compared(monkeypatch):
    """Else the time would tell how many keys come before the one that matches."""
    compared = []

    def compare(a, b):
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("llama_jax.serve.transport.api_keys.hmac.compare_digest", compare)
    keys = ApiKeys(["k1", "k2", "k3"])
    for given in ("k1", "k3", "k4"):
        compared.clear()
        keys.find(f"Bearer {given}")
        assert len(compared) == 3


def test_everything_but_the_two_probes_needs_a_key():
    server = rebuilt(keys=["k1", "k2"])
    documented = ok(server.get("/openapi.json", headers=BEARER)).json()["paths"]
    closed = {*documented, "/", "/nowhere", "/v1/models/tiny", "/docs"} - {"/live", "/health"}
    for path in closed:
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            response = server.run(lambda client, m=method, p=path: client.request(m, p))
            assert response.status_code == 401, (method, path)
    for path in ("/live", "/health"):
        assert ok(server.get(path)).json() == {"status": "ok"}


def test_the_host_header_opens_nothing():
    server = rebuilt(keys=["k1"])
    for host in ("localhost/health?", "x/live#", "health"):
        assert server.get("/v1/models", headers={"Host": host}).status_code == 401
    for path in ("/health/../v1/models", "//health", "/health/", "/%68ealth/x", "/live;/metrics"):
        assert server.get(path).status_code == 401, path


def test_the_metrics_can_be_open():
    server = rebuilt(keys=["k1"], open_paths=["/metrics"])
    assert "num_requests_running" in ok(server.get("/metrics")).text
    assert server.get("/v1/models").status_code == 401


def test_the_server_lives_before_it_is_ready_and_while_it_ends():
    server = FakeServer()
    opened, server.app = server.app, Door(["k1"])
    assert ok(server.get("/live")).json() == {"status": "ok"}
    assert server.run(lambda client: client.head("/live")).status_code == 200
    assert server.get("/health").status_code == 503
    assert server.post("/live", {}).status_code == 503
    server.app = opened
    server.served.draining = True
    assert ok(server.get("/live")).json() == {"status": "ok"}
    assert server.get("/health").status_code == 503
    server.engine.die()
    assert server.get("/live").status_code == 200
    assert server.post("/live", {}).status_code == 405


# EngineLimits


def refused(server: FakeServer, **body) -> str:
    """The field that a completion with it is refused for."""
    response = server.post("/v1/completions", {"prompt": "Hi", **body})
    assert response.status_code == 400
    return error_of(response)["param"]


def test_the_numbers_of_choices_and_prompts_are_options(monkeypatch):
    server = FakeServer(max_in_flight=100)
    assert refused(server, n=17) == "n"
    monkeypatch.setattr(LIMITS, "choices", 20)
    monkeypatch.setattr(LIMITS, "prompts", 2)
    assert len(server.complete(n=17)["choices"]) == 17
    assert refused(server, n=21) == "n"
    assert refused(server, prompt=["Hi"] * 3) == "prompt"
    schemas = openapi_document("1", EngineLimits(320, 200))["components"]["schemas"]
    for kind in ("CompletionRequest", "ChatRequest"):
        assert {"type": "integer", "minimum": 1, "maximum": 20} in schemas[kind]["properties"]["n"][
            "anyOf"
        ]
    forms = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    assert [form["maxItems"] for form in forms if "maxItems" in form] == [2, 199, 2]


# Several names


def test_a_model_may_have_several_names():
    server = FakeServer()
    server.served.aliases = ("gpt-4", "org/small")
    listed = ok(server.get("/v1/models")).json()["data"]
    assert [card["id"] for card in listed] == ["tiny", "gpt-4", "org/small"]
    assert ok(server.get("/v1/models/org/small")).json()["id"] == "org/small"
    assert server.complete(model="gpt-4")["model"] == "tiny"
    assert server.post("/v1/completions", {"prompt": "Hi", "model": "gpt-5"}).status_code == 404


def test_a_refusal_is_on_the_record_of_its_request():
    server, records = rebuilt(keys=["k1"]), []
    server.app.listeners.append(records.append)
    server.get("/v1/models")
    assert [(record.status, record.error) for record in records] == [(401, "invalid_api_key")]


# CORS

PAGE = {"Origin": "https://chat.example"}
PREFLIGHT = {
    **PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


def preflight(server: FakeServer, headers=PREFLIGHT) -> httpx.Response:
    return server.run(lambda client: client.options("/v1/chat/completions", headers=headers))


def allowed(response: httpx.Response) -> dict[str, str]:
    prefix = "access-control-"
    return {k: v for k, v in response.headers.items() if k.startswith(prefix)}


def test_without_the_flag_no_page_may_read_an_answer():
    server = FakeServer(api_key="k2")
    assert preflight(server).status_code == 401
    response = ok(server.get("/v1/models", headers={**PAGE, **BEARER}))
    assert not allowed(response) and not allowed(server.get("/v1/models", headers=PAGE))


def test_a_page_of_an_allowed_origin_reads_answers_and_errors():
    server = rebuilt(keys=["k2"], origins=["https://chat.example"])
    answer = allowed(ok(preflight(server)))
    assert answer["access-control-allow-origin"] == "https://chat.example"
    assert "x-stainless-os" in answer["access-control-allow-headers"]
    assert answer["access-control-allow-methods"] == "GET, HEAD, POST"
    for headers, status in (({**PAGE, **BEARER}, 200), (PAGE, 401)):
        response = server.get("/v1/models", headers=headers)
        assert response.status_code == status
        assert allowed(response)["access-control-allow-origin"] == "https://chat.example"
        assert "X-Request-Id" in allowed(response)["access-control-expose-headers"]


def test_a_page_of_another_origin_reads_nothing():
    server = rebuilt(keys=["k2"], origins=["https://chat.example"])
    response = preflight(server, {**PREFLIGHT, "Origin": "https://evil.example"})
    assert response.status_code == 400 and error_of(response)
    assert "access-control-allow-origin" not in response.headers
    headers = {"Origin": "https://evil.example", **BEARER}
    assert not allowed(ok(server.get("/v1/models", headers=headers))).keys() & {
        "access-control-allow-origin"
    }


def test_every_origin_and_credentials():
    anyone = allowed(ok(preflight(rebuilt(origins=["*"]))))
    assert anyone["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in anyone
    refused = preflight(
        rebuilt(origins=["*"]), {**PREFLIGHT, "Access-Control-Request-Method": "PUT"}
    )
    assert refused.status_code == 400 and error_of(refused)
    one = allowed(ok(preflight(rebuilt(origins=["https://chat.example"], credentials=True))))
    assert one["access-control-allow-credentials"] == "true"


# Request ids


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/v1/models"])
def test_every_answer_has_the_id_that_was_sent(path):
    server = rebuilt(keys=["k1"])
    given = "req-1.2:3".ljust(128, "x")
    response = server.get(path, headers={"X-Request-Id": given})
    assert response.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "a\x1b[31m", "<script>", "a,b"])
def test_an_id_that_is_missing_or_strange_is_replaced(given):
    server = FakeServer()
    headers = {} if given is None else {"X-Request-Id": given}
    ids = {server.get("/live", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2 and given not in ids
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


def test_clients_see_the_id_of_answers_streams_and_errors():
    server = FakeServer()
    with (
        listening(server) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
    ):
        headers = {"X-Request-Id": "mine"}
        answer = client.chat.completions.create(
            model="tiny", messages=user("Hi"), extra_headers=headers
        )
        assert answer._request_id == "mine"
        with client.chat.completions.with_streaming_response.create(
            model="tiny", messages=user("Hi"), stream=True, extra_headers=headers
        ) as stream:
            assert stream.headers["x-request-id"] == "mine"
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("other", extra_headers=headers)
        assert caught.value.request_id == "mine"
        assert httpx.get(address, headers={"Expect": "x", "Host": "a b"}).headers["x-request-id"]


# Behind a proxy


@pytest.mark.parametrize("prefix", ["", "/llama"])
def test_a_root_path_works_whether_or_not_the_proxy_removes_it(prefix):
    server = rebuilt(keys=["k2"], root_path="/llama")
    assert ok(server.get(f"{prefix}/health"))
    assert server.get(f"{prefix}/v1/models").status_code == 401
    document = ok(server.get(f"{prefix}/openapi.json", headers=BEARER)).json()
    assert document["servers"] == [{"url": "/llama"}]
    assert server.get("/llamas/health", headers=BEARER).status_code == 404
    assert server.get("/llama", headers=BEARER).status_code == 200  # the page
    assert server.get("/llama/llama/health").status_code == 401


@pytest.mark.parametrize(
    ("trusted", "client"),
    [
        (None, "127.0.0.1"),
        ("10.0.0.0/8", "127.0.0.1"),
        ("127.0.0.1", "203.0.113.7"),
        ("*", "1.1.1.1"),
    ],
)
def test_only_trusted_proxies_name_the_client(trusted, client):
    server, seen = FakeServer(), []
    server.app.listeners.append(lambda record: seen.append(record.client))
    headers = {"X-Forwarded-For": "1.1.1.1, 203.0.113.7"}
    with listening(server, trusted_proxies=trusted) as address:
        httpx.get(f"{address}/live", headers=headers)
    assert [each.rpartition(":")[0] for each in seen] == [client]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(
    ("host", "trusted", "client"),
    [
        ("127.0.0.1", None, "127.0.0.1"),
        ("127.0.0.1", "127.0.0.0/8", "[2001:db8::7]"),
        ("[::1]", "127.0.0.0/8", "[::1]"),
        ("[::1]", "::1", "[2001:db8::7]"),
    ],
)
def test_an_address_is_the_same_on_a_socket_of_both_kinds(host, trusted, client):
    """The kernel shows 127.0.0.1 as ::ffff:127.0.0.1, which no network of IPv4 contains."""
    server, seen = FakeServer(), []
    server.app.listeners.append(lambda record: seen.append(record.client))
    with listening(server, "::", trusted_proxies=trusted) as address:
        port = address.rpartition(":")[2]
        headers = {"X-Forwarded-For": "2001:db8::7"}
        httpx.get(f"http://{host}:{port}/live", headers=headers)
    assert [each.rpartition(":")[0] for each in seen] == [client]


# A Unix socket


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_unix_socket(tmp_path):
    path, before = tmp_path / "s", umask()
    listener = listen_unix(path)
    assert is_loopback(listener) and path.stat().st_mode & 0o777 == 0o600
    assert umask() == before
    with pytest.raises(ListenError, match="--uds"):
        listen_unix(path)
    server, seen = FakeServer(), []
    server.app.listeners.append(lambda record: seen.append(record.client))
    transport = httpx.HTTPTransport(uds=str(path))
    with (
        listening(server, listener=listener) as address,
        httpx.Client(transport=transport) as client,
    ):
        assert ok(client.post(f"{address}/v1/completions", json={"prompt": "Hi"}))
    assert seen == ["unix"]
    with listen_unix(path):  # left behind by a server that is gone
        pass


def test_a_file_is_not_replaced_by_a_unix_socket(tmp_path):
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ListenError, match="--uds"):
        listen_unix(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "precious"


@pytest.mark.parametrize(
    ("limits", "raised_to"),
    [
        ((256, 1000), 1000),
        ((256, 10**6), MAX_OPEN_FILES),
        ((256, resource.RLIM_INFINITY), MAX_OPEN_FILES),
        ((10**5, 10**6), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ],
)
def test_the_limit_of_open_files_is_raised(monkeypatch, limits, raised_to):
    raised = []
    monkeypatch.setattr(resource, "getrlimit", {resource.RLIMIT_NOFILE: limits}.get)
    monkeypatch.setattr(resource, "setrlimit", lambda *given: raised.append(given))
    allow_connections()
    wanted = (resource.RLIMIT_NOFILE, (raised_to, limits[1]))
    assert raised == ([] if raised_to is None else [wanted])
