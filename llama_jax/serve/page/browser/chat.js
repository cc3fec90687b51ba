// The conversation: it is kept in this tab's memory, and sent whole with every message.

import { call, events } from "./api.js";
import { byId, element } from "./elements.js";
import { mark, read, wrong } from "./parameters.js";
import { kinds } from "./requests.js";
import { finish, speak } from "./spoken.js";
import { explainTokens } from "./tokens.js";
import { Turn } from "./turn.js";

const NAMES = {
  chat: { question: "You", answer: "Model" },
  completion: { question: "Prompt", answer: "Continuation" },
};
const EXAMPLES = {
  chat: ["What is a pipeline stage?", "What is 27 + 48?", "Why does the ring never drain?"],
  completion: ["Once upon a time", "The capital of France is", "def fibonacci(n):"],
};

const transcript = byId("transcript");
const empty = byId("empty");
const message = byId("message");
const parameters = byId("parameters");

let kind = "chat";
let turns = [];
let following = true; // whether the end of the conversation is in sight, and stays there
let running = null; // the AbortController of the answer that is being generated

export function startChat() {
  explainTokens(transcript);
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  message.addEventListener("input", fitMessage);
  let before = 0;
  transcript.addEventListener("scroll", () => {
    const { scrollTop, scrollHeight, clientHeight } = transcript;
    if (scrollTop < before) following = false;
    else if (scrollHeight - scrollTop - clientHeight < 40) following = true;
    before = scrollTop;
  });
  parameters.addEventListener("input", () => {
    mark(parameters, null);
    byId("scale").hidden = !parameters.elements.colored.checked;
  });
  parameters.addEventListener("submit", (event) => event.preventDefault());
  byId("stop").addEventListener("click", stop);
  byId("regenerate").addEventListener("click", regenerate);
  byId("clear").addEventListener("click", clear);
}

// A model without a chat template continues texts.
export function setKind(chat) {
  kind = chat ? "chat" : "completion";
  message.placeholder = chat ? "Message" : "A text to continue";
  byId("message-label").textContent = message.placeholder;
  for (const field of parameters.querySelectorAll("[data-chat-only]")) field.hidden = !chat;
  byId("examples").replaceChildren(...EXAMPLES[kind].map(example));
  if (!chat) {
    byId("empty-hint").textContent =
      "This model has no chat template: it continues the text. The text is kept in this tab's " +
      "memory only.";
  }
}

export function stop() {
  running?.abort();
}

export function regenerate() {
  if (running || turns.length === 0) return;
  const last = turns.pop();
  last.element.remove();
  generate(last.prompt);
}

export function clear() {
  stop();
  turns = [];
  transcript.replaceChildren(empty);
  empty.hidden = false;
  byId("regenerate").disabled = true;
  message.focus();
}

function example(prompt) {
  const button = element("button", { type: "button" }, prompt);
  button.addEventListener("click", () => {
    message.focus();
    if (!running) generate(prompt);
  });
  return element("li", {}, button);
}

function send() {
  const prompt = message.value;
  if (running || prompt.trim() === "") return;
  message.value = "";
  fitMessage();
  generate(prompt);
}

async function generate(prompt) {
  const field = wrong(parameters);
  const turn = new Turn(prompt, NAMES[kind]);
  const before = turns.filter((earlier) => earlier.text !== ""); // a failed turn is not sent again
  turns.push(turn);
  empty.hidden = true;
  transcript.append(turn.element);
  following = true;
  follow();
  if (field) {
    showParameters(true);
    problem(turn, `${field.closest("label").firstChild.data.trim()}: ${field.validationMessage}`, field.name);
    return;
  }
  busy(new AbortController());
  const { signal } = running;
  try {
    const usage = await receive(turn, before, signal);
    finish(turn.finish(turn.reason, usage));
    follow();
  } catch (error) {
    if (signal.aborted) finish(turn.finish("stopped"));
    else problem(turn, error.message, error.param);
  }
  if (running?.signal === signal) busy(null);
}

async function receive(turn, before, signal) {
  const { path, body, part } = kinds[kind];
  const stream = { stream: true, stream_options: { include_usage: true } };
  const response = await call(path, {
    body: { ...body(before, turn.prompt, read(parameters)), ...stream },
    signal,
  });
  let usage = null;
  for await (const event of events(response)) {
    usage = event.usage ?? usage;
    for (const choice of event.choices) {
      const next = part(choice);
      turn.append(next);
      follow();
      turn.reason = next.reason ?? turn.reason;
      speak(next.text);
    }
  }
  return usage;
}

function problem(turn, text, param) {
  turn.fail(text);
  finish("");
  mark(parameters, param);
  follow();
  byId("regenerate").disabled = false;
}

// Keeps the end in sight: once a frame, since each look at a height lays the page out anew.
let frame = null;
function follow() {
  frame ??= requestAnimationFrame(() => {
    frame = null;
    if (following) transcript.scrollTop = transcript.scrollHeight;
  });
}

function busy(controller) {
  running = controller;
  const focused = document.activeElement;
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
  byId("regenerate").disabled = controller !== null || turns.length === 0;
  if (focused === byId("send") || focused === byId("stop") || focused === byId("regenerate")) {
    message.focus(); // the button is gone, and the focus must not be
  }
}

export function showParameters(shown) {
  parameters.hidden = !shown;
  byId("show-parameters").setAttribute("aria-expanded", String(shown));
}

function fitMessage() {
  message.style.height = "auto";
  message.style.height = `${Math.min(message.scrollHeight + 2, innerHeight / 3)}px`;
}
