"""The answer to one prompt. Imports no JAX."""

from dataclasses import dataclass

from llama_jax.engine.interface import FinishReason
from llama_jax.llm.notebook.html import completion_html


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
      text: without special tokens, and without the stop string that ended it.
      token_ids: all that were generated, an EOS or stop token included.
      finish_reason: "stop" (an EOS or stop token, or a stop string), "length", or "error".
      prompt_token_ids: the prompt as the model saw it.
      error: one sentence where the reason is "error"; what came before it is in `text`.
      prompt: the prompt's text, of a chat with its special tokens; None where the prompt was given
        as token ids.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    error: str | None = None
    prompt: str | None = None

    def _repr_html_(self) -> str:
        return completion_html(
            prompt=self.prompt,
            num_prompt_tokens=len(self.prompt_token_ids),
            text=self.text,
            num_tokens=len(self.token_ids),
            finish_reason=self.finish_reason,
            error=self.error,
        )
