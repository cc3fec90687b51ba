"""The notebooks run on other checkpoints than the demo's, or say in one sentence what they need."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.support.paths import ROOT
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

pytestmark = pytest.mark.slow
LENGTH = {"max_position_embeddings": 1024}


def base(path: Path) -> None:
    """A model without a chat template."""
    write_checkpoint(path, vocab_size=320, num_hidden_layers=4, **LENGTH)
    make_tokenizer(path, chat_template=False)


def geometry(path: Path) -> None:
    """Fewer layers and heads than the demo checkpoint, and not powers of two."""
    sizes = {"num_hidden_layers": 5, "num_attention_heads": 6, "hidden_size": 48, "head_dim": 8}
    write_checkpoint(path, vocab_size=350, tie_word_embeddings=True, **sizes, **LENGTH)
    make_tokenizer(path)


def run(number: int, checkpoint: Path) -> None:
    """Runs a notebook with its line that selects the checkpoint changed."""
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("../demo/checkpoint", str(checkpoint))
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=180, resources=where).execute()


@pytest.mark.parametrize(("number", "write"), [(2, base), (4, geometry)])
def test_a_notebook_runs(tmp_path, number, write):
    write(tmp_path)
    run(number, tmp_path)


@pytest.mark.parametrize(("number", "write"), [(1, base)])
def test_a_notebook_says_what_it_needs(tmp_path, number, write):
    write(tmp_path)
    with pytest.raises(CellExecutionError) as caught:
        run(number, tmp_path)
    assert caught.value.ename == "AssertionError"
    assert caught.value.evalue.endswith(".") and "\n" not in caught.value.evalue
