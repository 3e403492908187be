
"use strict";
// Drawing: rows of history in, SVG out. Text is only ever set as textContent.

const WINDOW = 600; // seconds of history, each second; before that a row each OLD_INTERVAL seconds
const OLD_INTERVAL = 15;
const OLDEST = 6 * 3600;
// Seconds shown -> seconds between marks. A young sidecar has a short history, which should fill the width.
const SPANS = [[60, 10], [120, 30], [300, 60], [WINDOW, 120], [3600, 600], [OLDEST, 3600]];
// What a reader can choose: the most that is shown.
const CHOICES = [WINDOW, 3600, OLDEST];
let shown = SPANS[0];

function fit(rows, now, most) {
  const age = rows.length ? now - rows[0].t : 0;
  shown = SPANS.find(([seconds]) => age <= seconds || seconds === most) ?? SPANS.at(-1);
}
// Seconds without a row that interrupt a line: the sidecar was not running.
const HOLE = 5;
const hole = (row, newest) => (row.t < newest.t - WINDOW + OLD_INTERVAL ? 3 * OLD_INTERVAL : HOLE);

// Rows older than WINDOW: one each OLD_INTERVAL, and one at each change of the verdict.
function thin(rows, now) {
  const kept = [];
  for (const row of rows) {
    const last = kept.at(-1);
    const tells = !last || row.t >= now - WINDOW || row.t - last.t >= OLD_INTERVAL || row.state !== last.state || row.reason !== last.reason;
    if (tells && row.t >= now - OLDEST) kept.push(row);
  }
  return kept;
}
const PLOT = { height: 132, left: 66, right: 10, top: 8, bottom: 20 };
const BAND = { height: 88, left: 10, right: 10, top: 4, bottom: 20 };
const RANK = { stalled: 3, dead: 3, suspect: 2, unknown: 1, starting: 1, exempt: 1, quiet: 1, progressing: 0, idle: 0 };

function node(tag, props = {}, ...inside) {
  const made = Object.assign(document.createElement(tag), props);
  made.append(...inside.filter((part) => part !== null && part !== undefined));
  return made;
}

function shape(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// --- numbers for people: three digits, always with their unit ---

const digits = (value) => (Math.abs(value) < 9.995 ? 2 : Math.abs(value) < 99.95 ? 1 : 0);

function amount(value, unit = "") {
  const [scaled, prefix] = Math.abs(value) >= 999.5e3 ? [value / 1e6, "M"] : Math.abs(value) >= 1e4 ? [value / 1e3, "k"] : [value, ""];
  const text = scaled.toLocaleString("en", { maximumFractionDigits: digits(scaled) });
  return [text, prefix + unit].filter(Boolean).join("\u00a0");
}

function span(seconds) {
  if (seconds < 0.9995) return amount(seconds * 1000, "ms");
  if (seconds < 59.5) return amount(seconds, "s");
  const whole = Math.round(seconds);
  const parts = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = parts.findIndex(([, size]) => whole >= size);
  let rest = whole;
  return parts.slice(first, first + 2).map(([unit, size]) => {
    const count = Math.floor(rest / size);
    rest -= count * size;
    return count ? `${count}\u00a0${unit}` : "";
  }).filter(Boolean).join(" ");
}

function size(bytes) {
  const step = bytes < 1 ? 0 : Math.min(4, Math.floor(Math.log2(bytes) / 10));
  return amount(bytes / 2 ** (10 * step), ["B", "KiB", "MiB", "GiB", "TiB"][step]);
}

const share = (value) => amount(value * 100, "%");
const clock = (wall, seconds = true) =>
  new Date(wall * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: seconds ? "2-digit" : undefined });

// --- scales ---

const MINUTES = [10, 20, 30, 60, 120, 180, 240, 360, 600, 1200, 1800, 3600, 7200];

function ceiling(peak, time) {
  if (!(peak > 0)) return time ? 2 : 1;
  if (time && peak > 6) return MINUTES.find((step) => step >= peak) ?? peak;
  const power = 10 ** Math.floor(Math.log10(peak));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= peak * 0.999) * power;
}

function across(now, width, frame) {
  const room = width - frame.left - frame.right;
  return (t) => frame.left + Math.min(1, Math.max(0, (t - now + shown[0]) / shown[0])) * room;
}

function timeAxis(now, x, width, frame) {
  const step = shown[1] * (width < 420 ? (shown[0] === WINDOW ? 1.5 : 2) : 1);
  const bottom = frame.height - frame.bottom;
  const marks = [];
  for (let t = Math.ceil((now - shown[0]) / step) * step; t <= now; t += step) {
    const anchor = x(t) > width - 24 ? "end" : x(t) < 24 ? "start" : "middle";
    marks.push(shape("line", { class: "axis", x1: x(t), x2: x(t), y1: bottom, y2: bottom + 4 }));
    marks.push(shape("text", { x: x(t), y: frame.height - 4, "text-anchor": anchor }, clock(t, step % 60 !== 0)));
  }
  return marks;
}

// --- the verdict band ---

