// One probe text: its chunks, p and surprisal over position and figures, for one run or two.

import { button, el } from "./dom.js";
import { describeChunk, drawText } from "./draw.js";
import { asCsv, asJsonLines, download } from "./export.js";
import { pictureOf } from "./picture.js";
import { drawBits, drawHistogram, drawStrip } from "./strips.js";
import { focusFrom } from "./surroundings.js";
import { cutsOf, figures, occurrences, printable } from "./text.js";

const DRAWN_BYTES = 4096; // of a longer text, until asked for all
export const percent = (x) => `${(100 * x).toFixed(1)}%`;

/** A tooltip at the pointer or at the chunk that has the keyboard; one for the whole page. */
export function makeTooltip() {
  const node = el("div", { class: "tooltip", role: "status", hidden: true });
  const hide = () => {
    node.hidden = true;
  };
  const show = (rows, x, y) => {
    node.replaceChildren(
      ...rows.map(([label, value]) => el("div", {}, el("b", {}, label), el("span", {}, value))),
    );
    node.hidden = false;
    const { width, height } = node.getBoundingClientRect();
    const left = Math.min(x + 12, document.documentElement.clientWidth - width - 8);
    const above = y + 22 + height > document.documentElement.clientHeight;
    node.style.left = `${Math.max(left, 8)}px`;
    node.style.top = `${Math.max(above ? y - height - 14 : y + 22, 8)}px`;
  };
  return { node, show, hide };
}

/** One run's view of one text. longest: of each stage, the longest chunk of any run. */
function drawColumn(seg, starts, options, tooltip, longest) {
  const { levels, gold, threshold } = options;
  const column = el("div", { class: "column" });
  const cuts = cutsOf(starts, levels);
  const draw = (limit) => {
    const { box, chunks } = drawText(seg, starts, { ...options, limit });
    const strips = el("div", { class: "strips" });
    const redrawStrips = (marked) => {
      const width = Math.max(Math.floor(column.clientWidth || 600) - 2, 100);
      strips.replaceChildren(
        ...levels.map((s) => drawStrip(seg, s, starts, { gold, threshold, marked }, width)),
        ...(seg.bits ? [drawBits(seg, cuts, marked, width)] : []),
      );
    };
    const chosen = { index: -1 };
    const choose = (i, x, y) => {
      if (i === chosen.index) return;
      box.querySelector(".chosen")?.classList.remove("chosen");
      chosen.index = i;
      const node = i < 0 ? null : box.querySelector(`[data-chunk="${i}"]`);
      redrawStrips(node ? chunks[i] : null);
      if (!node) return tooltip.hide();
      node.classList.add("chosen");
      const place = x === undefined ? node.getClientRects()[0] : null;
      tooltip.show(describeChunk(seg, chunks, i, levels), x ?? place.left, y ?? place.bottom - 12);
    };
    listen(box, strips, seg, chunks, chosen, choose);
    const more = limit < seg.bytes.length
      ? button(`Show all ${seg.bytes.length} bytes`, `Show all ${seg.bytes.length} bytes`, () => draw(Infinity), "wide")
      : null;
    column.replaceChildren(el("div", { class: "of" }, options.label), box, ...(more ? [more] : []), strips, drawNumbers(seg, starts, options, longest));
    column.redraw = () => redrawStrips(null);
    redrawStrips(null);
  };
  draw(DRAWN_BYTES);
  return column;
}

/** Pointer and keys: over the text, over the strips. A text that was reached with the keyboard
 * takes the arrow keys, one that was clicked leaves them to the steps. */
function listen(box, strips, seg, chunks, chosen, choose) {
  box.addEventListener("pointermove", (e) => {
    const node = e.target.closest(".chunk");
    choose(node ? Number(node.dataset.chunk) : -1, e.clientX, e.clientY);
  });
  strips.addEventListener("pointermove", (e) => {
    const { left, width } = strips.getBoundingClientRect();
    const offset = ((e.clientX - left) / width) * seg.bytes.length;
    choose(chunks.findLastIndex((c) => c.start <= offset), e.clientX, e.clientY);
  });
  for (const node of [box, strips]) node.addEventListener("pointerleave", () => choose(-1));
  const isByPointer = focusFrom(box);
  box.addEventListener("blur", () => choose(-1));
  box.addEventListener("keydown", (e) => {
    const move = new Map([["ArrowRight", 1], ["ArrowLeft", -1], ["Escape", 0]]).get(e.key);
    if (move === undefined || (move && isByPointer())) return;
    e.preventDefault();
    e.stopPropagation();
    if (move === 0) box.blur();
    else choose(Math.max(0, Math.min(chosen.index + move, chunks.length - 1)));
  });
}

