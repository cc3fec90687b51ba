// One turn of the conversation: what was asked, and the answer as it grows.

import { element } from "./elements.js";
import { tokenSpan } from "./tokens.js";
import { count, digits, milliseconds } from "./units.js";

const ENDS = {
  stop: "",
  length: "It ended at the maximum number of tokens.",
  stopped: "Stopped.",
};

export class Turn {
  constructor(prompt, names) {
    this.prompt = prompt;
    this.text = "";
    this.body = element("div", { class: "text" });
    this.note = element("p", { class: "note" });
    this.answer = element(
      "article",
      { class: "answer busy", "aria-label": names.answer, "aria-busy": "true" },
      element("p", { class: "who" }, names.answer),
      this.body,
      this.note,
    );
    this.element = element(
      "div",
      { class: "turn" },
      element(
        "article",
        { class: "question", "aria-label": names.question },
        element("p", { class: "who" }, names.question),
        element("div", { class: "text" }, prompt),
      ),
      this.answer,
    );
    this.started = performance.now();
    this.first = null;
    this.pending = []; // tokens whose text has not come yet
  }

  append({ text, tokens }) {
    this.first ??= performance.now();
    this.text += text;
    this.pending.push(...tokens);
    if (text === "") return;
    if (this.pending.length === 0) {
      if (this.body.lastChild?.nodeType === Node.TEXT_NODE) this.body.lastChild.appendData(text);
      else this.body.append(text);
      return;
    }
    const span = tokenSpan(text, this.pending);
    if (this.body.children.length === 0) span.tabIndex = 0;
    this.body.append(span);
    this.pending = [];
  }

  // Ends the answer: `reason` is the server's finish reason, or "stopped". Returns how it ended.
  finish(reason, usage) {
    this.#end();
    const end = ENDS[reason] ?? `It ended with the reason "${reason}".`;
    this.note.textContent = [end, this.first === null ? "" : this.#facts(usage)].join(" ").trim();
    return end || "End of the answer.";
  }

  #facts(usage) {
    const facts = [`First token after ${milliseconds((this.first - this.started) / 1000)}`];
    if (usage) facts.push(count(usage.completion_tokens, "token"));
    if (usage?.completion_tokens > 1) {
      const seconds = (performance.now() - this.first) / 1000;
      facts.push(`${digits((usage.completion_tokens - 1) / seconds)} tokens/s`);
    }
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    if (cached) facts.push(`${cached} of ${usage.prompt_tokens} prompt tokens from the cache`);
    return `${facts.join(", ")}.`;
  }

  fail(message) {
    this.#end();
    this.note.textContent = message;
    this.note.classList.add("problem");
    this.note.setAttribute("role", "alert");
  }

  #end() {
    this.answer.classList.remove("busy");
    this.answer.removeAttribute("aria-busy");
  }
}
