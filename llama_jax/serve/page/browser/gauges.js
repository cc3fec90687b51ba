// The numbers beside the picture: requests, pages, and how well the ring is filled.

import { byId, element, set } from "./elements.js";
import { recentRatio } from "./status.js";
import { count, percent, short, whole } from "./units.js";

// Each returns {text, about, share}: a share from 0 to 1 is drawn as a bar.
const GAUGES = {
  Running: ({ stats, engine }) => ({
    text: whole(stats.num_running),
    about: `of ${count(engine.max_num_seqs, "sequence")}`,
    share: stats.num_running / engine.max_num_seqs,
  }),
  Waiting: ({ stats }) => ({
    text: whole(stats.num_waiting),
    about: "in the queue",
  }),
  "Pages in use": ({ stats, engine }) => {
    const used = stats.pages_total - stats.pages_free;
    return {
      text: percent(used / Math.max(1, stats.pages_total)),
      about: `of ${short(stats.pages_total)}`,
      share: used / Math.max(1, stats.pages_total),
    };
  },
  "Stages busy": (status, history) => {
    const share = recentRatio(history, "stage_ticks_busy", "stage_ticks");
    return { text: share === null ? "–" : percent(share), about: "in the last 2 s", share: share ?? 0 };
  },
  "Cached prompt tokens": ({ stats }) => {
    const all = stats.prompt_tokens + stats.cached_tokens;
    return {
      text: all ? percent(stats.cached_tokens / all) : "–",
      about: `of ${short(all)}`,
      share: all ? stats.cached_tokens / all : 0,
    };
  },
  Preemptions: ({ stats }) => ({
    text: whole(stats.preemptions),
    about: "for lack of pages",
  }),
};

const tiles = {};

export function showGauges(status, history) {
  for (const [name, measure] of Object.entries(GAUGES)) {
    tiles[name] ??= makeTile(name);
    const { text, about, share } = measure(status, history);
    const tile = tiles[name];
    tile.value.textContent = text;
    tile.about.textContent = about;
    if (share === undefined) continue;
    tile.bar.hidden = false;
    tile.bar.style.setProperty("--share", share);
    set(tile.bar, { "aria-valuenow": Math.round(100 * share), "aria-valuetext": `${text} ${about}` });
  }
}

function makeTile(name) {
  const tile = {
    value: element("p", { class: "value" }),
    about: element("p", { class: "about" }),
    bar: element("div", { class: "meter", role: "meter", "aria-label": name, "aria-valuemin": 0, "aria-valuemax": 100, hidden: true }),
  };
  byId("gauges").append(element("div", { class: "tile" }, element("h3", {}, name), tile.value, tile.about, tile.bar));
  return tile;
}
