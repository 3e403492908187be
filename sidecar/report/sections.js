
"use strict";
// The tables below the charts: each is a pure function from its part of the snapshot to nodes.

const row = (label, value) => [node("dt", { textContent: label }), node("dd", {}, value)];
const facts = (pairs) => node("dl", { className: "facts" }, ...pairs.flatMap(([label, value]) => row(label, value)));
const soft = (text) => node("span", { className: "soft", textContent: text });
const bad = (text) => node("span", { className: "bad", textContent: text });
const badge = (state) => { const made = node("span", { className: "badge", textContent: state }); made.dataset.state = state; return made; };

function reading(read, view) {
  if ("absent" in read) return soft(`absent: ${read.absent}`);
  if ("failed" in read) return bad(`could not be read: ${read.failed}`);
  return view(read.value);
}

// columns: [heading, row -> text or node, "n" for numbers, "name" for names, "wide" for texts that wrap]
function table(columns, rows) {
  const head = columns.map(([heading, , kind]) => node("th", { textContent: heading, className: kind ?? "" }));
  const body = rows.map((item) => node("tr", {}, ...columns.map(([, cell, kind]) => node("td", { className: kind ?? "" }, cell(item)))));
  return node("div", { className: "scroll" }, node("table", {}, node("thead", {}, node("tr", {}, ...head)), node("tbody", {}, ...body)));
}

function meter(part) {
  const bar = node("span");
  bar.style.width = `${Math.max(0, Math.min(1, part)) * 100}%`;
  return node("span", { className: "meter" }, bar);
}

const GOOD = ["ok", "cached", "passed"];
const chips = (outcomes) => node("span", {}, ...outcomes.filter(([, count]) => count).map(([outcome, count]) =>
  node("span", { className: GOOD.includes(outcome) || outcome === "client_cancelled" || outcome === "not_begun" ? "chip" : "chip bad", textContent: `${outcome} ${amount(count)}` })));

// --- verdict changes and diagnoses ---

function evidenceValue(name, value) {
  if (value === null) return "none";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return value;
  return /(_age|_allowed|_predicted|_for|_seconds)$/.test(name) ? span(value) : amount(value);
}

function changes(list) {
  const unfolded = new Set([...$("changes").querySelectorAll("details[open]")].map((item) => item.dataset.key));
  return list.length ? list.map((change, index) => {
    const until = list[index - 1]?.since_wall;
    const lasted = until ? `lasted ${span(Math.max(0.001, until - change.since_wall))}` : "now";
    const why = node("span", { className: "why" }, node("code", { textContent: change.reason }), ` ${change.detail} `, soft(`(${lasted})`));
    const evidence = Object.entries(change.evidence).map(([name, value]) => [name.replaceAll("_", " "), evidenceValue(name, value)]);
    const when = node("time", { textContent: clock(change.since_wall), title: new Date(change.since_wall * 1000).toISOString() });
    const made = node("details", {}, node("summary", {}, when, badge(change.state), why),
      evidence.length ? facts(evidence) : soft("no evidence beyond the reason"));
    made.dataset.key = `${change.since_wall} ${change.state}`;
    made.dataset.state = change.state;
    made.open = unfolded.has(made.dataset.key);
    return made;
  }) : [soft("none yet")];
}

function diagnoses(list) {
  if (!list.length) return [soft("none: the engine was never killed")];
  return [table([
    ["taken", (d) => node("a", { href: `diagnoses/${encodeURIComponent(d.id)}`, textContent: clock(d.at_wall), title: new Date(d.at_wall * 1000).toISOString() })],
    ["reason", (d) => node("code", { textContent: d.reason })],
    ["engine processes", (d) => d.summary || soft("not examined"), "wide"],
    ["size", (d) => size(d.bytes), "n"],
  ], list)];
}

// --- tenants and images ---

function tenants({ list, known, total }) {
  $("tenants-note").textContent = known > list.length ? `${list.length} largest of ${known}` : "";
  if (!list.length) return [soft("no request yet")];
  return [table([
    ["tenant", (t) => t.tenant || "(no name)", "name"],
    ["in flight", (t) => amount(t.requests_in_flight), "n"],
    ["MU in flight", (t) => amount(t.mu_in_flight, "MU"), "n"],
    ["MU total", (t) => amount(t.mu_total, "MU"), "n"],
    ["share of MU", (t) => meter(total ? t.mu_total / total : 0)],
    ["tokens", (t) => amount(t.tokens_total, "tok"), "n"],
    ["requests", (t) => amount(t.requests_total), "n"],
    ["outcomes", (t) => chips(t.outcomes), "wide"],
  ], list)];
}

const DEVICES = { auto: "prepared on a GPU if one is visible, else on the CPU", cpu: "prepared on the CPU", cuda: "prepared on a GPU" };

