/* The address is the state: controls write it, views read it, Back undoes it. */
(function () {
  "use strict";
  const no = () => window.dash_clientside.no_update;
  const RESETS = { label: ["page", "token"], sequence: ["page", "token"], layer: ["expert", "piece", "pins"] };
  const wasOpen = {};

  /* What is safe behind the first equals sign stays as it was typed. */
  const PLAIN = { "%3D": "=", "%2C": ",", "%3B": ";", "%3A": ":", "%2F": "/" };
  const readable = (query) => query.replace(/%(3D|2C|3B|3A|2F)/g, (code) => PLAIN[code]);

  function go(pathname, params, replace) {
    const query = readable(params.toString());
    const href = pathname + (query ? "?" + query : "");
    if (href === window.location.pathname + window.location.search) return;
    window.history[replace ? "replaceState" : "pushState"]({}, "", href);
    if (!replace) window.dispatchEvent(new PopStateEvent("popstate"));
  }

  function written(value) {
    if (Array.isArray(value)) return value.join(".");
    return value === null || value === undefined ? "" : String(value);
  }

  /* Change parameters of the address; an empty value removes one. */
  function change(changes) {
    const params = new URLSearchParams(window.location.search);
    for (const [name, value] of Object.entries(changes)) {
      if (written(value) === "") params.delete(name); else params.set(name, written(value));
    }
    go(window.location.pathname, params);
  }

  function shaped(text, like) {
    if (Array.isArray(like)) return text ? text.split(".") : [];
    return typeof like === "number" ? Number(text) : text;
  }

  /* Another run: the page stays as it is set, what was selected in the old run goes. */
  const OF_A_RUN = ["layer", "expert", "head", "token", "sae", "feature", "label", "sequence", "piece", "pins", "page", "q", "other"];
  function pickRun(run) {
    const kept = [...new URLSearchParams(window.location.search)].filter(([name]) => name !== "run" && !OF_A_RUN.includes(name));
    go(window.location.pathname, new URLSearchParams([["run", run], ...kept]));
  }

  window.moescope = Object.assign(window.moescope || {}, {
    change,
    pickRun,
    open(href) { const url = new URL(href, window.location.href); go(url.pathname, url.searchParams); },
  });

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    moescope: {
      frame_key(pathname, search, key, active) {
        const run = new URLSearchParams(search || "").get("run") || "";
        const current = active ? active.run : "";
        if (key && key.path === pathname && (key.run === run || (key.run === "" && run === current))) return no();
        return { path: pathname, run };
      },
      /* Write the run that is shown into the address, so that a copied link keeps showing it. */
      settle(active) {
        if (!active) return no();
        document.title = active.title;
        const params = new URLSearchParams(window.location.search);
        if (active.run && !params.get("run")) {
          const all = new URLSearchParams([["run", active.run], ...params]);
          go(window.location.pathname, all, true);
        }
        return no();
      },
      pick_run(run, active) {
        if (run && active && run !== active.run) pickRun(run);
        return no();
      },
      forget_failure() { return null; },
      /* The part of the address that one view depends on; the view is left alone while that part stays the same. */
      slice(search, wanted, current) {
        const params = new URLSearchParams(search || "");
        const kept = new URLSearchParams();
        for (const name of wanted) if (params.get(name)) kept.set(name, params.get(name));
        const text = "?" + kept.toString();
        return text === current ? no() : text;
      },
      /* Address → controls. */
      fill(search, ids, every) {
        const defaults = Object.assign({}, ...every);
        const params = new URLSearchParams(search || "");
        return ids.map(({ url }) => (params.has(url) ? shaped(params.get(url), defaults[url]) : defaults[url]));
      },
      /* Controls → address. */
      control(values, ids, every) {
        const defaults = Object.assign({}, ...every);
        const params = new URLSearchParams(window.location.search);
        ids.forEach(({ url }, i) => {
          const text = written(values[i]);
          const wanted = text === written(defaults[url]) ? "" : text;
          if (wanted === (params.get(url) || "") || text === (params.get(url) || "")) return;
          if (wanted === "") params.delete(url); else params.set(url, wanted);
          (RESETS[url] || []).forEach((name) => params.delete(name));
          /* The parameters of another analysis mean something else. */
          if (url === "analysis") [...params.keys()].filter((name) => name.startsWith("p_")).forEach((name) => params.delete(name));
        });
        go(window.location.pathname, params);
        return no();
      },
      go_to(href) { if (href) window.moescope.open(href); return no(); },
      /* Closing a side panel takes its subject out of the address. */
      closed(opened, names) {
        const subject = names.join();
        if (opened) wasOpen[subject] = true;
        else if (wasOpen[subject]) {
          wasOpen[subject] = false;
          change(Object.fromEntries(names.map((name) => [name, ""])));
        }
        return no();
      },
      row_to_expert(cell) {
        if (cell && cell.rowId) { const [layer, expert] = cell.rowId.split(":"); change({ layer, expert }); }
        return no();
      },
    },
  });

  /* Cells of tables that lead somewhere. */
  const components = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});
  components.MoescopeLink = function (props) {
    const href = props.data && props.data[props.colDef.field + "_href"];
    const text = props.valueFormatted || (props.value === null || props.value === undefined ? "—" : String(props.value));
    if (!href) return React.createElement("span", { className: "foreign" }, text);
    const follow = (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      window.moescope.open(href);
    };
    return React.createElement("a", { href, className: "cell-link foreign", onClick: follow }, text);
  };

  /* AG Grid follows the colour scheme of the page. */
  const root = document.documentElement;
  const follow = () => root.setAttribute("data-ag-theme-mode", root.getAttribute("data-mantine-color-scheme") || "light");
  new MutationObserver(follow).observe(root, { attributes: true, attributeFilter: ["data-mantine-color-scheme"] });
  follow();
})();
