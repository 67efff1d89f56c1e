"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const curves = data.curves;
  const find = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const DASHES = [[], [9, 4], [2.5, 3], [9, 3, 2, 3], [14, 4], [5, 5]];
  const COLORS = 8;
  root.classList.add("js");

  // ---- view state, kept in the URL so that a link shows what its sender saw
  const state = { curve: curves.names[0], x: curves.meters[0], part: 1, log: false, hide: new Set(), cost: "" };

  function readAddress() {
    const address = location.hash.slice(1);
    if (address && !address.includes("=")) return; // a link to a place on the page
    const given = new URLSearchParams(address);
    const choice = (key, allowed) => (allowed.includes(given.get(key)) ? given.get(key) : allowed[0]);
    state.curve = choice("curve", curves.names);
    state.x = choice("x", curves.meters);
    state.part = Number(given.get("part")) || 1;
    state.log = given.get("log") === "1";
    const hidden = (given.get("hide") || "").split(",").filter((part) => part !== "").map(Number);
    state.hide = new Set(hidden.filter((arm) => arm in data.arms));
    state.cost = given.get("cost") || "";
  }

  function writeAddress() {
    const said = new URLSearchParams();
    if (state.curve !== curves.names[0]) said.set("curve", state.curve);
    if (state.x !== curves.meters[0]) said.set("x", state.x);
    if (state.part !== 1) said.set("part", state.part);
    if (state.log) said.set("log", "1");
    if (state.hide.size) said.set("hide", [...state.hide].sort((a, b) => a - b).join(","));
    if (state.cost) said.set("cost", state.cost);
    history.replaceState(null, "", `#${said}`);
  }

  // ---- quality against cost: the choice itself is plain CSS
  const costs = all("input[name=cost]");
  costs.forEach((input, number) => input.addEventListener("change", () => {
    state.cost = number ? input.value : "";
    writeAddress();
  }));

  // ---- downloads and copying
  const status = find(".status");
  const say = (text) => { if (status) status.textContent = text; };

  function csv(rows) {
    const columns = [...new Set(rows.flatMap(Object.keys))];
    const cell = (value) => {
      if (value === null || value === undefined) return "";
      let text = String(value);
      // A spreadsheet would run a text that begins like a formula.
      if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const lines = [columns, ...rows.map((row) => columns.map((column) => row[column]))];
    return lines.map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
  }

  all("button[data-table]").forEach((button) => button.addEventListener("click", () => {
    const { table, format } = button.dataset;
    const rows = data.tables[table];
    const text = format === "csv" ? csv(rows) : JSON.stringify(rows, null, 1) + "\n";
    const type = format === "csv" ? "text/csv" : "application/json";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
    link.download = `${table}.${format}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    say(`Saved ${link.download}.`);
  }));

  all("button[data-copy]").forEach((button) => button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(data.command);
    } catch {
      getSelection().selectAllChildren(find(".command pre"));
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    say("Command copied.");
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }));

  // ---- curves
  const box = find("#chart");
  let chart = null;

  /** Reads a column at point numbers: straight lines between its knots. */
  function columnAt([knots, values], at) {
    let k = 0;
    return at.map((index) => {
      while (k < knots.length - 2 && knots[k + 1] <= index) k += 1;
      if (knots.length < 2) return values[0];
      const share = (index - knots[k]) / (knots[k + 1] - knots[k]);
      return values[k] + share * (values[k + 1] - values[k]);
    });
  }

  const positive = (value) => (state.log && !(value > 0) ? null : value);
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function short(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    for (const [scale, prefix] of [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (size >= scale) return `${+(value / scale).toPrecision(3)} ${prefix}`;
    }
    return size < 1e-3 ? value.toExponential(0) : String(+value.toPrecision(3));
  }

  function axisLabel() {
    if (state.x === "seconds") return "Time, s";
    return data.xLabels[state.x];
  }

  /** The drawn lines: one entry per line, bands as pairs of invisible ones. */
  function build() {
    const tables = [], series = [{}], bands = [];
    const add = (x, ys, styles) => {
      const order = x.map((_, i) => i).filter((i) => i === 0 || x[i] > x[i - 1]);
      tables.push([order.map((i) => x[i]), ...ys.map((y) => order.map((i) => positive(y[i])))]);
      series.push(...styles);
    };
    const visible = (entry) => !state.hide.has(entry.arm);
    const means = curves.means[state.curve].filter((m) => visible(m) && m[state.x]);
    for (const m of means) {
      if (m.runs < 2) continue;
      const first = series.length;
      const edge = { stroke: "transparent", width: 0, points: { show: false } };
      const high = m.mean.map((v, i) => v + m.spread[i]);
      const low = m.mean.map((v, i) => v - m.spread[i]);
      add(m[state.x], [high, low], [edge, edge]);
      bands.push({ series: [first, first + 1], fill: `${color(`--a${m.arm % COLORS}`)}26` });
    }
    for (const s of curves.seeds[state.curve].filter(visible)) {
      if (!s.columns[state.x]) continue;
      const stroke = `${color(`--a${s.arm % COLORS}`)}55`;
      add(columnAt(s.columns[state.x], s.at), [s.value], [{ stroke, width: 0.8, points: { show: false } }]);
    }
    for (const m of means) {
      const dash = DASHES[(m.arm + Math.floor(m.arm / COLORS)) % DASHES.length];
      add(m[state.x], [m.mean], [{ stroke: color(`--a${m.arm % COLORS}`), width: 2, dash, points: { show: m.mean.length < 2 } }]);
    }
    return { table: tables.length ? uPlot.join(tables) : [[0, 1]], series, bands };
  }

  let whole = null;

  /** Range of the horizontal axis: a zoom as it is, else the chosen last part of all. */
  function shownRange(low, high) {
    if (whole && (low !== whole[0] || high !== whole[1])) return [low, high];
    if (low === high) return [low - 1, high + 1];
    return [high - state.part * (high - low), high];
  }

  function readout(self) {
    const at = self.cursor.idx === null || self.cursor.idx === undefined ? null : self.posToVal(self.cursor.left, "x");
    all("[data-readout]").forEach((output) => {
      const m = curves.means[state.curve].find((entry) => entry.arm === Number(output.dataset.readout));
      const x = m && m[state.x];
      if (at === null || !x || state.hide.has(m.arm) || at < x[0] || at > x[x.length - 1]) {
        output.textContent = "";
        return;
      }
      const next = Math.max(1, x.findIndex((value) => value >= at));
      const nearer = x.length > 1 && at - x[next - 1] > x[next] - at ? next : next - 1;
      output.textContent = Number(m.mean[nearer]).toPrecision(3);
    });
  }

  function draw() {
    if (!box || !curves.names.length) return;
    if (chart) chart.destroy();
    box.textContent = "";
    const { table, series, bands } = build();
    whole = [table[0][0], table[0][table[0].length - 1]];
    const width = box.clientWidth;
    const font = `12px ${getComputedStyle(box).getPropertyValue("--sans")}`;
    const axis = {
      stroke: color("--soft"), font, labelFont: font, labelSize: 22,
      grid: { stroke: color("--faint"), width: 1 }, ticks: { stroke: color("--faint"), width: 1, size: 5 },
    };
    chart = new uPlot({
      width, height: Math.round(Math.min(420, Math.max(280, width * 0.46))),
      legend: { show: false }, padding: [10, 16, 0, 0],
      cursor: { y: false, points: { show: false }, drag: { x: true, y: false } },
      scales: { x: { time: false, range: (_, low, high) => shownRange(low, high) }, y: { distr: state.log ? 3 : 1 } },
      axes: [
        { ...axis, size: 36, label: axisLabel(), values: (_, ticks) => ticks.map((v) => (v === null ? "" : short(v))) },
        { ...axis, size: 56, ...(state.log ? { values: (_, ticks) => ticks.map((v) => (v === null ? "" : short(v))) } : {}) },
      ],
      series, bands, hooks: { setCursor: [readout] },
    }, table, box);
    root.dataset.lines = String(series.length - 1);
  }

  function fill() {
    const meter = find("#meter");
    if (!meter) return;
    meter.replaceChildren(...curves.meters.map((key) => new Option(data.xLabels[key], key)));
    const redraw = () => { writeAddress(); draw(); };
    find("#curve").addEventListener("change", (event) => { state.curve = event.target.value; redraw(); });
    meter.addEventListener("change", () => { state.x = meter.value; redraw(); });
    find("#part").addEventListener("change", (event) => { state.part = Number(event.target.value); redraw(); });
    find("#logarithmic").addEventListener("change", (event) => { state.log = event.target.checked; redraw(); });
    all("[data-arm]").forEach((input) => input.addEventListener("change", () => {
      state.hide[input.checked ? "delete" : "add"](Number(input.dataset.arm));
      redraw();
    }));
  }

  /** Puts the state into the controls. */
  function show() {
    const chosen = costs.find((input) => input.value === state.cost) || costs[0];
    if (chosen) chosen.checked = true;
    if (!find("#meter")) return;
    find("#curve").value = state.curve;
    find("#meter").value = state.x;
    find("#part").value = String(state.part);
    find("#logarithmic").checked = state.log;
    all("[data-arm]").forEach((input) => { input.checked = !state.hide.has(Number(input.dataset.arm)); });
  }

  fill();
  readAddress();
  show();
  draw();
  requestAnimationFrame(() => { root.dataset.ready = "true"; });

  let width = box ? box.clientWidth : 0;
  addEventListener("resize", () => {
    if (box && box.clientWidth !== width) { width = box.clientWidth; draw(); }
  });
  addEventListener("hashchange", () => { readAddress(); show(); draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  // Paper is white: draw in the light colors while printing.
  addEventListener("beforeprint", () => { root.dataset.theme = "light"; draw(); });
  addEventListener("afterprint", () => { delete root.dataset.theme; draw(); });
})();
