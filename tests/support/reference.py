"""Small random models, their logits by transformers on PyTorch, and the ring without a server."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
import transformers

from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.load import choose_dtype, load_params
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.constraint import Constraint
from llama_jax.engine.device_memory import choose_mesh_sizes
from llama_jax.engine.executor import Executor
from llama_jax.engine.interface import TokenLogprobs
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.programs import Programs
from llama_jax.engine.prompt_logprobs import PromptLogprobs
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.sizing import CPU_PAGE
from llama_jax.engine.tick_loop import TickLoop
from llama_jax.model.kv_storage import choose_kv_dtype
from llama_jax.ring.kv_cache import page_bytes
from sharding.mesh import make_mesh

MESHES = ("1x1", "2x1", "4x1", "1x2", "2x2", "4x2")

# Unfinished programs with collectives can hang XLA:CPU. The setting counts only before JAX looks
# for devices, which no test module does while it is imported.
jax.config.update("jax_cpu_enable_async_dispatch", False)

ROPE_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def make_model(
    *,
    vocab_size: int = 256,
    embed_dim: int = 64,
    mlp_dim: int = 96,
    num_layers: int = 4,
    num_heads: int = 8,
    num_kv_heads: int = 4,
    head_dim: int = 8,
    rope: dict = ROPE_PLAIN,
    tied: bool = False,
    max_position_embeddings: int = 512,
    seed: int = 0,
) -> transformers.LlamaForCausalLM:
    """A float32 Llama with random weights, large enough that its logits differ clearly."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=embed_dim,
        intermediate_size=mlp_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rope_parameters=rope,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=vocab_size - 1,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return model


def save_model(model: transformers.LlamaForCausalLM, path: Path) -> Path:
    """Writes a Hugging Face checkpoint directory."""
    model.save_pretrained(path)
    return path


