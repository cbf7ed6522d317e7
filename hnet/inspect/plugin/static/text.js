// Bytes, characters, chunks and figures of one segmentation. No DOM in this file.

const encoder = new TextEncoder();
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

const SHORT = new Map([["\t", "\\t"], ["\n", "\\n"], ["\r", "\\r"]]);
const numbered = (c) => `\\u{${c.codePointAt(0).toString(16).padStart(4, "0")}}`;

/** A name from data as it may be drawn: what is invisible or turns text around is a number. */
export const printable = (name) => name.replace(UNSEEN, (c) => SHORT.get(c) ?? numbered(c));

/** The bytes of a segmentation in its JSON form. */
export function bytesOf(json) {
  if (json.text !== undefined) return encoder.encode(json.text);
  return Uint8Array.from(atob(json.base64), (c) => c.charCodeAt(0));
}

function sequenceLength(lead) {
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead <= 0xdf) return 2;
  if (lead >= 0xe0 && lead <= 0xef) return 3;
  if (lead >= 0xf0 && lead <= 0xf4) return 4;
  return 0;
}

/** [{start, end, char}] in order; char is null for a byte that belongs to no character. */
export function characters(bytes) {
  const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  const out = [];
  for (let start = 0; start < bytes.length; ) {
    const length = sequenceLength(bytes[start]);
    let char = null;
    if (length && start + length <= bytes.length) {
      try {
        char = strict.decode(bytes.subarray(start, start + length));
      } catch {
        char = null;
      }
    }
    const end = start + (char === null ? 1 : length);
    out.push({ start, end, char });
    start = end;
  }
  return out;
}

/** A segmentation ready to draw: bytes, characters, and for each stage starts and positions. */
export function prepare(json) {
  const bytes = bytesOf(json);
  const every = Array.from(bytes, (_, i) => i);
  const stages = json.stages.map((stage, s) => ({
    starts: stage.starts,
    probs: stage.probs,
    positions: s === 0 ? every : json.stages[s - 1].starts,
  }));
  const chars = characters(bytes);
  const inside = new Set();
  for (const { start, end } of chars) for (let o = start + 1; o < end; o++) inside.add(o);
  const gold = new Map(Object.entries(json.gold)); // a kind may be called "constructor"
  const bits = json.bits?.length ? json.bits : null;
  return { name: json.name, bytes, chars, inside, stages, routes: json.routes, gold, bits, json };
}

/** Surprisal of the bytes from `start` to `end` together, in bits; null if it is not known. */
export function bitsOf(seg, start, end) {
  return seg.bits?.slice(start, end).reduce((a, b) => a + b, 0) ?? null;
}

/** Offsets strictly inside the text at which a chunk of one of the levels starts. */
export const cutsOf = (starts, levels) => new Set(levels.flatMap((s) => starts[s]?.slice(1) ?? []));

/** Offset of the first byte of the character that a byte belongs to. */
export function characterAt(seg, offset) {
  while (seg.inside.has(offset)) offset--;
  return offset;
}

/** Offsets of the characters in which a query occurs, letter case aside. */
export function occurrences(seg, query) {
  const wanted = query.toLowerCase();
  if (!wanted) return new Set();
  let text = "";
  const owner = []; // of each unit of `text`, its character
  seg.chars.forEach(({ char }, i) => {
    const low = (char ?? "\ufffd").toLowerCase();
    for (let unit = 0; unit < low.length; unit++) owner.push(i);
    text += low;
  });
  const found = new Set();
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + 1)) {
    for (let unit = at; unit < at + wanted.length; unit++) found.add(seg.chars[owner[unit]].start);
  }
  return found;
}

/** Chunk starts of every stage: the model's own, or those a threshold on p would give.
 *
 * What an outer stage newly cuts has no probability inside, and starts no chunk there. */
export function startsAt(seg, threshold) {
  if (threshold === null) return seg.stages.map((stage) => stage.starts);
  const out = [];
  seg.stages.forEach((stage, s) => {
    const allowed = s === 0 ? null : new Set(out[s - 1]);
    const first = seg.bytes.length ? [0] : [];
    const rest = stage.positions.filter(
      (offset, i) => offset > 0 && stage.probs[i] > threshold && (!allowed || allowed.has(offset)),
    );
    out.push([...first, ...rest]);
  });
  return out;
}