function images({ images: use, device }) {
  $("images-note").textContent = DEVICES[device] ?? "";
  if (device === "off") return [soft("off: images pass through to the engine unchanged")];
  const counted = use.stages.filter(([, count]) => count);
  if (!counted.length && !use.outcomes.length) return [soft("no image yet")];
  const mean = ([, count, seconds]) => seconds / count;
  const slowest = Math.max(...counted.map(mean), 1e-9);
  return [
    facts([["images", chips(use.outcomes)], ["bytes", `${size(use.bytes_in)} in, ${size(use.bytes_out)} out`]]),
    counted.length ? table([
      ["stage", ([stage]) => stage],
      ["mean time", (stage) => span(mean(stage)), "n"],
      ["", (stage) => meter(mean(stage) / slowest)],
      ["images", ([, count]) => amount(count), "n"],
    ], counted) : soft("none was prepared"),
  ];
}

// --- signals ---

const gpus = (read) => [reading(read, (list) => list.length ? table([
  ["GPU", (g) => node("span", { title: g.uuid, textContent: `${g.index} ${g.name}` }), "name"],
  ["busy", (g) => reading(g.utilization, share), "n"],
  ["", (g) => reading(g.utilization, meter)],
  ["memory", (g) => node("span", {}, reading(g.memory_used, size), " of ", reading(g.memory_total, size)), "n"],
  ["power", (g) => reading(g.power, (watts) => amount(watts, "W")), "n"],
  ["temperature", (g) => reading(g.temperature, (celsius) => amount(celsius, "°C")), "n"],
  ["XID errors", (g) => g.xid_errors.length ? chips(g.xid_errors.map(([xid, count]) => [`XID\u00a0${xid} ×`, count])) : "none"],
], list) : soft("absent: the driver lists no GPU"))];

const ENGINE = [
  ["running", "running", amount], ["waiting", "waiting", amount], ["KV cache used", "kv_usage", share],
  ["prompt tokens", "prompt_tokens", (v) => amount(v, "tok")], ["generated tokens", "generation_tokens", (v) => amount(v, "tok")],
  ["finished requests", "finished", amount], ["engine steps", "iterations", amount],
  ["sleeping", "sleeping", (v) => (v ? "yes" : "no")], ["started", "started_wall", (v) => new Date(v * 1000).toISOString().slice(0, 19).replace("T", " ") + " UTC"],
];
const engine = (read) => [reading(read, (sample) =>
  facts(ENGINE.map(([label, name, view]) => [label, sample[name] === null ? soft("not reported") : view(sample[name])])))];

const CANARY = { ok: "a token came back", failed: "ended with an error", starved: "no token within the time allowed",
  moot: "no evidence: real work progressed meanwhile, or nothing was sent", refused: "no connection", busy: "the engine is full",
  rejected: "the engine does not accept it" };
function canary({ last, ago, outstanding, use }) {
  const pairs = outstanding === null ? [] : [["outstanding", bad(`for ${span(Math.max(0.001, outstanding))}`)]];
  if (!last) return [...(pairs.length ? [facts(pairs)] : []), soft("no result yet")];
  const outcome = `${last.outcome}: ${CANARY[last.outcome] ?? ""}`;
  pairs.push(["last", ["failed", "starved", "refused"].includes(last.outcome) ? bad(outcome) : outcome], ["ended", `${span(Math.max(1, ago))} ago`],
    ["took", `${span(last.ended - last.started)} of ${span(last.allowed)} allowed`]);
  if (last.detail) pairs.push(["detail", last.detail]);
  pairs.push(["cost so far", `${amount(use.passed)} passed, ${amount(use.mu)} MU, ${amount(use.tokens)} tokens`]);
  if (use.usable === false) pairs.push(["usable", bad("no canary passes here: a hang is found by users' silence alone, and later")]);
  if (use.garbage) pairs.push(["answers", bad("unusual: the engine may compute garbage")]);
  return [facts(pairs)];
}

const own = ({ read, lag }) => [reading(read, (sample) => facts([
  ["control process", `pid ${sample.pid}`], ["memory", size(sample.rss)], ["CPU used", span(Math.max(0.001, sample.cpu_seconds))],
  ["loop lag", span(lag)]]))];

const relays = (list) => [list.length ? table([
  ["relay", (r) => `${r.index}, pid ${r.pid}`],
  ["open", (r) => amount(r.open), "n"],
  ["loop lag", (r) => span(r.lag), "n"],
  ["last heartbeat", (r) => (r.pulse_age === null ? "none yet" : r.pulse_age > 3 ? bad(`${span(r.pulse_age)} ago`) : `${span(r.pulse_age)} ago`), "n"],
  ["restarts", (r) => (r.restarts ? bad(amount(r.restarts)) : "0"), "n"],
], list) : soft("no relay process yet")];

// id -> what it shows -> how
const SECTIONS = [
  ["changes", (s) => s.changes, changes],
  ["diagnoses", (s) => s.diagnoses, diagnoses],
  ["tenants", (s) => ({ list: s.tenants, known: s.tenants_known, total: s.mu_total }), tenants],
  ["images", (s) => ({ images: s.images, device: s.images_device }), images],
  ["gpus", (s) => s.gpus, gpus],
  ["engine", (s) => s.engine, engine],
  ["canary", (s) => ({ last: s.canary, use: s.canaries, ago: s.canary && s.at - s.canary.ended, outstanding: s.canary_outstanding_since === null ? null : s.at - s.canary_outstanding_since }), canary],
  ["own", (s) => ({ read: s.own, lag: s.own_lag }), own],
  ["relays", (s) => s.relays, relays],
];
