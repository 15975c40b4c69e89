// The live part of the page: figures that answer to the pointer, and the table of all components.
// Whatever comes from the result is set as text, never as markup.
"use strict";
(async () => {
  const find = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const element = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key in node && typeof value !== "string") node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  };

  // ---- Light and dark, navigation, copying
  const theme = find("#theme"), system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("wpjax-theme", document.documentElement.dataset.theme); } catch { /* not allowed: fine */ }
    nameTheme();
  });
  system.addEventListener("change", nameTheme);
  nameTheme();
  for (const link of all("nav a, #pill a, .skip")) {
    link.addEventListener("click", (event) => { // the hash holds pins and filters: do not overwrite it
      event.preventDefault();
      const target = find(link.getAttribute("href"));
      target.scrollIntoView();
      target.focus({ preventScroll: true });
    });
  }
  const copy = async (text, button) => {
    const before = button.textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { button.textContent = "Not allowed"; }
    setTimeout(() => { button.textContent = before; }, 1500);
  };
  for (const button of all("button[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", () => copy(find(button.dataset.copy).textContent, button));
  }

  // ---- The data: see report/payload.py
  if (!("DecompressionStream" in window)) {
    find("#old-browser").hidden = false;
    return;
  }
  const packed = Uint8Array.from(atob(find("#data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const size = new DataView(buffer).getUint32(0, true);
  const about = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const n = about.n, names = about.names, column = {};
  let at = 4 + size;
  for (const [name, type] of about.columns) {
    const bytes = new Uint8Array(4 * n), first = { float: 1, int: 0, bool: 3 }[type];
    for (let k = first; k < 4; k++) {
      const plane = new Uint8Array(buffer, at, n);
      if (type === "bool") column[name] = plane;
      else for (let i = 0; i < n; i++) bytes[4 * i + k] = plane[i];
      at += n;
    }
    if (type === "float") column[name] = new Float32Array(bytes.buffer);
    if (type === "int") column[name] = new Int32Array(bytes.buffer);
  }
  const kindOf = (i) => about.kinds[column.kind[i]];
  const place = new Map(names.map((name, i) => [name, i]));
  const lower = names.map((name) => name.toLowerCase());
  // The best number known of each effect: exact, else an estimate. NaN of components that are there for sets only.
  const best = new Float32Array(n).fill(NaN);
  for (let i = 0; i < n; i++) {
    if (column.swept && !column.swept[i]) continue;
    for (const key of about.best) if (!Number.isNaN(column[key][i])) { best[i] = column[key][i]; break; }
  }
  const isEstimate = (i) => about.best[0] === "effect" && Number.isNaN(column.effect[i]);

  // ---- Numbers as text
  const digits = {};
  for (const entry of about.table) {
    let most = 0;
    for (const v of column[entry.key]) if (Math.abs(v) < Infinity) most = Math.max(most, Math.abs(v));
    digits[entry.key] = Math.min(7, Math.max(4, 2 - Math.floor(Math.log10(most || 1))));
  }
  digits.best = digits[about.best[0]] ?? 4;
  const number = (v, n_digits = 4) => {
    if (Number.isNaN(v) || v === null) return "–";
    return v !== 0 && Math.abs(v) < 5 * 10 ** -n_digits ? v.toExponential(1) : v.toFixed(n_digits);
  };
  const signed = (v, n_digits = 4) => (v > 0 ? "+" : "") + number(v, n_digits);
  const short = (v) => (Number.isNaN(v) ? "–" : v === 0 ? "0" : Number(v.toPrecision(2)).toString());
  const percent = (v) => {
    const a = Math.abs(100 * v);
    return `${v > 0 ? "+" : ""}${a && a < 0.1 ? Number((100 * v).toPrecision(2)) : (100 * v).toFixed(a < 10 ? 2 : 1)} %`;
  };
  const english = new Intl.NumberFormat("en"), thousands = (v) => english.format(v);
  const textOf = (entry, i) => {
    const v = column[entry.key][i];
    if (entry.type === "bool") return v ? "yes" : "no";
    if (entry.type === "p") return short(v);
    return entry.key === "delta_norm" ? (Number.isNaN(v) ? "–" : v.toPrecision(3)) : number(v, digits[entry.key]);
  };
  const endsOf = (entry, i) => {
    if (!entry.bounds.length || Number.isNaN(column[entry.key][i])) return "";
    return `[${entry.bounds.map((b) => number(column[b][i], digits[entry.key])).join(", ")}]`;
  };
  const told = (i) => {
    const lines = [names[i]];
    if (Number.isNaN(column.effect[i])) lines.push(`${about.best.find((k) => !Number.isNaN(column[k][i])) ?? "not measured"} ${signed(best[i], digits.best)}`);
    else {
      lines.push(`effect ${signed(column.effect[i], digits.effect)} ${endsOf(about.table[0], i)}`);
      lines.push(`p ${short(column.p_value[i])}, q ${short(column.q_value[i])}`);
    }
    if (column.rank[i]) lines.push(`rank ${thousands(column.rank[i])} of ${thousands(n)}`);
    if (column.below_noise_floor?.[i]) lines.push("below the noise floor");
    return lines.join("\n");
  };

  // ---- State: what is filtered, sorted and pinned. The hash of the address holds it.
  const NUMBERS = Object.fromEntries(about.table.map((entry) => [entry.key, entry]));
  const fresh = () => ({ q: "", kinds: new Set(about.kinds), layer: null, pinned: false, sort: "rank", down: false });
  const state = { ...fresh(), pins: new Set() };
  const firstDown = (key) => key in NUMBERS && !NUMBERS[key].up;
  const readHash = () => {
    Object.assign(state, fresh());
    state.pins = new Set();
    if (!location.hash.includes("=")) return;
    const from = new URLSearchParams(location.hash.slice(1));
    state.q = from.get("q") ?? "";
    state.pins = new Set((from.get("pins") ?? "").split(",").filter((name) => place.has(name)));
    if (from.has("kinds")) state.kinds = new Set(from.get("kinds").split(",").filter((kind) => about.kinds.includes(kind)));
    if (/^-?\d+$/.test(from.get("layer") ?? "")) state.layer = Number(from.get("layer"));
    state.pinned = from.get("pinned") === "1";
    const sort = from.get("sort") ?? "rank", key = sort.replace(/^-/, "");
    if (["rank", "name", "kind", "layer"].includes(key) || key in NUMBERS) [state.sort, state.down] = [key, sort.startsWith("-")];
  };
  const writeHash = () => {
    const to = new URLSearchParams();
    if (state.pins.size) to.set("pins", [...state.pins].join(","));
    if (state.q) to.set("q", state.q);
    if (state.kinds.size < about.kinds.length) to.set("kinds", [...state.kinds].join(","));
    if (state.layer !== null) to.set("layer", state.layer);
    if (state.pinned) to.set("pinned", "1");
    if (state.sort !== "rank" || state.down) to.set("sort", (state.down ? "-" : "") + state.sort);
    const hash = to.toString().replaceAll("%2C", ",");
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  };
  const isFiltered = () => Boolean(state.q || state.pinned || state.layer !== null || state.kinds.size < about.kinds.length);

  const natural = Uint32Array.from({ length: n }, (_, i) => i).sort((a, b) =>
    column.layer[a] - column.layer[b] || column.kind[a] - column.kind[b] || column.index[a] - column.index[b]);
  const alphabet = new Uint32Array(n);
  natural.forEach((i, k) => { alphabet[i] = k; });
  const keys = { ...column, name: alphabet };

  let view = new Uint32Array(0); // the rows of the table, in order
  const inView = new Uint8Array(n);
  const compute = () => {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const exact = new Set(words.filter((word) => lower.includes(word)));
    const kinds = about.kinds.map((kind) => state.kinds.has(kind)), chosen = [];
    for (let i = 0; i < n; i++) {
      inView[i] = 0;
      if (!kinds[column.kind[i]]) continue;
      if (state.layer !== null && column.layer[i] !== state.layer) continue;
      if (state.pinned && !state.pins.has(names[i])) continue;
      if (!words.every((w) => (exact.has(w) ? lower[i] === w : /^l\d+$/.test(w) ? column.layer[i] === Number(w.slice(1)) : lower[i].includes(w)))) continue;
      inView[i] = 1;
      chosen.push(i);
    }
    view = Uint32Array.from(chosen);
    const key = keys[state.sort], sign = state.down ? -1 : 1;
    const missing = (i) => Number.isNaN(key[i]) || (state.sort === "rank" && key[i] === 0);
    view.sort((a, b) => {
      const last = missing(a) - missing(b); // what was not measured comes last, whichever way
      return last || (missing(a) ? 0 : sign * (key[a] - key[b])) || alphabet[a] - alphabet[b];
    });
  };

  // ---- The table. Only the rows that are seen are in the document: 40,000 would be slow.
  const ROW = 34, box = find("#box"), old = find("#ranked");
  const table = element("table", { id: "components-table" }), body = element("tbody"), head = element("tr");
  const fixed = [
    { key: "pin", title: "pin", width: 48 },
    { key: "rank", title: "rank", width: 84, about: `place by ${about.by}` },
    { key: "name", title: "component", width: Math.min(260, 48 + 8 * names.reduce((m, s) => Math.max(m, s.length), 9)), text: true },
    { key: "kind", title: "kind", width: 36 + 9 * about.kinds.reduce((m, s) => Math.max(m, s.length), 4), text: true },
    { key: "layer", title: "layer", width: 84 },
  ];
  const hiddenColumns = new Set(about.table.filter((entry) => entry.hidden).map((entry) => entry.key));
  let shown = [], pool = [], largest = 0;
  for (const v of best) if (Math.abs(v) > largest) largest = Math.abs(v);

  const sortBy = (key) => {
    state.down = state.sort === key ? !state.down : firstDown(key);
    state.sort = key;
    changed();
  };
  const layOut = () => {
    const entries = about.table.filter((entry) => !hiddenColumns.has(entry.key));
    const numbers = entries.map((entry) => ({
      ...entry, entry, width: Math.max(entry.bounds.length ? 130 + 19 * digits[entry.key] : 96, 40 + 8.5 * entry.title.length),
    }));
    // On a narrow screen name and effect come first.
    const [star, rank, name, ...others] = fixed;
    shown = innerWidth < 640 ? [star, name, ...numbers, rank, ...others] : [...fixed, ...numbers];
    const widths = element("colgroup", {}, ...shown.map((c) => { const col = element("col"); col.style.width = `${c.width}px`; return col; }));
    head.replaceChildren(...shown.map((c) => {
      const cell = element("th", { scope: "col", "data-key": c.key, class: c.text ? "text" : "" });
      if (c.about) cell.title = c.about;
      if (c.key === "pin") cell.append(element("span", {}, "pin"));
      else {
        const button = element("button", { type: "button" }, c.title);
        button.addEventListener("click", () => sortBy(c.key));
        cell.append(button);
      }
      return cell;
    }));
    table.replaceChildren(element("caption", { hidden: true }, "All components"), widths, element("thead", {}, head), body);
    table.style.width = `${shown.reduce((sum, c) => sum + c.width, 0)}px`;
    pool = [];
    body.replaceChildren();
  };
  const newRow = () => {
    const row = element("tr");
    for (const c of shown) {
      const cell = element("td", { class: { pin: "pin", name: "name", kind: "kind" }[c.key] ?? "" });
      if (c.key === "pin") {
        const button = element("button", { type: "button" }, "☆");
        button.addEventListener("click", () => pin(row.dataset.name));
        cell.append(button);
      } else if (c.key === "kind") cell.append(element("i"), element("span"));
      else if (c.entry?.bounds.length) cell.append(element("span"), element("small", { class: "ends" }));
      row.append(cell);
    }
    return row;
  };
  const fill = (row, i, k) => {
    const isPinned = state.pins.has(names[i]);
    row.dataset.name = names[i];
    row.setAttribute("aria-rowindex", k + 2);
    row.className = `${column.below_noise_floor?.[i] ? "noise" : ""} ${isPinned ? "pinned" : ""}`.trim();
    row.title = column.below_noise_floor?.[i] ? "below the noise floor" : "";
    shown.forEach((c, j) => {
      const cell = row.children[j];
      if (c.key === "pin") {
        const button = cell.firstChild;
        button.textContent = isPinned ? "★" : "☆";
        button.setAttribute("aria-pressed", isPinned);
        button.setAttribute("aria-label", `pin ${names[i]}`);
      } else if (c.key === "rank") cell.textContent = column.rank[i] || "–";
      else if (c.key === "name") cell.textContent = names[i];
      else if (c.key === "kind") {
        cell.firstChild.style.background = colour(kindOf(i));
        cell.lastChild.textContent = kindOf(i);
      } else if (c.key === "layer") cell.textContent = column.layer[i] < 0 ? "–" : column.layer[i];
      else {
        const into = c.entry.bounds.length ? cell.firstChild : cell;
        into.textContent = textOf(c.entry, i);
        if (c.entry.bounds.length) cell.lastChild.textContent = ` ${endsOf(c.entry, i)}`;
        if (c.key === about.best[0]) {
          const v = column[c.key][i];
          cell.classList.add("bar");
          cell.style.setProperty("--share", Number.isNaN(v) ? 0 : Math.min(1, Math.abs(v) / (largest || 1)));
          cell.style.setProperty("--bar", v < 0 ? "var(--less)" : "var(--more)");
        }
      }
    });
  };
  const gap = (height) => {
    const cell = element("td", { colspan: String(shown.length) });
    cell.style.height = `${height}px`;
    return element("tr", { class: "gap", "aria-hidden": "true" }, cell);
  };
  let printing = false, above = null, below = null;
  const drawRows = () => {
    const seen = printing ? 100 : Math.ceil((box.clientHeight || 600) / ROW) + 12;
    const first = printing ? 0 : Math.max(0, Math.min(Math.floor(box.scrollTop / ROW) - 6, view.length - seen));
    const count = Math.min(seen, view.length - first);
    while (pool.length < count) pool.push(newRow());
    if (!above) { above = gap(0); below = gap(0); }
    above.firstChild.style.height = `${first * ROW}px`;
    below.firstChild.style.height = `${printing ? 0 : Math.max(0, view.length - first - count) * ROW}px`;
    for (let k = 0; k < count; k++) fill(pool[k], view[first + k], first + k);
    const rows = pool.slice(0, count);
    if (body.childElementCount !== count + 2 || body.firstChild !== above) body.replaceChildren(above, ...rows, below);
    for (const cell of head.children) {
      if (cell.dataset.key === state.sort) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    table.setAttribute("aria-rowcount", view.length + 1);
  };
  let due = false;
  box.addEventListener("scroll", () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => { due = false; drawRows(); });
  }, { passive: true });
  addEventListener("beforeprint", () => { printing = true; drawRows(); drawFigures(680); });
  addEventListener("afterprint", () => { printing = false; drawRows(); drawFigures(); });

  const csv = () => {
    const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
    const entries = about.table.flatMap((entry) => [entry.key, ...entry.bounds]);
    const lines = [["rank", "name", "kind", "layer", "index", ...entries].join(",")];
    const plain = (v) => (Number.isNaN(v) ? "" : Number.isInteger(v) ? v : Number(v.toPrecision(5)));
    for (const i of view) {
      lines.push([column.rank[i] || "", quoted(names[i]), quoted(kindOf(i)), column.layer[i], column.index[i],
        ...entries.map((key) => plain(column[key][i]))].join(","));
    }
    const link = element("a", { download: `${about.behaviour.replace(/[^\w.-]+/g, "_").slice(0, 60)}.csv` });
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };

  // ---- Filters
  const q = find("#q"), layerChoice = find("#layer"), kindBoxes = find("#kinds"), onlyPinned = find("#only-pinned");
  const layers = [...new Set(column.layer)].filter((l) => l >= 0).sort((a, b) => a - b);
  layerChoice.append(...layers.map((l) => element("option", { value: String(l) }, `layer ${l}`)));
  if (column.layer.some((l) => l < 0)) layerChoice.append(element("option", { value: "-1" }, "no layer"));
  for (const kind of about.kinds) {
    const tick = element("input", { type: "checkbox", "data-kind": kind });
    tick.addEventListener("change", () => { if (tick.checked) state.kinds.add(kind); else state.kinds.delete(kind); changed(); });
    kindBoxes.append(element("label", {}, tick, kind));
  }
  kindBoxes.hidden = about.kinds.length < 2;
  let wait = 0;
  q.addEventListener("input", () => { clearTimeout(wait); state.q = q.value; wait = setTimeout(changed, 80); });
  layerChoice.addEventListener("change", () => { state.layer = layerChoice.value === "" ? null : Number(layerChoice.value); changed(); });
  onlyPinned.addEventListener("change", () => { state.pinned = onlyPinned.checked; changed(); });
  const clear = () => { const { sort, down } = state; Object.assign(state, fresh(), { sort, down }); changed(); };
  for (const button of all("[data-clear]")) button.addEventListener("click", clear);
  find(".filters").addEventListener("submit", (event) => event.preventDefault());
  find("#csv").addEventListener("click", csv);
  const choices = find("#columns div");
  for (const entry of about.table) {
    const tick = element("input", { type: "checkbox", checked: !hiddenColumns.has(entry.key) });
    tick.addEventListener("change", () => { if (tick.checked) hiddenColumns.delete(entry.key); else hiddenColumns.add(entry.key); layOut(); drawRows(); });
    choices.append(element("label", { title: entry.about }, tick, entry.title));
  }
  const pin = (name) => {
    if (!state.pins.delete(name)) state.pins.add(name);
    changed();
  };
  const pick = (i, event) => { // a component in a figure: show it in the table; with shift, pin it
    if (event.shiftKey) { pin(names[i]); return; }
    const same = state.q === names[i];
    Object.assign(state, fresh(), { sort: state.sort, down: state.down, q: same ? "" : names[i] });
    changed();
  };
  const pickLayer = (layer) => {
    state.layer = state.layer === layer ? null : layer;
    state.q = "";
    changed();
  };

  const pill = find("#pill");
  let tableSeen = false;
  new IntersectionObserver(([entry]) => { tableSeen = entry.isIntersecting; showPill(); }).observe(box);
  const showPill = () => {
    pill.hidden = tableSeen || !isFiltered();
    const said = [state.q, state.layer === null ? "" : state.layer < 0 ? "no layer" : `layer ${state.layer}`, state.pinned ? "pinned" : ""].filter(Boolean).join(", ");
    find("span", pill).textContent = `${said || "filtered"}: ${thousands(view.length)}`;
  };
  const pins = find("#pins");
  const drawPins = () => {
    pins.hidden = !state.pins.size;
    pins.replaceChildren("Pinned:", ...[...state.pins].map((name) => {
      const button = element("button", { type: "button", title: told(place.get(name)), "aria-label": `unpin ${name}` }, `${name} ${signed(best[place.get(name)], digits.best)} ×`);
      button.addEventListener("click", () => pin(name));
      return button;
    }));
    const names_only = element("button", { type: "button", class: "quiet" }, "Copy names");
    names_only.addEventListener("click", () => copy([...state.pins].join(","), names_only));
    pins.append(names_only);
  };
  const changed = () => {
    compute();
    if (q.value !== state.q) q.value = state.q;
    layerChoice.value = state.layer === null ? "" : String(state.layer);
    for (const tick of all("input", kindBoxes)) tick.checked = state.kinds.has(tick.dataset.kind);
    onlyPinned.checked = state.pinned;
    find("#count").textContent = view.length === n ? `${thousands(n)} components` : `${thousands(view.length)} of ${thousands(n)} components`;
    find("#csv").textContent = `CSV, ${thousands(view.length)} rows`;
    box.scrollTop = Math.min(box.scrollTop, Math.max(0, view.length * ROW - box.clientHeight));
    drawRows();
    drawPins();
    showPill();
    writeHash();
    refreshFigures();
  };

  // ---- Figures
  const colour = (kind) => `var(--k-${kind}, var(--soft))`;
  // A colour from less (-1) by zero to more (+1).
  const diverge = (share) => `color-mix(in oklab, var(${share < 0 ? "--less" : "--more"}) ${(100 * Math.min(1, Math.abs(share))).toFixed(1)}%, var(--zero))`;
  const figures = new Map(all("figure[data-figure]").map((figure) => [figure.dataset.figure, figure]));
  const PINNED = { stroke: "var(--ink)", strokeWidth: 2, fill: "none" };
  const clickable = (plot, act) => {
    plot.addEventListener("click", (event) => { if (plot.value !== null && plot.value !== undefined) act(plot.value, event); });
    return plot;
  };
  const draw = (width, height, options) => Plot.plot({ width, height, marginTop: 28, marginBottom: 38, style: { background: "transparent", color: "var(--ink)" }, ...options });
  const keysOf = (pairs) => element("p", { class: "keys" }, ...pairs.map(([text, fill]) => {
    const mark = element("i");
    mark.style.background = fill;
    return element("span", {}, mark, text);
  }));
  const rampOf = (scale) => element("p", { class: "ramp" }, element("span", {}, `−${scale.toPrecision(2)}`), element("i"), element("span", {}, `+${scale.toPrecision(2)}`), "share of the gap");
  const tip = (options) => Plot.tip(options.data, Plot[options.by ?? "pointer"]({ fill: "var(--surface)", stroke: "var(--line)", maxRadius: 60, lineHeight: 1.35, textPadding: 10, ariaHidden: "true", ...options, data: undefined, by: undefined }));
  const layerTicks = (n_layers) => { const step = Math.max(1, Math.ceil(n_layers / 12)); return d3.range(0, n_layers, step); };
  const rowsOf = (kind) => { const out = [], k = about.kinds.indexOf(kind); for (let i = 0; i < n; i++) if (column.kind[i] === k && !Number.isNaN(best[i])) out.push(i); return out; };

  const DRAW = {};
  DRAW.depth = (width) => {
    const sums = new Map(); // layer, kind, sign -> sum
    const n_layers = (layers.at(-1) ?? 0) + 1, total = new Float64Array(n_layers);
    for (let i = 0; i < n; i++) {
      const kind = kindOf(i), layer = column.layer[i];
      if (layer < 0 || Number.isNaN(best[i]) || !about.parts.includes(kind)) continue;
      const key = `${layer} ${kind} ${best[i] < 0}`;
      if (!sums.has(key)) sums.set(key, { layer, kind, sum: 0 });
      sums.get(key).sum += best[i];
      total[layer] += best[i];
    }
    const bars = [...sums.values()];
    const byLayer = d3.range(n_layers).map((layer) => ({
      layer, sum: total[layer],
      title: [`layer ${layer}: ${percent(total[layer])}`, ...about.parts.map((kind) => `${kind} ${percent(d3.sum(bars.filter((b) => b.layer === layer && b.kind === kind), (b) => b.sum))}`)].join("\n"),
    }));
    const plot = draw(width, 280, {
      marginLeft: 46, x: { type: "band", domain: d3.range(n_layers), ticks: layerTicks(n_layers), tickSize: 0, label: "layer" }, y: { label: "sum of single effects", grid: true, nice: true, tickFormat: ".0%" },
      marks: [
        Plot.barY(bars, { x: "layer", y: "sum", fill: (d) => colour(d.kind), fillOpacity: (d) => (state.layer === null || state.layer === d.layer ? 1 : 0.25), order: about.parts, z: "kind" }),
        Plot.ruleY([0], { stroke: "var(--soft)" }),
        tip({ data: byLayer, by: "pointerX", x: "layer", y: (d) => Math.max(0, d.sum), title: "title", maxRadius: Infinity, anchor: "bottom" }),
      ],
    });
    return [keysOf(about.parts.map((kind) => [kind, colour(kind)])), clickable(plot, (d) => pickLayer(d.layer))];
  };

  const map = (kind) => (width) => {
    const rows = rowsOf(kind);
    if (!rows.length) return "No number is known of these components.";
    const n_layers = d3.max(rows, (i) => column.layer[i]) + 1, n_index = d3.max(rows, (i) => column.index[i]) + 1;
    const scale = d3.max(rows, (i) => Math.abs(best[i])) || 1e-9;
    const marked = rows.filter((i) => state.pins.has(names[i]) || names[i] === state.q);
    const x = (i) => column.index[i], y = (i) => column.layer[i];
    const plot = draw(width, Math.min(420, 70 + 13 * n_layers), {
      marginLeft: 44, marginTop: 10, padding: 0.06,
      x: { type: "band", domain: d3.range(n_index), ticks: layerTicks(n_index), tickSize: 0, label: kind === "kv_group" ? "KV group" : kind },
      y: { type: "band", domain: d3.range(n_layers).reverse(), ticks: layerTicks(n_layers), tickSize: 0, label: "layer" },
      marks: [
        Plot.cell(rows, { x, y, fill: { value: (i) => diverge(best[i] / scale), scale: null }, fillOpacity: (i) => (inView[i] ? 1 : 0.3), rx: 1.5 }),
        Plot.cell(marked, { x, y, rx: 1.5, inset: -0.5, ...PINNED }),
        tip({ data: rows, x, y, title: told }),
      ],
    });
    return [clickable(plot, pick), rampOf(scale)];
  };
  DRAW.heads = map("head");
  DRAW.kv_groups = map("kv_group");

  const MOST = 1500; // dots of one figure
  const dots = (rows, value) => (rows.length <= MOST ? rows : Array.from(rows).sort((a, b) => value(b) - value(a)).slice(0, MOST));
  DRAW.neurons = (width) => {
    const rows = rowsOf("neuron"), some = dots(rows, (i) => Math.abs(best[i]));
    const x = (i) => column.layer[i] + ((column.index[i] * 0.618034) % 1 - 0.5) * 0.7, y = (i) => best[i];
    const marked = rows.filter((i) => state.pins.has(names[i]) || names[i] === state.q);
    const leaders = [...some].sort((a, b) => best[b] - best[a]).slice(0, 1), last = layers.at(-1) ?? 0;
    const anchor = (i) => (column.layer[i] > last / 2 ? "end" : "start");
    const labels = [...new Set([...marked, ...leaders])];
    const plot = draw(width, 360, {
      marginLeft: 62, x: { domain: [-0.6, last + 0.6], ticks: layerTicks(last + 1), tickFormat: "d", label: "layer" }, y: { grid: true, nice: true, label: "effect" },
      marks: [
        Plot.ruleY([0], { stroke: "var(--soft)" }),
        Plot.dot(some, { x, y, r: 2.2, fill: colour("neuron"), fillOpacity: (i) => (inView[i] ? 0.65 : 0.08) }),
        Plot.dot(marked, { x, y, r: 5, ...PINNED }),
        ...["start", "end"].map((side) => Plot.text(labels.filter((i) => anchor(i) === side), { x, y, text: (i) => names[i], textAnchor: side, dx: side === "start" ? 7 : -7, fontSize: 11, stroke: "var(--surface)", fill: "var(--ink)", strokeWidth: 4 })),
        tip({ data: some, x, y, title: told }),
      ],
    });
    return [clickable(plot, pick), some.length < rows.length ? element("p", { class: "ramp" }, `The ${thousands(some.length)} largest of ${thousands(rows.length)} by magnitude.`) : ""];
  };

  DRAW.top = (width) => {
    const rows = Array.from(view).filter((i) => !Number.isNaN(best[i])).sort((a, b) => best[b] - best[a]).slice(0, 20);
    if (!rows.length) return "No component that the table shows has an effect.";
    const y = (i) => names[i], x = (i) => best[i];
    const bounded = rows.filter((i) => !Number.isNaN(column.ci_low[i]));
    const margin = 16 + 6.6 * d3.max(rows, (i) => names[i].length);
    find(".live", figures.get("top")).style.minHeight ||= `${66 + 17 * rows.length}px`; // what stands below stays where it is
    const plot = draw(width, 66 + 17 * rows.length, {
      marginTop: 10, marginLeft: Math.min(margin, width / 2), marginRight: 16, x: { label: "share of the gap, alone", grid: true, ticks: Math.max(3, Math.round(width / 110)) }, y: { domain: rows.map(y), label: null, tickSize: 0 },
      marks: [
        Plot.ruleX([0], { stroke: "var(--soft)" }),
        Plot.barX(rows, { y, x, fill: (i) => colour(kindOf(i)), fillOpacity: (i) => (isEstimate(i) ? 0.4 : 0.85), insetTop: 2, insetBottom: 2 }),
        Plot.ruleY(bounded, { y, x1: (i) => column.ci_low[i], x2: (i) => column.ci_high[i], stroke: "var(--ink)", strokeWidth: 1.2 }),
        Plot.barX(rows.filter((i) => state.pins.has(names[i])), { y, x, ...PINNED, strokeWidth: 1.5 }),
        tip({ data: rows, by: "pointerY", y, x, title: told, maxRadius: Infinity }),
      ],
    });
    return [rows.some(isEstimate) ? element("p", { class: "keys" }, "Pale: an estimate; the weights were not replaced.") : "", clickable(plot, pick)];
  };

  const axesX = find("#axis-x"), axesY = find("#axis-y");
  if (axesX) {
    const usable = about.table.filter((entry) => entry.type !== "bool" && column[entry.key].some((v) => !Number.isNaN(v)));
    const has = (key) => usable.some((entry) => entry.key === key);
    const upwards = about.best.find(has) ?? usable[0].key;
    const wanted = [["set_score", "screen", "delta_norm"].find((key) => key !== upwards && has(key)) ?? upwards, upwards];
    [axesX, axesY].forEach((select, k) => {
      select.append(...usable.map((entry) => element("option", { value: entry.key }, entry.title)));
      select.value = wanted[k];
      select.addEventListener("change", () => drawFigure("compare"));
    });
  }
  const scatter = (width, kx, ky) => {
    const x = (i) => column[kx][i], y = (i) => column[ky][i];
    const known = [];
    for (let i = 0; i < n; i++) if (Number.isFinite(x(i)) && Number.isFinite(y(i))) known.push(i);
    if (!known.length) return `No component has both ${NUMBERS[kx].title} and ${NUMBERS[ky].title}: choose other columns.`;
    const span = [d3.max(known, (i) => Math.abs(x(i))) || 1, d3.max(known, (i) => Math.abs(y(i))) || 1];
    const some = dots(known, (i) => Math.abs(x(i)) / span[0] + Math.abs(y(i)) / span[1]);
    const marked = known.filter((i) => state.pins.has(names[i]) || names[i] === state.q);
    const plot = draw(width, 320, {
      marginLeft: 62, x: { label: NUMBERS[kx].title, grid: true, nice: true, ticks: Math.max(3, Math.round(width / 110)) }, y: { label: NUMBERS[ky].title, grid: true, nice: true },
      marks: [
        Plot.ruleX([0], { stroke: "var(--line)" }), Plot.ruleY([0], { stroke: "var(--line)" }),
        Plot.dot(some, { x, y, r: 2.8, fill: (i) => colour(kindOf(i)), fillOpacity: (i) => (inView[i] ? 0.7 : 0.08) }),
        Plot.dot(marked, { x, y, r: 5.5, ...PINNED }),
        Plot.text(marked, { x, y, text: (i) => names[i], dy: -11, fontSize: 11, stroke: "var(--surface)", fill: "var(--ink)", strokeWidth: 4 }),
        tip({ data: some, x, y, title: (i) => `${told(i)}\n${kx} ${short(x(i))}, ${ky} ${short(y(i))}` }),
      ],
    });
    const kinds = about.kinds.filter((kind) => known.some((i) => kindOf(i) === kind));
    return [keysOf(kinds.map((kind) => [kind, colour(kind)])), clickable(plot, pick), some.length < known.length ? element("p", { class: "ramp" }, `The ${thousands(some.length)} farthest out of ${thousands(known.length)}.`) : ""];
  };
  DRAW.compare = (width) => scatter(width, axesX.value, axesY.value);
  if (about.plane) DRAW.plane = (width) => scatter(width, "source", "relay");

  DRAW.coverage = (width) => {
    const c = about.coverage, bars = c.kinds.flatMap((kind, k) => [
      { kind, what: "as one patch", value: c.joint[k], fill: colour(kind) },
      { kind, what: "sum of single effects", value: c.sum[k], fill: "color-mix(in oklab, var(--soft) 45%, var(--surface))" },
    ]).filter((bar) => bar.value !== null && !Number.isNaN(bar.value));
    const plot = draw(width, 50 + 52 * c.kinds.length, {
      marginLeft: 14 + 7 * d3.max(c.kinds, (kind) => kind.length), marginRight: 56, x: { label: "share of the gap", tickFormat: ".0%", grid: true, ticks: Math.max(3, Math.round(width / 110)) }, y: { axis: null, domain: ["as one patch", "sum of single effects"] }, fy: { domain: c.kinds, label: null, padding: 0.25, axis: "left" },
      marks: [
        Plot.barX(bars, { fy: "kind", y: "what", x: "value", fill: "fill", insetBottom: 1 }),
        Plot.text(bars, { fy: "kind", y: "what", x: (d) => Math.max(0, d.value), text: (d) => `${(100 * d.value).toFixed(1).replace(/^-0\.0$/, "0.0")} %`, textAnchor: "start", dx: 5, fill: "var(--ink)" }),
        Plot.ruleX([0], { stroke: "var(--soft)" }), Plot.ruleX([1], { stroke: "var(--soft)", strokeDasharray: "2,3" }),
      ],
    });
    return [element("p", { class: "keys" }, `Coloured: as one patch. Grey: the sum of single effects. All together: ${(100 * c.all).toFixed(0)} %.`), plot];
  };

  DRAW.anchor = (width) => {
    const a = about.anchor, two = [["gap", "var(--soft)", "gap"], ["specific", "var(--accent)", "gap without drift"]];
    const lines = two.flatMap(([key, stroke, label]) => a[key][0].map((mean, layer) => ({ layer, mean, low: a[key][1][layer], high: a[key][2][layer], stroke, label })));
    const shared = { width, marginLeft: 46, x: { label: "layer", domain: [0, a.stability.length - 1], ticks: layerTicks(a.stability.length), tickFormat: "d" } };
    const rule = Plot.ruleX([a.layer], { stroke: "var(--ink)", strokeDasharray: "2,3" });
    return [
      keysOf([...two.map(([, stroke, label]) => [label, stroke]), ["split-half cosine", colour("neuron")]]),
      draw(width, 220, { ...shared, y: { label: "expert − base, in standard deviations", grid: true }, marks: [
        Plot.ruleY([0], { stroke: "var(--soft)" }), rule,
        Plot.areaY(lines, { x: "layer", y1: "low", y2: "high", fill: "stroke", z: "label", fillOpacity: 0.18 }),
        Plot.lineY(lines, { x: "layer", y: "mean", stroke: "stroke", z: "label" }),
        tip({ data: lines, x: "layer", y: "mean", title: (d) => `layer ${d.layer}${d.layer === a.layer ? ", the anchor's" : ""}\n${d.label} ${short(d.mean)} [${short(d.low)}, ${short(d.high)}]` }),
      ] }),
      draw(width, 110, { ...shared, y: { label: "split-half cosine", grid: true, domain: [Math.min(0, d3.min(a.stability)), 1], ticks: 3 }, marks: [
        rule, Plot.lineY(a.stability, { x: (_, i) => i, y: (d) => d, stroke: colour("neuron") }),
        tip({ data: a.stability.map((v, layer) => ({ v, layer })), by: "pointerX", x: "layer", y: "v", title: (d) => `layer ${d.layer}: ${short(d.v)}`, maxRadius: Infinity }),
      ] }),
    ];
  };

  DRAW.flow = (width) => {
    if (!about.flow) return null;
    const kinds = Object.keys(about.flow), n_layers = about.flow[kinds[0]].length, cells = [];
    for (const kind of kinds) {
      about.flow[kind].forEach((row, layer) => row.forEach((share, to) => {
        if (share) cells.push({ kind, layer, to, share, via: to === 0 ? "itself" : `L${(to - 1) >> 1}.${to % 2 ? "attn" : "mlp"}` });
      }));
    }
    if (!cells.length) return null;
    const scale = d3.max(cells, (d) => Math.abs(d.share)), ticks = layerTicks(n_layers);
    const plot = draw(width, 90 + kinds.length * Math.min(170, 26 + 7 * n_layers), {
      marginLeft: 46, marginRight: 70, marginTop: 8, fy: { domain: kinds, label: null, padding: 0.12 },
      x: { type: "band", domain: d3.range(1 + 2 * n_layers), ticks: [0, ...ticks.slice(1).map((l) => 1 + 2 * l)], tickFormat: (t) => (t === 0 ? "self" : `${(t - 1) / 2}`), tickSize: 0, label: width < 560 ? "arrives by way of" : "arrives by way of: itself, then attention and MLP of each layer" },
      y: { type: "band", domain: d3.range(n_layers).reverse(), ticks: layerTicks(2 * n_layers).filter((l) => l < n_layers), tickSize: 0, label: "layer of the source" },
      marks: [
        Plot.frame({ stroke: "var(--line)" }),
        Plot.cell(cells, { fy: "kind", x: "to", y: "layer", fill: { value: (d) => diverge(d.share / scale), scale: null }, fillOpacity: (d) => (state.layer === null || d.layer === state.layer ? 1 : 0.25), inset: 0.2 }),
        tip({ data: cells, fy: "kind", x: "to", y: "layer", title: (d) => `${d.kind}s of layer ${d.layer}\nby way of ${d.via}: ${percent(d.share)}` }),
      ],
    });
    return [clickable(plot, (d) => pickLayer(d.layer)), rampOf(scale)];
  };

  const howMany = find("#n-sources");
  howMany?.addEventListener("input", () => drawFigure("hierarchy"));
  DRAW.hierarchy = (width) => {
    const g = about.graph;
    if (!g || !g.sources.length) return null;
    howMany.max = g.sources.length;
    find("#n-sources-said").textContent = Math.min(howMany.value, g.sources.length);
    const sources = g.sources.slice(0, Number(howMany.value)).map((name, s) => ({ name, s, i: place.get(name), value: d3.sum(g.flow[s]) }));
    for (const source of sources) source.value = Number.isNaN(best[source.i]) ? source.value : best[source.i];
    // Aggregators: the fewest targets that hold 80 % of the positive inflow (circuits/hierarchy.py), at most 12.
    const ends = g.targets.length - (g.targets.at(-1) === "rest" ? 1 : 0);
    const inflow = d3.range(1, ends).map((u) => ({ name: g.targets[u], u, value: d3.sum(sources, (s) => g.flow[s.s][u]) })).filter((t) => t.value > 0).sort((a, b) => b.value - a.value);
    const total = d3.sum(inflow, (t) => t.value), targets = [];
    for (let held = 0, k = 0; k < inflow.length && targets.length < 12 && held < 0.8 * total; k++) { held += inflow[k].value; targets.push(inflow[k]); }
    const layerOf = (name) => Number(/^L(\d+)/.exec(name)?.[1] ?? -1);
    const stack = (nodes, x, role) => [...nodes].sort((a, b) => layerOf(a.name) - layerOf(b.name)).map((node, k) => ({ ...node, x, role, y: (k + 0.5) / nodes.length }));
    const left = stack(sources, 0, "source"), middle = stack(targets, 1, "aggregator");
    const right = stack(g.executors.map(([name, value]) => ({ name, value })), 3, "executor");
    const end = { name: g.end, x: 2, y: 0.5, role: "end", value: d3.sum(sources, (s) => s.value) };
    const links = [];
    for (const a of left) {
      for (const b of middle) links.push({ a, b, value: g.flow[a.s][b.u] });
      links.push({ a, b: end, value: g.flow[a.s][0] });
    }
    const widest = d3.max([...links.map((l) => Math.abs(l.value)), ...middle.map((m) => m.value)]) || 1e-9;
    for (const b of middle) links.push({ a: b, b: end, value: b.value });
    for (const e of right) links.push({ a: end, b: e, value: (widest * e.value) / (right[0].value || 1) });
    const drawn = links.filter((l) => Math.abs(l.value) > widest / 60), nodes = [...left, ...middle, end, ...right];
    const say = (d) => (d.role === "end" ? d.name : `${d.name}\n${{ source: "source, effect", aggregator: "aggregator, inflow", executor: "executor, effect" }[d.role]} ${percent(d.value)}`);
    const w = Math.max(width, 600), long = d3.max(left, (d) => d.name.length);
    const plot = draw(w, Math.max(240, 60 + 24 * d3.max([left.length, middle.length, right.length])), {
      marginLeft: 66 + 6.4 * long, marginRight: right.length ? 150 : 110, marginTop: 34, x: { axis: null, domain: [0, right.length ? 3 : 2] }, y: { axis: null, domain: [1, 0] },
      marks: [
        Plot.link(drawn, { x1: (l) => l.a.x, y1: (l) => l.a.y, x2: (l) => l.b.x, y2: (l) => l.b.y, curve: "bump-x", stroke: { value: (l) => (l.value < 0 ? "var(--less)" : "var(--more)"), scale: null }, strokeWidth: (l) => Math.max(0.6, (9 * Math.abs(l.value)) / widest), strokeOpacity: 0.42 }),
        Plot.dot(nodes, { x: "x", y: "y", r: (d) => (d.role === "end" ? 8 : 4.5), fill: (d) => (d.role === "end" ? "var(--ink)" : colour(d.role === "aggregator" ? (d.name.endsWith("mlp") ? "mlp" : "head") : kindOf(d.i ?? place.get(d.name) ?? 0))), stroke: (d) => (state.pins.has(d.name) || d.name === state.q ? "var(--ink)" : "var(--surface)"), strokeWidth: (d) => (state.pins.has(d.name) || d.name === state.q ? 2.5 : 1) }),
        Plot.text(left, { x: "x", y: "y", text: (d) => `${d.name}  ${percent(d.value)}`, textAnchor: "end", dx: -9 }),
        Plot.text(middle, { x: "x", y: "y", text: (d) => `${d.name}  ${percent(d.value)}`, textAnchor: "middle", dy: -10, stroke: "var(--surface)", strokeWidth: 4, fill: "var(--ink)" }),
        Plot.text([end, ...right], { x: "x", y: "y", text: (d) => (d.role === "end" ? d.name : `${d.name}  ${percent(d.value)}`), textAnchor: right.length ? "middle" : "start", dx: right.length ? 0 : 13, dy: right.length ? -14 : 0, stroke: "var(--surface)", strokeWidth: 4, fill: "var(--ink)", fontWeight: 600 }),
        Plot.text([["sources", 0], ["aggregators", 1], ...(right.length ? [["executors", 3]] : [])], { x: (d) => d[1], frameAnchor: "top", text: (d) => d[0], dy: -24, textAnchor: (d) => "middle", fontWeight: 650, fill: "var(--soft)" }),
        tip({ data: nodes, x: "x", y: "y", title: say, maxRadius: 30 }),
      ],
    });
    const paths = all('[aria-label="link"] path', plot);
    plot.addEventListener("input", () => paths.forEach((path, k) => {
      const at = plot.value;
      path.classList.toggle("fade", Boolean(at) && drawn[k].a.name !== at.name && drawn[k].b.name !== at.name);
    }));
    const note = g.sure ? "" : element("p", { class: "keys" }, "No effect is surely above zero (q < 0.05), so the largest effects stand here: take them as a first guess.");
    return [note, clickable(plot, (d, event) => { const i = place.get(d.name); if (i !== undefined) pick(i, event); else if (layerOf(d.name) >= 0) pickLayer(layerOf(d.name)); })];
  };

  const measure = find("#measure");
  if (about.curves && measure) {
    measure.append(...about.curves.measures.map(([name, title]) => element("option", { value: name }, title)));
    measure.addEventListener("change", () => drawFigure("curves"));
  }
  const paint = (r) => (r === 0 ? "var(--accent)" : about.curves.rankings[r].startsWith("random") ? "var(--soft)" : `var(--c-${(r - 1) % 4})`);
  DRAW.calibration = (width) => {
    const c = about.curves, each = Math.max(190, Math.min(250, (width - 16 * 3) / 4)), side = element("div");
    side.style.cssText = "display:flex;flex-wrap:wrap;gap:12px 16px";
    if (c.foretells.every(([, rho]) => rho === null)) return "No score and no checker tells these patched models apart, so nothing can be foretold.";
    for (const [name, rho] of c.foretells) {
      const points = [0, 1].flatMap((way) => c.rankings.flatMap((ranking, r) => c.n_components[r].map((count, p) => ({
        ranking, count, way, r, x: c.position[name][way][r][p], y: c.position.strict[way][r][p], stroke: paint(r),
      })))).filter((d) => d.x !== null && d.y !== null);
      const says = rho === null ? (points.length ? "all alike" : "no gap") : `rank correlation ${rho.toFixed(2)}`;
      const plot = points.length ? draw(each, 210, {
        marginLeft: 42, marginTop: 14, x: { label: "share by the score", grid: true, ticks: 4, tickFormat: ".0%" }, y: { label: null, grid: true, ticks: 4, tickFormat: ".0%" },
        marks: [
          Plot.link([0], { x1: 0, y1: 0, x2: 1, y2: 1, stroke: "var(--soft)", strokeDasharray: "2,3" }),
          Plot.dot(points, { x: "x", y: "y", r: 3, fill: "stroke", fillOpacity: 0.8 }),
          tip({ data: points, x: "x", y: "y", title: (d) => `${d.ranking}, ${thousands(d.count)} components ${d.way ? "taken out" : "put in"}\n${name} ${percent(d.x)}, passes ${percent(d.y)}` }),
        ],
      }) : "";
      side.append(element("div", {}, element("p", { class: "keys" }, `${name}: ${says}`), plot));
    }
    return [side];
  };
  DRAW.curves = (width) => {
    const c = about.curves, shares = c.shares[measure.value];
    const points = [0, 1].map((side) => c.rankings.flatMap((ranking, r) => c.n_parameters[r].map((size, p) => ({
      ranking, r, size, count: c.n_components[r][p], value: shares[0][side][r][p], low: shares[1][side][r][p], high: shares[2][side][r][p], stroke: paint(r),
    })))).map((side) => side.filter((d) => d.value !== null).sort((a, b) => a.size - b.size));
    if (!points[0].length) return "There is no gap between base and expert on this measure, so there is no share of it.";
    const each = width > 640 ? (width - 24) / 2 : width, seen = [];
    const keys = c.rankings.map((ranking, r) => [ranking.startsWith("random") ? "random" : ranking, paint(r)]).filter(([name]) => !seen.includes(name) && seen.push(name));
    const side = element("div", { class: "sides" });
    side.style.cssText = "display:flex;flex-wrap:wrap;gap:24px";
    ["brought back to the base", "taken away from the expert"].forEach((title, k) => side.append(draw(each, 280, {
      marginLeft: 46, x: { type: "log", label: "parameters patched", tickFormat: "~s", ticks: 4 }, y: { label: `share ${title}`, grid: true, tickFormat: ".0%" },
      marks: [
        Plot.ruleY([0], { stroke: "var(--soft)" }), Plot.ruleY([1], { stroke: "var(--soft)", strokeDasharray: "2,3" }),
        Plot.areaY(points[k], { x: "size", y1: "low", y2: "high", z: "r", fill: "stroke", fillOpacity: 0.1 }),
        Plot.lineY(points[k], { x: "size", y: "value", z: "r", stroke: "stroke", strokeWidth: (d) => (d.r === 0 ? 2.4 : 1.4) }),
        Plot.dot(points[k], { x: "size", y: "value", r: 2.5, fill: "stroke" }),
        tip({ data: points[k], x: "size", y: "value", title: (d) => `${d.ranking}\n${thousands(d.count)} components, ${thousands(d.size)} parameters\n${percent(d.value)} [${percent(d.low)}, ${percent(d.high)}]` }),
      ],
    })));
    return [keysOf(keys), side];
  };

  DRAW.layers = (width) => {
    const last = d3.max(about.layers, (c) => d3.max(c.layers)), sources = [...new Set(about.layers.map((c) => c.source))];
    const tints = ["var(--accent)", "var(--c-0)", "var(--c-1)", "var(--c-2)", "var(--c-3)", "var(--soft)"];
    return sources.flatMap((source) => {
      const mine = about.layers.filter((c) => c.source === source);
      const points = mine.flatMap((c, k) => c.layers.map((layer, j) => ({ label: c.label, layer, value: c.values[j], stroke: tints[k % tints.length] }))).filter((d) => d.value !== null);
      const plot = draw(width, 170, {
        marginLeft: 46, x: { domain: [-0.5, last + 0.5], ticks: layerTicks(last + 1), tickFormat: "d", label: "layer" }, y: { label: "share", grid: true, nice: true, ticks: 4 },
        marks: [
          Plot.ruleY([0], { stroke: "var(--soft)" }),
          state.layer === null ? null : Plot.ruleX([state.layer], { stroke: "var(--ink)", strokeDasharray: "2,3" }),
          Plot.lineY(points, { x: "layer", y: "value", z: "label", stroke: "stroke" }), Plot.dot(points, { x: "layer", y: "value", fill: "stroke", r: 3 }),
          tip({ data: points, x: "layer", y: "value", title: (d) => `${d.label}, layer ${d.layer}: ${short(d.value)}` }),
        ],
      });
      const title = `${source}: where ${mine[0].edits ? "changing it works" : "it appears to live"}`;
      return [element("p", { class: "keys" }, element("b", {}, title)), keysOf(mine.map((c, k) => [c.label, tints[k % tints.length]])), clickable(plot, (d) => pickLayer(d.layer))];
    });
  };
  DRAW.interference = (width) => {
    const { behaviours, levels } = about.interference, n_b = behaviours.length, side = element("div");
    side.style.cssText = "display:flex;flex-wrap:wrap;gap:8px 20px";
    const brief = (name) => { const s = name.replace(/^tiny:/, ""); return s.length > 18 ? `${s.slice(0, 17)}…` : s; };
    const margin = 16 + 6.4 * d3.max(behaviours, (name) => brief(name).length), each = Math.min(width, Math.max(220, margin + 58 * n_b));
    for (const [level, maps] of Object.entries(levels)) {
      for (const [title, values] of maps) {
        const cells = values.flatMap((row, a) => row.map((value, b) => ({ a, b, value }))).filter((d) => d.value !== null);
        const say = (d) => (title === "brings back" ? `${(100 * d.value).toFixed(0)} %` : d.value.toFixed(2));
        const plot = draw(each, 60 + 34 * n_b, {
          marginLeft: margin, marginTop: 8, marginBottom: 52, padding: 0.05, x: { type: "band", domain: d3.range(n_b), tickFormat: (b) => brief(behaviours[b]), tickSize: 0, tickRotate: -20, label: null }, y: { type: "band", domain: d3.range(n_b), tickFormat: (a) => brief(behaviours[a]), tickSize: 0, label: null },
          marks: [
            Plot.cell(cells, { x: "b", y: "a", fill: { value: (d) => diverge(0.75 * Math.max(-1, Math.min(1, d.value))), scale: null }, rx: 2, stroke: (d) => (d.a === d.b ? "var(--ink)" : "none") }),
            Plot.text(cells, { x: "b", y: "a", text: say, fill: "var(--ink)" }),
            tip({ data: cells, x: "b", y: "a", title: (d) => `set of ${behaviours[d.a]}\n${behaviours[d.b]}: ${say(d)}` }),
          ],
        });
        side.append(element("div", {}, element("p", { class: "keys" }, element("b", {}, `${level}: ${title}`)), plot));
      }
    }
    return [side];
  };

  const room = (figure) => Math.max(240, Math.floor(figure.clientWidth - parseFloat(getComputedStyle(figure).paddingLeft) * 2));
  const drawFigure = (name, width) => {
    const figure = figures.get(name);
    if (!figure || !DRAW[name]) return;
    const into = find(".live", figure), still = find(".static", figure);
    let drawn = null;
    try { drawn = DRAW[name](width ?? room(figure)); } catch (error) { console.error(name, error); } // the static one stays
    if (drawn === null) return; // the page says in words why there is nothing
    into.replaceChildren(...(typeof drawn === "string" ? [element("p", { class: "empty" }, drawn)] : drawn));
    for (const svg of all(":scope svg", into)) {
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", figure.dataset.alt);
      for (const part of svg.children) part.setAttribute("aria-hidden", "true"); // the label of the whole says it
    }
    into.hidden = false;
    if (into.scrollWidth > into.clientWidth) { // the keyboard scrolls it, too
      into.tabIndex = 0;
      into.setAttribute("role", "group");
      into.setAttribute("aria-label", find("h3", figure).textContent);
    } else into.removeAttribute("tabindex");
    if (still) still.remove();
    for (const part of all("[data-live]", figure)) part.hidden = false;
  };
  const drawFigures = (width) => {
    stale.clear();
    const widths = [...figures.values()].map((figure) => width ?? room(figure)); // all before the first is drawn: one layout
    [...figures.keys()].forEach((name, k) => drawFigure(name, widths[k]));
  };
  // What is out of sight is drawn anew when it comes into sight.
  const seen = new Set(), stale = new Set();
  const eye = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const name = target.dataset.figure;
      if (!isIntersecting) seen.delete(name);
      else { seen.add(name); if (stale.delete(name)) drawFigure(name); }
    }
  }, { rootMargin: "200px" });
  const refreshFigures = () => { for (const name of figures.keys()) if (seen.has(name)) drawFigure(name); else stale.add(name); };

  // ---- Begin
  for (const part of all("[data-needs-script]")) part.hidden = false;
  find("#static-table").remove();
  for (const figure of all("figure[data-script-only]")) figure.hidden = false;
  layOut();
  box.append(table);
  readHash();
  changed();
  drawFigures();
  for (const figure of figures.values()) eye.observe(figure);
  addEventListener("hashchange", () => { readHash(); changed(); });
  let lastWidth = innerWidth, resizing = 0;
  addEventListener("resize", () => {
    if (innerWidth === lastWidth) return;
    lastWidth = innerWidth;
    clearTimeout(resizing);
    resizing = setTimeout(() => { layOut(); drawRows(); drawFigures(); }, 120);
  });
  document.documentElement.dataset.ready = "1"; // tests wait for it
})();
