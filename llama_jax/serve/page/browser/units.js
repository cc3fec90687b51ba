// Numbers as people read them.

const BYTES = ["B", "kB", "MB", "GB", "TB"];

export function bytes(value) {
  let power = 0;
  while (value >= 999.5 && power < BYTES.length - 1) {
    value /= 1000;
    power += 1;
  }
  return `${digits(value).replace(/\.0+$/, "")} ${BYTES[power]}`;
}

const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });

// 12,345 stays as it is, and 1234567 is 1.2M.
export function short(number) {
  return number < 1e5 ? whole(number) : compact.format(number);
}

export function whole(number) {
  return Math.round(number).toLocaleString("en-US");
}

// Three significant digits, or all digits of a large number.
export function digits(value) {
  if (value >= 99.5) return whole(value);
  if (value === 0) return "0";
  return value >= 9.95 ? value.toFixed(1) : value.toFixed(2);
}

export function milliseconds(seconds) {
  if (seconds === null) return "–";
  return seconds >= 0.9995 ? `${digits(seconds)} s` : `${digits(1000 * seconds)} ms`;
}

export function percent(share) {
  if (share > 0 && share < 0.0005) return "<0.1%";
  return `${(100 * share).toFixed(share > 0.9995 || share === 0 ? 0 : 1)}%`;
}

export function count(number, thing) {
  return `${whole(number)} ${thing}${number === 1 ? "" : "s"}`;
}

// [0, 1, 2] is "layers 0–2".
export function layers(numbers) {
  if (numbers.length === 0) return "no layers";
  const first = numbers[0];
  const last = numbers[numbers.length - 1];
  return first === last ? `layer ${first}` : `layers ${first}–${last}`;
}
