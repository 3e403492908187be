
"use strict";
// The page: events in, document out. Rules:
// - Text is only set as textContent, as tenant names come from clients.
// - URLs are relative, so that the page works behind a path prefix.
// - A section is rebuilt only if its data changed, so that selected or expanded parts stay.
// - Without data for LOST_AFTER_S the page reports that above everything else.

const LOST_AFTER_S = 3.5; // three missed snapshots
const RECONNECT_AFTER_S = 15; // without data, also of a connection that looks open
const RETRY_INTERVAL_S = 3;

const STATES = {
  starting: ["◔", "The engine has not served its first token yet. Not ready."],
  idle: ["○", "No work is outstanding; the engine responds."],
  progressing: ["●", "Work is outstanding, and tokens arrive."],
  quiet: ["◐", "Work is outstanding; the engine is silent, within the time allowed."],
  suspect: ["▲", "Silent for longer than allowed. Not ready; a canary is sent to confirm."],
  stalled: ["■", "No progress of any kind. Liveness fails: the engine will be restarted."],
  dead: ["✕", "The engine is gone. Liveness fails: it will be restarted."],
  exempt: ["◇", "Sleep, pause, update or profiling: not evaluated, not ready."],
  unknown: ["?", "The state is unknown at present. No probe fails because of it."],
};
const LIMITS = { stock: "MU in flight", flow: "MU per minute", kv: "the KV cache", queue: "the wait before the first token",
  ttft: "the time to first token" };
const RULES = {
  floor: "the minimum", predicted: "the time predicted for this work",
  learned: "gaps during normal operation", cap: "the maximum",
};
const CHARTS = [
  { title: "Silence of the engine", time: true, tick: (v) => (v ? span(v) : "0\u00a0s"), lines: [
      { column: "progress_age", kind: "a", label: "silent for", show: span, none: "nothing outstanding" },
      { column: "allowed", kind: "limit", label: "allowed", show: span }],
    note: (s) => `allowed is set by ${RULES[s.silence_ruled_by] ?? s.silence_ruled_by}` },
  { title: "Requests", tick: (v) => amount(v), least: 2, lines: [
      { column: "in_flight", kind: "a", label: "in flight", show: (v) => amount(v) },
      { column: "waiting", kind: "b", label: "waiting", show: (v) => amount(v) }] },
  { title: "Tokens delivered", tick: (v) => amount(v, "tok/s"), lines: [
      { column: "tokens_per_second", kind: "a", label: "rate", show: (v) => amount(v, "tok/s") }],
    note: (s) => `${amount(s.load.tokens_delivered_total, "tok")} since the start` },
  { title: "Time to first token", time: true, tick: (v) => (v ? span(v) : "0\u00a0s"), objective: (s) => s.load.objectives.find(([name]) => name === "ttft_seconds")?.[1], lines: [
      { column: "first_token_p95", kind: "a", label: "p95", show: span, none: "no stream" },
      { column: "first_token_p50", kind: "b", label: "median", show: span, none: "no stream" }],
    note: (s) => `streams of the last minute: ${amount(s.latencies.first_token?.count ?? 0)}` },
  { title: "Time per output token", time: true, tick: (v) => (v ? span(v) : "0\u00a0s"), lines: [
      { column: "output_token_p95", kind: "a", label: "p95", show: span, none: "no stream" },
      { column: "output_token_p50", kind: "b", label: "median", show: span, none: "no stream" }],
    note: (s) => `streams that ended in the last minute: ${amount(s.latencies.output_token?.count ?? 0)}` },
  { title: "Model units in flight", tick: (v) => amount(v, "MU"), limit: (s) => s.load.mu_max_in_flight, lines: [
      { column: "mu_in_flight", kind: "a", label: "in flight", show: (v) => amount(v, "MU") }],
    capacity: (v) => amount(v, "MU"), note: (s) => `prefill ${amount(s.load.prefill_tokens_in_flight, "tok")}, decode ${amount(s.load.decode_tokens_in_flight, "tok")} outstanding` },
  { title: "Model units per minute", tick: (v) => amount(v, "MU"), limit: (s) => s.load.mu_max_per_minute, lines: [
      { column: "mu_per_minute", kind: "a", label: "settled", show: (v) => amount(v, "MU/min") }],
    capacity: (v) => amount(v, "MU/min"), note: (s) => `coefficients ${s.load.coefficients_fingerprint} (${s.load.coefficients_source}${s.load.coefficients_stale ? ", stale: recalibrate" : ""})` },
  { title: "Utilization", tick: share, least: 1, lines: [
      { column: "utilization", kind: "a", label: "load", show: share },
      { column: "gpu", kind: "b", label: "GPU busy", show: share, none: "not read" }],
    note: (s) => `load is limited by ${LIMITS[s.load.limited_by] ?? s.load.limited_by}` },
];

