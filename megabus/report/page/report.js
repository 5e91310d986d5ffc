"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const panels = new Map(data.panels.map((panel) => [panel.key, panel]));
  const AXES = ["tokens", "flops", "time"];
  const NEAR = 5; // to a growth, a phase or a fault, that it is told
  const state = { x: "tokens", log: false, hidden: new Set() };
  const narrow = matchMedia("(max-width: 700px)");
  let drawings = null; // by panel and view; of the loss also one for narrow windows

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  function short(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    for (const [scale, suffix] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
      if (size >= 0.9995 * scale && size < 1e15) return `${+(value / scale).toPrecision(4)}${suffix}`;
    }
    return size < 1e-3 || size >= 1e15 ? value.toExponential(2).replace(/\.?0+e\+?/, "e") : `${+value.toPrecision(4)}`;
  }

  function show() {
    const view = `${state.x}${state.log ? " log" : ""}`;
    document.querySelectorAll("figure.panel").forEach((figure) => {
      const box = figure.querySelector(".chart"), key = figure.dataset.panel;
      box.innerHTML = (narrow.matches && drawings[`${key} narrow`] || drawings[key])[view];
      box.querySelectorAll("[data-run]").forEach((g) => { if (state.hidden.has(+g.dataset.run)) g.style.display = "none"; });
      pointer(figure, box.querySelector("svg"));
    });
    document.querySelectorAll("button[data-x]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.x === state.x));
    document.getElementById("log").setAttribute("aria-pressed", state.log);
    document.querySelectorAll("button[data-toggle]").forEach((b) => b.setAttribute("aria-pressed", !state.hidden.has(+b.dataset.toggle)));
    document.documentElement.dataset.shown = view;
  }

  // Where a place of the horizontal axis lies in the drawing, as the drawing tells it.
  function places(svg) {
    const [left, right, top, bottom] = svg.dataset.box.split(" ").map(Number);
    const f = state.log ? Math.log10 : (v) => v, [low, high] = svg.dataset.span.split(" ").map((v) => f(+v));
    return { left, right, top, bottom, X: (place) => left + (f(place) - low) / (high - low) * (right - left) };
  }

  function line(tip, run, text) {
    const row = document.createElement("div"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.dataset.run = run % 6;
    row.append(swatch, `${data.runs.length > 1 ? `${data.runs[run].name}, ` : ""}${text}`);
    tip.append(row);
  }

  function pointer(figure, svg) {
    const panel = panels.get(figure.dataset.panel), { left, right, top, bottom, X } = places(svg);
    const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [name, value] of [["class", "cross"], ["y1", top], ["y2", bottom], ["visibility", "hidden"]]) cross.setAttribute(name, value);
    svg.append(cross);
    const absent = (place) => place === null || state.log && place <= 0;
    const leave = () => {
      cross.setAttribute("visibility", "hidden");
      figure.querySelectorAll(".tip").forEach((tip) => tip.remove());
    };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const bounds = svg.getBoundingClientRect(), at = (event.clientX - bounds.left) * svg.viewBox.baseVal.width / bounds.width;
      leave();
      if (at < left || at > right) return;
      const tip = document.createElement("div");
      tip.className = "tip";
      let where = null;
      data.runs.forEach((run, number) => {
        if (state.hidden.has(number)) return;
        run.curves[panel.key].forEach((curve, i) => {
          if (!curve) return;
          const { event: kind, label } = panel.lines[i], along = run.places[kind][state.x];
          let best = -1, distance = Infinity;
          along.forEach((place, j) => {
            if (!absent(place) && Math.abs(X(place) - at) < distance) { distance = Math.abs(X(place) - at); best = j; }
          });
          if (best < 0) return;
          where = where === null ? along[best] : where;
          const values = curve.low ? [curve.low[best], curve.high[best]] : [curve.y[best]];
          line(tip, number, `${label}: ${values.map((v) => v === null ? "–" : short(v)).join(" to ")}`);
        });
        const near = (mark) => !absent(mark[state.x]) && Math.abs(X(mark[state.x]) - at) < NEAR;
        run.growths.filter(near).forEach((growth) => line(tip, number, `growth ${growth.name}: ${growth.text}`));
        run.phases.filter(near).forEach((phase) => line(tip, number, `phase ${phase.name}: ${phase.text}`));
        run.faults.filter(near).forEach((fault) => line(tip, number, fault.text));
      });
      if (where === null) return;
      const head = document.createElement("b");
      head.textContent = `${short(where * svg.dataset.scale)} ${svg.dataset.unit}`;
      tip.prepend(head);
      for (const end of ["x1", "x2"]) cross.setAttribute(end, X(where));
      cross.setAttribute("visibility", "visible");
      figure.append(tip);
      const space = figure.clientWidth - tip.offsetWidth - 8;
      tip.style.left = `${Math.max(4, Math.min(space, event.clientX - figure.getBoundingClientRect().left + 14))}px`;
      tip.style.top = `${svg.parentNode.offsetTop + top}px`;
    });
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
  unpack(data.drawings).then((found) => {
    drawings = found;
    addEventListener("hashchange", read);
    narrow.addEventListener("change", show);
    read();
  });
})();
