/* Panels: asked for when they come into view, and again when the address changes what they read. */
(function () {
  "use strict";
  const no = () => window.dash_clientside.no_update;
  const seen = new Set();
  let count = 0;

  const watcher = new IntersectionObserver(
    (entries) => {
      let news = false;
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        watcher.unobserve(target);
        seen.add(target.dataset.panel);
        news = true;
      }
      if (news) window.dash_clientside.set_props("panels-seen", { data: (count += 1) });
    },
    { rootMargin: "300px" },
  );

  /* New panels are watched; those that left the page are forgotten. */
  const watched = new WeakSet();
  new MutationObserver(() => {
    const here = document.querySelectorAll("[data-panel]");
    const names = new Set([...here].map((panel) => panel.dataset.panel));
    for (const name of seen) if (!names.has(name)) seen.delete(name);
    for (const panel of here) if (!watched.has(panel)) { watched.add(panel); watcher.observe(panel); }
  }).observe(document.documentElement, { childList: true, subtree: true });

  function given(spec, params) {
    const values = { ...spec.given };
    for (const [name, parameter] of Object.entries(spec.wanted)) if (params.get(name)) values[parameter] = params.get(name);
    return values;
  }

  /* What a mark is called, from its axes and hover text: L3, E7, H2. */
  function named(point, letter) {
    const texts = [point.x, point.y, point.label, point.text, point.hovertext, point.data && point.data.name];
    for (const text of texts) {
      const found = typeof text === "string" && new RegExp("(?:^|[^A-Za-z])" + letter + "(\\d+)(?![\\d])").exec(text);
      if (found) return found[1];
    }
    return null;
  }

  function layerOf(point) {
    const block = /(?:^|[^A-Za-z])L(\d+) ([a-z]+(?:\.\d+)?)(?![a-z])/.exec([point.y, point.x].join(" · "));
    return block && block[2] !== "mlp" ? block[1] + "." + block[2] : named(point, "L");
  }

  function chosen(point, click) {
    const custom = point.customdata;
    if (custom && typeof custom === "object" && !Array.isArray(custom)) return custom;
    if (click === "expert") return { layer: layerOf(point), expert: named(point, "E") };
    if (click === "head") return { layer: named(point, "L"), head: named(point, "H") };
    if (click === "layer") return { layer: layerOf(point) };
    if (click === "feature") return { feature: named(point, "F") };
    return { [click]: point.customdata ?? point.x };
  }

  /* Plotly reads its titles as a kind of HTML; ours come escaped from the server. */
  function picture(graph, format) {
    const dark = document.documentElement.getAttribute("data-mantine-color-scheme") === "dark";
    const { meta, ...shown } = JSON.parse(JSON.stringify(graph.layout));
    const more = meta && meta.title ? meta.top - ((shown.margin && shown.margin.t) || 0) : 0;
    const ground = dark ? "#1f2023" : "#ffffff";
    const layout = { ...shown, paper_bgcolor: ground, plot_bgcolor: ground, font: { ...shown.font, color: dark ? "#e9ecef" : "#1a1b1e" } };
    if (meta && meta.title) Object.assign(layout, { title: meta.title, margin: { ...shown.margin, t: meta.top } });
    if (dark) for (const [name, axis] of Object.entries(layout)) if (/^[xy]axis\d*$/.test(name)) Object.assign(axis, { gridcolor: "#3b3d42", zerolinecolor: "#3b3d42" });
    const size = graph._fullLayout;
    /* Wide enough for the lines of the title, and higher by the room that it takes. */
    const width = Math.max(size.width, 840);
    layout.autosize = false;
    return { figure: { data: graph.data, layout }, options: { format, width, height: size.height + more, scale: format === "png" ? 2 : 1 } };
  }

  async function saveImage(panel, format) {
    const graph = panel.querySelector(".js-plotly-plot");
    if (!graph || !window.Plotly) return;
    const { figure, options } = picture(graph, format);
    const url = await window.Plotly.toImage({ ...figure, config: { plotlyServerURL: "" } }, options);
    const anchor = document.createElement("a");
    anchor.href = url;
    anchor.download = panel.dataset.analysis + "-" + panel.dataset.runs.replace(/[^\w.+=-]+/g, "-") + "." + format;
    anchor.click();
  }

  const panelOf = (identity) => document.querySelector('[data-panel="' + CSS.escape(identity) + '"]');

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    panels: {
      ask(search, _count, specs, asks) {
        const params = new URLSearchParams(search || "");
        const ids = (window.dash_clientside.callback_context.inputs_list[2] || []).map(({ id }) => id.panel);
        return specs.map((spec, i) => {
          if (!spec || !(spec.eager || seen.has(ids[i]))) return no();
          const ask = { analysis: spec.analysis, runs: spec.runs, given: given(spec, params) };
          return JSON.stringify(ask) === JSON.stringify(asks[i]) ? no() : ask;
        });
      },
      /* One view is open at a time; its own button closes it. */
      view(...given) {
        const trigger = window.dash_clientside.callback_context.triggered_id;
        if (!trigger || !given.slice(0, -1).some(Boolean)) return no();
        const view = given[given.length - 1] === trigger.part ? null : trigger.part;
        for (const button of panelOf(trigger.panel).querySelectorAll("[data-view]"))
          button.setAttribute("aria-expanded", String(button.dataset.view === view));
        return view;
      },
      image(...given) {
        const trigger = window.dash_clientside.callback_context.triggered_id;
        if (trigger && given.some(Boolean)) saveImage(panelOf(trigger.panel), trigger.part);
        return no();
      },
      clicked(click, spec) {
        const point = click && click.points && click.points[0];
        if (!point || !spec || !spec.click) return no();
        const changes = chosen(point, spec.click);
        if (Object.values(changes).every((value) => value !== null && value !== undefined)) window.moescope.change(changes);
        return no();
      },
    },
  });

  /* Numbers in the tables of results: counts whole and grouped, others to four digits, what is missing as a dash. */
  const functions = (window.dashAgGridFunctions = window.dashAgGridFunctions || {});
  functions.MoescopeNumber = function (value) {
    if (value === null || value === undefined) return "—";
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value)) return value.toLocaleString("en-US").replace("-", "−");
    const size = Math.abs(value);
    const text = size >= 1e6 || size < 1e-4 ? value.toExponential(3) : Number(value.toPrecision(4)).toLocaleString("en-US", { maximumFractionDigits: 8 });
    return text.replace(/-/g, "−");
  };
})();
