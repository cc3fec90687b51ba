"""The shape of the code: layers, imports, dependencies, documentation links and file lengths."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("sharding", "llama_jax", "convert", "bench", "demo", "tests")
MAX_LINES = {"tests": 500}  # per file; 400 elsewhere

# From the lowest layer to the highest, one package per layer: a module may import from its own
# package and from those before it. docs/architecture.md shows the same list, top down.
LAYERS = (
    "sharding",
    "llama_jax.quantization",
    "llama_jax.gguf",
    "llama_jax.text",
    "llama_jax.terminal",
    "llama_jax.config",
    "llama_jax.weights",
    "llama_jax.checkpoint",
    "llama_jax.model",
    "llama_jax.ring",
    "llama_jax.costs",
    "llama_jax.engine",
    "llama_jax.interpret",
    "llama_jax.pictures",
    "llama_jax.client",
    "llama_jax.llm",
    "llama_jax.serve",
    "llama_jax.plan",
    "convert",
    "bench",
)
# What the HTTP process and the capacity planner load, in addition to `client`, `llm` and `serve`.
WITHOUT_JAX = (
    "llama_jax.config",
    "llama_jax.costs",
    "llama_jax.engine.chunk_choice",
    "llama_jax.engine.interface",
    "llama_jax.engine.latency_targets",
    "llama_jax.engine.messages",
    "llama_jax.engine.options",
    "llama_jax.engine.packets",
    "llama_jax.engine.microbatch",
    "llama_jax.engine.page_tables",
    "llama_jax.engine.pages",
    "llama_jax.engine.prompt_logprobs",
    "llama_jax.engine.prefill",
    "llama_jax.engine.roster",
    "llama_jax.engine.scheduler",
    "llama_jax.engine.sizing",
    "llama_jax.engine.tick_timer",
    "llama_jax.plan",
    "llama_jax.ring.sizes",
    "llama_jax.weights.table",
)
DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "demo", "bench/results")
    for path in (ROOT / folder).glob("*.md")
)


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports: at the top, inside a function, or for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def layer(module: str) -> int:
    """The number of the layer that a module belongs to; -1 for a module of another project."""
    for number, name in enumerate(LAYERS):
        if module == name or module.startswith(f"{name}."):
            return number
    return -1


def upward(path: Path) -> list[str]:
    """The modules of higher layers that a file imports."""
    own = layer(module_name(path))
    return [module for module in imports(path) if layer(module) > own]


@pytest.mark.parametrize("package", [name for name in LAYERS if "." not in name] + ["llama_jax"])
def test_nothing_imports_upward(package):
    lazy = ROOT / "llama_jax" / "__init__.py"  # names its exports and imports them on first use
    found = {str(path): upward(path) for path in sources(package) if path != lazy}
    assert found and {path: modules for path, modules in found.items() if modules} == {}


def test_every_module_belongs_to_a_layer():
    outside = {ROOT / "llama_jax" / "__init__.py"}
    for path in sources("sharding", "llama_jax", "convert", "bench"):
        assert path in outside or layer(module_name(path)) >= 0, path


def test_an_upward_import_is_detected(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "sharding").mkdir()
    bad = tmp_path / "sharding" / "ring.py"
    bad.write_text("def run():\n    from llama_jax.engine import core\n")
    assert sorted(upward(bad)) == ["llama_jax.engine", "llama_jax.engine.core"]


def test_the_documentation_shows_the_layers():
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("\n## Layers\n")[1].split("\n## ")[0]
    shown = re.findall(r"^\| `([\w./]+)/` \|", section, re.MULTILINE)
    assert [name.replace("/", ".") for name in reversed(shown)] == list(LAYERS)


@cache
def modules_loaded_by(*modules: str) -> frozenset[str]:
    """Every module that a new process has loaded after these imports."""
    program = "\n".join(f"import {module}" for module in modules)
    program += "\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return frozenset(done.stdout.split())


def test_the_http_process_and_the_scheduler_do_not_load_jax():
    packages = ("llama_jax/costs", "llama_jax/serve")
    served = [module_name(path) for path in sources(*packages) if path.stem != "__main__"]
    loaded = modules_loaded_by(*WITHOUT_JAX, *served)
    assert "llama_jax" in loaded and not loaded & {"jax", "jaxlib", "flax", "orbax", "torch"}
    assert "jax" in modules_loaded_by("llama_jax.model")  # the check would notice


def test_a_gpu_machine_needs_no_server_packages():
    """Model, ring, engine and benchmarks import nothing that only the server needs.

    PyTorch and transformers, which benchmarks compare with, would take most of the time.
    """
    program = """
