// A text as its chunks. Whatever comes from data enters the page as text only.

import { el } from "./dom.js";
import { bitsOf, characterAt, chunksOf, cutsOf, printable, probsAt, routeAt } from "./text.js";

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

/** Put the characters of a chunk into its node; returns the direction they are read in.
 *
 * marks: offset -> nodes that stand before it. found: offsets of characters that a search found. */
function fillChunk(node, seg, chunk, chars, isCut, marks, found) {
  let plain = "";
  let isFound = false;
  let read = "";
  const flush = () => {
    if (plain) node.append(isFound ? el("mark", {}, plain) : plain);
    plain = "";
  };
  for (const { start, end, char } of chars) {
    const from = Math.max(start, chunk.start);
    if (marks.has(from) && from !== chunk.start) {
      flush();
      node.append(...marks.get(from)());
    }
    if (found.has(start) !== isFound) {
      flush();
      isFound = !isFound;
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

/** What stands inside chunks: offset -> function that makes nodes. */
function marksInside(seg, cuts, goldOffsets, other) {
  const marks = new Map();
  const add = (offset, classes, title) => {
    const before = marks.get(offset) ?? (() => []);
    marks.set(offset, () => [...before(), el("i", { class: classes, title })]);
  };
  for (const offset of goldOffsets) if (!cuts.has(offset)) add(offset, "gold missed", "gold boundary missed");
  if (other) {
    const absent = new Set([...other].filter((o) => !cuts.has(o)).map((o) => characterAt(seg, o)));
    for (const offset of absent) add(offset, "absent", "a boundary of the other run");
  }
  return marks;
}

/** The text as chunks of the stages in `levels`, up to about `limit` bytes; {box, chunks}.
 *
 * other: boundaries of the run beside it, or null. found: offsets of characters to highlight. */
export function drawText(seg, starts, { levels, gold, limit, other, found }) {
  const box = el("div", { class: "text", dir: "auto", tabindex: "0", role: "group" });
  box.setAttribute("aria-label", `chunks of ${printable(seg.name)}; arrow keys move between them`);
  const goldOffsets = new Set(seg.gold.get(gold) ?? []);
  const chunks = chunksOf(seg, starts, levels);
  const cuts = cutsOf(starts, levels);
  const isCut = (start, end) => {
    for (let o = start + 1; o < end; o++) if (cuts.has(o)) return true;
    return false;
  };
  const marks = marksInside(seg, cuts, goldOffsets, other);
  const charsOf = characterWalk(seg);
  const outer = levels[levels.length - 1]; // its chunks are the largest: they alternate in tint
  let tint = 1;
  chunks.forEach((chunk, i) => {
    if (chunk.start >= limit) return;
    if (chunk.depth === outer || i === 0) tint = 1 - tint;
    const node = el("span", { class: `chunk tint${tint}` });
    if (i > 0) node.classList.add(`depth${Math.min(chunk.depth - levels[0], 2)}`);
    if (seg.inside.has(chunk.start)) node.classList.add("inside");
    if (i > 0 && other && !other.has(chunk.start)) {
      node.append(el("i", { class: "only", title: "a boundary that the other run does not have" }));
    }
    if (goldOffsets.has(chunk.start)) node.append(el("i", { class: "gold hit", title: "gold boundary found" }));
    const chars = charsOf(chunk.start, chunk.end);
    const direction = fillChunk(node, seg, chunk, chars, isCut, marks, found);
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
  const bits = bitsOf(seg, start, end);
  return [
    ["chunk", `${i + 1} of ${chunks.length}, starts ${starting}`],
    ["offsets", `${start} to ${end}, ${end - start} byte${end - start === 1 ? "" : "s"}`],
    ["bytes", bytes + (end - start > 16 ? " …" : "")],
    ...probsAt(seg, start).map(({ stage, p }) => [`p stage ${stage}`, p.toFixed(3)]),
    ["surprisal", bits === null ? null : `${bits.toFixed(2)} bits, first byte ${seg.bits[start].toFixed(2)}`],
    ["route", route === null ? null : printable(route)],
    ["starts", golds.length ? `gold ${golds.join(", ")}` : null],
    ["note", seg.inside.has(start) ? "starts inside a character" : null],
  ].filter(([, value]) => value !== null);
}
