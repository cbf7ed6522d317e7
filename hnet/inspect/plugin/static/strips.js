// Pictures over the positions of a text, and of chunk lengths, as SVG: sharp on screen and paper.

import { el, svg } from "./dom.js";

const P_HEIGHT = 46;
const BITS_HEIGHT = 34;
const MOST_BITS = 8; // what guessing a byte costs
const CAP = 3;
const MARKS = 7; // room for gold marks above p
const DASH = 8;

const bars = (list, bar, base) => list.map(([x, y]) => `M${x} ${y}h${bar}V${base}H${x}z`).join("");
const round = (x) => Math.round(x * 100) / 100;

function strip(label, width, height, ...parts) {
  const picture = svg("svg", {
    class: "strip", role: "img", width, height, viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none",
  }, ...parts);
  picture.setAttribute("aria-label", label);
  return picture;
}

/** A frame around the positions from `marked.start` to `marked.end`. */
function frame(marked, step, height) {
  if (!marked) return null;
  const width = round(Math.max((marked.end - marked.start) * step, 2));
  return svg("rect", { class: "frame", x: round(marked.start * step), y: 0.75, width, height: height - 1.5 });
}

const captioned = (caption, picture) => el("figure", {}, el("figcaption", {}, caption), picture);

/** p over position: a bar per position, filled where a chunk starts. */
export function drawStrip(seg, stage, starts, { gold, threshold, marked }, width) {
  const y = (p) => round(MARKS + (1 - p) * (P_HEIGHT - MARKS));
  const step = width / Math.max(seg.bytes.length, 1);
  const bar = round(Math.max(Math.min(step - (step > 3 ? 1 : 0), 8), 1));
  const cuts = new Set(starts[stage]);
  const { positions, probs } = seg.stages[stage];
  const at = positions.map((offset, i) => [round(offset * step), y(probs[i])]);
  const drawn = (isStart) => at.filter((_, i) => cuts.has(positions[i]) === isStart);
  const golds = (seg.gold.get(gold) ?? []).map((offset) => {
    const x = round(offset * step - 2.5);
    return `M${x} 0h${5 + bar}l${-(5 + bar) / 2} 6z`;
  });
  const dashes = [];
  for (let x = 0; threshold !== null && x < width; x += DASH) dashes.push([x, y(threshold) - 0.75]);
  const label = `probability of a boundary over position, stage ${stage}`;
  return captioned(`p of a boundary, stage ${stage}; blue: a chunk starts${golds.length ? "; triangle: gold" : ""}`, strip(label, width, P_HEIGHT,
    ...[0, 0.5, 1].map((p) => svg("rect", { class: "grid", x: 0, y: Math.min(y(p), P_HEIGHT - 1), width, height: 1 })),
    svg("path", { class: "value", d: bars(drawn(false), bar, P_HEIGHT) }),
    svg("path", { class: "value start", d: bars(drawn(true), bar, P_HEIGHT) }),
    svg("path", { class: "goldmark", d: golds.join("") }),
    svg("path", { class: "threshold", d: dashes.map(([x, top]) => `M${x} ${top}h5v1.5h-5z`).join("") }),
    frame(marked, step, P_HEIGHT),
  ));
}

/** Surprisal over position; filled where a chunk of the outermost shown stage starts. What is above
 * the bits of a byte, worse than guessing, is cut off and capped. */
export function drawBits(seg, cuts, marked, width) {
  const y = (bits) => round(BITS_HEIGHT * (1 - Math.min(bits / MOST_BITS, 1)));
  const step = width / Math.max(seg.bytes.length, 1);
  const bar = round(Math.max(Math.min(step - (step > 3 ? 1 : 0), 8), 1));
  const drawn = (isWanted) => seg.bits.flatMap((bits, i) => (isWanted(i, bits) ? [[round(i * step), y(bits)]] : []));
  return captioned(`bits per byte, 0 to ${MOST_BITS}; red: more`, strip("surprisal of each byte in bits", width, BITS_HEIGHT,
    ...[0, 0.5, 1].map((part) => svg("rect", { class: "grid", x: 0, y: Math.min(BITS_HEIGHT * part, BITS_HEIGHT - 1), width, height: 1 })),
    svg("path", { class: "value", d: bars(drawn((i) => !cuts.has(i)), bar, BITS_HEIGHT) }),
    svg("path", { class: "value start", d: bars(drawn((i) => cuts.has(i)), bar, BITS_HEIGHT) }),
    svg("path", { class: "cap", d: bars(drawn((_, bits) => bits > MOST_BITS), bar, CAP) }),
    frame(marked, step, BITS_HEIGHT),
  ));
}

/** Chunk lengths as bars; `longest` sets the scale, so that pictures side by side compare. */
export function drawHistogram(lengths, longest, { width = 220, height = 66 } = {}) {
  const size = Math.max(1, Math.ceil(longest / 24));
  const counts = new Array(Math.ceil(longest / size)).fill(0);
  for (const length of lengths) counts[Math.floor((length - 1) / size)]++;
  const highest = Math.max(...counts, 1);
  const base = height - 14;
  const step = width / counts.length;
  const picture = svg("svg", { class: "histogram", width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  picture.setAttribute("aria-label", `chunk lengths in bytes, 1 to ${longest}`);
  counts.forEach((count, i) => {
    const high = (count / highest) * (base - 2);
    const range = size === 1 ? `${i + 1}` : `${i * size + 1} to ${(i + 1) * size}`;
    const title = svg("title", {}, `${range} bytes: ${count} chunks`);
    picture.append(
      svg("rect", { class: "slot", x: i * step, y: 0, width: step, height: base }, title),
      svg("rect", { class: "count", x: i * step + 0.5, y: base - high, width: Math.max(step - 1, 0.5), height: high }),
    );
  });
  picture.append(svg("rect", { class: "axis", x: 0, y: base, width, height: 1 }));
  for (const [text, x, anchor] of [["1", 1, "start"], [`${longest} bytes`, width - 1, "end"]]) {
    picture.append(svg("text", { x, y: height - 3, "text-anchor": anchor }, text));
  }
  return picture;
}
