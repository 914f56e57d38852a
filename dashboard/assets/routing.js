/* The routing page: tabs that keep what was set on them, sliders that move on a kept answer, ways that lead to their tokens. */
(function () {
  "use strict";
  const no = () => window.dash_clientside.no_update;
  const SELECTION = ["run", "layer", "expert", "head", "token", "sae", "feature", "edits"];
  const SETTLED = 350;
  const left = new Map();

  /* Positions that are written as what they stand for. */
  window.dashMantineFunctions = window.dashMantineFunctions || {};
  window.dashMantineFunctions.powerOfTwo = (value) => 2 ** value;
  window.dashMantineFunctions.slideLabel = (value) => String(Math.round(value * 100) / 100);

  /* --- tabs --- */
  function here() { return new URLSearchParams(window.location.search).get("tab") || ""; }

  function go(tab) {
    const params = new URLSearchParams(window.location.search);
    left.set(here(), window.location.search);
    const again = left.get(tab.dataset.tab === firstTab() ? "" : tab.dataset.tab);
    const next = new URLSearchParams(again || "");
    for (const name of SELECTION) if (params.get(name)) next.set(name, params.get(name)); else next.delete(name);
    if (tab.dataset.tab === firstTab()) next.delete("tab"); else next.set("tab", tab.dataset.tab);
    window.moescope.open(window.location.pathname + "?" + next.toString());
  }

  function firstTab() { return document.querySelector("[data-tab]")?.dataset.tab; }

  document.addEventListener("click", (event) => {
    const tab = event.target.closest && event.target.closest("a[data-tab]");
    if (!tab || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    go(tab);
  });

  document.addEventListener("keydown", (event) => {
    const tab = event.target.closest && event.target.closest("a[data-tab]");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!tab || !(step || event.key === "Home" || event.key === "End")) return;
    const tabs = [...document.querySelectorAll("a[data-tab]")];
    const at = tabs.indexOf(tab);
    const next = event.key === "Home" ? 0 : event.key === "End" ? tabs.length - 1 : (at + step + tabs.length) % tabs.length;
    event.preventDefault();
    tabs[next].focus();
  });

  function current(search) {
    const name = new URLSearchParams(search || "").get("tab") || firstTab();
    for (const tab of document.querySelectorAll("a[data-tab]")) {
      if (tab.dataset.tab === name) tab.setAttribute("aria-current", "page"); else tab.removeAttribute("aria-current");
    }
  }

  /* --- the marker in a simulator's figure --- */
  const wanted = new Map();
  const NAME = "position of the slider";

  function mark(panel, places) {
    wanted.set(panel, places || []);
    draw(panel);
  }

  function draw(panel) {
    const graph = document.querySelector('[data-panel="' + panel + '"] .js-plotly-plot');
    if (!graph || !graph._fullLayout || !window.Plotly) return;
    if (!graph.moescopeMarked) {
      graph.moescopeMarked = true;
      graph.on("plotly_afterplot", () => { if (!marked(graph, panel)) draw(panel); });
    }
    if (marked(graph, panel)) return;
    const others = (graph.layout.shapes || []).filter((shape) => shape.name !== NAME);
    const mine = (wanted.get(panel) || []).map(([axis, x]) => ({
      name: NAME, type: "line", xref: axis, yref: axis.replace("x", "y") + " domain", x0: x, x1: x, y0: 0, y1: 1,
      line: { color: "#868e96", width: 2 },
    }));
    window.Plotly.relayout(graph, { shapes: [...others, ...mine] });
  }

  function marked(graph, panel) {
    const shapes = (graph.layout.shapes || []).filter((shape) => shape.name === NAME);
    const places = wanted.get(panel) || [];
    return shapes.length === places.length && places.every(([axis, x], i) => shapes[i].xref === axis && shapes[i].x0 === x);
  }

  /* Figures come after their cards. */
  let waiting = false;
  new MutationObserver(() => {
    if (waiting || !wanted.size) return;
    waiting = true;
    window.setTimeout(() => { waiting = false; for (const panel of wanted.keys()) draw(panel); }, 120);
  }).observe(document.documentElement, { childList: true, subtree: true });

  /* --- cards --- */
  const html = (type, props) => ({ type, namespace: "dash_html_components", props });

  function card({ label, value, detail, href }) {
    const shown = html("Div", { className: "card-value", children: value });
    const number = href
      ? { type: "Anchor", namespace: "dash_mantine_components", props: { href, className: "card-link", children: shown } }
      : shown;
    return html("Div", {
      className: "card sim-card",
      children: [
        html("Div", { className: "card-label", children: label }),
        number,
        html("Div", { className: "card-detail", children: detail || "" }),
      ],
    });
  }

  /* Where the slider stands, as the address writes it; a list of steps is written by its words. */
  const timers = new Map();
  const tidy = (value) => Math.round(value * 100) / 100;

  function written(spec, value) {
    if (spec.steps) return String(spec.steps[value]);
    return String(spec.power ? 2 ** value : tidy(value));
  }

  function position(spec, text) {
    let value = text === null || text === "" || Number.isNaN(Number(text)) ? spec.default : Number(text);
    if (spec.steps) {
      const near = spec.steps.map((step) => Math.abs(step - value));
      return near.indexOf(Math.min(...near));
    }
    if (spec.power) value = Math.round(Math.log2(Math.max(value, 1)));
    return Math.min(Math.max(value, spec.least), spec.most);
  }

  function keep(spec, value) {
    const params = new URLSearchParams(window.location.search);
    const text = written(spec, value);
    const plain = text === String(spec.default) ? "" : text;
    if ((params.get(spec.parameter) || "") === plain) return;
    window.clearTimeout(timers.get(spec.parameter));
    timers.set(spec.parameter, window.setTimeout(() => {
      timers.delete(spec.parameter);
      if (document.querySelector("[data-simulator]")) window.moescope.change({ [spec.parameter]: plain });
    }, SETTLED));
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    routing: {
      slide(value, data, search, spec) {
        if (!spec || value === null || value === undefined) return [no(), no()];
        const moved = (window.dash_clientside.callback_context.triggered || []).some(({ prop_id }) => prop_id.includes('"part":"slide"'));
        if (moved) keep(spec, value);
        if (!data) return [no(), no()];
        if (data.problem) return [html("Div", { className: "muted foreign", children: data.problem }), ""];
        const params = new URLSearchParams(search || "");
        const [name, usual] = data.choice;
        const curves = data.at[(name && params.get(name)) || usual] || data.at[usual] || {};
        const key = spec.power ? String(2 ** value) : String(tidy(value));
        const cards = curves[key] || curves[nearest(curves, key)];
        mark(spec.panel, data.marks[key] || []);
        return [cards ? cards.map(card) : [], data.words[key] || ""];
      },
      /* Address → slider, but not while the hand is on it. */
      place(search, value, spec) {
        if (!spec || timers.has(spec.parameter)) return no();
        const wish = position(spec, new URLSearchParams(search || "").get(spec.parameter));
        return wish === value ? no() : wish;
      },
      tab(search) { current(search); return no(); },
      /* A way in the diagram → its tokens. */
      way(click) {
        const point = click && click.points && click.points[0];
        const way = point && point.customdata;
        if (typeof way === "string" && way) window.moescope.change({ way });
        return no();
      },
    },
  });

  /* A cache smaller than what is prefetched is not in the answer: the smallest that is. */
  function nearest(curves, key) {
    return Object.keys(curves).sort((a, b) => Math.abs(a - key) - Math.abs(b - key))[0];
  }
})();
