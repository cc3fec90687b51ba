// Small charts of the last minute: throughput, requests, and latencies against their targets.

import { byId, element, set, svg } from "./elements.js";
import { digits, milliseconds, whole } from "./units.js";

const SAMPLES = 120;
const WIDTH = 600; // of the drawing, which is stretched to its card
const HEIGHT = 100;

// Each line is [name, value of a sample]; null where there is none. Targets are in milliseconds.
const CHARTS = [
  {
    title: "Tokens per second",
    lines: [["generated", (s) => s.generated], ["prompt", (s) => s.prompt]],
    show: digits,
  },
  {
    title: "Requests",
    lines: [["running", (s) => s.running], ["waiting", (s) => s.waiting]],
    show: whole,
  },
  {
    title: "Time to first token",
    lines: [["p50", (s) => s.firstToken.p50], ["p95", (s) => s.firstToken.p95]],
    show: milliseconds,
    target: { name: "llama-jax-ttft-target", value: 500 },
  },
  {
    title: "Time per output token",
    lines: [["p50", (s) => s.outputToken.p50], ["p95", (s) => s.outputToken.p95]],
    show: milliseconds,
    target: { name: "llama-jax-tpot-target", value: 50 },
  },
];

let charts = null;

export function showCharts(status, history) {
  charts ??= CHARTS.map((chart) => new Chart(chart));
  for (const chart of charts) chart.show(history);
}

class Chart {
  constructor({ title, lines, show, target }) {
    Object.assign(this, { title, lines, format: show });
    this.paths = lines.map((_, index) => svg("path", { class: `line line-${index}` }));
    this.area = svg("path", { class: "area" });
    this.targetLine = svg("path", { class: "target" });
    this.drawing = svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      this.area,
      this.targetLine,
      ...this.paths.toReversed(),
    );
    this.top = element("span", { class: "top" });
    this.verdict = element("p", { class: "verdict" });
    this.values = lines.map(() => element("span", { class: "value" }));
    const legend = lines.map(([name], index) =>
      element("li", {}, element("span", { class: `key line-${index}` }), `${name} `, this.values[index]));
    this.target = target && this.#makeTarget(target);
    byId("charts").append(
      element(
        "figure",
        { class: "card chart" },
        element("figcaption", {}, element("h3", {}, title), element("p", { class: "about" }, "last minute"), element("ul", { class: "legend" }, ...legend)),
        element("div", { class: "plot" }, this.drawing, this.top),
        ...(target ? [element("div", { class: "goal" }, this.target.label, this.verdict)] : []),
      ),
    );
  }

  show(history) {
    const values = this.lines.map(([, value]) => history.map(value));
    const target = this.target?.seconds();
    const largest = Math.max(...values.flat(), 0);
    const most = niceCeiling(Math.max(1.05 * largest, 1.1 * (target ?? 0)) || 1);
    this.paths.forEach((path, index) => set(path, { d: curve(values[index], most) }));
    set(this.area, { d: area(values[0], most) });
    this.top.textContent = this.format(most).replace(/\.0+\b/, "");
    const now = values.map((line) => line[line.length - 1]);
    now.forEach((value, index) => {
      this.values[index].textContent = value === null ? "–" : this.format(value);
    });
    const said = this.lines.map(([name], index) => `${name} ${this.values[index].textContent}`);
    set(this.drawing, { "aria-label": `${this.title} in the last minute: ${said.join(", ")} now.` });
    if (target === undefined) return;
    const y = HEIGHT * (1 - target / most);
    set(this.targetLine, { d: `M0 ${y}H${WIDTH}` });
    const slow = now[1] !== null && now[1] > target;
    this.verdict.textContent = now[1] === null ? "no recent tokens" : slow ? "p95 above" : "p95 within";
    this.verdict.dataset.mood = now[1] === null ? "" : slow ? "bad" : "good";
  }

  #makeTarget({ name, value }) {
    const input = element("input", { type: "number", min: 1, step: "any", required: true });
    input.value = localStorage.getItem(name) ?? value;
    input.addEventListener("change", () => {
      if (input.checkValidity()) localStorage.setItem(name, input.value);
      else input.value = localStorage.getItem(name) ?? value;
    });
    return {
      label: element("label", {}, "Target ", input, " ms"),
      seconds: () => (Number(input.value) || value) / 1000,
    };
  }
}

function curve(values, most) {
  let path = "";
  let drawn = false;
  values.forEach((value, index) => {
    if (value !== null) path += `${drawn ? "L" : "M"}${x(index, values)} ${HEIGHT * (1 - value / most)}`;
    drawn = value !== null;
  });
  return path;
}

function area(values, most) {
  const known = values.map((value) => value ?? 0);
  return `${curve(known, most)}V${HEIGHT}H${x(0, values)}Z`;
}

function x(index, values) {
  return (WIDTH * (index + SAMPLES - values.length)) / (SAMPLES - 1);
}

// The next round number at or above a positive value.
function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((digit) => digit * power).find((nice) => nice >= value);
}
