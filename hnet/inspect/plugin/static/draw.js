// Drawing of one segmentation. Whatever comes from data enters the page through textContent only.

import { chunksOf, printable, probsAt, routeAt } from "./text.js";

/** An element with attributes and children; strings become text nodes. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const RTL = /[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;
const STRONG = /\p{L}/u;
const MARK = /\p{M}/u;
const HIDDEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cn}]/u;
const JOINERS = "\u200c\u200d"; // they shape their neighbours, so they are drawn, not named
const BLANK = { "\t": "⇥", "\n": "↵", "\r": "␍" };
const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");
const byteBox = (byte, why) => el("span", { class: "byte", title: why }, `\\x${hex(byte)}`);

/** A box with the number of a character that would be invisible, or turn the text around it. */
function numberBox(char) {
  const code = char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  return el("span", { class: "byte", title: "invisible character" }, `U+${code}`);
}

/** Nodes that show one character; a blank keeps its effect on the line behind its sign. */
function shownCharacter(char) {
  if (BLANK[char]) {
    const keep = char === "\r" ? "" : char;
    return [el("span", { class: "blank" }, BLANK[char]), document.createTextNode(keep)];
  }
  if (HIDDEN.test(char) && !JOINERS.includes(char)) return [numberBox(char)];
  return [document.createTextNode(char)];
}

/** What stands before the bytes of a character that a boundary cuts: it touches no neighbour. */
function cutCharacter(char) {
  const shown = HIDDEN.test(char) ? numberBox(char) : onItsOwn(char);
  return el("span", { class: "cut", title: "a boundary cuts it" }, shown);
}

/** A mark needs something to sit on. */
const onItsOwn = (char) => (MARK.test(char) ? `◌${char}` : char);

/** Direction of the first strong letter, so that a separator stands where the chunk begins. */
function directionOf(text) {
  for (const char of text) if (STRONG.test(char)) return RTL.test(char) ? "rtl" : "ltr";
  return null;
}

/** Gives the characters that overlap successive byte ranges, each search going on from the last. */
function characterWalk(seg) {
  let next = 0;
  return (from, to) => {
    while (next > 0 && seg.chars[next - 1].end > from) next--;
    while (next < seg.chars.length && seg.chars[next].end <= from) next++;
    let last = next;
    while (last < seg.chars.length && seg.chars[last].start < to) last++;
    return seg.chars.slice(next, last);
  };
}

/** Put the characters of a chunk into its node; returns the direction they are read in. */
function fillChunk(node, seg, chunk, chars, goldOffsets, isCut) {
  let plain = "";
  let read = "";
  const flush = () => {
    if (plain) node.append(plain);
    plain = "";
  };
  for (const { start, end, char } of chars) {
    const from = Math.max(start, chunk.start);
    if (goldOffsets.has(from) && from !== chunk.start) {
      flush();
      node.append(el("i", { class: "gold missed" }));
    }
    if (char === null) {
      flush();
      node.append(byteBox(seg.bytes[start], "not valid UTF-8"));
    } else if (isCut(start, end)) {
      flush();
      if (from === start) node.append(cutCharacter(char));
      const why = `byte of U+${char.codePointAt(0).toString(16).toUpperCase()}`;
      for (let o = from; o < Math.min(end, chunk.end); o++) node.append(byteBox(seg.bytes[o], why));
    } else {
      read += char;
      if (BLANK[char] || HIDDEN.test(char)) {
        flush();
        node.append(...shownCharacter(char));
      } else plain += start === chunk.start ? onItsOwn(char) : char;
    }
  }
  flush();
  return directionOf(read);
}

/** The text as chunks of the stages in `levels`, up to about `limit` bytes; {box, chunks}. */
export function drawText(seg, starts, { levels, gold, limit }) {
  const box = el("div", { class: "text", dir: "auto", tabindex: "0", role: "group" });
  box.setAttribute("aria-label", `chunks of ${printable(seg.name)}; arrow keys move between them`);
  const goldOffsets = new Set(seg.gold.get(gold) ?? []);
  const chunks = chunksOf(seg, starts, levels);
  const cutAt = new Set(chunks.map((c) => c.start));
  const isCut = (start, end) => {
    for (let o = start + 1; o < end; o++) if (cutAt.has(o)) return true;
    return false;
  };
  const charsOf = characterWalk(seg);
  const outer = levels[levels.length - 1]; // its chunks are the largest: they alternate in tint
  let tint = 1;
  chunks.forEach((chunk, i) => {
    if (chunk.start >= limit) return;
    if (chunk.depth === outer || i === 0) tint = 1 - tint;
    const node = el("span", { class: `chunk tint${tint}` });
    if (i > 0) node.classList.add(`depth${Math.min(chunk.depth - levels[0], 2)}`);
    if (seg.inside.has(chunk.start)) node.classList.add("inside");
    if (goldOffsets.has(chunk.start)) node.append(el("i", { class: "gold hit" }));
    const chars = charsOf(chunk.start, chunk.end);
    const direction = fillChunk(node, seg, chunk, chars, goldOffsets, isCut);
    if (direction) node.style.direction = direction;
    node.dataset.chunk = i;
    box.append(node);
  });
  return { box, chunks };
}

