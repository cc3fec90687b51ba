"""Small random models, their answers by transformers on PyTorch, and the ring without a server."""

import contextlib
import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import transformers

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
    """A Llama with random weights, large enough that its logits differ clearly; float32."""
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
    """[T, V] float32: after each token, by transformers."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


@dataclasses.dataclass
class Run:
    """What came out of the ring: tokens by request, and logits by (request, token index)."""

    tokens: dict[int, list[int]]
    logits: dict[int, dict[int, np.ndarray]]
    reasons: dict[int, str]


def make_loop(path, mesh: str, *, results_late: int = 0, fill: float = float("nan"), **options):
    """A `TickLoop` over a checkpoint, the pool full of NaN, and its engine's limits."""
    from llama_jax.checkpoint import open_checkpoint
    from llama_jax.checkpoint.load import choose_dtype, load_params
    from llama_jax.engine.executor import Executor
    from llama_jax.engine.options import EngineOptions
    from llama_jax.engine.scheduler import Scheduler
    from llama_jax.engine.sizing import choose_limits
    from llama_jax.engine.tick_loop import TickLoop
    from sharding.mesh import make_mesh

    options = EngineOptions(path=str(path), mesh=mesh, **options)
    with contextlib.closing(open_checkpoint(path)) as reader:
        config = reader.config
        device_mesh = make_mesh(mesh)
        dtype = choose_dtype(options.dtype, config, "cpu")
        params = load_params(reader, device_mesh, dtype)
    limits, longest = choose_limits(options, config, device_mesh, dtype)
    executor = Executor(config, device_mesh, limits, params, dtype, fill)
    scheduler = Scheduler(limits, device_mesh.shape["stage"], options.max_queue)
    loop = TickLoop(scheduler, executor, results_late)
    return loop


def drive(loop, requests, *, max_model_len=512, stop_ids=frozenset(), aborts=(), keep_logits=True, max_ticks=20000):
    """Runs requests to their end.

    requests: (request id, tick of arrival, prompt, params); aborts: (tick, request id).
    """
    run = Run(defaultdict(list), defaultdict(dict), {})

    def keep(packet, result):
        logits = np.asarray(result.logits)
        for index, segment in packet.results(result.bucket.rows):
            if segment.epoch == segment.sequence.epoch:
                where = segment.position + segment.length
                run.logits[segment.sequence.request_id][where] = logits[index]

    if keep_logits:
        loop.on_result = keep
    waiting = sorted(requests, key=lambda r: r[1])
    aborts = list(aborts)
    for tick in range(max_ticks):
        while waiting and waiting[0][1] <= tick:
            request_id, _, prompt, params = waiting.pop(0)
            loop.scheduler.add(
                request_id, prompt, params,
                max_model_len=max_model_len, seed=params.seed or 0, stop_ids=stop_ids,
            )
        for when, request_id in aborts:
            if when == tick:
                loop.scheduler.abort(request_id)
                run.reasons.setdefault(request_id, "abort")
        if not waiting and not loop.has_work:
            return run
        for output in loop.step():
            assert run.reasons.get(output.request_id) is None, "an output after the end"
            if output.token is not None:
                run.tokens[output.request_id].append(output.token)
            if output.finish_reason:
                run.reasons[output.request_id] = output.finish_reason
    raise AssertionError(f"not finished after {max_ticks} ticks")
