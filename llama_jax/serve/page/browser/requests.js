// The two ways to ask for text: a chat, or for models without a chat template, a completion.

const ALTERNATIVES = 5; // shown for a colored token

// A part of an answer: {text, tokens, reason}. A token is {text, logprob, alternatives}.
const chat = {
  path: "v1/chat/completions",

  body(turns, prompt, { fields, system, colored }) {
    const messages = system === "" ? [] : [{ role: "system", content: system }];
    for (const turn of turns) {
      messages.push({ role: "user", content: turn.prompt });
      messages.push({ role: "assistant", content: turn.text });
    }
    messages.push({ role: "user", content: prompt });
    const logprobs = colored ? { logprobs: true, top_logprobs: ALTERNATIVES } : {};
    return { messages, ...fields, ...logprobs };
  },

  part(choice) {
    const tokens = (choice.logprobs?.content ?? []).map((entry) => ({
      text: entry.token,
      logprob: entry.logprob,
      alternatives: entry.top_logprobs.map(({ token, logprob }) => ({ text: token, logprob })),
    }));
    return { text: choice.delta.content ?? "", tokens, reason: choice.finish_reason };
  },
};

// The model continues the whole text so far.
const completion = {
  path: "v1/completions",

  body(turns, prompt, { fields, colored }) {
    const before = turns.map((turn) => turn.prompt + turn.text).join("");
    return { prompt: before + prompt, ...fields, ...(colored ? { logprobs: ALTERNATIVES } : {}) };
  },

  part(choice) {
    const { tokens = [], token_logprobs, top_logprobs } = choice.logprobs ?? {};
    return {
      text: choice.text,
      tokens: tokens.map((text, index) => ({
        text,
        logprob: token_logprobs[index],
        alternatives: Object.entries(top_logprobs[index])
          .map(([other, logprob]) => ({ text: other, logprob }))
          .sort((first, second) => second.logprob - first.logprob),
      })),
      reason: choice.finish_reason,
    };
  },
};

export const kinds = { chat, completion };
