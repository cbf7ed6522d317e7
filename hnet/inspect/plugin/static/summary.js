// Figures of all texts together, and how far two runs agree.

import { el } from "./dom.js";
import { exportButtons, percent } from "./card.js";
import { drawHistogram } from "./strips.js";
import { agreement, figures, precisionRecallF1, printable } from "./text.js";

/** A row for every run and stage. runs: [{label, run, step, pairs}]; `of` says which texts these are. */
export function drawSummary(runs, levels, of) {
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
    ["bytes per chunk", ({ f }) => f.mean.toFixed(2)],
    rows.some(({ f }) => f.bpb !== null) ? ["bits per byte", ({ f }) => f.bpb?.toFixed(3) ?? "–"] : null,
    ["percentiles 5 / 50 / 95", ({ f }) => f.percentiles.map((p) => +p.toFixed(1)).join(" / ")],
    ["longest", ({ f }) => f.longest],
    ["coeff. of variation", ({ f }) => f.cv.toFixed(2)],
    ["inside characters", ({ f }) => percent(f.splits)],
    ["p from 0.4 to 0.6", ({ f }) => percent(f.undecided)],
    ...kinds.map((kind) => [`F1 ${printable(kind)}`, score(kind)]),
    ["chunk lengths", ({ f, stage }) => drawHistogram(f.lengths, longest(stage), { width: 170, height: 46 })],
  ].filter((column) => column !== null);
  const head = [of, ...columns.map(([name]) => name)].map((name) => el("th", { scope: "col" }, name));
  const body = rows.map((row) => {
    const name = el("span", { class: "run" }, row.label);
    const cells = columns.map(([label, cell]) => el("td", { "data-label": label }, cell(row)));
    return el("tr", {}, el("th", { scope: "row" }, name, `stage ${row.stage}`), ...cells);
  });
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
  const shown = runs.flatMap(({ run, step, pairs }) => pairs.map(([seg]) => ({ run, step, seg })));
  const caption = el("div", { class: "caption" }, el("span", {}, of), exportButtons("all", shown));
  return el("section", { class: "summary" }, caption, table);
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
