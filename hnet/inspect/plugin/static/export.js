// What is shown as files: boundaries as JSON lines or CSV, a card as SVG.

import { el } from "./dom.js";
import { bitsOf, lengthsOf, printable, probsAt, routeAt } from "./text.js";

const COLUMNS = ["run", "step", "text", "stage", "chunk", "start", "end", "hex", "shown", "p", "bits", "route"];

/** Hand a file to the person. */
export function download(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = el("a", { href: url, download: name.replace(/[^\p{L}\p{N}._-]+/gu, "_").slice(-100) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Segmentations as stored, one per line: what experiments.boundaries and `read_segmentations` take. */
export const asJsonLines = (shown) =>
  shown.map(({ run, step, seg }) => `${JSON.stringify({ run, step, ...seg.json })}\n`).join("");

/** A cell that no spreadsheet takes for a formula. */
function cell(value) {
  const text = typeof value === "string" && /^[=+\-@\t\r']/.test(value) ? `'${value}` : String(value ?? "");
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** A row per chunk of every stage; hex is exact, `shown` is for people. */
export function asCsv(shown) {
  const decoder = new TextDecoder();
  const rows = shown.flatMap(({ run, step, seg }) =>
    seg.stages.flatMap(({ starts }, stage) => {
      const lengths = lengthsOf(seg, starts);
      return starts.map((start, i) => {
        const end = start + lengths[i];
        const bytes = seg.bytes.subarray(start, end);
        const hex = Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join(" ");
        const p = probsAt(seg, start).find((found) => found.stage === stage)?.p;
        const bits = bitsOf(seg, start, end);
        const text = printable(decoder.decode(bytes));
        return [run, step, printable(seg.name), stage, i, start, end, hex, text, p, bits?.toFixed(3), routeAt(seg, start)];
      });
    }),
  );
  return [COLUMNS, ...rows].map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}
