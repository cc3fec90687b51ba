"""Pictures of a running engine, in a notebook kernel, and the HTML of a mesh."""

import base64
import io
import subprocess
import sys
from html.parser import HTMLParser

import jax
import nbformat
import numpy as np
import pytest
from jax.sharding import Mesh
from matplotlib import image
from nbclient import NotebookClient

from llama_jax import pictures
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.core import Engine
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.recording import record
from llama_jax.terminal.units import bytes_text
from tests.support.paths import ROOT
from tests.support.programs import compile_few
from tests.support.reference import make_model, save_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    # The smallest sizes compile the fewest programs.
    model = make_model(num_layers=2, vocab_size=8192, embed_dim=128)  # megabytes
    path = save_model(model, tmp_path_factory.mktemp("model"))
    small = dict(max_num_seqs=4, max_model_len=128, max_chunk=64)
    with pytest.MonkeyPatch.context() as patch:
        compile_few(patch)
        yield Engine(EngineOptions(path=str(path), mesh="2x2", **small))


@pytest.fixture(scope="module")
def recording(engine):
    with record(engine) as found:
        for request_id in range(5):
            params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
            engine.add(request_id, [20] * (30 + 9 * request_id), params)
        while engine.has_work:
            engine.step()
    return found


def test_a_real_run_is_recorded_and_drawn(engine, recording):
    stats = engine.stats()
    assert len(recording.ticks) == stats.ticks and recording.request_ids == [0, 1, 2, 3, 4]
    assert recording.busy_share() == stats.stage_ticks_busy / stats.stage_ticks
    tokens = sum(tick.packet.chunk_tokens for tick in recording.ticks)
    assert tokens == stats.prompt_tokens
    # The prompt's packet samples the first of six tokens; each decode row samples one of the rest.
    assert sum(len(tick.packet.rows) for tick in recording.ticks) == 5 * 5
    picture = pictures.timeline(recording, slice(None))
    axes = picture.axes[0]
    empty = sum(1 for cell in axes.patches if cell.get_facecolor()[3] == 0)
    assert len(axes.patches) == stats.stage_ticks
    assert empty == stats.stage_ticks - stats.stage_ticks_busy
    assert f"{100 * recording.busy_share():.0f}%" in picture.get_suptitle()
    title = pictures.page_occupancy(recording).get_suptitle()
    assert f"at most {max(sum(t.pages.values()) for t in recording.ticks)} of" in title


def test_mesh_and_memory_of_a_real_engine(engine):
    executor = engine.loop.executor
    expected = {device: [0, 0] for device in executor.mesh.devices.flat}
    for kind, arrays in enumerate([executor.params, executor.state.cache]):
        for array in jax.tree.leaves(arrays):
            for shard in array.addressable_shards:
                expected[shard.device][kind] += shard.data.nbytes
    for of in [(engine,), (executor.mesh, executor.params, executor.state.cache)]:
        texts = [text.get_text().split("\n")[-2:] for text in pictures.mesh(*of).axes[0].texts]
        assert texts == [
            [f"weights {bytes_text(weights)}", f"KV cache {bytes_text(cache)}"]
            for weights, cache in expected.values()
        ]
        bars = [bar.get_width() for bar in pictures.memory(*of).axes[0].patches]
        assert np.allclose(np.array(bars) * 1e6, np.array(list(expected.values())).ravel())


@pytest.mark.slow
def test_a_kernel_shows_pictures_and_meshes_with_and_without_pyplot():
    cells = [
        "import os; os.environ |= {'JAX_NUM_CPU_DEVICES': '4', 'JAX_PLATFORMS': 'cpu'}",
        "import sys, numpy as np\n"
        "from llama_jax import pictures\n"
        "from sharding.mesh import make_mesh",
        "picture = pictures.attention(np.eye(3), list('abc'))\npicture",
        "make_mesh('2x2')",
        "'matplotlib.pyplot' in sys.modules",
        "%matplotlib inline\n"
        "import matplotlib.pyplot as plt\n"
        "pictures.attention(np.eye(3), list('abc'))",
        "another = pictures.attention(np.eye(3), list('abc'))\nplt.get_fignums()",
        "from llama_jax.text.tokenizer import Tokenizer\nTokenizer('demo/checkpoint').vocab_size",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = [[output for output in cell.outputs] for cell in notebook.cells]
    for shown in (outputs[2], outputs[5]):
        (output,) = shown  # displayed once
        pixels = image.imread(io.BytesIO(base64.b64decode(output.data["image/png"])))
        assert pixels[0, 0, 3] == 0 and pixels[..., 3].max() == 1 and pixels.shape[1] > 200
    assert "<table" in outputs[3][0].data["text/html"]
    assert outputs[4][0].data["text/plain"] == "False"
    assert [output.data["text/plain"] for output in outputs[6]] == ["[]"]
    (vocabulary,) = outputs[7]  # only the value: no warning from importing transformers
    assert vocabulary.data["text/plain"] == "1813"


def test_importing_the_package_loads_no_matplotlib_and_pictures_load_no_pyplot():
    program = (
        "import sys, llama_jax, llama_jax.llm.llm, llama_jax.engine.recording\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import llama_jax.pictures\n"
        "assert 'matplotlib' in sys.modules\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_without_matplotlib_the_error_names_the_extra_to_install():
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "try: import llama_jax.pictures\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "llama-jax[notebook]" in done.stdout


class Table(HTMLParser):
    """The texts of the cells, row by row. Asserts that every tag is closed."""

    def __init__(self, html: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.styles = ""
        self.feed(html)
        assert self.tags == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.styles += dict(attributes).get("style", "") + ";"
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag

    def handle_data(self, data):
        if self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_mesh_html_is_the_grid_of_devices():
    devices = np.array(jax.devices()[:8])
    html = pictures.mesh_html(Mesh(devices.reshape(4, 2), ("stage", "model")))
    table = Table(html)
    assert table.rows == [
        ["", "model 0", "model 1"],
        *[[f"stage {i}", f"cpu:{2 * i}", f"cpu:{2 * i + 1}"] for i in range(4)],
    ]
    assert "stage 4 × model 2: 8 devices (cpu)" in html
    assert "currentColor" in table.styles and "background:none" in table.styles
    assert not {"#", "white", "black"} & {*table.styles}
    line = Table(pictures.mesh_html(Mesh(devices[:2], ("data",))))
    assert line.rows == [["data 0", "cpu:0"], ["data 1", "cpu:1"]]
    cube = pictures.mesh_html(Mesh(devices.reshape(2, 2, 2), ("x", "y", "z")))
    rows = Table(cube).rows
    assert len(rows) == 6 and "x 1" in cube
    assert (rows[0], rows[5]) == (["", "z 0", "z 1"], ["y 1", "cpu:6", "cpu:7"])


def test_mesh_html_escapes_names():
    bad = "<script>alert(1)</script>"
    html = pictures.mesh_html(Mesh(np.array(jax.devices()[:4]).reshape(2, 2), (bad, "&b")))
    table = Table(html)  # not a tag
    assert "<script" not in html and table.rows[1][0] == f"{bad} 0"
    assert table.rows[0][1] == "&b 0"
