// The packets of the ring, which move on by one stage in every tick, in slow motion.

import { set, svg } from "./elements.js";
import { milliseconds, whole } from "./units.js";

// The palette of llama_jax/pictures: neighbors differ most. The second color is that of the text.
const COLORS = [
  ["#88ccee", "#000"],
  ["#cc6677", "#000"],
  ["#117733", "#fff"],
  ["#ddcc77", "#000"],
  ["#aa4499", "#fff"],
  ["#44aa99", "#000"],
  ["#882255", "#fff"],
  ["#999933", "#000"],
  ["#332288", "#fff"],
];
const TICK = 1000; // milliseconds of a tick as it is drawn
const MOVING = 0.4; // the part of it in which the packets move
const BACK = 13; // where the way back from the last stage is
const SMALL = 0.3; // only sampled tokens go back
const SIZE = { width: 72, height: 28 };

const still = matchMedia("(prefers-reduced-motion: reduce)");

// The packet in each stage, stage 0 first; none while there is no work.
export function packetsOf({ stages }) {
  return stages.some(({ rows, chunk_tokens }) => rows + chunk_tokens > 0) ? stages : [];
}

export class Ring {
  // `places` are the heights of the stages, first to last; `width` is that of the ring.
  constructor(places, width) {
    this.places = places;
    this.middle = (width + BACK) / 2;
    const last = places[places.length - 1];
    const [top, bottom] = [places[0] - SIZE.height / 2 - 7, last + SIZE.height / 2 + 7];
    const bend = 8;
    this.down = svg("path", { class: "track", d: `M${this.middle} ${places[0]}V${last}` });
    this.up = svg("path", {
      class: "track",
      d:
        `M${this.middle} ${last}V${bottom - bend}q0 ${bend} ${-bend} ${bend}H${BACK + bend}` +
        `q${-bend} 0 ${-bend} ${-bend}V${top + bend}q0 ${-bend} ${bend} ${-bend}` +
        `H${this.middle - bend}q${bend} 0 ${bend} ${bend}V${places[0]}`,
    });
    const arrows = places.slice(1).map((place, stage) => (place + places[stage]) / 2);
    this.packets = places.map((_, number) => makePacket(number));
    this.element = svg(
      "g",
      { class: "ring" },
      this.down,
      this.up,
      ...arrows.map((y) => svg("path", { class: "arrow", d: `M${this.middle - 4} ${y - 3}l4 5l4 -5` })),
      svg("path", { class: "arrow", d: `M${BACK - 4} ${(top + bottom) / 2 + 3}l4 -5l4 5` }),
      ...this.packets.map((packet) => packet.group),
    );
    this.offset = 0; // ticks drawn
    this.frame = null;
    this.place(0);
  }

  // Shows the packets of a report; `tick` is the duration of a tick in seconds, null if unknown.
  // Returns a sentence on what is drawn.
  show(stats, tick) {
    const stages = this.places.length;
    const packets = packetsOf(stats);
    this.busy = packets.length > 0;
    this.packets.forEach((packet, number) => {
      const stage = (((stats.ticks - 1 - number) % stages) + stages) % stages;
      fillPacket(packet, packets[stage] ?? { rows: 0, chunk_tokens: 0 });
    });
    if (still.matches) this.place(stats.ticks - 1);
    else if (this.busy && this.frame === null) this.run();
    if (tick === null) return this.busy ? "" : "No work: the ring stands still.";
    const time = `A tick takes ${milliseconds(tick)}`;
    if (still.matches) return `${time}; the packets stand where the last report saw them.`;
    const slower = TICK / 1000 / tick;
    return slower < 1.5 ? `${time}.` : `${time}; the packets are drawn ${whole(slower)} times slower.`;
  }

  stop() {
    cancelAnimationFrame(this.frame);
    this.busy = false;
  }

  run() {
    let before = null;
    const step = (now) => {
      this.frame = null;
      const resting = this.offset % 1 < 1 - MOVING;
      const seen = this.element.getClientRects().length > 0;
      if (!seen || (!this.busy && resting)) return;
      this.offset += before === null ? 0 : Math.min(now - before, 100) / TICK;
      before = now;
      this.place(this.offset);
      this.frame = requestAnimationFrame(step);
    };
    this.frame = requestAnimationFrame(step);
  }

  // Places the packets `ticks` ticks after packet 0 was in stage 0.
  place(ticks) {
    const hops = Math.floor(ticks);
    const moved = Math.max(0, (ticks - hops - 1 + MOVING) / MOVING);
    const part = moved * moved * (3 - 2 * moved);
    const stages = this.places.length;
    this.packets.forEach(({ group }, number) => {
      const stage = (((hops - number) % stages) + stages) % stages;
      const { x, y, scale } = this.#between(stage, part);
      group.classList.toggle("small", scale < 0.7);
      set(group, { transform: `translate(${x.toFixed(1)} ${y.toFixed(1)}) scale(${scale.toFixed(3)})` });
    });
  }

  #between(stage, part) {
    if (stage < this.places.length - 1) {
      const y = this.places[stage] + part * (this.places[stage + 1] - this.places[stage]);
      return { x: this.middle, y, scale: 1 };
    }
    const { x, y } = this.up.getPointAtLength(part * this.up.getTotalLength());
    const scale = 1 - (1 - SMALL) * Math.min(1, 8 * Math.min(part, 1 - part));
    return { x, y, scale };
  }
}

function makePacket(number) {
  const [color, ink] = COLORS[number % COLORS.length];
  const { width, height } = SIZE;
  const box = svg("rect", { x: -width / 2, y: -height / 2, width, height, rx: height / 2 });
  const text = svg("text", { y: 4.5 });
  return { group: svg("g", { class: "packet" }, box, text), box, text, color, ink };
}

function fillPacket({ group, box, text, color, ink }, { rows, chunk_tokens: chunk }) {
  const empty = rows + chunk === 0;
  group.classList.toggle("hollow", empty);
  set(box, { fill: empty ? null : color });
  text.style.fill = ink;
  text.textContent = [rows ? `${rows}` : "", chunk ? `+${chunk}` : ""].join(" ").trim();
}
