"use strict";
// The data of the page: an index, and a compressed text for each group, opened when it is looked at.
const index = JSON.parse(document.getElementById("index").textContent);
const blobs = Array.from(document.querySelectorAll("script.group"), (element) => element.textContent);
const main = document.getElementById("main");
const why = document.getElementById("why");
const opened = new Map();
const state = { place: null, group: null, colour: "advantage", query: "" };

// ---- Elements. Text of the run only ever becomes a text node
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
// A table that may be wider than the window is scrolled by keyboard too
function wide(label, table) {
  return el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": label }, table);
}
function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e5 || size < 1e-3 ? value.toExponential(digits - 1) : Number(value.toPrecision(digits)).toString();
  return text.replaceAll("-", "−");
}
// Control and direction characters would act on the page instead of being seen
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g, (c) => {
    const code = c.charCodeAt(0);
    return code < 32 ? String.fromCharCode(0x2400 + code) : "⟨" + code.toString(16).toUpperCase().padStart(4, "0") + "⟩";
  });
}

// ---- Groups
async function openGroup(blob) {
  if (opened.has(blob)) return opened.get(blob);
  const bytes = Uint8Array.from(atob(blobs[blob]), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const content = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = new DataView(content.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(content.subarray(4, 4 + size)));
  const array = (place) => (place === null || place === undefined ? null : decode(...header.arrays[place], content, 4 + size));
  const group = { rows: header.rows, array, derived: false };
  for (const row of group.rows) {
    const places = new Uint32Array(array(row.tokens).buffer);
    row.tokens = Array.from(places, (place) => index.vocabulary[place][1]);
    row.ids = Array.from(places, (place) => index.vocabulary[place][0]);
  }
  opened.set(blob, group);
  if (opened.size > 60) opened.delete(opened.keys().next().value);
  return group;
}
// Byte by byte: the lowest bytes of all values come first
function decode(offset, count, width, content, start) {
  const bytes = new Uint8Array(count * width);
  for (let plane = 0; plane < width; plane++)
    for (let i = 0; i < count; i++) bytes[i * width + plane] = content[start + offset + plane * count + i];
  return width === 4 ? new Float32Array(bytes.buffer) : new Float64Array(bytes.buffer);
}
// Numbers of a group that is looked at; a search needs none
function openNumbers(group, settings) {
  if (group.derived) return;
  group.derived = true;
  for (const row of group.rows) {
    openRow(row, group.array, settings);
    derive(row, settings);
  }
}
function openRow(row, array, settings) {
  const count = row.tokens.length;
  row.counts = new Array(count).fill(true);
  for (const t of row.masked) row.counts[t] = false;
  for (const name of ["advantages", "kl", "entropy", "logprobs", "ratio"]) row[name] = array(row[name]);
  for (const source of row.sources) {
    for (const name of ["mean", "std", "divisor", "return", "share"]) source[name] = array(source[name]);
    source.reward = dense(source.reward, count);
    source.shaped = source.shaped === undefined ? source.reward : dense(source.shaped, count);
    if (!source.std && source.divisor) source.std = source.divisor.map((value) => value - settings.advantage_eps);
  }
  return row;
}
function dense(pairs, count) {
  const values = new Array(count).fill(null);
  for (const [t, value] of pairs || []) values[t] = value;
  return values;
}
// Returns and shares that follow from the rest: the formulas of `derived` in credit/embed.py, in which they are checked
function derive(row, settings) {
  const normalizesReturns = settings.normalizes === "returns";
  const merged = settings.multi_objective_aggregation === "sum_then_normalize" && !normalizesReturns;
  for (const source of row.sources) {
    if (source.return || !row.explained || source.weight === 0) continue;
    const counted = merged ? row.sources.filter((other) => other.weight !== 0) : [source];
    const count = row.tokens.length;
    source.return = new Float64Array(count).fill(NaN);
    source.share = new Float64Array(count).fill(NaN);
    let following = 0;
    for (let t = count - 1; t >= 0; t--) {
      if (!row.counts[t]) continue;
      const ends = counted.some((other) => other.shaped[t] !== null);
      const differs = source.divisor && !Number.isNaN(source.divisor[t]);
      let earned = source.shaped[t] || 0;
      if (!normalizesReturns) earned = ends && differs ? (earned - source.mean[t]) / source.divisor[t] : 0;
      // A turn ends where the loss mask does
      const discounts = { token: true, step: ends, turn: !row.counts[t + 1] }[settings.gamma_unit];
      following = earned + (discounts ? source.gamma : 1) * following;
      source.return[t] = following;
      const compared = normalizesReturns ? (differs ? (following - source.mean[t]) / source.divisor[t] : 0) : following;
      source.share[t] = (source.weight * compared) / row.batch_divisor;
    }
  }
  if (!row.advantages) row.advantages = Float64Array.from(row.tokens, (_, t) => (row.counts[t] ? row.sources.reduce((sum, source) => sum + source.share[t], row.offset) : NaN));
}

// ---- Colours
const SIGNED = "signed";
function choices(settings) {
  const found = { advantage: ["Advantage", SIGNED, (row, t) => row.advantages[t]] };
  index.sources.forEach((name, k) => {
    found["return-" + k] = ["Return of " + name, SIGNED, (row, t) => row.sources[k].return && row.sources[k].return[t]];
    found["reward-" + k] = ["Reward of " + name, SIGNED, (row, t) => row.sources[k].reward[t]];
    found["share-" + k] = ["Share of " + name, SIGNED, (row, t) => row.sources[k].share && row.sources[k].share[t]];
  });
  found.kl = ["KL (" + settings.kl_estimator + ")", "amount", (row, t) => row.kl && row.kl[t]];
  found.entropy = ["Entropy", "amount", (row, t) => row.entropy && row.entropy[t]];
  found.ratio = ["Log of the ratio", SIGNED, (row, t) => row.ratio && Math.log(row.ratio[t])];
  found.surprise = ["−log-prob", "amount", (row, t) => row.logprobs && -row.logprobs[t]];
  return found;
}
function largest(rows, value) {
  let most = 0;
  for (const row of rows)
    for (let t = 0; t < row.tokens.length; t++) {
      const size = row.counts[t] ? Math.abs(value(row, t)) : 0;
      if (size > most && Number.isFinite(size)) most = size;
    }
  return most;
}
// Shades are classes of a style sheet: thousands of styles of their own, or of attributes, would take the browser longer
const SHADES = 32;
for (const colour of ["plus", "minus", "amount"])
  for (let depth = 1; depth <= SHADES; depth++)
    document.styleSheets[0].insertRule(`.${colour}${depth} { background: rgba(var(--${colour}), calc(var(--strength) * ${depth / SHADES})) }`);
function shade(value, most, kind) {
  if (value === null || value === undefined || Number.isNaN(value) || !most) return "";
  const depth = Math.round(Math.min(1, Math.abs(value) / most) * SHADES);
  return depth === 0 ? "" : (kind === SIGNED ? (value > 0 ? "plus" : "minus") : "amount") + depth;
}
function legend(most, kind) {
  const at = (colour, strength) => `rgba(var(${colour}), calc(var(--strength) * ${strength}))`;
  const gradient = kind === SIGNED ? `${at("--minus", 1)}, ${at("--minus", 0)}, ${at("--plus", 0)}, ${at("--plus", 1)}` : `${at("--amount", 0)}, ${at("--amount", 1)}`;
  const bar = el("i");
  bar.style.background = `linear-gradient(90deg, ${gradient})`;
  return el("span", { class: "legend" }, kind === SIGNED ? number(-most) : "0", bar, number(most));
}

// ---- Places: #/mode/step/group/completion/token
function stepAt(mode, step) {
  return index.steps.find((entry) => entry.mode === mode && entry.step === step);
}
function parse(hash) {
  const [mode, step, group, completion, token] = hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  const place = { mode, step: Number(step) };
  const entry = stepAt(mode, place.step);
  if (!entry) return { query: mode === "search" ? step || "" : null };
  place.entry = entry;
  if (group !== undefined) place.group = entry.groups.find((found) => found.group === Number(group));
  if (completion !== undefined) place.completion = Number(completion);
  if (token !== undefined) place.token = Number(token);
  return place;
}
function address(entry, group, completion, token) {
  return "#/" + [entry.mode, entry.step, group && group.group, completion, token].filter((part) => part !== undefined && part !== null).join("/");
}
function go(hash) {
  if (location.hash === hash) show();
  else location.hash = hash;
}
async function show() {
  const place = parse(location.hash);
  const sameGroup = state.place && place.group && state.place.group === place.group && state.group;
  state.place = place;
  crumbs(place);
  if (!place.group) {
    state.group = null;
    why.hidden = true;
    main.replaceChildren(...(place.entry ? stepPage(place.entry) : place.query !== null && place.query !== undefined ? [searchPage(place.query)] : overview()));
    window.scrollTo(0, 0);
    return;
  }
  if (!sameGroup) {
    const group = await openGroup(place.group.blob);
    if (state.place !== place) return;
    openNumbers(group, place.entry.settings);
    state.group = group;
    main.replaceChildren(...groupPage(place, group));
    window.scrollTo(0, 0);
  }
  select(place.completion, place.token);
}
function crumbs(place) {
  const parts = [el("a", { href: "#/" }, "Overview")];
  if (place.entry) parts.push(" › ", el("a", { href: address(place.entry) }, (place.mode === "eval" ? "evaluation, step " : "step ") + place.step));
  if (place.group) parts.push(" › ", el("a", { href: address(place.entry, place.group) }, "group " + place.group.group));
  document.getElementById("crumbs").replaceChildren(...parts);
}

// ---- First screen
function overview() {
  const findings = index.findings.map((finding) =>
    el("li", { class: finding.kind }, el("b", {}, finding.title), el("p", {}, visible(finding.text), " ", finding.link ? el("a", { href: finding.link }, "Show") : null)));
  const train = index.steps.filter((entry) => entry.mode === "train");
  const evaluations = index.steps.filter((entry) => entry.mode === "eval");
  const list = (entries) => el("p", {}, entries.flatMap((entry) => [el("a", { href: address(entry) }, String(entry.step)), " "]));
  return [
    el("h2", {}, "Findings"),
    findings.length ? el("ul", { class: "findings" }, findings) : el("p", { class: "empty" }, "Nothing stands out."),
    el("h2", {}, "Training"),
    index.curves.length ? el("p", { class: "empty" }, "Click a curve to open the nearest recorded step.") : null,
    el("div", { class: "curves" }, index.curves.map((curve) => chart(curve, train))),
    train.length ? el("h2", {}, "Recorded steps") : null, train.length ? list(train) : null,
    evaluations.length ? el("h2", {}, "Recorded evaluations") : null, evaluations.length ? list(evaluations) : null,
  ].filter(Boolean);
}
function chart(curve, entries) {
  const width = 340, height = 150, left = 46, right = 8, top = 8, bottom = 20;
  const steps = curve.points.map((point) => point[0]), values = curve.points.map((point) => point[1]);
  const low = Math.min(...values), high = Math.max(...values), first = Math.min(...steps), last = Math.max(...steps);
  const pad = (high - low) * 0.05 || Math.abs(high) * 0.05 || 0.5;
  const x = (step) => left + ((width - left - right) * (step - first)) / (last - first || 1);
  const y = (value) => top + ((height - top - bottom) * (high + pad - value)) / (high - low + 2 * pad);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${curve.name}, from ${number(values[0])} to ${number(values[values.length - 1])}` });
  picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  for (const value of low === high ? [low] : [low, high])
    picture.append(svg("text", { x: left - 4, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  picture.append(svg("text", { x: left, y: height - 5 }, String(first)), svg("text", { x: width - right, y: height - 5, "text-anchor": "end" }, String(last)));
  picture.append(svg("polyline", { class: "curve", points: curve.points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ") }));
  if (curve.points.length < 40) for (const [step, value] of curve.points) picture.append(svg("circle", { class: "dot", cx: x(step), cy: y(value), r: 2 }));
  const shown = entries.filter((entry) => entry.step >= first && entry.step <= last);
  const edges = shown.map((entry, i) => (i ? (x(shown[i - 1].step) + x(entry.step)) / 2 : left));
  shown.forEach((entry, i) => {
    const end = i + 1 < shown.length ? edges[i + 1] : width - right;
    const hit = svg("rect", { class: "hit", x: edges[i], y: top, width: Math.max(1, end - edges[i]), height: height - top - bottom });
    const value = curve.points.find((point) => point[0] === entry.step);
    hit.append(svg("title", {}, `Step ${entry.step}: ${value ? number(value[1]) : "not logged"}`));
    hit.addEventListener("click", () => go(address(entry)));
    picture.append(hit);
  });
  const save = (kind) => el("button", { type: "button", "aria-label": `Save ${curve.name} as ${kind}`, on: { click: () => exportChart(picture, curve.name, kind) } }, kind);
  return el("figure", {}, el("figcaption", {}, el("span", {}, breakable(curve.name)), save("SVG"), save("PNG")), picture);
}
// Long names break after a slash or an underscore, not within a word
function breakable(name) {
  return visible(name).split(/(?<=[/_])/).flatMap((part) => [part, el("wbr")]);
}
function exportChart(picture, name, kind) {
  const copy = picture.cloneNode(true);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  // Room for the name, which stands beside the picture on the page
  copy.setAttribute("viewBox", "0 -20 340 170");
  copy.append(svg("text", { x: 46, y: -6 }, visible(name)));
  copy.querySelectorAll(".hit").forEach((hit) => hit.remove());
  copy.append(svg("style", {}, "text{font:11px sans-serif;fill:#333}.axis{stroke:#999}.curve{fill:none;stroke:#0b57a4;stroke-width:1.6}.dot{fill:#0b57a4}"));
  const source = new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" });
  const download = (blob, suffix) => {
    const link = el("a", { href: URL.createObjectURL(blob), download: name.replace(/[^\w.-]+/g, "_") + suffix });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  if (kind === "SVG") return download(source, ".svg");
  const image = new Image();
  image.onload = () => {
    const canvas = el("canvas", { width: 1360, height: 680 });
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => download(blob, ".png"));
  };
  image.src = URL.createObjectURL(source);
}

// ---- A step's groups
function stepPage(entry) {
  const rows = entry.groups.map((group) =>
    el("tr", {},
      el("td", {}, el("a", { href: address(entry, group) }, "group " + group.group)),
      el("td", {}, el("div", { class: "prompt" }, shorten(visible(group.prompt), 300))),
      el("td", { class: "number" }, String(group.completions)),
      group.rewards.map((value) => el("td", { class: "number" }, number(value))),
      el("td", { class: "number" }, group.flat ? "no spread" : number(group.strongest))));
  const head = ["", "prompt"].map((name) => el("th", {}, name)).concat(["completions", ...index.sources, "largest advantage"].map((name) => el("th", { class: "number" }, breakable(name))));
  return [el("h2", {}, (entry.mode === "eval" ? "Evaluation after step " : "Step ") + entry.step), wide("Groups", el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows)))];
}
function shorten(text, length) {
  return text.length > length ? text.slice(0, length) + "…" : text;
}
function samePrompt(place) {
  const found = index.steps.filter((entry) => entry.mode === place.mode).flatMap((entry) => entry.groups.filter((group) => group.prompt === place.group.prompt).map((group) => [entry, group]));
  if (found.length < 2) return null;
  return el("p", {}, "This prompt at steps ", found.flatMap(([entry, group]) => [el("a", { href: address(entry, group), "aria-current": group === place.group ? "page" : null }, String(entry.step)), " "]));
}

// ---- A group's completions side by side
function groupPage(place, group) {
  const options = choices(place.entry.settings);
  if (!options[state.colour]) state.colour = "advantage";
  const menu = el("select", { id: "colour", on: { change: () => { state.colour = menu.value; paint(scale); } } }, Object.entries(options).map(([value, [label]]) => el("option", { value, selected: value === state.colour ? "" : null }, label)));
  const scale = el("span", { id: "scale" });
  const bar = el("div", { class: "bar" }, el("label", {}, "Colour by ", menu), scale);
  const boxes = group.rows.map((row) => completionBox(row));
  // Before the page has them, so that it is laid out once
  paint(scale);
  return [
    el("h2", {}, `Step ${place.step}, group ${place.group.group}`),
    el("div", { class: "box prompt" }, visible(place.group.prompt)), samePrompt(place), bar,
    el("div", { class: "completions" }, boxes),
  ].filter(Boolean);
}
function completionBox(row) {
  // It scrolls where the completion is long, so by keyboard too
  const text = el("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": "Tokens of completion " + row.completion });
  row.elements = row.tokens.map((token, t) => {
    // Bytes of a character that ends later have no text of their own
    const shown = token === "" ? "·" : visible(token).replace(/\n/g, "⏎\n");
    const element = document.createElement("span");
    element.className = row.counts[t] ? "t" : "t off";
    element.textContent = shown;
    element.dataset.t = t;
    text.append(element);
    row.sources.forEach((source, k) => {
      const step = source.is_steps ? source.ends.indexOf(t) : -1;
      if (step < 0) return;
      const value = source.returned[step];
      const verdict = value === null ? "not scored" : number(value);
      text.append(el("span", { class: "verdict", title: `${index.sources[k]}, step ${step + 1}` }, (value === null ? "? " : value > 0 ? "✓ " : "✗ ") + verdict));
    });
    return element;
  });
  if (!row.tokens.length) text.append(el("span", { class: "empty" }, "empty"));
  const place = (event) => (event.target.dataset.t === undefined ? null : Number(event.target.dataset.t));
  text.addEventListener("mouseover", (event) => place(event) !== null && explain(row, place(event)));
  text.addEventListener("click", (event) => place(event) !== null && go(address(state.place.entry, state.place.group, row.completion, place(event))));
  const totals = row.sources.map((source, k) => {
    const given = source.transformed.filter((value) => value !== null);
    const total = given.length ? number(given.reduce((sum, value) => sum + value, 0)) : "not judged";
    return `${index.sources[k]} ${total}${source.withheld && given.length ? " (withheld)" : ""}`;
  });
  const heading = el("h3", {}, `Completion ${row.completion} `, el("span", {}, `${row.tokens.length} tokens${row.truncated ? ", truncated" : ""} · ${totals.join(" · ")}`));
  return el("section", { class: "completion", id: "completion-" + row.completion }, heading, text);
}
function paint(scale) {
  const [, kind, value] = choices(state.place.entry.settings)[state.colour];
  const most = largest(state.group.rows, value);
  for (const row of state.group.rows)
    row.elements.forEach((element, t) => {
      if (element.shade) element.classList.remove(element.shade);
      element.shade = row.counts[t] ? shade(value(row, t), most, kind) : "";
      if (element.shade) element.classList.add(element.shade);
    });
  scale.replaceChildren(legend(most, kind));
  if (state.query) underline();
}
function underline() {
  for (const row of state.group.rows) {
    const text = row.tokens.join("").toLowerCase();
    let from = text.indexOf(state.query), end = 0;
    row.tokens.forEach((token, t) => {
      const start = end;
      end += token.length;
      while (from >= 0 && from + state.query.length <= start) from = text.indexOf(state.query, from + 1);
      row.elements[t].classList.toggle("found", from >= 0 && from < end);
    });
  }
}
function select(completion, token) {
  document.querySelectorAll(".t.here").forEach((element) => element.classList.remove("here"));
  const row = state.group.rows.find((found) => found.completion === completion);
  if (!row) { why.hidden = true; return; }
  const element = token === undefined ? null : row.elements[token];
  if (element) {
    element.classList.add("here");
    explain(row, token);
    element.scrollIntoView({ block: "nearest" });
  }
  document.getElementById("completion-" + completion).scrollIntoView({ block: "nearest" });
}

// ---- Why a token has its advantage
function explain(row, t) {
  const settings = state.place.entry.settings;
  const facts = [`token ${t} (id ${row.ids[t]})`];
  if (row.logprobs) facts.push(`log-prob ${number(row.logprobs[t])}`);
  if (row.ratio) facts.push(`ratio ${number(row.ratio[t], 4)}`);
  if (row.entropy) facts.push(`entropy ${number(row.entropy[t])} nats`);
  if (row.kl) facts.push(`KL (${settings.kl_estimator}) ${number(row.kl[t])} nats`);
  const title = el("p", {}, el("span", { class: "token" }, visible(row.tokens[t]).replace(/\n/g, "⏎") || "·"), " ", facts.join(", "));
  why.hidden = false;
  if (!row.counts[t]) return why.replaceChildren(title, el("p", {}, "Outside the loss mask: not trained on."));
  const advantage = el("p", { class: "sum" }, `Advantage ${number(row.advantages[t], 6)}`);
  const normalizesReturns = settings.normalizes === "returns";
  const columns = ["source", "reward here", "γ", normalizesReturns ? "return" : "return of normalised rewards", "group mean", "std", "divided by", "weight", "adds"];
  const lines = row.sources.map((source, k) => {
    const at = (name) => (source[name] ? source[name][t] : null);
    const flat = row.explained && Number.isNaN(at("divisor")) && (normalizesReturns || source.shaped[t] !== null);
    const cells = [at("shaped"), source.gamma, at("return"), at("mean"), at("std"), at("divisor"), source.weight, at("share")];
    return el("tr", {}, el("td", {}, index.sources[k] + (source.withheld ? " (withheld)" : "")), cells.map((value, i) => el("td", { class: "number" }, i === 5 && flat ? "no spread" : number(value, 6))));
  });
  const table = wide("Sum of the advantage", el("table", {}, el("thead", {}, el("tr", {}, columns.map((name, i) => el("th", { class: i ? "number" : null }, name)))), el("tbody", {}, lines)));
  if (!row.explained) return why.replaceChildren(title, advantage, el("p", {}, "How it was made from these is not known: the estimator, or compute_advantages, is your own."), table);
  const shares = row.sources.map((source) => (source.share ? source.share[t] : 0));
  const total = shares.reduce((sum, share) => sum + share, row.offset);
  const terms = shares.map((share) => number(share, 6)).concat(row.offset ? [number(row.offset, 6) + " (batch mean)"] : []);
  advantage.textContent = `Advantage ${number(row.advantages[t], 6)} = ${terms.join(" + ").replaceAll("+ −", "− ")}` + (Math.abs(total - row.advantages[t]) > 1e-5 * Math.max(1, Math.abs(total)) ? ` (adds up to ${number(total, 6)})` : "");
  const over = row.batch_divisor !== 1 ? ` / ${number(row.batch_divisor, 6)} (batch)` : "";
  const how = normalizesReturns ? `adds = weight × (return − group mean) / divided by${over}` : `adds = weight × return${over}; on a step's last token, normalised reward = (reward − group mean) / divided by`;
  why.replaceChildren(title, advantage, table, el("p", { class: "empty" }, how));
}

// ---- Search
function searchPage(query) {
  state.query = query.toLowerCase();
  const list = el("ul", { class: "findings" }), status = el("p", { class: "empty", role: "status" }, "Searching …");
  find(state.query, list, status);
  return el("section", {}, el("h2", {}, `Search for “${visible(query)}”`), status, list);
}
async function find(query, list, status) {
  const place = state.place;
  let found = 0;
  for (const entry of [...index.steps].reverse())
    for (const group of entry.groups) {
      const { rows } = await openGroup(group.blob);
      if (state.place !== place) return;
      if (group.prompt.toLowerCase().includes(query)) add(entry, group, undefined, undefined, group.prompt, "prompt");
      for (const row of rows) {
        const text = row.tokens.join("");
        const at = text.toLowerCase().indexOf(query);
        if (at < 0) continue;
        let end = 0;
        const token = row.tokens.findIndex((piece) => (end += piece.length) > at);
        add(entry, group, row.completion, token, text.slice(Math.max(0, at - 60), at + 120), "completion " + row.completion);
      }
      if (found >= 200) { status.textContent = "The last 200 places:"; return; }
    }
  status.textContent = found ? `${found} places` : "Nowhere.";
  function add(entry, group, completion, token, text, label) {
    found++;
    list.append(el("li", { class: "note" }, el("a", { href: address(entry, group, completion, token) }, `${entry.mode === "eval" ? "evaluation, " : ""}step ${entry.step}, group ${group.group}, ${label}`), el("p", { class: "prompt" }, shorten(visible(text), 200))));
  }
}
document.getElementById("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = event.target.querySelector("input").value;
  event.target.querySelector("input").blur();
  if (query.trim()) go("#/search/" + encodeURIComponent(query));
});

