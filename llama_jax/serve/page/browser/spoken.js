// Reads an answer to users of screen readers: by sentences, since a word at a time cannot be heard.

import { byId } from "./elements.js";

const END = /[.!?:]\s|\n/g;

let waiting = "";

export function speak(text) {
  waiting += text;
  const ends = [...waiting.matchAll(END)];
  if (ends.length === 0) return;
  const last = ends[ends.length - 1];
  say(waiting.slice(0, last.index + last[0].length));
  waiting = waiting.slice(last.index + last[0].length);
}

// Says what is left of the answer, and how it ended.
export function finish(note) {
  say(`${waiting} ${note}`);
  waiting = "";
}

function say(text) {
  if (text.trim() !== "") byId("spoken").textContent = text.trim();
}