function runs(rows) {
  const found = [];
  for (const row of rows) {
    const last = found.at(-1);
    const joined = last && row.t - last.end < hole(row, rows.at(-1));
    if (joined) last.end = row.t;
    if (!joined || last.state !== row.state || last.reason !== row.reason) {
      found.push({ state: row.state, reason: row.reason, start: row.t, end: row.t });
    }
  }
  return found;
}

function drawBand(host, rows, now, hover) {
  const width = host.clientWidth;
  const x = across(now, width, BAND);
  const bottom = BAND.height - BAND.bottom;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${BAND.height}`, height: BAND.height, role: "img" });
  svg.setAttribute("aria-label", `Verdicts over the last ${span(shown[0])}`);
  const named = [0, 0, 0, 0]; // right end of the last name, by rank; each rank has its own height
  for (const run of runs(rows)) {
    const rank = RANK[run.state];
    const tall = 8 + 13 * rank; // steps as high as a name, so that names of neighbours do not overlap
    const wide = Math.max(2, x(run.end) - x(run.start));
    const hot = hover !== null && run.start <= hover && hover < run.end ? " hot" : "";
    svg.append(shape("rect", { class: "run" + hot, "data-state": run.state, x: x(run.start), y: bottom - tall, width: wide, height: tall }));
    // A bad verdict is named even if it was too short for its name; the name then ends with the verdict.
    const needed = 6 + 7 * run.state.length;
    const left = wide > needed ? x(run.start) : x(run.end) - needed;
    if ((wide > needed || rank > 1) && left >= named[rank]) {
      svg.append(shape("text", { class: "word", x: left + 2, y: bottom - tall - 4 }, run.state));
      named[rank] = left + needed;
    }
  }
  svg.append(shape("line", { class: "axis", x1: BAND.left, x2: width - BAND.right, y1: bottom, y2: bottom }));
  svg.append(...timeAxis(now, x, width, BAND), ...crosshair(hover, x, BAND));
  host.replaceChildren(svg);
}

// --- a chart: lines over the window, with bad verdicts shaded behind them ---

function drawChart(chart, rows, now, hover, limit) {
  const width = chart.plot.clientWidth;
  const x = across(now, width, PLOT);
  const values = chart.lines.flatMap((line) => rows.map((row) => row[line.column] ?? 0));
  const top = ceiling(Math.max(chart.least ?? 0, limit ?? 0, values.reduce((a, b) => Math.max(a, b), 0)), chart.time);
  const bottom = PLOT.height - PLOT.bottom;
  const y = (value) => bottom - (Math.min(value, top) / top) * (bottom - PLOT.top);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${PLOT.height}`, height: PLOT.height, role: "img", "aria-label": chart.title });
  for (const run of runs(rows).filter((run) => RANK[run.state] > 1)) {
    const wide = Math.max(1, x(run.end) - x(run.start));
    svg.append(shape("rect", { class: "shade", "data-state": run.state, x: x(run.start), y: PLOT.top, width: wide, height: bottom - PLOT.top }));
  }
  for (const part of [0, 0.5, 1]) {
    svg.append(shape("line", { class: part ? "grid" : "axis", x1: PLOT.left, x2: width - PLOT.right, y1: y(top * part), y2: y(top * part) }));
    svg.append(shape("text", { x: PLOT.left - 6, y: y(top * part) + 4, "text-anchor": "end" }, chart.tick(top * part)));
  }
  svg.append(...timeAxis(now, x, width, PLOT));
  if (limit) svg.append(shape("path", { class: "trace limit", d: `M${PLOT.left} ${y(limit)}H${width - PLOT.right}` }));
  chart.lines.forEach((line, index) => {
    const pieces = unbroken(rows, line.column);
    const path = pieces.map((piece) => "M" + piece.map((row) => `${x(row.t).toFixed(1)} ${y(row[line.column]).toFixed(1)}`).join("L") + "h.1").join("");
    if (index === 0) svg.append(shape("path", { class: "area", d: pieces.map((piece) => area(piece, line.column, x, y, bottom)).join("") }));
    svg.append(shape("path", { class: "trace " + line.kind, d: path }));
  });
  svg.append(...crosshair(hover, x, PLOT));
  chart.plot.replaceChildren(svg);
}

function unbroken(rows, column) {
  const pieces = [];
  let last = null;
  for (const row of rows) {
    const shown = row[column] !== null && row[column] !== undefined;
    if (shown && last !== null && row.t - last < hole(row, rows.at(-1))) pieces.at(-1).push(row);
    else if (shown) pieces.push([row]);
    last = shown ? row.t : null;
  }
  return pieces;
}

function area(piece, column, x, y, bottom) {
  const edge = piece.map((row) => `${x(row.t).toFixed(1)} ${y(row[column]).toFixed(1)}`).join("L");
  return `M${x(piece[0].t).toFixed(1)} ${bottom}L${edge}L${x(piece.at(-1).t).toFixed(1)} ${bottom}Z`;
}

function crosshair(hover, x, frame) {
  return hover === null ? [] : [shape("line", { class: "cross", x1: x(hover), x2: x(hover), y1: frame.top, y2: frame.height - frame.bottom })];
}