// ---- Keyboard
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (typing) { if (event.key === "Escape") document.activeElement.blur(); return; }
  if (event.key === "/") { event.preventDefault(); document.querySelector("#search input").focus(); return; }
  const { entry, group, completion, token } = state.place;
  if (event.key === "Escape") return go(!entry ? "#/" : group ? (completion !== undefined ? address(entry, group) : address(entry)) : "#/");
  if (event.key === "n" || event.key === "p") {
    const steps = index.steps.filter((other) => !entry || other.mode === entry.mode);
    const next = entry ? steps[steps.indexOf(entry) + (event.key === "n" ? 1 : -1)] : steps[0];
    return next && go(group && next.groups.length ? address(next, next.groups[Math.min(entry.groups.indexOf(group), next.groups.length - 1)]) : address(next));
  }
  if (!entry) return;
  if (event.key === "[" || event.key === "]") {
    const next = entry.groups[group ? entry.groups.indexOf(group) + (event.key === "]" ? 1 : -1) : 0];
    return next && go(address(entry, next));
  }
  if (!state.group || !event.key.startsWith("Arrow")) return;
  event.preventDefault();
  const rows = state.group.rows;
  let place = rows.findIndex((row) => row.completion === completion), at = token;
  if (place < 0 || at === undefined) { place = Math.max(place, 0); at = 0; }
  else if (event.key === "ArrowRight") at++;
  else if (event.key === "ArrowLeft") at--;
  else place += event.key === "ArrowDown" ? 1 : -1;
  place = Math.min(Math.max(place, 0), rows.length - 1);
  at = Math.min(Math.max(at, 0), rows[place].tokens.length - 1);
  history.replaceState(null, "", address(entry, group, rows[place].completion, at));
  show();
});

// ---- Light or dark
const root = document.documentElement;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
root.dataset.theme = dark.matches ? "dark" : "light";
dark.addEventListener("change", () => { root.dataset.theme = dark.matches ? "dark" : "light"; });
document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; });

window.addEventListener("hashchange", show);
show();
