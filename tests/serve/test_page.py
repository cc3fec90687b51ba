"""The page: its routes, headers and files, the form for a key, and the status that it shows."""

import base64
import hashlib
import re

import pytest

from llama_jax.engine.interface import StageStats, Stats
from llama_jax.serve.monitoring.recent import MAX_VALUES, WINDOW_SECONDS, RecentValues
from llama_jax.serve.page.static import static_files
from tests.support.fake_client import FakeServer, error_of
from tests.support.paths import ROOT

FOLDER = ROOT / "llama_jax" / "serve" / "page" / "browser"
FILES = sorted(FOLDER.iterdir())
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
KEY = {"authorization": "Bearer sesame"}
# A name that no browser fetches.
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


@pytest.fixture(scope="module")
def server():
    return FakeServer()


@pytest.fixture(scope="module")
def locked():
    return FakeServer(api_key="sesame")


def loaded(text: str) -> set[str]:
    """The files that the page's HTML or one of its modules names."""
    named = re.findall(r'(?:href|src)="(page/[^"]+)"', text)
    return {*named, *(f"page/{name}" for name in re.findall(r' from "\./([^"]+)"', text))}


def test_the_page_loads_all_of_its_files_from_this_server(server):
    index = server.get("/")
    waiting, types = loaded(index.text), set()
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    found = set()
    while waiting:
        path = waiting.pop()
        found.add(path)
        response = server.get(f"/{path}")
        assert response.status_code == 200
        types.add((path.rsplit(".")[1], response.headers["content-type"]))
        waiting |= loaded(response.text) - found
    assert found == {f"page/{file.name}" for file in FILES if file.suffix != ".html"}
    assert types == {
        ("css", "text/css; charset=utf-8"),
        ("js", "text/javascript; charset=utf-8"),
        ("svg", "image/svg+xml"),
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_names_nothing_outside_and_parses_no_html(file):
    text = file.read_text().replace(SVG_NAMESPACE, "")
    assert not re.search(r"https?:|//[\w-]+\.\w|@import|url\(", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", text)
    assert not re.search(r"\beval\b|new Function|setTimeout\(\s*[\"'`]|\son\w+=\"|\sstyle=\"", text)
    assert len(text.splitlines()) <= 400


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/base.css", "/page/icon.svg"])
def test_a_file_is_sent_again_only_if_it_has_changed(server, path):
    first = server.get(path)
    tag = first.headers["etag"]
    for tags in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = server.get(path, headers={"if-none-match": tags})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    changed = server.get(path, headers={"if-none-match": '"other"'})
    assert (changed.status_code, changed.content) == (200, first.content)
    assert first.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/", "/page/main.js"])
def test_browsers_run_and_load_only_what_is_the_pages_own(server, path):
    headers = server.get(path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "object-src": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/../static.py",
        "/page/%2e%2e/static.py",
        "/page/..%2fstatic.py",
        "/page//etc/passwd",
        "/page/%2fetc%2fpasswd",
        "/page/main.js/",
        "/page/main.js%00.css",
        "/page/MAIN.JS",
        "/page/index.html",
        "/page/key_form.html",
        "/index.html",
    ],
)
def test_no_other_name_is_a_file(server, path):
    assert error_of(server.get(path))["code"] == "not_found"


def test_other_methods_are_refused(server):
    assert server.post("/", {}).status_code == 405
    assert server.post("/page/main.js", {}).status_code == 405


# With an API key


def test_without_the_key_a_browser_gets_a_form_and_nothing_else(locked):
    form = locked.get("/", headers=BROWSER)
    assert form.status_code == 401
    assert form.headers["www-authenticate"] == "Bearer"
    assert form.headers["cache-control"] == "no-store"
    assert form.headers["content-type"] == "text/html; charset=utf-8"
    assert 'type="password"' in form.text
    wrong = locked.get("/", headers={**BROWSER, "authorization": "Bearer other"})
    assert (wrong.status_code, wrong.content) == (401, form.content)
    for path in ("/status", *(f"/page/{file.name}" for file in FILES), "/page/nowhere"):
        assert error_of(locked.get(path, headers=BROWSER))["code"] == "invalid_api_key"
    for accept in ({}, {"accept": "application/json"}):
        assert error_of(locked.get("/", headers=accept))["code"] == "invalid_api_key"
    assert error_of(locked.post("/", {}, headers=BROWSER))["code"] == "invalid_api_key"


def test_the_form_may_run_its_own_script_and_what_it_fetches(locked):
    form = locked.get("/", headers=BROWSER)
    policy = dict(
        part.split(" ", 1) for part in form.headers["content-security-policy"].split("; ")
    )
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", form.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[directive].split()
        assert "'unsafe-inline'" not in policy[directive]
    assert policy["default-src"] == "'self'"


def test_with_the_key_the_page_and_its_files_come(locked):
    assert locked.get("/", headers={**BROWSER, **KEY}).text == (FOLDER / "index.html").read_text()
    assert locked.get("/page/main.js", headers=KEY).status_code == 200
    assert locked.get("/status", headers=KEY).status_code == 200


def test_a_browser_without_a_key_is_told_of_other_problems_as_before(locked):
    """Only the lack of a key has a form: a body that is too large has an error."""
    too_large = locked.run(
        lambda client: client.request("GET", "/", headers={**BROWSER, **KEY}, content=b" " * 3**14)
    )
    assert too_large.status_code in (413, 415)
    assert error_of(too_large)


# The status


def test_the_status_is_the_engines_facts_and_its_latest_report():
    server = FakeServer()
    server.engine.stats = Stats(
        num_running=2, ticks=9, stages=(StageStats(3, 64), StageStats(0, 0))
    )
    response = server.get("/status")
    status = response.json()
    assert response.headers["cache-control"] == "no-store"
    assert (status["model"], status["ready"], status["chat"]) == ("tiny", True, True)
    assert status["engine"]["devices"][3]["kv_bytes"] == 8_000_000
    assert status["stats"]["stages"] == [
        {"rows": 3, "chunk_tokens": 64},
        {"rows": 0, "chunk_tokens": 0},
    ]
    assert status["latency"]["time_to_first_token"]["p50"] is None


def test_the_status_tells_whether_the_server_can_generate():
    server = FakeServer(chat_template=False)
    assert server.get("/status").json()["chat"] is False
    server.served.draining = True
    assert server.get("/status").json()["ready"] is False
    server.served.draining, server.engine.alive = False, False
    response = server.get("/status")
    assert (response.status_code, response.json()["ready"]) == (200, False)


def test_the_status_has_the_latencies_of_recent_answers():
    server = FakeServer("Hello!")
    now = iter(range(1000))
    server.served.metrics.clock = lambda: 0.25 * next(now)
    tokens = server.complete(max_tokens=5, ignore_eos=True)["usage"]["completion_tokens"]
    latency = server.get("/status").json()["latency"]
    assert (tokens, latency["time_to_first_token"]["count"]) == (5, 1)
    assert latency["time_per_output_token"] == {"count": 4, "p50": 0.25, "p95": 0.25, "p99": 0.25}


def test_percentiles_are_of_the_last_seconds():
    recent = RecentValues()
    for second in range(1, 101):
        recent.add(second / 100, second)
    assert recent.percentiles(1.0) == {"count": 100, "p50": 50, "p95": 95, "p99": 99}
    assert recent.percentiles(WINDOW_SECONDS + 0.9) == {
        "count": 10,
        "p50": 95,
        "p95": 100,
        "p99": 100,
    }
    assert recent.percentiles(WINDOW_SECONDS + 2)["p50"] is None
    for _ in range(2 * MAX_VALUES):
        recent.add(1.0, 7)
    assert recent.percentiles(1.0) == {"count": MAX_VALUES, "p50": 7, "p95": 7, "p99": 7}


def test_files_are_read_once():
    assert static_files() is static_files()
