"""The engines that `python -m bench peers` compares, each behind the same function.

`ENGINES[name](path, prompts, dtype, new_tokens)` loads the checkpoint and returns a function. Each
call of that answers all prompts greedily, with so many tokens each, and returns `Times`. Imports of
an engine are inside its function: Flax Llama runs in an environment without the others.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


class Moment(NamedTuple):
    """The clock, and the CPU time of this process so far; or the difference of two; in seconds."""

    clock: float
    cpu: float

    @classmethod
    def now(cls) -> "Moment":
        """This moment."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Moment", steps: float = 1) -> "Moment":
        """The time of each of so many steps since then."""
        return Moment((self.clock - start.clock) / steps, (self.cpu - start.cpu) / steps)


class Times(NamedTuple):
    """Times of one answer to all prompts.

    Attributes:
      prefill: from the prompts to the first token of every answer.
      decode: of one more token for every answer; None if there was none.
    """

    prefill: Moment
    decode: Moment | None


Answer = Callable[[], Times]


def llama_jax(
    mesh: str, path: str, prompts: list[list[int]], dtype: str, new_tokens: int
) -> Answer:
    """This project's engine on a mesh, with its scheduler and without HTTP.

    It prefills the prompts in chunks, one after another. Decoding counts from the second token of
    the last answer on, when no chunk is left, and until the first answer is complete.
    """
    from llama_jax.config.sampling_params import SamplingParams
    from llama_jax.engine.core import Engine
    from llama_jax.engine.options import EngineOptions

    options = EngineOptions(
        path=path,
        mesh=mesh,
        dtype=dtype,
        max_num_seqs=len(prompts),
        max_chunk=len(prompts[0]),
        max_model_len=1024,
        prefix_caching=False,
        wait_for_programs=True,
    )
    engine = Engine(options, lambda progress: None)
    extra = 1 + len(prompts) if new_tokens > 1 else 0  # while the others are prefilled
    params = SamplingParams(temperature=0, max_tokens=new_tokens + extra, ignore_eos=True)

    def answer() -> Times:
        start = Moment.now()
        for number, prompt in enumerate(prompts):
            engine.add(number, prompt, params)
        produced = [0] * len(prompts)
        first = decoding = end = None
        counted_from = counted_to = 0
        while engine.has_work:
            for output in engine.step():
                produced[output.request_id] += 1
            if first is None and min(produced) == 1:
                first = Moment.now()
            if decoding is None and min(produced) == 2:
                decoding, counted_from = Moment.now(), sum(produced)
            elif decoding and end is None and max(produced) == new_tokens + extra:
                end, counted_to = Moment.now(), sum(produced)
        assert first
        if not (decoding and end):
            return Times(first.since(start), None)
        steps = (counted_to - counted_from) / len(prompts)
        return Times(first.since(start), end.since(decoding, steps))

    return answer


def transformers(path: str, prompts: list[list[int]], dtype: str, new_tokens: int) -> Answer:
    """transformers on PyTorch: `generate`, with a stopping criterion that notes the time."""
    import torch
    import transformers

    kind = getattr(torch, dtype)
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=kind).eval()
    tokens = torch.tensor(prompts)
    moments: list[Moment] = []

    def note(ids: Any, scores: Any, **_: Any) -> Any:
        moments.append(Moment.now())
        return torch.zeros(len(ids), dtype=torch.bool)

    def answer() -> Times:
        moments.clear()
        start = Moment.now()
        with torch.inference_mode():
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([note]),
            )
        first, last, steps = moments[0], moments[-1], len(moments) - 1
        return Times(first.since(start), last.since(first, steps) if steps else None)

    return answer


def flax_llama(path: str, prompts: list[list[int]], dtype: str, new_tokens: int) -> Answer:
    """Llama in Flax, from transformers 4: its model with its static cache, jitted as a whole.

    One step is one jitted call that updates the cache in place and chooses the next tokens. The
    host waits only for the last one.
    """
    import jax
    import jax.numpy as jnp
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(**json.loads((Path(path) / "config.json").read_text()))
    model = FlaxLlamaForCausalLM(config, dtype=jnp.dtype(dtype), _do_init=False)
    params = _flax_params(path, dtype)
    batch, length = len(prompts), len(prompts[0])
    room = length + new_tokens
    mask = jnp.ones((batch, room), jnp.int32)

    @partial(jax.jit, donate_argnums=1)
    def step(params: Any, cache: Any, tokens: jax.Array, position: jax.Array) -> tuple[Any, ...]:
        positions = jnp.broadcast_to(position + jnp.arange(tokens.shape[1]), tokens.shape)
        out = model(
            tokens,
            params=params,
            past_key_values=cache,
            attention_mask=mask,
            position_ids=positions,
        )
        return out.past_key_values, out.logits[:, -1:].argmax(-1)

    def answer() -> Times:
        cache = model.init_cache(batch, room)
        start = Moment.now()
        cache, tokens = step(params, cache, jnp.asarray(prompts), 0)
        tokens.block_until_ready()
        first = Moment.now()
        for number in range(new_tokens - 1):
            cache, tokens = step(params, cache, tokens, length + number)
        tokens.block_until_ready()
        steps = new_tokens - 1
        return Times(first.since(start), Moment.now().since(first, steps) if steps else None)

    return answer


def _flax_params(path: str, dtype: str) -> Any:
    """The checkpoint as Flax names and lays out its parameters: matrices as [in, out]."""
    import jax.numpy as jnp
    from safetensors.numpy import load_file

    params: dict[str, Any] = {}
    for name, array in load_file(Path(path) / "model.safetensors").items():
        *parents, _ = name.split(".")
        matrix = array.ndim == 2
        if name == "model.embed_tokens.weight":
            leaf = "embedding"
        else:
            leaf, array = ("kernel", array.T) if matrix else ("weight", array)
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(array, dtype)
    # It knows no tied embeddings.
    params["lm_head"] = {"kernel": params["model"]["embed_tokens"]["embedding"].T}
    return params


LLAMA_JAX = {mesh: f"llama-jax {mesh}" for mesh in ("1x1", "1x2")}
TRANSFORMERS, FLAX = "transformers", "flax"
ENGINES = {
    **{name: partial(llama_jax, mesh) for mesh, name in LLAMA_JAX.items()},
    TRANSFORMERS: transformers,
    FLAX: flax_llama,
}
