// Polls the server's status while the page is visible, and keeps the last minute of it.

import { call } from "./api.js";

const PERIOD = 500; // milliseconds between polls
const KEPT = 120; // a minute of them
const SMOOTHED = 4; // polls over which rates are taken: the engine reports every quarter second

// Calls `onStatus(status, history)` for each answer, and `onProblem(sentence)` if there is none.
export function watch(onStatus, onProblem) {
  const history = [];
  let polling = false;

  async function poll() {
    polling = !document.hidden;
    if (!polling) return;
    try {
      const status = await (await call("status")).json();
      history.push(sample(status, history));
      if (history.length > KEPT) history.shift();
      onStatus(status, history);
    } catch (error) {
      onProblem(error.message);
    }
    setTimeout(poll, PERIOD);
  }

  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && !polling) poll();
  });
  poll();
}

// What the charts show of a status. Rates are those since a sample a few polls ago.
function sample({ stats, latency }, history) {
  const before = history[Math.max(0, history.length - SMOOTHED)];
  const now = { time: performance.now() / 1000, stats };
  const rate = (name) => {
    if (before === undefined) return 0;
    return Math.max(0, stats[name] - before.stats[name]) / (now.time - before.time);
  };
  return {
    ...now,
    generated: rate("generation_tokens"),
    prompt: rate("prompt_tokens"),
    running: stats.num_running,
    waiting: stats.num_waiting,
    firstToken: latency.time_to_first_token,
    outputToken: latency.time_per_output_token,
  };
}

// The ratio of the growths of two counters over the last samples; null if the second did not grow.
export function recentRatio(history, part, whole) {
  const first = history[Math.max(0, history.length - 1 - SMOOTHED)].stats;
  const last = history[history.length - 1].stats;
  const grown = last[whole] - first[whole];
  return grown > 0 ? (last[part] - first[part]) / grown : null;
}
