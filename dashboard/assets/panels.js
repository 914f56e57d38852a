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
      clicked(click, spec) {
        const point = click && click.points && click.points[0];
        if (!point || !spec || !spec.click) return no();
        const changes = chosen(point, spec.click);
        if (Object.values(changes).every((value) => value !== null && value !== undefined)) window.moescope.change(changes);
        return no();
      },
    },
  });
})();
