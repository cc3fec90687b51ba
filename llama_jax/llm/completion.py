"""The answer to one prompt. Imports no JAX."""

from dataclasses import dataclass

from llama_jax.engine.interface import FinishReason, TokenLogprobs
from llama_jax.engine.prompt_logprobs import PromptLogprobs
from llama_jax.llm.notebook.html import completion_html


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
      text: the answer, by default without special tokens and without the stop string that ended it.
      token_ids: every generated token, including an EOS or stop token.
      finish_reason: "stop" (an EOS token, a stop token or a stop string), "length" or "error".
      prompt_token_ids: the tokens of the prompt.
      error: one sentence if the reason is "error"; `text` then has what came before it.
      prompt: the text of the prompt, with the special tokens of a chat; None if it was given as
        token ids.
      logprobs: the log-probabilities at each generated token, if `SamplingParams.logprobs` asks for
        them; else None.
      prompt_logprobs: None for the first token of the prompt and the log-probabilities of each of
        the others, if `SamplingParams.prompt_logprobs` asks for them; else None.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    error: str | None = None
    prompt: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: PromptLogprobs | None = None

    def _repr_html_(self) -> str:
        return completion_html(
            prompt=self.prompt,
            num_prompt_tokens=len(self.prompt_token_ids),
            text=self.text,
            num_tokens=len(self.token_ids),
            finish_reason=self.finish_reason,
            error=self.error,
        )
