// Tokens colored by probability, with their alternatives in a tooltip.

import { byId, element } from "./elements.js";
import { percent } from "./units.js";

// Lower bounds of the probability at the levels that chat.css colors; the first has no color.
const LEVELS = [0.9, 0.5, 0.2, 0.05, 0];

// A part of an answer with the tokens that it consists of: more than one if the earlier ones end
// inside a character.
export function tokenSpan(text, tokens) {
  const least = Math.exp(Math.min(...tokens.map((token) => token.logprob)));
  const level = LEVELS.findIndex((bound) => least >= bound);
  const span = element("span", { class: `token level-${level}`, tabindex: -1 }, text);
  span.tokens = tokens;
  return span;
}

// Shows the alternatives of the token under the pointer or with the focus. One token of an answer
// can be reached by Tab, and the others from there by arrow keys.
export function explainTokens(transcript) {
  const tooltip = byId("alternatives");
  const hide = () => {
    tooltip.hidden = true;
    transcript.querySelector("[aria-describedby=alternatives]")?.removeAttribute("aria-describedby");
  };
  const show = (event) => {
    const span = event.target;
    if (!span.tokens) return;
    hide();
    tooltip.replaceChildren(...span.tokens.map(alternatives));
    span.setAttribute("aria-describedby", "alternatives");
    tooltip.hidden = false;
    place(tooltip, span);
  };
  transcript.addEventListener("pointerover", show);
  transcript.addEventListener("pointerout", hide);
  transcript.addEventListener("focusin", show);
  transcript.addEventListener("focusout", hide);
  transcript.addEventListener("scroll", hide);
  transcript.addEventListener("keydown", (event) => {
    if (event.target.tokens) move(event, hide);
  });
}

function move(event, hide) {
  const span = event.target;
  const spans = [...span.parentNode.querySelectorAll(".token")];
  const places = {
    ArrowLeft: spans.indexOf(span) - 1,
    ArrowRight: spans.indexOf(span) + 1,
    Home: 0,
    End: spans.length - 1,
  };
  if (event.key === "Escape") hide();
  const next = spans[places[event.key]];
  if (next === undefined) return;
  event.preventDefault();
  span.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function alternatives(token) {
  const rows = token.alternatives.map(({ text, logprob }) => row(text, logprob, text === token.text));
  if (!token.alternatives.some(({ text }) => text === token.text)) {
    rows.push(row(token.text, token.logprob, true)); // it was less likely than all of them
  }
  return element("div", { class: "choices" }, ...rows);
}

function row(text, logprob, chosen) {
  const bar = element("span", { class: "likelihood" });
  bar.style.setProperty("--share", Math.exp(logprob));
  return element(
    "div",
    { class: chosen ? "choice chosen" : "choice" },
    element("span", { class: "choice-text" }, visible(text)),
    bar,
    element("span", { class: "choice-share" }, percent(Math.exp(logprob))),
    element("span", { class: "hidden" }, chosen ? " (chosen)," : ","),
  );
}

function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

function place(tooltip, span) {
  const at = span.getClientRects()[0];
  const { width, height } = tooltip.getBoundingClientRect();
  const left = Math.min(at.left, document.documentElement.clientWidth - width - 8);
  const above = at.top - height - 6;
  tooltip.style.left = `${Math.max(8, left)}px`;
  tooltip.style.top = `${above > 8 ? above : at.bottom + 6}px`;
}
