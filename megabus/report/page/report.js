"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const panels = new Map(data.panels.map((panel) => [panel.key, panel]));
  const AXES = ["tokens", "flops", "time"];
  const state = { x: "tokens", log: false, hidden: new Set() };
  const SVG = "http://www.w3.org/2000/svg";
  const CLIPPED = ["loss", "target"]; // whose first values would flatten the rest

  function make(parent, tag, attributes, text) {
    const node = document.createElementNS(SVG, tag);
    for (const name in attributes) node.setAttribute(name, attributes[name]);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
    return node;
  }

  const colour = (run) => `var(--run${run % 6})`;

  function short(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    for (const [scale, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
      if (size >= 0.9995 * scale && size < 1e15) return `${+(value / scale).toPrecision(4)}${suffix}`;
    }
    return size < 1e-3 || size >= 1e15 ? value.toExponential(2).replace(/\.?0+e/, "e") : `${+value.toPrecision(4)}`;
  }

  const power = (value) => value === 0 ? "0" : value.toExponential(2).replace(/\.?0+e\+?/, "e");

  // The horizontal axis: its label, how a place is written, and what hours are multiplied with.
  function axisOf(longest) {
    if (state.x === "tokens") return { label: "tokens", text: short, scale: 1 };
    if (state.x === "flops") return { label: "training compute (FLOPs)", text: power, scale: 1 };
    const [scale, unit] = longest > 2 ? [1, "hours"] : longest > 1 / 30 ? [60, "minutes"] : [3600, "seconds"];
    return { label: `training time (${unit})`, text: short, scale };
  }

  function ticks(low, high, log, count) {
    if (log) {
      const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
      const steps = high / low < 8 ? [1, 1.5, 2, 3, 4, 5, 7] : last - first <= 2 ? [1, 2, 5] : [1];
      const every = Math.max(1, Math.ceil((last - first) / count));
      const found = [];
      for (let e = first; e <= last; e += every) for (const s of steps) found.push(s * 10 ** e);
      return found.filter((t) => t >= low * 0.9999 && t <= high * 1.0001);
    }
    const raw = (high - low) / count, size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((s) => s * size).find((s) => s >= raw * 0.999) || size * 10;
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
    return found;
  }

  // From values to pixels; a span of nothing gets some.
  function scale(low, high, from, to, log) {
    const f = log ? Math.log10 : (v) => v;
    const a = f(low), b = f(high);
    return (v) => from + (f(v) - a) / (b - a || 1) * (to - from);
  }

  function path(xs, ys) {
    let d = "", pen = false;
    xs.forEach((x, i) => {
      if (x === null || ys[i] === null) { pen = false; return; }
      d += `${pen ? "L" : "M"}${x.toFixed(1)} ${ys[i].toFixed(1)}${pen ? "" : "h0"}`; // a dot, should none follow
      pen = true;
    });
    return d;
  }

  function span(panel, curves) {
    let ys = [];
    for (const { curve } of curves) for (const key of ["y", "low", "high"]) if (curve[key]) ys.push(...curve[key]);
    ys = ys.filter((y) => y !== null && (!panel.log || y > 0)).sort((a, b) => a - b);
    if (!ys.length) return null;
    const high = CLIPPED.includes(panel.key) ? ys[Math.floor(0.985 * (ys.length - 1))] : ys[ys.length - 1];
    if (panel.log) return ys[0] === high ? [ys[0] / 2, high * 2] : [ys[0] / 1.15, high * 1.15];
    const pad = 0.05 * (high - ys[0]) || 0.05 * Math.abs(high) || 1;
    return [ys[0] - pad, high + pad];
  }

  // The same stretch of the horizontal axis in every diagram: what all runs that are shown cover.
  function extent() {
    let low = Infinity, high = -Infinity;
    data.runs.forEach((run, number) => {
      if (state.hidden.has(number)) return;
      for (const event in run.places) {
        for (const x of run.places[event][state.x]) {
          if (x === null || state.log && x <= 0) continue;
          low = Math.min(low, x);
          high = Math.max(high, x);
        }
      }
    });
    if (low > high) return [null, null];
    if (!state.log) low = Math.min(low, 0);
    return [low, low === high ? low + (Math.abs(low) || 1) : high];
  }

  function draw(figure) {
    const panel = panels.get(figure.dataset.panel), box = figure.querySelector(".chart");
    box.replaceChildren();
    const width = Math.max(260, box.clientWidth), height = panel.key === "loss" ? 360 : 220;
    const left = 58, right = width - 12, top = 20, bottom = height - 40;
    const svg = make(box, "svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    const curves = [];
    data.runs.forEach((run, number) => {
      if (state.hidden.has(number)) return;
      (run.curves[panel.key] || []).forEach((curve, i) => {
        const { event, shape, label } = panel.lines[i];
        if (curve) curves.push({ run: number, shape, label, curve, at: run.places[event][state.x] });
      });
    });
    const range = span(panel, curves);
    const [low, high] = extent();
    if (!range || low === null) {
      make(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to show");
      return;
    }
    const axis = axisOf(high), X = scale(low, high, left, right, state.log), Y = scale(range[0], range[1], bottom, top, panel.log);

    for (const t of ticks(range[0], range[1], panel.log, height > 300 ? 7 : 5)) {
      make(svg, "line", { class: "grid", x1: left, x2: right, y1: Y(t), y2: Y(t) });
      make(svg, "text", { x: left - 6, y: Y(t) + 4, "text-anchor": "end" }, short(t));
    }
    let free = -Infinity;
    for (const t of ticks(low * axis.scale, high * axis.scale, state.log, Math.max(2, Math.floor((right - left) / 70)))) {
      const x = X(t / axis.scale), text = axis.text(t), half = 3.6 * text.length;
      make(svg, "line", { class: "axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 });
      if (x - half < free || x + half > width) continue;
      make(svg, "text", { class: "tick", x, y: bottom + 17, "text-anchor": "middle" }, text);
      free = x + half + 6;
    }
    make(svg, "path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}` });
    make(svg, "text", { class: "xlabel", x: (left + right) / 2, y: height - 5, "text-anchor": "middle" }, axis.label);

    const clip = `clip-${panel.key.replace(/[^a-z0-9]/gi, "-")}`;
    make(make(make(svg, "defs", {}), "clipPath", { id: clip }), "rect", { x: left, y: top, width: right - left, height: bottom - top });
    marks(svg, panel, X, low, high, left, right, top, bottom);
    const inside = make(svg, "g", { "clip-path": `url(#${clip})` });
    const absent = (value, log) => value === null || (log && value <= 0);
    for (const { run, shape, curve, at: where } of curves) {
      const xs = where.map((x) => absent(x, state.log) ? null : X(x));
      const pixels = (values) => values.map((y) => absent(y, panel.log) ? null : Y(y));
      if (curve.low) {
        const lows = pixels(curve.low), highs = pixels(curve.high);
        const at = xs.map((x, i) => i).filter((i) => xs[i] !== null && lows[i] !== null && highs[i] !== null);
        const there = at.map((i) => `${xs[i].toFixed(1)} ${highs[i].toFixed(1)}`);
        const back = at.reverse().map((i) => `${xs[i].toFixed(1)} ${lows[i].toFixed(1)}`);
        if (at.length) make(inside, "path", { class: "area", fill: colour(run), d: `M${there.concat(back).join("L")}Z` });
      } else {
        const ys = pixels(curve.y);
        make(inside, "path", { class: `line ${shape}`, stroke: colour(run), d: path(xs, ys) });
        const points = xs.filter((x, i) => x !== null && ys[i] !== null);
        if (points.length === 1) make(inside, "circle", { cx: points[0], cy: ys[xs.indexOf(points[0])], r: 3, fill: colour(run) });
      }
    }
    pointer(figure, svg, curves, axis, X, width, left, right, top, bottom);
  }

  function marks(svg, panel, X, low, high, left, right, top, bottom) {
    const within = (x) => x >= low && x <= high && (!state.log || x > 0);
    const labels = [];
    data.runs.forEach((run, number) => {
      if (state.hidden.has(number)) return;
      const lines = [];
      run.growths.forEach((growth, i) => {
        if (!within(growth[state.x])) return;
        const x = X(growth[state.x]);
        lines.push(`M${x.toFixed(1)} ${top}V${bottom}`);
        labels.push({ x, number, short: `${i + 1}`, full: `${i + 1}: ${growth.text}` });
      });
      make(svg, "path", { class: "growth", stroke: colour(number), d: lines.join("") });
      for (const fault of run.faults) {
        if (!within(fault[state.x])) continue;
        const x = X(fault[state.x]);
        const mark = make(svg, "path", { class: "fault", d: `M${x.toFixed(1)} ${bottom - 8}l5 8h-10z` });
        make(mark, "title", {}, fault.text);
      }
    });
    // Names where there is room, then numbers, then nothing.
    labels.sort((a, b) => a.x - b.x);
    let free = left - 4;
    labels.forEach((label, i) => {
      const next = i + 1 < labels.length ? labels[i + 1].x : right;
      const fits = panel.key === "loss" && 6.6 * label.full.length < next - label.x;
      const text = fits ? label.full : label.short;
      if (label.x - 3 < free) return;
      make(svg, "text", { x: label.x - 3, y: top - 6, style: `fill: ${colour(label.number)}` }, text);
      free = label.x + 7 * text.length + 4;
    });
  }

  function pointer(figure, svg, curves, axis, X, width, left, right, top, bottom) {
    const cross = make(svg, "line", { class: "cross", y1: top, y2: bottom, visibility: "hidden" });
    const leave = () => {
      cross.setAttribute("visibility", "hidden");
      figure.querySelectorAll(".tip").forEach((tip) => tip.remove());
    };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const bounds = svg.getBoundingClientRect(), at = (event.clientX - bounds.left) * width / bounds.width;
      leave();
      if (at < left || at > right) return;
      const tip = document.createElement("div");
      tip.className = "tip";
      let where = null;
      for (const { run, label, curve, at: places } of curves) {
        let best = -1, distance = Infinity;
        places.forEach((x, i) => {
          if (x === null || state.log && x <= 0) return;
          if (Math.abs(X(x) - at) < distance) { distance = Math.abs(X(x) - at); best = i; }
        });
        if (best < 0) continue;
        where = where === null ? places[best] : where;
        const value = curve.low ? [curve.low[best], curve.high[best]] : [curve.y[best]];
        const row = document.createElement("div"), swatch = document.createElement("span");
        swatch.className = "swatch";
        swatch.dataset.run = run % 6;
        const name = data.runs.length > 1 ? `${data.runs[run].name}, ` : "";
        row.append(swatch, `${name}${label}: ${value.map((v) => v === null ? "–" : short(v)).join(" to ")}`);
        tip.append(row);
      }
      if (where === null) return;
      const head = document.createElement("b");
      head.textContent = `${axis.text(where * axis.scale)} ${axis.label.replace(/.*\((.*)\)/, "$1")}`;
      tip.prepend(head);
      cross.setAttribute("x1", X(where));
      cross.setAttribute("x2", X(where));
      cross.setAttribute("visibility", "visible");
      figure.append(tip);
      const space = figure.clientWidth - tip.offsetWidth - 8;
      tip.style.left = `${Math.max(4, Math.min(space, event.clientX - figure.getBoundingClientRect().left + 14))}px`;
      tip.style.top = `${svg.parentNode.offsetTop + top}px`;
    });
  }

  function show() {
    document.querySelectorAll("figure.panel").forEach(draw);
    document.querySelectorAll("button[data-x]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.x === state.x));
    document.getElementById("log").setAttribute("aria-pressed", state.log);
    document.querySelectorAll("button[data-toggle]").forEach((b) => b.setAttribute("aria-pressed", !state.hidden.has(+b.dataset.toggle)));
    document.documentElement.dataset.shown = `${state.x}${state.log ? " log" : ""}`;
  }

  // #x=flops&log=1&hide=0,2: a view that can be linked to.
  function read() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    state.x = AXES.includes(wanted.get("x")) ? wanted.get("x") : "tokens";
    state.log = wanted.get("log") === "1";
    state.hidden = new Set((wanted.get("hide") || "").split(",").filter(Boolean).map(Number));
    show();
  }

  function write() {
    const hash = new URLSearchParams({ x: state.x });
    if (state.log) hash.set("log", "1");
    if (state.hidden.size) hash.set("hide", [...state.hidden].join(","));
    location.hash = hash;
  }

  document.querySelectorAll("button[data-x]").forEach((b) => b.addEventListener("click", () => { state.x = b.dataset.x; write(); }));
  document.getElementById("log").addEventListener("click", () => { state.log = !state.log; write(); });
  document.querySelectorAll("button[data-toggle]").forEach((b) => b.addEventListener("click", () => {
    const run = +b.dataset.toggle;
    if (!state.hidden.delete(run)) state.hidden.add(run);
    write();
  }));
  addEventListener("hashchange", read);
  let drawn = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== drawn) { drawn = innerWidth; show(); } });
  read();
})();