function drawNumbers(seg, starts, { levels, kinds, other }, longest) {
  const rows = levels.map((stage, i) => {
    const f = figures([[seg, starts]], stage);
    if (!f) return null;
    const gold = f.gold.filter(([kind]) => kinds.includes(kind)).map(([kind, score]) => {
      const detail = `precision ${score.precision.toFixed(2)}, recall ${score.recall.toFixed(2)}`;
      return el("span", { title: detail }, `${printable(kind)} F1 ${score.f1.toFixed(2)}`);
    });
    const facts = [
      el("b", {}, `stage ${stage}`),
      el("span", {}, `${f.lengths.length} chunk${f.lengths.length === 1 ? "" : "s"}`),
      el("span", {}, `${f.mean.toFixed(2)} bytes per chunk`),
      el("span", {}, `longest ${f.longest}`),
      i === 0 && f.bpb !== null ? el("span", {}, `${f.bpb.toFixed(3)} bits per byte`) : null,
      f.splits ? el("span", { class: "warn" }, `${percent(f.splits)} inside characters`) : null,
      i === 0 && other ? el("span", {}, differences(cutsOf(starts, levels), other)) : null,
      ...gold,
    ];
    const drawn = drawHistogram(f.lengths, longest[stage], { width: 180, height: 48 });
    return el("div", { class: "numbers" }, el("div", { class: "facts" }, ...facts), drawn);
  });
  return el("div", {}, ...rows);
}

function differences(own, other) {
  const only = [...own].filter((o) => !other.has(o)).length;
  const absent = [...other].filter((o) => !own.has(o)).length;
  return `${only} boundar${only === 1 ? "y" : "ies"} only here, ${absent} only there`;
}

/** The longest chunk of each stage over the runs, so that their histograms have one scale. */
function longestOf(views, levels) {
  const longest = {};
  for (const stage of levels) {
    const found = views.map(([seg, starts]) => (seg ? figures([[seg, starts]], stage)?.longest : 0));
    longest[stage] = Math.max(1, ...found.map((length) => length ?? 0));
  }
  return longest;
}

/** Buttons that save the shown runs of a text: [{run, step, seg}]. */
export function exportButtons(name, shown, card = null) {
  const file = (end) => `${[...new Set(shown.map(({ run }) => run))].join("-")}-${shown[0].step}-${name}.${end}`;
  const save = (end, type, make) => () => download(file(end), type, make());
  const picture = () => pictureOf(card(), (node) => node.classList.contains("actions"));
  return el("div", { class: "actions" },
    card ? button("SVG", "Save this card as SVG", save("svg", "image/svg+xml", picture)) : null,
    button("JSON", "Save boundaries as JSON lines", save("jsonl", "application/jsonl", () => asJsonLines(shown))),
    button("CSV", "Save boundaries as CSV", save("csv", "text/csv", () => asCsv(shown))),
  );
}

/** A card: `views` has [segmentation or null, its starts] for each run of `runs`: [{run, step, label}]. */
export function drawCard(title, views, runs, options, tooltip) {
  const name = printable(title.name) || "text";
  const routes = title.routes.map((route) => el("span", { class: "route" }, printable(route)));
  const longest = longestOf(views, options.levels);
  const none = (why) => el("div", { class: "column none" }, why);
  const columns = views.map(([seg], i) => {
    if (!seg) return none("not written at this step");
    const [, starts] = views[i];
    const levels = options.levels.filter((stage) => stage < seg.stages.length);
    if (!levels.length) return none(`no stage ${options.levels[0]} here`);
    const beside = views.find(([other], j) => j !== i && other);
    const other = beside ? cutsOf(beside[1], levels) : null;
    const own = { ...options, levels, other, found: occurrences(seg, options.query), label: runs[i].label };
    return drawColumn(seg, starts, own, tooltip, longest);
  });
  const shown = views.flatMap(([seg], i) => (seg ? [{ run: runs[i].run, step: runs[i].step, seg }] : []));
  const actions = shown.length ? exportButtons(name, shown, () => card) : null;
  const size = el("span", { class: "size" }, `${title.bytes} bytes`);
  const head = el("h2", {}, el("span", { class: "name" }, name), ...routes, size, actions);
  const card = el("article", { class: "card" }, head, el("div", { class: "columns" }, ...columns));
  return { card, redraw: () => columns.forEach((c) => c.redraw?.()) };
}
