"""SmolLM2-135M-Instruct, a trained model in GGUF: its answers are those of transformers.

transformers gets the weights as the `gguf` package's own reader and NumPy dequantize them, with the
rows of queries and keys put in order here.
"""

import gguf
import httpx
import numpy as np
import pytest
import torch
import transformers

from convert.__main__ import main
from llama_jax import LLM, SamplingParams
from llama_jax.checkpoint import open_checkpoint
from llama_jax.text.tokenizer import Tokenizer
from tests.support.real_models import smollm2
from tests.support.server_process import REAL_SERVER, ServerProcess
from tests.support.tiny_checkpoint import bits, read

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from 1 to 10.",
    "Explain in one sentence why the sky is blue.",
]
MAX_TOKENS = 32
OPTIONS = {"max_model_len": 256, "max_num_seqs": 4, "max_chunk": 64}
# Logits of the two programs differ by about 1e-4. A smaller distance between the best two could
# decide a token differently; the questions have none.
CLEAR = 2e-3


@pytest.fixture(scope="module")
def path():
    return smollm2()


@pytest.fixture(scope="module")
def reference(path):
    """The model in transformers, in float32."""
    reader = gguf.GGUFReader(path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    model.model.rotary_emb.__init__(config)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for hf_name, weight in model.state_dict().items():
        if hf_name == "lm_head.weight":
            continue
        tensor = stored.pop(names.get_name(hf_name, try_suffixes=(".weight",)))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if "q_proj" in hf_name or "k_proj" in hf_name:
            values = values.reshape(-1, 32, 2, 576).swapaxes(1, 2)  # heads, pairs, halves
        weight.copy_(torch.from_numpy(np.ascontiguousarray(values)).reshape(weight.shape))
    assert not stored
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module")
def answers(path, reference):
    """For each question, the ids of the chat and of the greedy answer, ended by EOS or length."""
    tokenizer, found = Tokenizer(path), []
    for question in QUESTIONS:
        prompt = tokenizer.encode_chat([{"role": "user", "content": question}])
        with torch.no_grad():
            out = reference.generate(
                torch.tensor([prompt]),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=2,
            )
        best = torch.stack(out.logits).topk(2).values
        assert (best[..., 0] - best[..., 1]).min() > CLEAR, question
        found.append((prompt, out.sequences[0, len(prompt) :].tolist()))
    return found


def test_weights_are_those_of_transformers(path, reference):
    reader, weights = open_checkpoint(path), reference.state_dict()
    for name in reader.tensors:
        assert bits(read(reader, name, dtype=np.float32)) == bits(weights[name]), name


@pytest.mark.parametrize("mesh", ["1x1", "4x1"])
def test_greedy_answers_are_those_of_transformers(path, answers, mesh):
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    with LLM(path, mesh=mesh, **OPTIONS) as llm:
        for question, (prompt, wanted) in zip(QUESTIONS, answers, strict=True):
            found = llm.chat([{"role": "user", "content": question}], params)
            assert found.prompt_token_ids == prompt
            assert found.token_ids == wanted
            assert found.finish_reason == ("stop" if wanted[-1] == 2 else "length")
    assert any(wanted[-1] == 2 for _, wanted in answers), "no answer ends by itself"


def test_the_file_is_served(path, answers):
    """With one command, and chat works; the model has the name of the file."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    with ServerProcess(REAL_SERVER, str(path), *arguments) as server:
        server.wait_ready()
        url = server.url + "/v1"
        [model] = httpx.get(f"{url}/models").json()["data"]
        assert model["id"] == path.stem
        body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0}
        answer = httpx.post(
            f"{url}/chat/completions", json=body | {"max_tokens": MAX_TOKENS}, timeout=60
        ).json()
        text = Tokenizer(path).decode(answers[0][1])
        assert answer["choices"][0]["message"]["content"] == text
        assert "Paris" in text


def test_a_conversion_keeps_the_weights_and_the_tokenizer(path, tmp_path):
    assert main(["gguf", str(path), str(tmp_path / "new"), "--dtype", "float32"]) == 0
    source, new = open_checkpoint(path), open_checkpoint(tmp_path / "new")
    for name in ("model.embed_tokens.weight", "model.layers.29.self_attn.k_proj.weight"):
        assert bits(read(new, name)) == bits(read(source, name, dtype=np.float32))
    assert new.config.eos_token_ids == source.config.eos_token_ids == (2, 0)
    chat = [{"role": "user", "content": "It's 12:30."}]
    assert Tokenizer(tmp_path / "new").encode_chat(chat) == Tokenizer(path).encode_chat(chat)
