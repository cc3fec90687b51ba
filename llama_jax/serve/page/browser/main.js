// Starts the page: the chat, the picture of the deployment, and what belongs to both.

import { clear, regenerate, setKind, showParameters, startChat, stop } from "./chat.js";
import { showCharts } from "./charts.js";
import { byId } from "./elements.js";
import { showGauges } from "./gauges.js";
import { showMesh } from "./mesh.js";
import { watch } from "./status.js";
import { startTheme } from "./theme.js";

startTheme();
startChat();

const parameters = byId("parameters");
const toggleParameters = () => {
  showParameters(parameters.hidden);
  if (!parameters.hidden) parameters.querySelector("label:not([hidden]) :is(input, textarea)").focus();
};
byId("show-parameters").addEventListener("click", toggleParameters);

const shortcuts = byId("shortcuts");
byId("help").addEventListener("click", () => shortcuts.showModal());
const goToMessage = () => {
  show("chat");
  byId("message").focus();
};
// By the place of the key, since Alt makes other characters on some keyboards.
const KEYS = {
  KeyM: goToMessage,
  KeyR: regenerate,
  KeyN: clear,
  KeyP: toggleParameters,
  Slash: () => shortcuts.showModal(),
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !shortcuts.open) stop();
  const act = event.altKey && !event.ctrlKey && !event.metaKey && KEYS[event.code];
  if (!act) return;
  event.preventDefault();
  act();
});

// On a narrow screen one of the two parts is shown.
function show(view) {
  document.body.dataset.view = view;
  for (const name of ["chat", "deployment"]) {
    byId(`show-${name}`).setAttribute("aria-pressed", String(name === view));
  }
}
byId("show-chat").addEventListener("click", () => show("chat"));
byId("show-deployment").addEventListener("click", () => show("deployment"));

const state = byId("state");
const deployment = byId("deployment");
let kind = null;
watch(
  (status, history) => {
    const { ready, chat, model, engine } = status;
    byId("model").textContent = `${model} · ${engine.dtype} on ${engine.mesh} ${engine.platform}`;
    document.title = `${model} · llama-jax`;
    say(ready ? "Ready" : "Not ready", ready ? "good" : "bad");
    deployment.classList.remove("stale");
    if (chat !== kind) setKind((kind = chat));
    showMesh(status, history);
    showGauges(status, history);
    showCharts(status, history);
  },
  (message) => {
    say(message, "bad");
    deployment.classList.add("stale");
  },
);

// Only changes, since screen readers announce what is set.
function say(text, mood) {
  if (state.textContent !== text) state.textContent = text;
  state.dataset.mood = mood;
}

byId("message").focus();
