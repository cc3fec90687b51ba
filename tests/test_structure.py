"""The shape of the code: layers, imports, lint, types, and files short enough to read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("sharding", "llama_jax", "convert", "bench", "demo", "tests")
MOST_LINES = {"tests": 500}  # of a file; 400 elsewhere

# From the lowest layer to the highest, a package a layer: a module may import from its own package
# and from those before it. `docs/architecture.md` shows the same list.
LAYERS = (
    "sharding",
    "llama_jax.quantization",
    "llama_jax.text",
    "llama_jax.terminal",
    "llama_jax.config",
    "llama_jax.weights",
    "llama_jax.checkpoint",
    "llama_jax.model",
    "llama_jax.ring",
    "llama_jax.engine",
    "llama_jax.interpret",
    "llama_jax.pictures",
    "llama_jax.client",
    "llama_jax.llm",
    "llama_jax.serve",
    "convert",
    "bench",
)
# What the HTTP process and the capacity planner load, beside `client`, `llm` and `serve`.
WITHOUT_JAX = (
    "llama_jax.config",
    "llama_jax.engine.messages",
    "llama_jax.engine.options",
    "llama_jax.engine.pages",
    "llama_jax.engine.scheduler",
    "llama_jax.ring.sizes",
    "llama_jax.weights.table",
)


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function; for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def layer(module: str) -> int:
    """The number of the layer that a module belongs to; -1 for what is not ours."""
    for number, name in enumerate(LAYERS):
        if module == name or module.startswith(f"{name}."):
            return number
    return -1


def upward(path: Path) -> list[str]:
    own = layer(module_name(path))
    return [module for module in imports(path) if layer(module) > own]


@pytest.mark.parametrize("package", [name for name in LAYERS if "." not in name])
def test_nothing_imports_upwards(package):
    lazy = ROOT / "llama_jax" / "__init__.py"  # it names what it stands for, and imports on demand
    found = {str(path): upward(path) for path in sources(package) if path != lazy}
    assert {path: modules for path, modules in found.items() if modules} == {}


def test_an_upward_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "sharding").mkdir()
    bad = tmp_path / "sharding" / "ring.py"
    bad.write_text("def run():\n    from llama_jax.engine import core\n")
    assert sorted(upward(bad)) == ["llama_jax.engine", "llama_jax.engine.core"]


def modules_loaded_by(*modules: str) -> set[str]:
    """The top-level packages that a new process has loaded after these imports."""
    program = "\n".join(f"import {module}" for module in modules)
    program += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_http_process_and_the_scheduler_load_no_jax():
    served = [module_name(path) for path in sources("llama_jax/serve") if path.stem != "__main__"]
    loaded = modules_loaded_by(*WITHOUT_JAX, *served)
    assert "llama_jax" in loaded and not loaded & {"jax", "jaxlib", "flax", "orbax", "torch"}
    assert "jax" in modules_loaded_by("llama_jax.model.llama")  # the check would see it


def test_a_gpu_machine_needs_no_server_packages():
    """Model, ring, engine and the benchmarks run where only JAX, Flax and the readers are."""
    program = """
import sys
for name in ("fastapi", "msgspec", "uvicorn", "zmq"):
    sys.modules[name] = None  # importing it raises ImportError
import bench.audit, bench.decode, bench.divergence, bench.host_time, bench.load_speed
import llama_jax.engine.core, llama_jax.interpret, llama_jax.model, llama_jax.ring.sharded_llama
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_model_loads_no_reader_no_mesh_and_no_server():
    program = "import sys; from llama_jax.model import Llama; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name for name in done.stdout.split() if layer(name) >= 0}
    allowed = ("config", "model", "quantization", "weights")
    prefixes = ("sharding.", *(f"llama_jax.{package}" for package in allowed))
    assert {name for name in loaded if not f"{name}.".startswith(prefixes)} == set()
    assert "sharding.mesh" not in loaded


def test_nothing_unpickles():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    # The one reader of pickles goes through their instructions and calls nothing that they name.
    reader, allowed = ROOT / "convert/meta/tensor_pickle.py", "pickletools"
    for path in sources(*PACKAGES):
        found = {name.split(".")[0] for name in imports(path)} & {*forbidden, allowed}
        assert found == ({allowed} if path == reader else set()), path


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short_enough_to_read(package):
    lines = {path.name: len(path.read_text().splitlines()) for path in sources(package)}
    most = MOST_LINES.get(package, 400)
    assert lines and {path: n for path, n in lines.items() if n > most} == {}


@pytest.mark.parametrize("command", [["ruff", "check"], ["mypy"]], ids=lambda c: c[0])
def test_the_code_is_clean(command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
