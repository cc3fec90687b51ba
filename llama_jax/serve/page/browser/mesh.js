// The mesh as stages × ranks with each device's memory, and beside it the ring with its packets.

import { byId, element, set, svg } from "./elements.js";
import { Ring, packetsOf } from "./ring.js";
import { recentRatio } from "./status.js";
import { bytes, count, layers, whole } from "./units.js";

const LANE = 112; // width of the ring beside the devices
const LABEL = 19;
const GAP = 8;
const BOX = 46; // height of a device
const NARROWEST = 86; // where a device is narrower, a stage has several lines of them

let drawn = null; // what the picture shows now: {key, parts, ring}

export function showMesh(status, history) {
  const { engine, stats } = status;
  const room = byId("mesh").clientWidth;
  if (room === 0) return; // the other part of the page is shown
  const key = `${status.created} ${room}`;
  if (drawn?.key !== key) {
    drawn?.ring.stop();
    drawn = { key, ...draw(engine, room) };
  }
  const used = 1 - stats.pages_free / Math.max(1, stats.pages_total);
  for (const fill of drawn.fills) fill(used);
  const tick = recentRatio(history, "tick_seconds", "ticks");
  byId("motion").textContent = drawn.ring.show(stats, tick);
  set(drawn.picture, { "aria-label": `${byId("mesh-about").textContent}. ${packetsText(stats)}` });
  if (byId("table").open) showTable(status);
}

function draw(engine, width) {
  const stages = Map.groupBy(engine.devices, (device) => device.stage);
  const ranks = stages.get(0).length;
  byId("mesh-about").textContent =
    `${count(stages.size, "stage")} × ${count(ranks, "rank")} on ${engine.platform}, ` +
    `${whole(engine.num_pages * engine.page_size)} tokens of KV cache`;
  const room = width - LANE + GAP;
  const columns = Math.min(ranks, Math.max(1, Math.floor(room / (NARROWEST + GAP))));
  const box = { width: room / columns - GAP, height: BOX };
  const lines = Math.ceil(ranks / columns);
  const tall = lines * (BOX + GAP) - GAP; // a stage without its label
  const top = (stage) => LABEL + stage * (LABEL + tall + GAP);
  const height = top(stages.size) - LABEL - GAP + 2;
  const most = Math.max(...engine.devices.map(capacity));
  const fills = [];
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  for (const [stage, devices] of stages) {
    const name = `stage ${stage} · ${layers(devices[0].layers)}`;
    picture.append(svg("text", { class: "stage", x: LANE, y: top(stage) - 6 }, name));
    devices.forEach((device, rank) => {
      const x = LANE + (rank % columns) * (box.width + GAP);
      const y = top(stage) + Math.floor(rank / columns) * (BOX + GAP);
      const [group, fill] = drawDevice(device, { x, y, ...box }, most);
      picture.append(group);
      fills.push(fill);
    });
  }
  const places = [...stages.keys()].map((stage) => top(stage) + tall / 2);
  const ring = new Ring(places, LANE);
  picture.append(ring.element);
  byId("mesh").replaceChildren(picture);
  return { picture, ring, fills };
}

// Returns the drawing of a device, and a function that draws the share of the KV cache in use.
function drawDevice(device, { x, y, width, height }, most) {
  const inside = { x: x + 8, width: width - 16 };
  const scale = inside.width / most;
  const bar = { y: y + 20, height: 7 };
  const weights = device.weight_bytes * scale;
  const cache = device.kv_bytes * scale;
  const used = svg("rect", { class: "kv-used", x: inside.x + weights, ...bar, width: 0 });
  const total = bytes(device.weight_bytes + device.kv_bytes);
  const all = device.memory_bytes === null ? total : `${total} of ${bytes(device.memory_bytes)}`;
  const parts = `weights ${bytes(device.weight_bytes)} · KV ${bytes(device.kv_bytes)}`;
  const wide = width >= 170; // narrow boxes have room for one number, and for the rest a title
  const group = svg(
    "g",
    { class: "device" },
    svg("title", {}, `${shortName(device)}: ${parts}, ${all} in all`),
    svg("rect", { class: "box", x: x + 0.5, y: y + 0.5, width: width - 1, height: height - 1, rx: 6 }),
    svg("text", { class: "name", x: inside.x, y: y + 14 }, shortName(device)),
    svg("rect", { class: "free", x: inside.x, ...bar, width: inside.width }),
    svg("rect", { class: "weights", x: inside.x, ...bar, width: weights }),
    svg("rect", { class: "kv-free", x: inside.x + weights, ...bar, width: cache }),
    used,
  );
  if (wide) group.append(svg("text", { class: "total", x: x + width - 8, y: y + 14 }, all));
  group.append(svg("text", { class: "parts", x: inside.x, y: y + 39.5 }, wide ? parts : total));
  return [group, (share) => set(used, { width: cache * share })];
}

function capacity(device) {
  return device.memory_bytes ?? device.weight_bytes + device.kv_bytes;
}

function shortName({ name }) {
  return name.replace("TFRT_CPU_", "cpu:");
}

function packetsText(stats) {
  const packets = packetsOf(stats);
  if (packets.length === 0) return "The ring is idle.";
  return packets
    .map(({ rows, chunk_tokens }, stage) => `Stage ${stage} holds ${contents(rows, chunk_tokens)}.`)
    .join(" ");
}

function contents(rows, chunk) {
  if (rows + chunk === 0) return "an empty packet";
  return chunk ? `${count(rows, "decode row")} and ${count(chunk, "prompt token")}` : count(rows, "decode row");
}

function showTable({ engine, stats }) {
  const head = ["Stage", "Rank", "Device", "Layers", "Weights", "KV cache", "Packet in the stage"];
  const packets = packetsOf(stats);
  const rows = engine.devices.map((device) => {
    const packet = packets[device.stage];
    return [
      device.stage,
      device.rank,
      shortName(device),
      layers(device.layers),
      bytes(device.weight_bytes),
      bytes(device.kv_bytes),
      packet ? contents(packet.rows, packet.chunk_tokens) : "idle",
    ];
  });
  byId("table").querySelector("div").replaceChildren(
    element(
      "table",
      {},
      element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)))),
      element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((text) => element("td", {}, `${text}`))))),
    ),
  );
}
