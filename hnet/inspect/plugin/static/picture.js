// A part of the page as one SVG file: its boxes, borders, texts and pictures where they stand now.

import { svg } from "./dom.js";

const UNWRITABLE = /[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu; // in XML
const PAINTED = ["fill", "stroke", "stroke-width", "stroke-dasharray", "font-size", "font-family", "opacity"];
const pen = document.createElement("canvas").getContext("2d");

/** SVG source of what `node` shows; elements for which `leaves` holds are left out. */
export function pictureOf(node, leaves) {
  const origin = node.getBoundingClientRect();
  const size = { width: Math.ceil(origin.width), height: Math.ceil(origin.height) };
  const picture = svg("svg", { ...size, viewBox: `0 0 ${size.width} ${size.height}` });
  paint(node, picture, { origin, leaves });
  return new XMLSerializer().serializeToString(picture);
}

function paint(node, picture, context) {
  if (node.nodeType === Node.TEXT_NODE) return paintText(node, picture, context);
  if (node.nodeType !== Node.ELEMENT_NODE || context.leaves(node)) return;
  const style = getComputedStyle(node);
  if (style.display === "none" || style.visibility === "hidden") return;
  if (node instanceof SVGSVGElement) return paintPicture(node, picture, context);
  paintBoxes(node, style, picture, context);
  for (const child of node.childNodes) paint(child, picture, context);
  paintMark(node, picture, context);
}

const isSeen = (colour) => !/^(transparent|rgba\(.*, 0\))$/.test(colour);

function paintBoxes(node, style, picture, { origin }) {
  const rects = [...node.getClientRects()].filter((r) => r.width && r.height);
  rects.forEach((rect, i) => {
    const [x, y] = [rect.left - origin.left, rect.top - origin.top];
    const rx = parseFloat(style.borderTopLeftRadius) || null;
    if (isSeen(style.backgroundColor)) {
      picture.append(svg("rect", { x, y, width: rect.width, height: rect.height, rx, fill: style.backgroundColor }));
    }
    const isRtl = style.direction === "rtl";
    const [isFirst, isLast] = [i === 0, i === rects.length - 1];
    const sides = [
      ["Top", true, x, y, x + rect.width, y],
      ["Bottom", true, x, y + rect.height, x + rect.width, y + rect.height],
      ["Left", isRtl ? isLast : isFirst, x, y, x, y + rect.height],
      ["Right", isRtl ? isFirst : isLast, x + rect.width, y, x + rect.width, y + rect.height],
    ];
    for (const [side, isHere, x1, y1, x2, y2] of sides) {
      const width = parseFloat(style[`border${side}Width`]);
      const kind = style[`border${side}Style`];
      if (!isHere || !width || kind === "none" || rx) continue;
      const inwards = { Top: [0, 1], Bottom: [0, -1], Left: [1, 0], Right: [-1, 0] }[side];
      const lines = kind === "double" ? [width / 6, (width * 5) / 6] : [width / 2];
      for (const by of lines) {
        const [dx, dy] = inwards.map((d) => d * by);
        picture.append(svg("line", {
          x1: x1 + dx, y1: y1 + dy, x2: x2 + dx, y2: y2 + dy, stroke: style[`border${side}Color`],
          "stroke-width": kind === "double" ? width / 3 : width, "stroke-dasharray": kind === "dashed" ? "3 2" : null,
        }));
      }
    }
    if (rx && parseFloat(style.borderTopWidth) && style.borderTopStyle !== "none") {
      const box = { x: x + 0.5, y: y + 0.5, width: rect.width - 1, height: rect.height - 1 };
      picture.append(svg("rect", { ...box, rx, fill: "none", stroke: style.borderTopColor }));
    }
  });
}

/** A text node, a line of it at a time. */
function paintText(node, picture, { origin }) {
  const style = getComputedStyle(node.parentElement);
  pen.font = style.font;
  const { fontBoundingBoxAscent: ascent, fontBoundingBoxDescent: descent } = pen.measureText("x");
  for (const { text, rect } of linesOf(node)) {
    const isRtl = style.direction === "rtl";
    const shown = svg("text", {
      x: (isRtl ? rect.right : rect.left) - origin.left,
      y: rect.top - origin.top + (rect.height - ascent - descent) / 2 + ascent,
      fill: style.color, "font-size": style.fontSize, "font-family": style.fontFamily,
      "font-weight": style.fontWeight, direction: isRtl ? "rtl" : null, "xml:space": "preserve",
      textLength: rect.width, lengthAdjust: "spacingAndGlyphs",
    }, text.replace(UNWRITABLE, ""));
    picture.append(shown);
  }
}

/** [{text, rect}] of each line on which a text node stands. */
function linesOf(node) {
  const range = document.createRange();
  const lines = [];
  let at = 0;
  for (const char of node.data) {
    range.setStart(node, at);
    range.setEnd(node, (at += char.length));
    const rect = range.getBoundingClientRect();
    const last = lines[lines.length - 1];
    if (char === "\n" || (!rect.width && !last)) continue;
    if (last && (!rect.width || Math.abs(last.rect.top - rect.top) < 2)) {
      last.text += char;
      if (!rect.width) continue;
      const [left, right] = [Math.min(last.rect.left, rect.left), Math.max(last.rect.right, rect.right)];
      last.rect = { left, right, width: right - left, top: last.rect.top, height: rect.height };
    } else {
      const { left, right, top, width, height } = rect;
      lines.push({ text: char, rect: { left, right, top, width, height } });
    }
  }
  return lines.filter(({ text, rect }) => rect.width && text.trim());
}

/** A picture within the page, with the colours that the style sheet gives it. */
function paintPicture(node, picture, { origin }) {
  const copy = node.cloneNode(true);
  const [from, to] = [node, copy].map((root) => [root, ...root.querySelectorAll("*")]);
  from.forEach((element, i) => {
    const style = getComputedStyle(element);
    for (const name of PAINTED) to[i].setAttribute(name, style.getPropertyValue(name));
  });
  const rect = node.getBoundingClientRect();
  const place = { x: rect.left - origin.left, y: rect.top - origin.top, width: rect.width, height: rect.height };
  for (const [name, value] of Object.entries(place)) copy.setAttribute(name, value);
  picture.append(copy);
}

/** Marks of the text, which the style sheet draws. */
function paintMark(node, picture, { origin }) {
  if (node.tagName !== "I") return;
  const style = getComputedStyle(node, "::before");
  const rect = node.getBoundingClientRect();
  const [x, y] = [rect.left - origin.left, rect.top - origin.top];
  const fill = style.getPropertyValue("--mark").trim();
  const shape = { hit: `M${x - 4} ${y - 9}h8l-4 7z`, missed: `M${x - 3} ${y - 5}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z`,
    only: `M${x - 4} ${y + rect.height + 3}h8l-4 -6z`, absent: `M${x} ${y - 2}v${rect.height + 4}` };
  for (const [name, d] of Object.entries(shape)) {
    if (!node.classList.contains(name)) continue;
    const isLine = name === "missed" || name === "absent";
    picture.append(svg("path", { d, fill: isLine ? "none" : fill, stroke: isLine ? fill : "none", "stroke-width": 1.5,
      "stroke-dasharray": name === "absent" ? "2 2" : null }));
  }
}