const page = { rows: [], columns: [], most: WINDOW, snapshot: null, receivedAt: 0, hover: null, source: null, drawn: {} };
const $ = (id) => document.getElementById(id);
const put = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };
const silence = () => (performance.now() - page.receivedAt) / 1000;
const wallNow = () => page.snapshot.at_wall + silence();

// --- the feed ---

function connect() {
  page.source?.close();
  page.source = new EventSource("events");
  page.source.addEventListener("history", (event) => {
    const { columns, points, older } = JSON.parse(event.data);
    page.columns = columns;
    page.rows = [...older, ...points].map(toRow);
  });
  page.source.addEventListener("snapshot", (event) => {
    page.snapshot = JSON.parse(event.data);
    page.receivedAt = performance.now();
    remember(toRow(page.snapshot.point));
    show();
  });
  page.source.onerror = () => { if (page.source.readyState === EventSource.CLOSED) setTimeout(connect, RETRY_INTERVAL_S * 1000); };
}

const toRow = (point) => Object.fromEntries(page.columns.map((column, index) => [column, point[index]]));

function remember(row) {
  while (page.rows.length && page.rows.at(-1).t >= row.t) page.rows.pop();
  page.rows = thin([...page.rows, row], row.t);
}

function tick() {
  if (!page.snapshot) return;
  const lost = silence() > LOST_AFTER_S;
  document.body.classList.toggle("stale", lost);
  $("lost").hidden = !lost;
  $("link").dataset.link = lost ? "lost" : "live";
  put("link", lost ? "connection lost" : "live");
  if (lost) put("lost", `No data for ${span(Math.round(silence()))}. Below is the state at ${clock(page.snapshot.at_wall)}, not the current one. Reconnecting.`);
  if (silence() > RECONNECT_AFTER_S && page.source.readyState === EventSource.OPEN) connect();
  showTime(lost ? page.snapshot.at_wall : wallNow(), lost);
}

// --- the top: what, why, since when ---

function showTime(now, lost) {
  const { state, since_wall: since } = page.snapshot.verdict;
  const held = span(Math.max(1, Math.floor(now - since)));
  const today = new Date(since * 1000).toDateString() === new Date(now * 1000).toDateString();
  put("for", `for ${held}`);
  put("since", `since ${today ? "" : new Date(since * 1000).toLocaleDateString("en-GB") + " "}${clock(since)}`);
  const zone = new Intl.DateTimeFormat("en-GB", { timeZoneName: "short" }).formatToParts().find((part) => part.type === "timeZoneName").value;
  put("clock", `${clock(now)} ${zone}`);
  const name = page.snapshot.place.pod || page.snapshot.engine_kind;
  document.title = lost ? `no data – ${name}` : `${STATES[state][0]} ${state} ${held} – ${name}`;
}

// Where it is, for whoever has ten of these pages open.
function showPlace({ place, models, engine_kind: kind, engine_version: version }) {
  put("engine-kind", `engine: ${[kind, version].filter(Boolean).join(" ")}`);
  const pod = [place.namespace, place.pod].filter(Boolean).join("/");
  const more = models.length > 1 ? ` and ${models.length - 1} more` : "";
  for (const [id, label, text] of [["model", "model", models.length ? models[0] + more : ""], ["pod", "pod", pod], ["node", "node", place.node]]) {
    $(id).hidden = !text;
    put(id, `${label}: ${text}`);
  }
}

// A time and what it is judged by; "–" where no stream has shown it.
function showTimes(id, times, of) {
  put(id, times ? span(times.p50) : "–");
  put(`${id}-of`, times ? `p95 ${span(times.p95)}${of}` : "no stream");
}

function showProbes(probes, handover) {
  $("probes").replaceChildren("probes: ", ...probes.flatMap(([kind, passes], index) =>
    [index ? ", " : "", passes ? `${kind} passes` : node("b", { textContent: `${kind} fails` })]));
  $("operator").hidden = !handover;
  put("operator", `An operator must act: ${handover}`);
}

