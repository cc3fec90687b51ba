"""The header of a GGUF file, and damaged files."""

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.checkpoint import open_checkpoint
from llama_jax.gguf import GgufError, find_gguf
from llama_jax.gguf.header import read_header
from sharding.errors import UserError
from tests.support.gguf_file import gpt2_metadata, tiny_backend, tiny_model, write_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    metadata = gpt2_metadata(tiny_backend(), "llama-bpe") | {"general.quantized": True}
    write_gguf(path, tiny_model(vocab_size=600), "F16", tokenizer=metadata)
    open_checkpoint(path).close()
    return path


def test_the_header_is_that_of_the_gguf_package(file):
    header, reference = read_header([file]), gguf.GGUFReader(file)
    known = {key for key in reference.fields if not key.startswith("GGUF.")}
    assert header.metadata == {key: reference.fields[key].contents() for key in known}
    assert header.tensors.keys() == {tensor.name for tensor in reference.tensors}
    for wanted in reference.tensors:
        found = header.tensors[wanted.name]
        assert found.shape == tuple(wanted.shape.tolist()[::-1])
        assert (found.type, found.offset) == (wanted.tensor_type.name, wanted.data_offset)
        assert found.nbytes == wanted.n_bytes


def test_the_alignment_of_the_tensors_is_read(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), metadata={"general.alignment": 32})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "data_alignment", 256, raising=False)
        own = gguf.GGUFWriter.__init__

        def init(writer, *arguments, **options):
            own(writer, *arguments, **options)
            writer.data_alignment = 256

        patch.setattr(gguf.GGUFWriter, "__init__", init)
        wide = write_gguf(tmp_path / "wide.gguf", tiny_model(), metadata={"general.alignment": 256})
    offsets = [tensor.offset for tensor in read_header([wide]).tensors.values()]
    assert all(offset % 256 == 0 for offset in offsets)
    assert any(t.offset % 256 for t in read_header([path]).tensors.values())
    open_checkpoint(wide)


@given(st.data())
def test_a_damaged_file_is_refused(file, tmp_path_factory, data):
    content = file.read_bytes()
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    end = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:end])
    with pytest.raises(UserError):
        open_checkpoint(path)


@given(st.data())
def test_a_file_with_wrong_bytes_is_refused_or_opened(file, tmp_path_factory, data):
    content = bytearray(file.read_bytes())
    start = min(t.offset for t in read_header([file]).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, start - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("wrong") / "model.gguf"
    path.write_bytes(content)
    try:
        open_checkpoint(path).close()
    except UserError as error:
        assert "\n" not in str(error)


def test_a_key_with_two_values_is_refused(tmp_path):
    """llama.cpp refuses it, too; the last one would silently count."""
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), metadata={"llama.rope.freq_bass": 5.0})
    open_checkpoint(path).close()
    path.write_bytes(path.read_bytes().replace(b"llama.rope.freq_bass", b"llama.rope.freq_base"))
    with pytest.raises(GgufError, match="two values for one key"):
        open_checkpoint(path)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    changes = {"blk.0.ffn_uq.weight": np.ones((48, 32), np.float32)}
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), changes=changes)
    path.write_bytes(path.read_bytes().replace(b"blk.0.ffn_uq", b"blk.0.ffn_up"))
    with pytest.raises(GgufError, match="damaged"):
        open_checkpoint(path)


def test_rows_that_are_no_whole_blocks_are_refused(file, tmp_path):
    content = bytearray(file.read_bytes())
    tensor = gguf.GGUFReader(file).tensors[0]
    *before, kind, _ = tensor.field.parts
    assert kind[0] == gguf.GGMLQuantizationType.F16 and tensor.shape[0] == 32
    at = tensor.field.offset + sum(part.nbytes for part in before)
    content[at : at + 4] = int(gguf.GGMLQuantizationType.Q4_K).to_bytes(4, "little")
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match="damaged"):
        open_checkpoint(path)


@pytest.mark.parametrize("alignment", [0, "32", 32.0])
def test_an_alignment_that_cannot_be_is_refused(tmp_path, alignment):
    metadata = {"general.alignment": alignment}
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), metadata=metadata)
    with pytest.raises(GgufError, match="damaged"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("moved", "named"),
    [
        (lambda number, offset: 0, "in the same place"),
        (lambda number, offset: offset + 32 * (number == 0), "in the same place"),
        (lambda number, offset: offset + (number == 1), "damaged"),
    ],
    ids=["all at the start", "one into the next", "beside the alignment"],
)
def test_tensors_that_cannot_lie_where_the_header_says_are_refused(file, tmp_path, moved, named):
    content = bytearray(file.read_bytes())
    for number, tensor in enumerate(gguf.GGUFReader(file).tensors):
        *before, offset = tensor.field.parts
        at = tensor.field.offset + sum(part.nbytes for part in before)
        assert int.from_bytes(content[at : at + 8], "little") == offset[0]
        content[at : at + 8] = moved(number, int(offset[0])).to_bytes(8, "little")
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=named):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "model.gguf"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(100), "version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(100), "little-endian"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, named):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=named):
        open_checkpoint(path)


def test_what_a_path_stands_for(tmp_path):
    file = tmp_path / "a" / "model.gguf"
    blob = tmp_path / "b" / "sha256-0123"  # as Ollama names its files
    for path in (file, blob):
        path.parent.mkdir()
        path.write_bytes(b"GGUF")
    assert find_gguf(file) == find_gguf(file.parent) == (file,)
    assert find_gguf(blob) == (blob,) and find_gguf(blob.parent) == ()
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "c") == ()
    (file.parent / "config.json").write_text("{}")
    assert find_gguf(file.parent) == (file,)
    (file.parent / "model.safetensors").touch()
    assert find_gguf(file.parent) == ()
    (blob.parent / "model.gguf").touch()
    assert find_gguf(blob.parent)
    (blob.parent / "weights" / "state").mkdir(parents=True)  # converted
    assert find_gguf(blob.parent) == ()
    assert find_gguf(tmp_path / ("long" * 100)) == ()  # the system refuses such a name


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny_model(), split=7)
    first, second, *_ = sorted(tmp_path.iterdir())
    alone = first.rename(tmp_path / "alone.gguf")
    with pytest.raises(GgufError, match="one of the"):
        open_checkpoint(alone)
    first.write_bytes(alone.read_bytes())
    second.write_bytes(first.read_bytes())
    with pytest.raises(GgufError, match="same tensors"):
        open_checkpoint(first)


def test_a_directory_of_several_models_needs_a_choice(tmp_path):
    for number in range(9):
        (tmp_path / f"model-Q{number}.gguf").touch()
    with pytest.raises(GgufError, match=r"9 models .*model-Q0\.gguf"):
        open_checkpoint(tmp_path)