def reference_logits(model: transformers.LlamaForCausalLM, tokens: list[int]) -> np.ndarray:
    """The logits after each token by transformers, `[T, V]` float32."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


class Request(NamedTuple):
    """A request, and the tick in which it arrives."""

    request_id: int
    tick: int
    prompt: list[int]
    params: SamplingParams


@dataclass
class Run:
    """The outputs of the ring.

    Attributes:
      tokens: request id -> its tokens.
      logits: request id -> token index -> the logits of that token, `[V']` float32.
      reasons: request id -> finish reason: "stop", "length", "error" or "abort".
      logprobs: request id -> those of each token, None if they were not asked for.
      prompt_logprobs: request id -> those of its prompt, if they were asked for.
    """

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    logits: dict[int, dict[int, np.ndarray]] = field(default_factory=lambda: defaultdict(dict))
    reasons: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs | None]] = field(
        default_factory=lambda: defaultdict(list)
    )
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)


def greedy_requests(
    lengths: Iterable[int], *, vocab_size: int, max_tokens: int, ticks_apart: int = 3
) -> list[Request]:
    """One request per prompt length, of random tokens, arriving one after another."""
    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return [
        Request(i, i * ticks_apart, rng.integers(0, vocab_size, length).tolist(), params)
        for i, length in enumerate(lengths)
    ]


def make_loop(
    path: Path,
    mesh: str,
    *,
    results_late: int = 0,
    fill: float = float("nan"),
    num_pages: int | None = None,
    largest_only: bool = False,
    **options: object,
) -> TickLoop:
    """A `TickLoop` that serves a checkpoint; its page pool starts full of NaN.

    With `largest_only`, it has one bucket of rows, and one of a chunk.
    """
    device_mesh = make_mesh(mesh)
    with contextlib.closing(open_checkpoint(path)) as reader:
        config = reader.config
        dtype = choose_dtype(options.get("dtype", "auto"), config, "cpu")
        params = load_params(reader, device_mesh, dtype)
    cache_dtype = choose_kv_dtype(options.get("kv_cache_dtype", "auto"), dtype)
    if num_pages is not None:
        page_size = options.get("page_size", CPU_PAGE)
        memory = num_pages * page_bytes(config, device_mesh, page_size, cache_dtype)
        options["kv_cache_memory"] = memory
    chosen = EngineOptions(path=str(path), mesh=mesh, **options)
    sizes, _ = choose_mesh_sizes(chosen, config, device_mesh, dtype)
    if largest_only:
        rows, chunks = (sizes.max_rows,), (0, sizes.max_chunk)
        sizes = replace(sizes, row_buckets=rows, chunk_buckets=chunks)
    executor = Executor(
        Programs(config, device_mesh, sizes, dtype, cache_dtype=cache_dtype), params, fill
    )
    scheduler = Scheduler(sizes, device_mesh.shape["stage"])
    return TickLoop(scheduler, executor, results_late)


def restart(loop: TickLoop, results_late: int = 0) -> TickLoop:
    """An empty loop with the compiled programs of another, which must not be used any more."""
    loop.executor.reset(float("nan"))
    return TickLoop(Scheduler(loop.sizes, loop.num_stages), loop.executor, results_late)


def drive(
    loop: TickLoop,
    requests: Iterable[Request | tuple],
    *,
    max_model_len: int = 512,
    stop_ids: frozenset[int] = frozenset(),
    aborts: Iterable[tuple[int, int]] = (),
    keep_logits: bool = True,
    max_ticks: int = 20000,
) -> Run:
    """Runs requests until all have ended. Aborts are (tick, request id)."""
    run = Run()

    def keep(packet, result):
        logits = np.asarray(result.logits)
        for index, segment in packet.results(result.bucket.rows):
            if segment.epoch == segment.sequence.epoch:
                token_index = segment.position + segment.length
                run.logits[segment.sequence.request_id][token_index] = logits[index]

    loop.on_result = keep if keep_logits else lambda packet, result: None
    waiting = sorted((Request(*request) for request in requests), key=lambda r: r.tick)
    for tick in range(max_ticks):
        while waiting and waiting[0].tick <= tick:
            request = waiting.pop(0)
            loop.scheduler.add(
                request.request_id,
                request.prompt,
                request.params,
                max_model_len=max_model_len,
                seed=request.params.seed or 0,
                stop_ids=stop_ids,
                constraint=Constraint(request.params, loop.executor.config.vocab_size)
                if request.params.constrains
                else None,
            )
        for _, request_id in (abort for abort in aborts if abort[0] == tick):
            unfinished = loop.scheduler.num_unfinished
            loop.scheduler.abort(request_id)
            assert loop.scheduler.num_unfinished == unfinished - 1, "the request to abort has ended"
            run.reasons[request_id] = "abort"
        if not waiting and not loop.has_work:
            return run
        for output in loop.step():
            assert output.request_id not in run.reasons, "an output after the finish reason"
            if output.token is not None:
                run.tokens[output.request_id].append(output.token)
                run.logprobs[output.request_id].append(output.logprobs)
            if output.prompt_logprobs is not None:
                assert len(run.tokens[output.request_id]) == 1, "not in the first output"
                run.prompt_logprobs[output.request_id] = output.prompt_logprobs
            if output.finish_reason:
                run.reasons[output.request_id] = output.finish_reason
    raise AssertionError(f"not finished after {max_ticks} ticks")


class Distance(NamedTuple):
    """The difference between the ring and transformers, given the ring's own tokens.

    Attributes:
      logits: the largest difference of two logits, relative to the largest logit.
      tokens: the largest gap between the best logit and that of the token that the ring chose.
    """

    logits: float
    tokens: float


def distance(model: transformers.LlamaForCausalLM, request: Request, run: Run) -> Distance:
    """Compares every token of a request, and its logits, with transformers."""
    prompt, tokens = request.prompt, run.tokens[request.request_id]
    logits = run.logits[request.request_id]
    assert sorted(logits) == list(range(len(prompt), len(prompt) + len(tokens)))
    expected = reference_logits(model, prompt + tokens)[len(prompt) - 1 : -1]
    found = np.stack([logits[index] for index in sorted(logits)])
    found, padding = np.split(found, [expected.shape[1]], axis=1)
    assert (padding == -np.inf).all()
    chosen = np.take_along_axis(expected, np.array(tokens)[:, None], axis=1)
    return Distance(
        float(np.abs(found - expected).max() / np.abs(expected).max()),
        float((expected.max(axis=1, keepdims=True) - chosen).max()),
    )