function showVerdict({ verdict, draining, version, load, latencies, probes, handover, progress_age: age, silence_allowed: allowed }) {
  $("verdict").dataset.state = verdict.state;
  put("glyph", STATES[verdict.state][0]);
  put("state", verdict.state);
  put("detail", verdict.detail);
  put("reason", verdict.reason);
  put("meaning", STATES[verdict.state][1]);
  put("what-to-do", RANK[verdict.state] && verdict.state !== "quiet" ? `What to do: docs/runbook.md#${verdict.reason}` : "");
  put("version", version);
  $("draining").hidden = !draining;
  put("now-silence", age === null ? "–" : span(age));
  put("now-silence-of", age === null ? "nothing outstanding" : `of ${span(allowed)} allowed`);
  put("now-requests", amount(load.requests_in_flight));
  const failing = load.errors_per_second ? `, ${amount(load.errors_per_second)}/s fail` : "";
  put("now-requests-of", `in flight, ${amount(load.requests_waiting)} waiting${failing}`);
  const objective = load.objectives.find(([name]) => name === "ttft_seconds")?.[1];
  showTimes("now-first", latencies.first_token, objective ? `, objective ${span(objective)}` : "");
  showTimes("now-token", latencies.output_token, "");
  showProbes(probes, handover);
  put("now-utilization", share(load.utilization));
  put("now-utilization-of", `limited by ${LIMITS[load.limited_by] ?? load.limited_by}`);
  const colour = getComputedStyle($("verdict")).getPropertyValue("--state");
  const icon = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="4" fill="${colour}"/></svg>`;
  once("icon", colour, () => { $("icon").href = "data:image/svg+xml," + encodeURIComponent(icon); });
}

// --- charts ---

function buildCharts() {
  for (const chart of CHARTS) {
    chart.plot = node("div");
    chart.legend = node("div", { className: "legend" });
    $("charts").append(node("section", { className: "card chart" }, node("h2", { textContent: chart.title }), chart.legend, chart.plot));
    follow(chart.plot, PLOT);
  }
  follow($("timeline"), BAND);
  for (const most of CHOICES) {
    const choice = node("button", { type: "button", textContent: span(most) });
    choice.addEventListener("click", () => { page.most = most; draw(); });
    choice.dataset.most = most;
    $("spans").append(choice);
  }
}

function follow(host, frame) {
  const at = (event) => {
    if (!page.snapshot) return;
    const box = host.getBoundingClientRect();
    const part = (event.clientX - box.left - frame.left) / (box.width - frame.left - frame.right);
    page.hover = page.snapshot.at_wall - shown[0] * (1 - Math.min(1, Math.max(0, part)));
    draw();
    if (host.id === "timeline") showTip(event, box);
  };
  host.addEventListener("pointermove", at);
  host.addEventListener("pointerdown", at);
  host.addEventListener("pointerleave", () => { page.hover = null; $("tip").hidden = true; draw(); });
}

function showTip(event, box) {
  const run = runs(page.rows).find((run) => run.start <= page.hover && page.hover <= run.end);
  $("tip").hidden = !run;
  if (!run) return;
  const lines = [`${STATES[run.state][0]} ${run.state}: ${run.reason}`, `${clock(run.start)} to ${clock(run.end)}, ${span(Math.max(1, run.end - run.start))}`];
  $("tip").replaceChildren(...lines.map((text) => node("div", { textContent: text })));
  $("tip").style.left = `${Math.max(8, Math.min(event.clientX + 12, innerWidth - $("tip").offsetWidth - 8))}px`;
  $("tip").style.top = `${box.bottom + 6}px`;
}

function draw() {
  if (!page.snapshot || document.hidden) return;
  const now = page.snapshot.at_wall;
  fit(page.rows, now, page.most);
  for (const choice of $("spans").children) choice.setAttribute("aria-pressed", String(Number(choice.dataset.most) === page.most));
  put("span", `last ${span(shown[0])}`);
  const rows = page.rows.filter((row) => row.t >= now - shown[0]);
  const row = page.hover === null ? page.rows.at(-1) : page.rows.findLast((row) => row.t <= page.hover);
  drawBand($("timeline"), rows, now, page.hover);
  for (const chart of CHARTS) {
    const limit = (chart.limit ?? chart.objective)?.(page.snapshot);
    drawChart(chart, rows, now, page.hover, limit);
    chart.legend.replaceChildren(...legend(chart, row, limit));
  }
}

function legend(chart, row, limit) {
  const entry = (kind, label, text) => node("span", {}, node("i", { className: kind }), `${label} `, node("b", { textContent: text }));
  const entries = chart.lines.map(({ column, kind, label, show, none }) => {
    const value = row?.[column];
    return entry(kind, label, value === null || value === undefined ? none ?? "no data" : show(value));
  });
  if (limit) entries.push(chart.capacity ? entry("limit", "capacity", chart.capacity(limit)) : entry("limit", "objective", span(limit)));
  const note = page.hover !== null && row ? `at ${clock(row.t)}` : chart.note?.(page.snapshot);
  return [...entries, note ? node("span", { textContent: note }) : null].filter(Boolean);
}

// --- all together ---

function once(id, data, build) {
  const key = JSON.stringify(data);
  if (page.drawn[id] === key) return;
  page.drawn[id] = key;
  build(data);
}

function show() {
  $("main").hidden = false;
  showPlace(page.snapshot);
  showVerdict(page.snapshot);
  for (const [id, select, build] of SECTIONS) once(id, select(page.snapshot), (data) => $(id).replaceChildren(...build(data)));
  draw();
  tick();
}

buildCharts();
connect();
setInterval(tick, 500);
addEventListener("resize", draw);
document.addEventListener("visibilitychange", draw);
