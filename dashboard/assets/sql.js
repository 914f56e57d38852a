/* The SQL page: the editor, the parameters' fields, the schema, the session's queries and the files. */
(function () {
  "use strict";
  const no = () => window.dash_clientside.no_update;
  const PREFIX = "p_";
  const SESSION = "moescope-sql";
  const WHO = Math.random().toString(36).slice(2);
  const SKIPPED = /[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|"(?:[^"]|"")*"|\$\$[^]*?\$\$|--[^\n]*|\/\*[^]*?\*\//g;
  let lastShown = null;
  let begun = 0;
  let clock = null;
  let runId = "";

  const box = () => document.getElementById("sql-text");
  const params = () => new URLSearchParams(window.location.search);
  const here = () => window.location.pathname === "/sql";

  /* The names after $, outside texts and comments, once each. */
  function parameters(sql) {
    const found = (sql || "").replace(SKIPPED, " ").match(/\$[A-Za-z_][A-Za-z0-9_]*/g) || [];
    return [...new Set(found.map((name) => name.slice(1)))];
  }

  function given(query) {
    const values = {};
    for (const [name, text] of query) if (name.startsWith(PREFIX)) values[name.slice(PREFIX.length)] = text;
    return values;
  }

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

  /* A component is known a moment before its element is there. */
  function whenThere(id, act, tries = 60) {
    const place = document.getElementById(id);
    if (place) act(place);
    else if (tries) window.requestAnimationFrame(() => whenThere(id, act, tries - 1));
  }

  /* A link that stays within the page. */
  function inPage(text, href) {
    const link = element("a", text, "sql-link");
    link.href = href;
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      window.moescope.open(link.href);
    });
    return link;
  }

  /* One field for each parameter; what was typed into one stays while the query changes. */
  function fields(sql) {
    const place = document.getElementById("sql-fields");
    if (!place) return;
    const typed = { ...given(params()) };
    for (const input of place.querySelectorAll("input")) typed[input.name] = input.value;
    const names = parameters(sql);
    const shown = [...place.querySelectorAll("input")].map((input) => input.name);
    if (names.join() === shown.join()) return;
    place.replaceChildren(...names.map((name) => {
      const label = element("label", "", "sql-field");
      const input = element("input");
      input.name = name;
      input.value = typed[name] || (name === "run" ? runId : "");
      input.autocomplete = "off";
      input.spellcheck = false;
      label.append(element("span", "$" + name), input);
      return label;
    }));
  }

  function examples(place, list) {
    place.replaceChildren(...list.map(({ title, href }) => {
      const row = element("li");
      row.append(inPage(title, href));
      return row;
    }));
  }

  function refill() {
    const place = document.getElementById("sql-fields");
    const values = given(params());
    if (place) for (const input of place.querySelectorAll("input")) input.value = values[input.name] || (input.name === "run" ? runId : "");
  }

  /* The query and its parameters go into the address; the address is what is run. */
  function run() {
    const changes = { sql: box().value };
    for (const name of Object.keys(given(params()))) changes[PREFIX + name] = "";
    for (const input of document.querySelectorAll("#sql-fields input")) {
      changes[PREFIX + input.name.toLowerCase()] = input.name === "run" && input.value === runId ? "" : input.value;
    }
    if (changes.sql !== (params().get("sql") || "")) Object.assign(changes, { chart: "", x: "", y: "", z: "" });
    const before = window.location.search;
    lastShown = changes.sql;
    window.moescope.change(changes);
    if (window.location.search === before) window.dash_clientside.set_props("sql-again", { data: Date.now() });
  }

  /* As if typed, so that Ctrl-Z takes it back. */
  function insert(text) {
    const area = box();
    area.focus();
    const before = area.value.slice(0, area.selectionStart);
    const space = before && !/[\s(,.]$/.test(before) ? " " : "";
    document.execCommand("insertText", false, space + text);
  }


  const name = (text) => (/^[a-z_][a-z0-9_]*$/.test(text) ? text : '"' + text.replace(/"/g, '""') + '"');

  function nameButton(text, title) {
    const button = element("button", text, "sql-name");
    button.type = "button";
    button.title = title;
    button.addEventListener("click", () => insert(name(text)));
    return button;
  }

  function tableView(table, counts, wanted) {
    const view = element("details");
    const heading = element("summary");
    heading.append(element("span", table.name, "mono"));
    if (counts && table.name in counts) heading.append(element("span", counts[table.name].toLocaleString("en"), "sql-count"));
    const list = element("ul");
    for (const [column, type, meaning] of table.columns) {
      const row = element("li");
      row.append(nameButton(column, "Insert " + column), element("span", type, "sql-type"), element("span", meaning, "sql-meaning"));
      list.append(row);
    }
    const first = element("div", "", "sql-table");
    first.append(nameButton(table.name, "Insert " + table.name), element("span", table.meaning, "sql-meaning"));
    view.append(heading, first, list);
    view.open = wanted !== "";
    return view;
  }

  const fits = (table, wanted) => table.name.includes(wanted) || table.columns.some(([column]) => column.includes(wanted));

  function showSchema(groups, counts, wanted) {
    const place = document.getElementById("sql-tables");
    if (!place || !groups) return;
    const words = (wanted || "").trim().toLowerCase();
    const open = new Set([...place.querySelectorAll("details[open] > summary > .mono")].map((name) => name.textContent));
    const parts = [];
    for (const { title, tables } of groups) {
      const shown = tables.filter((table) => fits(table, words)).map((table) => tableView(table, counts, words));
      for (const view of shown) if (open.has(view.querySelector(".mono").textContent)) view.open = true;
      if (shown.length) parts.push(element("h3", title, "sql-group"), ...shown);
    }
    place.replaceChildren(...(parts.length ? parts : [element("p", "No table or column of that name.", "muted")]));
  }

  /* --- the session's queries --- */
  function session() {
    try { return JSON.parse(window.sessionStorage.getItem(SESSION)) || []; } catch { return []; }
  }

  function remember(entry) {
    const kept = [entry, ...session().filter((old) => old.search !== entry.search)].slice(0, 30);
    try { window.sessionStorage.setItem(SESSION, JSON.stringify(kept)); } catch { /* full, or forbidden: the list is a comfort */ }
  }

  function showSession() {
    const list = document.getElementById("sql-session");
    if (!list) return;
    const entries = session();
    list.replaceChildren(...entries.map(({ sql, search, told }) => {
      const row = element("li");
      const link = inPage(sql.replace(/\s+/g, " ").slice(0, 120), "/sql" + search);
      link.classList.add("mono");
      link.title = sql.slice(0, 1000);
      row.append(link, element("span", told, "sql-meaning"));
      return row;
    }));
    if (!entries.length) list.append(element("li", "Queries that you run appear here, until the tab is closed.", "muted"));
  }

  function tick() {
    const place = document.getElementById("sql-clock");
    if (!place) return;
    const seconds = (Date.now() - begun) / 1000;
    place.textContent = seconds < 0.5 ? "" : "running for " + seconds.toFixed(1) + " s";
  }

  function stopClock() {
    window.clearInterval(clock);
    clock = null;
    const place = document.getElementById("sql-clock");
    if (place) place.textContent = "";
  }

  document.addEventListener("input", (event) => { if (event.target.id === "sql-text") fields(event.target.value); });
  document.addEventListener("keydown", (event) => {
    if (!here() || event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    if (event.target.id === "sql-text" || (event.target.closest && event.target.closest("#sql-fields"))) {
      event.preventDefault();
      run();
    }
  });

  async function fetchFile(kind, ask) {
    const told = document.getElementById("sql-file-told");
    const page = params().get("run") || null;
    told.textContent = "writing the file …";
    try {
      const answer = await fetch("/sql/file", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ask, run: page, kind }),
      });
      if (!answer.ok) {
        told.textContent = answer.status === 400 ? (await answer.json()).problem : "the file could not be written";
        return;
      }
      const link = element("a");
      link.href = URL.createObjectURL(await answer.blob());
      link.download = "query." + kind;
      link.click();
      window.setTimeout(() => URL.revokeObjectURL(link.href), 10000);
      told.textContent = "saved as query." + kind;
    } catch {
      told.textContent = "the app does not answer: is it still running?";
    }
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    sql: {
      ask(search, again, current) {
        if (!here()) return no();
        const query = new URLSearchParams(search || "");
        const ask = { sql: query.get("sql") || "", given: given(query), who: WHO, again: again || 0, run: query.get("run") || "" };
        return JSON.stringify(ask) === JSON.stringify(current) ? no() : ask;
      },
      /* Address → editor, unless it already shows that query: what is being typed stays. */
      text(search, id, list) {
        if (!here()) return no();
        runId = id || "";
        whenThere("sql-examples", (place) => examples(place, list || []));
        const sql = new URLSearchParams(search || "").get("sql") || "";
        const fresh = box() && box().value === "";
        window.setTimeout(showSession, 0);
        if (sql === lastShown && !fresh) { window.setTimeout(refill, 0); return no(); }
        lastShown = sql;
        window.setTimeout(() => { fields(sql); refill(); }, 0);
        return sql;
      },
      run(clicks) { if (clicks) run(); return no(); },
      file(csv, parquet, ask) {
        const pressed = (window.dash_clientside.callback_context.triggered[0] || {}).prop_id || "";
        if (ask && (csv || parquet)) fetchFile(pressed.startsWith("sql-csv") ? "csv" : "parquet", ask);
        return no();
      },
      schema(groups, wanted, counts) { showSchema(groups, counts, wanted); return no(); },
      counts(counts, groups, wanted) { showSchema(groups, counts, wanted); return no(); },
      begun(ask, told) {
        const after = document.getElementById("sql-after");
        if (!ask || !ask.sql) { if (after) after.hidden = true; stopClock(); return no(); }
        if (told && same(told.ask, ask)) return no();
        begun = Date.now();
        if (!clock) clock = window.setInterval(tick, 100);
        return no();
      },
      told(told, ask) {
        const after = document.getElementById("sql-after");
        if (after) after.hidden = !told || !!told.failed;
        if (!told || !same(told.ask, ask)) return no();
        stopClock();
        const rows = told.failed ? "failed" : (told.more ? "more than " : "") + told.rows.toLocaleString("en") + " rows";
        remember({ sql: ask.sql, search: window.location.search, told: rows });
        showSession();
        const file = document.getElementById("sql-file-told");
        if (file) file.textContent = "";
        return no();
      },
      forget(clicks) {
        if (clicks) { window.sessionStorage.removeItem(SESSION); showSession(); }
        return no();
      },
    },
  });

  /* A cell that names a token, an expert, a run …: the place where it is shown. */
  function target(as, value, row, links) {
    const role = (key) => (links.roles[key] === undefined ? undefined : row[links.roles[key]]);
    const whole = (text) => /^-?\d+$/.test(String(text));
    const run = links.runs[role("run_id")] || links.page;
    const block = role("block");
    const layer = whole(role("layer")) ? role("layer") + (block && block !== "mlp" ? "." + block : "") : null;
    const place = (path, wanted) => path + "?" + new URLSearchParams({ ...(run ? { run } : {}), ...wanted });
    if (value === null || value === undefined || value === "") return null;
    if (as === "run_id") return links.runs[value] ? "/?" + new URLSearchParams({ run: links.runs[value] }) : null;
    if (as === "name") return Object.values(links.runs).includes(value) ? "/?" + new URLSearchParams({ run: value }) : null;
    if (as === "label") return place("/tokens", { label: value });
    if (!whole(value)) return null;
    if (as === "token") return place("/tokens", { token: value });
    if (as === "token_id") return place("/tokens", { piece: value });
    if (as === "sequence_id") return place("/tokens", { sequence: value });
    if (as === "expert") return layer ? place("/experts", { layer, expert: value }) : null;
    if (as === "head") return layer ? place("/phenomena", { layer, head: value }) : null;
    if (as === "layer") return place("/tokens", links.routers.includes(Number(value)) ? { layer } : { layer: value, mode: "norm" });
    if (as === "feature") {
      const sae = links.saes[role("sae_id")] || role("sae");
      return sae ? place("/features", { sae, feature: value }) : null;
    }
    const expert = role("expert");
    return layer && whole(expert) && Number(value) > 0 ? place("/tokens", { layer, expert }) : null;
  }

  const forms = (window.dashAgGridFunctions = window.dashAgGridFunctions || {});
  const form = (write) => (value) => (value === null || value === undefined ? "—" : typeof value === "number" ? write(value) : String(value));
  const minus = (text) => text.replace(/-/g, "−");
  forms.sqlPlain = form(String);
  forms.sqlWhole = form((value) => minus(value.toLocaleString("en")));
  forms.sqlNumber = form((value) => {
    const size = Math.abs(value);
    if (value === 0 || (size >= 1e-3 && size < 1e9)) return minus(value.toLocaleString("en", { maximumSignificantDigits: size < 1e3 ? 4 : 7 }));
    return minus(value.toExponential(3));
  });

  const components = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});
  components.SqlLink = function (props) {
    const text = props.valueFormatted || (props.value === null || props.value === undefined ? "—" : String(props.value));
    const href = target(props.as, props.value, props.data || {}, props.links);
    if (!href) return React.createElement("span", { className: "foreign" }, text);
    const follow = (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      window.moescope.open(href);
    };
    return React.createElement("a", { href, className: "cell-link foreign", onClick: follow }, text);
  };

})();
