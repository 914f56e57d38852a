/* The atlas of experts: a crosshair with a line to read the cell from, arrow keys, and what the card's buttons do. */
(function () {
  "use strict";
  const no = () => window.dash_clientside.no_update;
  const HINT = "Point at a cell, or focus the map: arrow keys move, Enter opens the card.";
  let cursor = null;
  let pointed = null; // the cell under the pointer; Plotly tells of it once, and not again after the map was drawn anew
  let wasOpen = false;

  const graph = () => document.querySelector("#atlas .js-plotly-plot");
  const line = () => document.getElementById("atlas-line");

  /* The map of a drawn atlas: names of rows and columns, values and what else is known of each cell. */
  function map(gd) {
    const cells = gd && gd._fullData && gd._fullData[0];
    if (!cells || cells.type !== "heatmap" || !gd.calcdata) return null;
    const z = gd.calcdata[0][0].z;
    return { cells, z, rows: cells.y, columns: cells.x, xaxis: gd._fullLayout.xaxis, yaxis: gd._fullLayout.yaxis };
  }

  const expertAt = (at, i, j) => ((at.cells.text && at.cells.text[i] ? at.cells.text[i][j] : at.columns[j]) || "");

  function written(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "—";
    const size = Math.abs(value);
    const text = size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
    return text.replace("-", "−");
  }

  function told(at, i, j) {
    const meta = at.cells.meta || {};
    const [detail, n] = (at.cells.customdata && at.cells.customdata[i] && at.cells.customdata[i][j]) || ["", null];
    const expert = expertAt(at, i, j);
    if (!expert) return `${at.rows[i]}: no such expert`;
    const value = at.z[i][j];
    const missing = value === null || value === undefined || Number.isNaN(value);
    const parts = [`${at.rows[i]}·${expert}`, missing ? "no value" : `${written(value)} ${meta.unit || ""}`];
    if (detail) parts.push(plain(detail));
    if (n !== null && n !== undefined) parts.push(`n = ${n.toLocaleString("en")} ${meta.counted || ""}`);
    return parts.join(" · ");
  }

  /* Hover text is written for Plotly, which reads three signs as markup. */
  const plain = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");

  function box(mark, left, top, width, height) {
    if (!mark) return;
    Object.assign(mark.style, { left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px`, display: "block" });
  }

  function place(i, j, kinds) {
    const gd = graph();
    const at = map(gd);
    const home = document.getElementById("atlas");
    if (!at || !home) return;
    const outer = home.getBoundingClientRect();
    const inner = gd.getBoundingClientRect();
    const x0 = inner.left - outer.left + at.xaxis._offset;
    const y0 = inner.top - outer.top + at.yaxis._offset;
    const within = (value, most) => Math.max(0, Math.min(most, value));
    const span = (axis, k) => {
      const ends = [axis.l2p(k - 0.5), axis.l2p(k + 0.5)].map((p) => within(p, axis._length));
      return [Math.min(...ends), Math.abs(ends[1] - ends[0])];
    };
    const [left, width] = span(at.xaxis, j);
    const [top, height] = span(at.yaxis, i);
    if (width < 0.5 || height < 0.5) return hide(kinds);
    for (const kind of kinds) {
      const mark = home.querySelector(`.atlas-${kind}`);
      if (kind === "row") box(mark, x0, y0 + top, at.xaxis._length, height);
      else if (kind === "column") box(mark, x0 + left, y0, width, at.yaxis._length);
      else box(mark, x0 + left, y0 + top, width, height);
    }
  }

  function hide(kinds) {
    for (const kind of kinds) {
      const mark = document.querySelector(`#atlas .atlas-${kind}`);
      if (mark) mark.style.display = "none";
    }
  }

  function show(i, j) {
    const at = map(graph());
    if (!at || !line()) return;
    line().textContent = told(at, i, j);
    place(i, j, ["row", "column", "cell"]);
  }

  function rest() {
    const cell = pointed || cursor;
    if (cell) return show(cell.i, cell.j);
    if (line()) line().textContent = HINT;
    hide(["row", "column", "cell"]);
  }

  function layerOf(name) {
    const found = /^L(\d+)(?: (\S+))?$/.exec(name);
    return found && (found[2] && found[2] !== "mlp" ? `${found[1]}.${found[2]}` : found[1]);
  }

  /* Row and column of the expert in the address. */
  function chosen(at) {
    const params = new URLSearchParams(window.location.search);
    const layer = params.get("layer");
    const expert = params.get("expert");
    if (layer === null || expert === null) return null;
    const i = at.rows.findIndex((name) => layerOf(name) === layer || layerOf(name)?.split(".")[0] === layer);
    if (i < 0) return null;
    const j = at.columns.findIndex((_name, k) => expertAt(at, i, k) === `E${expert}`);
    return j < 0 ? null : { i, j };
  }

  function select() {
    const at = map(graph());
    if (!at) return;
    const found = chosen(at);
    if (found) place(found.i, found.j, ["selected"]); else hide(["selected"]);
  }

  /* One layer alone fills the height; all of them again when it is let go. */
  function onlyLayer() {
    const gd = graph();
    const at = map(gd);
    if (!at) return;
    const only = new URLSearchParams(window.location.search).get("only");
    if ((gd._only || null) === (only || null)) return;
    gd._only = only;
    const i = at.rows.findIndex((name) => only && layerOf(name) === only);
    const range = i < 0 ? [at.rows.length - 0.5, -0.5] : [i + 0.5, i - 0.5];
    window.Plotly.relayout(gd, { "yaxis.range": range });
  }

  function cellOf(event) {
    const point = event.points && event.points.find((p) => p.curveNumber === 0);
    if (!point || !Array.isArray(point.pointNumber)) return null;
    return { i: point.pointNumber[0], j: point.pointNumber[1] };
  }

  function attach(gd) {
    gd._atlas = true;
    gd.on("plotly_hover", (event) => {
      pointed = cellOf(event);
      if (pointed) return show(pointed.i, pointed.j);
      const point = event.points[0];
      const horizontal = point.data && point.data.orientation === "h";
      const [name, value] = horizontal ? [point.y, point.x] : [point.x, point.y];
      if (line()) line().textContent = `${name}: ${written(value)}, ${point.data.name}`;
    });
    gd.on("plotly_unhover", () => { pointed = null; rest(); });
    gd.on("plotly_afterplot", () => { select(); rest(); });
    gd.on("plotly_relayout", () => { select(); rest(); });
    gd._only = null;
    onlyLayer();
    select();
  }

  /* A figure may be drawn, or drawn anew, at any time. */
  let waiting = false;
  function look() {
    waiting = false;
    const gd = graph();
    if (!gd) { cursor = pointed = null; return; }
    if (!gd._atlas && gd.on && map(gd)) attach(gd);
    else if (!gd._atlas) again(120);
  }
  function again(milliseconds) {
    if (waiting) return;
    waiting = true;
    window.setTimeout(look, milliseconds);
  }
  new MutationObserver(() => { if (document.getElementById("atlas")) again(30); })
    .observe(document.documentElement, { childList: true, subtree: true });
  window.addEventListener("resize", () => window.setTimeout(() => { select(); rest(); }, 250));

  const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  document.addEventListener("keydown", (event) => {
    const home = document.getElementById("atlas");
    if (!home || event.target !== home || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = map(graph());
    if (!at) return;
    if (event.key === "Escape" && cursor) { cursor = null; rest(); return; }
    if (event.key === "Enter" && cursor) {
      const expert = /^E(\d+)$/.exec(expertAt(at, cursor.i, cursor.j));
      if (expert) window.moescope.change({ layer: layerOf(at.rows[cursor.i]), expert: expert[1] });
      event.preventDefault();
      return;
    }
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    const from = cursor || chosen(at);
    const within = (value, most) => Math.max(0, Math.min(most - 1, value));
    cursor = from
      ? { i: within(from.i + step[0], at.rows.length), j: within(from.j + step[1], at.columns.length) }
      : { i: 0, j: 0 };
    show(cursor.i, cursor.j);
  });
  document.addEventListener("focusout", (event) => {
    if (event.target && event.target.id === "atlas") { cursor = null; rest(); }
  });

  const pinned = (search) => (new URLSearchParams(search || "").get("pinned") || "").split(",").filter(Boolean);

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    experts: {
      follow() { window.setTimeout(() => { onlyLayer(); select(); }, 0); return no(); },
      label_shown(measure) { return measure === "label_lift" ? {} : { display: "none" }; },
      /* Closing the panel takes the expert out of the address; making room for the full card does not. */
      closed(opened) {
        const full = new URLSearchParams(window.location.search).get("view") === "card";
        if (opened === false && wasOpen && !full) window.moescope.change({ layer: "", expert: "" });
        wasOpen = opened === true;
        return no();
      },
      /* The lab with one edit more. */
      lab_link(search, edit) {
        const params = new URLSearchParams(search || "");
        const kept = new URLSearchParams();
        for (const name of ["run", "layer", "expert"]) if (params.get(name)) kept.set(name, params.get(name));
        const edits = (params.get("edits") || "").split(";").map((text) => text.trim()).filter(Boolean);
        if (edit && !edits.includes(edit)) edits.push(edit);
        kept.set("edits", edits.join(";"));
        return "/lab?" + kept.toString();
      },
      pin(clicks, name) {
        if (!clicks || !name) return no();
        const now = pinned(window.location.search);
        const next = now.includes(name) ? now.filter((one) => one !== name) : [...now, name].slice(-8);
        window.moescope.change({ pinned: next.join(",") });
        return no();
      },
      pin_words(search, name) { return pinned(search).includes(name) ? "Unpin" : "Pin to compare"; },
      unpin(clicks) { if (clicks) window.moescope.change({ pinned: "", pins: "" }); return no(); },
    },
  });
})();
