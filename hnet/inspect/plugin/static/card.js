// One probe text: its chunks, p over position and figures, for one run or two side by side.

import { describeChunk, drawHistogram, drawStrip, drawText, el } from "./draw.js";
import { agreement, figures, precisionRecallF1, printable } from "./text.js";

const DRAWN_BYTES = 4096; // of a longer text, until asked for all
const percent = (x) => `${(100 * x).toFixed(1)}%`;

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

/** One run's view of one text. */
function drawColumn(seg, starts, options, tooltip, longest) {
  const { levels, gold, threshold } = options;
  const column = el("div", { class: "column" });
  const draw = (limit) => {
    const { box, chunks } = drawText(seg, starts, { levels, gold, limit });
    const strips = el("div", { class: "strips" });
    const redrawStrips = (marked) => {
      const width = Math.max(Math.floor(column.clientWidth || 600) - 2, 100);
      strips.replaceChildren(
        ...levels.map((s) => drawStrip(seg, s, starts, { gold, threshold, marked }, width)),
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
      ? el("button", { type: "button", onclick: () => draw(Infinity) }, `Show all ${seg.bytes.length} bytes`)
      : null;
    column.replaceChildren(box, ...(more ? [more] : []), strips, drawNumbers(seg, starts, options, longest));
    column.redraw = () => redrawStrips(null);
  };
  draw(DRAWN_BYTES);
  return column;
}

/** Pointer and keys: over the text, over the strips. */
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
  box.addEventListener("blur", () => choose(-1));
  box.addEventListener("keydown", (e) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, Escape: 0 }[e.key];
    if (move === undefined) return;
    e.preventDefault();
    e.stopPropagation();
    choose(move === 0 ? -1 : Math.max(0, Math.min(chosen.index + move, chunks.length - 1)));
  });
}

function drawNumbers(seg, starts, { levels, kinds }, longest) {
  const rows = levels.map((stage) => {
    const f = figures([[seg, starts]], stage);
    if (!f) return null;
    const gold = f.gold.filter(([kind]) => kinds.includes(kind)).map(([kind, score]) => {
      const detail = `precision ${score.precision.toFixed(2)}, recall ${score.recall.toFixed(2)}`;
      return el("span", { title: detail }, `${printable(kind)} F1 ${score.f1.toFixed(2)}`);
    });
    const facts = [
      el("b", {}, `stage ${stage}`),
      el("span", {}, `${f.lengths.length} chunk${f.lengths.length === 1 ? "" : "s"}`),
      el("span", {}, `${f.mean.toFixed(2)} bytes a chunk`),
      el("span", {}, `longest ${f.longest}`),
      f.splits ? el("span", { class: "warn" }, `${percent(f.splits)} inside characters`) : null,
      ...gold,
    ];
    const drawn = drawHistogram(f.lengths, longest[stage], { width: 180, height: 48 });
    return el("div", { class: "numbers" }, el("div", { class: "facts" }, ...facts), drawn);
  });
  return el("div", {}, ...rows);
}

/** A card: `views` has [segmentation or null, its starts] for each run shown. */
export function drawCard(title, views, options, tooltip) {
  const routes = title.routes.map((name) => el("span", { class: "route" }, printable(name)));
  const longest = {}; // of each stage over the runs, so that their histograms have one scale
  for (const stage of options.levels) {
    const found = views.map(([seg, starts]) => (seg ? figures([[seg, starts]], stage)?.longest : 0));
    longest[stage] = Math.max(1, ...found.map((length) => length ?? 0));
  }
  const none = (why) => el("div", { class: "column none" }, why);
  const columns = views.map(([seg, starts]) => {
    if (!seg) return none("not written at this step");
    const levels = options.levels.filter((stage) => stage < seg.stages.length);
    if (!levels.length) return none(`no stage ${options.levels[0]} here`);
    return drawColumn(seg, starts, { ...options, levels }, tooltip, longest);
  });
  const head = el("h2", {}, el("span", { class: "name" }, printable(title.name) || "text"), ...routes);
  head.append(el("span", { class: "size" }, `${title.bytes} bytes`));
  const card = el("article", { class: "card" }, head, el("div", { class: "columns" }, ...columns));
  return { card, redraw: () => columns.forEach((c) => c.redraw?.()) };
}

/** Figures of all shown texts together: a row for every run and stage. */
export function drawSummary(runs, levels) {
  const rows = runs.flatMap(({ label, pairs }) =>
    levels.map((stage) => ({ label, stage, f: figures(pairs, stage) })).filter(({ f }) => f),
  );
  if (!rows.length) return null;
  const kinds = [...new Set(rows.flatMap(({ f }) => f.gold.map(([kind]) => kind)))];
  const score = (kind) => ({ f }) => {
    const found = f.gold.find(([name]) => name === kind)?.[1];
    if (!found) return "–";
    const parts = `P ${found.precision.toFixed(2)} R ${found.recall.toFixed(2)}`;
    return el("span", {}, found.f1.toFixed(3), el("small", {}, parts));
  };
  const longest = (stage) => Math.max(...rows.filter((row) => row.stage === stage).map(({ f }) => f.longest));
  const columns = [
    ["chunks", ({ f }) => f.lengths.length],
    ["bytes a chunk", ({ f }) => f.mean.toFixed(2)],
    ["percentiles 5 / 50 / 95", ({ f }) => f.percentiles.map((p) => +p.toFixed(1)).join(" / ")],
    ["longest", ({ f }) => f.longest],
    ["coeff. of variation", ({ f }) => f.cv.toFixed(2)],
    ["inside characters", ({ f }) => percent(f.splits)],
    ["p from 0.4 to 0.6", ({ f }) => percent(f.undecided)],
    ...kinds.map((kind) => [`F1 ${printable(kind)}`, score(kind)]),
    ["chunk lengths", ({ f, stage }) => drawHistogram(f.lengths, longest(stage), { width: 170, height: 46 })],
  ];
  const head = ["all texts shown", ...columns.map(([name]) => name)].map((name) => el("th", { scope: "col" }, name));
  const body = rows.map((row) => {
    const name = el("span", { class: "run", title: row.label }, row.label);
    const cells = columns.map(([, cell]) => el("td", {}, cell(row)));
    return el("tr", {}, el("th", { scope: "row" }, name, `stage ${row.stage}`), ...cells);
  });
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
  return el("section", { class: "summary" }, table);
}

/** How far two runs agree where to cut; `views` as of drawCard, for each text. */
export function drawAgreement(views, levels) {
  const both = views.filter((runs) => runs.length === 2 && runs.every(([seg]) => seg));
  const shared = levels.filter((stage) => both.every(([[, a], [, b]]) => a[stage] && b[stage]));
  if (!both.length || !shared.length) return null;
  const parts = shared.map((stage) => {
    const total = { hits: 0, predicted: 0, gold: 0 };
    for (const [[, a], [, b]] of both) {
      const found = agreement(a[stage], b[stage].slice(1));
      for (const name of Object.keys(total)) total[name] += found[name];
    }
    return `stage ${stage}: F1 ${precisionRecallF1(total).f1.toFixed(3)}`;
  });
  return el("p", { class: "divergence" }, `Agreement of the two runs' boundaries: ${parts.join(", ")}`);
}