import sys
from unittest.mock import MagicMock
for name in ("torch", "transformers"):
    sys.modules[name] = MagicMock()
for name in ("llguidance", "msgspec", "starlette", "uvicorn", "zmq"):
    sys.modules[name] = None  # importing it raises ImportError
import bench.audit, bench.peers, bench.divergence, bench.host_time, bench.load_speed
import llama_jax.engine.core, llama_jax.interpret, llama_jax.model, llama_jax.ring.sharded_llama
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_model_loads_no_reader_no_mesh_and_no_server():
    loaded = {name for name in modules_loaded_by("llama_jax.model") if layer(name) >= 0}
    allowed = ("config", "model", "quantization", "weights")
    prefixes = ("sharding.", *(f"llama_jax.{package}." for package in allowed))
    assert {name for name in loaded if not f"{name}.".startswith(prefixes)} == set()
    assert "llama_jax.model.llama" in loaded and "sharding.mesh" not in loaded


def test_nothing_unpickles():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    # The one reader of pickles interprets their opcodes and calls nothing that they name.
    reader, allowed = ROOT / "convert/meta/tensor_pickle.py", "pickletools"
    for path in sources(*PACKAGES):
        found = {name.split(".")[0] for name in imports(path)} & {*forbidden, allowed}
        assert found == ({allowed} if path == reader else set()), path


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short_enough_to_read(package):
    lines = {path.name: len(path.read_text().splitlines()) for path in sources(package)}
    limit = MAX_LINES.get(package, 400)
    assert lines and {path: n for path, n in lines.items() if n > limit} == {}


@pytest.mark.slow  # `make lint` does the same
@pytest.mark.parametrize(
    "arguments",
    [["llama_jax", "sharding", "convert"], [".", "--ignore", "DEP002,DEP004"]],
    ids=["installed", "everything"],
)
def test_dependencies_are_declared_as_imported(arguments):
    """What is installed needs exactly `dependencies`; tests and benchmarks may use the extras."""
    command = [sys.executable, "-m", "deptry", "--no-ansi", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_what_the_package_declares_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    scripts = project["project"]["scripts"]
    assert set(scripts) == {"llama-jax-serve", "llama-jax-convert", "llama-jax-plan"}
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(import_module(module), function))
    for package in ("llama_jax", "sharding", "convert"):
        assert (ROOT / package / "py.typed").is_file()


# --- links in the documentation ------------------------------------------------------------------


def links(document: Path) -> list[tuple[str, str]]:
    """(text, target) of every link to another place in this repository."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text)
    return [(label, target) for label, target in found if not re.match(r"\w+:", target)]


def headings(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub derives them."""
    lines = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def defines(path: Path, name: str) -> bool:
    """Whether a Python file defines a name, as a function, a class or a variable."""
    pattern = rf"^\s*(?:async )?(?:def|class) {name}\b|^\s*{name}(?:: .*)? = |^\s*{name}: "
    return re.search(pattern, path.read_text(), re.MULTILINE) is not None


def broken(document: Path) -> list[str]:
    """The links of a document that lead nowhere."""
    found = []
    for label, target in links(document):
        file, _, anchor = target.partition("#")
        path = (document.parent / file) if file else document
        name = label.strip("`").removesuffix("()").split(".")[-1]
        if not path.exists():
            found.append(f"{target} does not exist")
        elif anchor and (path.suffix != ".md" or anchor not in headings(path)):
            found.append(f"{target} is not a heading")  # line numbers go stale at once
        elif path.suffix == ".py" and re.fullmatch(r"`[\w.]+(\(\))?`", label):
            package = file.replace("../", "").removesuffix("/__init__.py").replace("/", ".")
            if label != f"`{package}`" and not defines(path, name):
                found.append(f"{file} does not define {label}")
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    assert broken(document) == []


def test_a_broken_link_is_detected(tmp_path):
    (tmp_path / "code.py").write_text("def there():\n    value = 1\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n[a](code.py) [`there`](code.py) [`code.value`](code.py) [b](#a-title)\n"
        "[c](gone.py) [`missing`](code.py) [d](code.py#L1) [e](#no-title) [f](https://example.org)"
    )
    assert broken(page) == [
        "gone.py does not exist",
        "code.py does not define `missing`",
        "code.py#L1 is not a heading",
        "#no-title is not a heading",
    ]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
    assert {path.name for path in DOCUMENTS} >= {"CHANGELOG.md", "CONTRIBUTING.md", "ring.md"}