/** [{start, end, depth}] for the levels shown; depth is the innermost shown stage that starts. */
export function chunksOf(seg, starts, levels) {
  const depth = new Map();
  for (const level of levels) for (const offset of starts[level] ?? []) depth.set(offset, level);
  const order = [...depth.keys()].sort((a, b) => a - b);
  return order.map((start, i) => ({
    start,
    end: order[i + 1] ?? seg.bytes.length,
    depth: depth.get(start),
  }));
}

/** Probability of each stage at a byte offset: [{stage, p}], for stages that decide there. */
export function probsAt(seg, offset) {
  return seg.stages.flatMap((stage, s) => {
    const i = s === 0 ? offset : stage.positions.indexOf(offset);
    return i >= 0 && i < stage.probs.length ? [{ stage: s, p: stage.probs[i] }] : [];
  });
}

export function routeAt(seg, offset) {
  let found = null;
  for (const [start, name] of seg.routes) if (start <= offset) found = name;
  return found;
}

export const lengthsOf = (seg, starts) =>
  starts.map((start, i) => (starts[i + 1] ?? seg.bytes.length) - start);

/** Linear interpolation between the sorted values, as NumPy's default. */
export function percentile(sorted, q) {
  const at = ((sorted.length - 1) * q) / 100;
  const low = Math.floor(at);
  const high = Math.min(low + 1, sorted.length - 1);
  return sorted[low] + (sorted[high] - sorted[low]) * (at - low);
}

/** Hits, predicted and gold boundaries strictly inside a text. */
export function agreement(starts, gold) {
  const wanted = new Set(gold);
  const cuts = starts.slice(1);
  return { hits: cuts.filter((o) => wanted.has(o)).length, predicted: cuts.length, gold: gold.length };
}

const ratio = (a, b) => (b ? a / b : 0);

export const precisionRecallF1 = ({ hits, predicted, gold }) => ({
  precision: ratio(hits, predicted),
  recall: ratio(hits, gold),
  f1: ratio(2 * hits, predicted + gold),
});

/** Figures of one stage pooled over texts: [[segmentation, its starts at every stage], ...]. */
export function figures(pairs, stage) {
  const texts = pairs.filter(([seg, starts]) => starts[stage] && seg.bytes.length);
  const lengths = texts.flatMap(([seg, starts]) => lengthsOf(seg, starts[stage]));
  if (!lengths.length) return null;
  lengths.sort((a, b) => a - b);
  const mean = lengths.reduce((a, b) => a + b, 0) / lengths.length;
  const variance = lengths.reduce((a, b) => a + (b - mean) ** 2, 0) / lengths.length;
  const cuts = texts.flatMap(([seg, starts]) => starts[stage].slice(1).map((o) => seg.inside.has(o)));
  const probs = texts.flatMap(([seg]) => seg.stages[stage].probs.slice(1));
  const told = texts.filter(([seg]) => seg.bits);
  const bits = told.reduce((sum, [seg]) => sum + bitsOf(seg, 0), 0);
  const bytes = told.reduce((sum, [seg]) => sum + seg.bytes.length, 0);
  const gold = new Map();
  for (const [seg, starts] of texts) {
    for (const [kind, offsets] of seg.gold) {
      const found = agreement(starts[stage], offsets);
      const total = gold.get(kind) ?? { hits: 0, predicted: 0, gold: 0 };
      for (const name of Object.keys(total)) total[name] += found[name];
      gold.set(kind, total);
    }
  }
  return {
    lengths,
    mean,
    cv: Math.sqrt(variance) / mean,
    percentiles: [5, 50, 95].map((q) => percentile(lengths, q)),
    longest: lengths[lengths.length - 1],
    splits: ratio(cuts.filter(Boolean).length, cuts.length),
    bpb: bytes ? bits / bytes : null,
    undecided: ratio(probs.filter((p) => p >= 0.4 && p <= 0.6).length, probs.length),
    gold: [...gold].map(([kind, counts]) => [kind, precisionRecallF1(counts)]),
  };
}