/** What the tooltip says about a chunk: [[label, value], ...]. */
export function describeChunk(seg, chunks, i, levels) {
  const { start, end, depth } = chunks[i];
  const bytes = [...seg.bytes.subarray(start, Math.min(end, start + 16))].map(hex).join(" ");
  const starting = levels.filter((s) => s <= depth).map((s) => `stage ${s}`).join(" and ");
  const golds = [...seg.gold].filter(([, o]) => o.includes(start)).map(([kind]) => printable(kind));
  const route = routeAt(seg, start);
  return [
    ["chunk", `${i + 1} of ${chunks.length}, starts ${starting}`],
    ["offsets", `${start} to ${end}, ${end - start} byte${end - start === 1 ? "" : "s"}`],
    ["bytes", bytes + (end - start > 16 ? " …" : "")],
    ...probsAt(seg, start).map(({ stage, p }) => [`p stage ${stage}`, p.toFixed(3)]),
    ["route", route === null ? null : printable(route)],
    ["starts", golds.length ? `gold ${golds.join(", ")}` : null],
    ["note", seg.inside.has(start) ? "starts inside a character" : null],
  ].filter(([, value]) => value !== null);
}

/** p over position: a bar a position, filled where a chunk starts. Returns the canvas. */
export function drawStrip(seg, stage, starts, { gold, threshold, marked }, width) {
  const height = 46;
  const scale = window.devicePixelRatio || 1;
  const canvas = el("canvas", { class: "strip", role: "img", width: width * scale, height: height * scale });
  canvas.setAttribute("aria-label", `probability of a boundary over position, stage ${stage}`);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const top = 7; // room for the gold marks
  const y = (p) => top + (1 - p) * (height - top);
  const step = width / Math.max(seg.bytes.length, 1);
  const bar = Math.max(Math.min(step - (step > 3 ? 1 : 0), 8), 1);
  pen.fillStyle = colour("--grid");
  for (const p of [0, 0.5, 1]) pen.fillRect(0, Math.min(y(p), height - 1), width, 1);
  const cuts = new Set(starts[stage]);
  const { positions, probs } = seg.stages[stage];
  for (const isStart of [false, true]) {
    pen.fillStyle = colour(isStart ? "--bar-start" : "--bar");
    positions.forEach((offset, i) => {
      if (cuts.has(offset) === isStart) pen.fillRect(offset * step, y(probs[i]), bar, height - y(probs[i]));
    });
  }
  pen.fillStyle = colour("--gold");
  for (const offset of seg.gold.get(gold) ?? []) {
    pen.beginPath();
    pen.moveTo(offset * step - 2.5, 0);
    pen.lineTo(offset * step + 2.5 + bar, 0);
    pen.lineTo(offset * step + bar / 2, 6);
    pen.fill();
  }
  if (threshold !== null) {
    pen.fillStyle = colour("--preview");
    for (let x = 0; x < width; x += 8) pen.fillRect(x, y(threshold) - 0.75, 5, 1.5);
  }
  if (marked !== null && marked !== undefined) {
    pen.strokeStyle = colour("--focus");
    pen.lineWidth = 1.5;
    pen.strokeRect(marked.start * step, 0.75, Math.max((marked.end - marked.start) * step, 2), height - 1.5);
  }
  return canvas;
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
    const title = svg("title", {});
    const range = size === 1 ? `${i + 1}` : `${i * size + 1} to ${(i + 1) * size}`;
    title.textContent = `${range} bytes: ${count} chunks`;
    picture.append(
      svg("rect", { class: "slot", x: i * step, y: 0, width: step, height: base }, title),
      svg("rect", { class: "count", x: i * step + 0.5, y: base - high, width: Math.max(step - 1, 0.5), height: high }),
    );
  });
  picture.append(svg("rect", { class: "axis", x: 0, y: base, width, height: 1 }));
  for (const [text, x, anchor] of [["1", 1, "start"], [`${longest} bytes`, width - 1, "end"]]) {
    const label = svg("text", { x, y: height - 3, "text-anchor": anchor });
    label.textContent = text;
    picture.append(label);
  }
  return picture;
}
