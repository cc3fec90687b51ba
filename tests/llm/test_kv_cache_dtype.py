"""`LLM(..., kv_cache_dtype=...)`, from the option to the answer."""

import numpy as np
import pytest

from llama_jax import LLM, SamplingParams
from llama_jax.engine.options import OptionError
from llama_jax.interpret import kv_cache
from tests.support.paths import ROOT

DEMO = ROOT / "demo/checkpoint"
SMALL = {"max_num_seqs": 2, "max_chunk": 64, "kv_cache_memory": 1 << 20}
GREEDY = SamplingParams(temperature=0, max_tokens=24)
QUESTION = [{"role": "user", "content": "What is 27 + 48?"}]


@pytest.mark.slow
def test_the_demo_answers_with_every_cache():
    with LLM(DEMO, in_process=True, **SMALL) as llm:
        plain, pages = llm.chat(QUESTION, GREEDY).text, llm.info.num_pages
        assert llm.info.kv_cache_dtype == "float32"
        tokens = np.array([llm.tokenizer.encode("What is a page?")])
        exact = kv_cache(llm.model, tokens)
        for name, dtype, more in (
            ("bf16", "bfloat16", 2.0),
            ("int8", "int8", 4 * 32 / 36),  # 32 numbers and a scale
            ("fp8", "float8_e4m3fn", 4 * 32 / 36),
        ):
            llm.restart(kv_cache_dtype=name)
            assert llm.info.kv_cache_dtype == dtype
            assert llm.info.num_pages == pytest.approx(more * pages, abs=1)
            assert llm.info.devices[0].kv_bytes <= 1 << 20
            assert llm.chat(QUESTION, GREEDY).text == plain
            for found, expected in zip(kv_cache(llm.model, tokens), exact, strict=True):
                assert 0 < np.abs(found[0] - expected[0]).max() <= 0.07 * np.abs(expected[0]).max()


def test_an_unknown_name_is_refused():
    with pytest.raises(OptionError, match="kv_cache_dtype") as caught:
        LLM(DEMO, kv_cache_dtype="fp4")
    assert "\n" not in str(caught.value)
