"""An engine whose outputs can be computed by hand, in the real process loop, without JAX.

Token i of an answer is (last token of the prompt + 1 + i) mod 1000; token 0 is EOS. Three tokens of
every prompt are cached, every request has waited for 0.25 s, and the log-probability of token t,
also in a prompt, is -t / 1000. The rest of its behavior is in `EngineOptions.path`: "fake",
"fake:MODE" or "fake:MODE:NUMBER", where MODE is

  hang      never becomes ready
  fatal     fails to start with a `UserError`
  bug       fails to start with a defect
  exit      prints an error and exits before it is ready
  kill      kills itself with SIGKILL after NUMBER tokens
  crash     raises in the step after NUMBER tokens
  freeze    hangs in the step after NUMBER tokens
  refuse    cannot answer prompts that start with 13, nor follow grammars
"""

import os
import signal
import sys
import time
from collections.abc import Callable

import numpy as np

from llama_jax.config import ConfigError
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import RequestError
from llama_jax.engine.interface import (
    DeviceInfo,
    EngineInfo,
    Output,
    Progress,
    Stats,
    TokenLogprobs,
)
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.process import main
from llama_jax.engine.prompt_logprobs import PromptLogprobs, PromptScoring
from llama_jax.engine.sizing import CPU_PAGE

VOCAB_SIZE = 1000
EOS = 0
TICK_SECONDS = 0.002


def score(prompt: list[int], params: SamplingParams) -> PromptLogprobs | None:
    """The likeliest token in every place of a prompt is 7."""
    if params.prompt_logprobs is None:
        return None
    scoring, n = PromptScoring(len(prompt), params.prompt_logprobs), len(prompt) - 1
    top = np.full((n, 20), -np.inf)
    top[:, 0] = -0.5
    scoring.put(0, np.array(prompt[1:]) / -1000, np.full(n, 2), np.full((n, 20), 7), top)
    return scoring.result()


class FakeEngine:
    def __init__(self, options: EngineOptions, progress: Callable[[Progress], None]) -> None:
        _, _, mode = options.path.partition(":")
        self.mode, _, number = mode.partition(":")
        self.number = int(number or 0)
        progress(Progress("loading", 1, 2, "a shard"))
        if self.mode == "hang":
            time.sleep(3600)
        if self.mode == "fatal":
            raise ConfigError("There is no model at nowhere: give a checkpoint directory.")
        if self.mode == "bug":
            raise KeyError("wq")
        if self.mode == "exit":
            print("RuntimeError: the device is on fire", file=sys.stderr, flush=True)
            os._exit(3)
        self.info = EngineInfo(
            model="fake",
            mesh=options.mesh,
            platform="cpu",
            dtype="float32",
            kv_cache_dtype="float32",
            vocab_size=VOCAB_SIZE,
            max_model_len=options.max_model_len or 1_000_000,
            max_num_seqs=options.max_num_seqs or 32,
            page_size=options.page_size or CPU_PAGE,
            num_pages=1,
            devices=[DeviceInfo("fake:0", 0, 0, [0, 1], 10, 20)],
            num_programs=1,
            load_seconds=0.0,
            compile_seconds=0.0,
        )
        self.live: dict[int, list[int]] = {}  # request: next token, tokens left, stops at EOS
        self.unlucky: set[int] = set()
        self.asked: dict[int, tuple[list[int], SamplingParams]] = {}
        self.made = 0

    def add(self, request_id: int, prompt: list[int], params: SamplingParams) -> None:
        left = self.info.max_model_len - len(prompt)
        if params.max_tokens is not None:
            left = min(left, params.max_tokens)
        if prompt[0] == 13:
            self.unlucky.add(request_id)
        self.asked[request_id] = prompt, params
        self.live[request_id] = [(prompt[-1] + 1) % VOCAB_SIZE, left, not params.ignore_eos]

    def abort(self, request_id: int) -> None:
        self.live.pop(request_id, None)

    def step(self) -> list[Output]:
        time.sleep(TICK_SECONDS)
        outputs = []
        for request_id, state in list(self.live.items()):
            token, left, stops = state
            prompt, params = self.asked[request_id]
            if self.mode == "refuse" and (refused := self.refusal(request_id, params)):
                outputs.append(refused)
                del self.live[request_id]
                continue
            reason = "stop" if stops and token == EOS else "length" if left == 1 else None
            logprobs = None
            if params.logprobs is not None:
                logprobs = TokenLogprobs(-token / 1000, [(token, -0.5)])
            scores = score(prompt, params) if token == (prompt[-1] + 1) % VOCAB_SIZE else None
            outputs.append(
                Output(
                    request_id,
                    token,
                    reason,
                    cached_tokens=3,
                    logprobs=logprobs,
                    prompt_logprobs=scores,
                    queue_seconds=0.25,
                )
            )
            state[:2] = [(token + 1) % VOCAB_SIZE, left - 1]
            if reason is not None:
                del self.live[request_id]
        self.made += len(outputs)
        if self.mode == "kill" and self.made > self.number:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mode == "freeze" and self.made > self.number:
            time.sleep(3600)
        if self.mode == "crash" and self.made > self.number:
            raise RuntimeError("INTERNAL: a device is lost\nand here come pages of text")
        return outputs

    def refusal(self, request_id: int, params: SamplingParams) -> Output | None:
        if request_id in self.unlucky:
            return Output(request_id, None, "error", "13 brings bad luck.")
        if params.grammar:
            return Output.of_error(request_id, RequestError("No token is left.", "grammar"))
        return None

    def stats(self) -> Stats:
        return Stats(num_running=len(self.live), generation_tokens=self.made)

    @property
    def has_work(self) -> bool:
        return bool(self.live)


if __name__ == "__main__":
    main(build=FakeEngine)
