/* The command palette and the list of keys: found in the browser, from what the frame already knows. */
(function () {
  "use strict";
  const { made, selected, undo } = window.moescope.frame;
  const MOST = 60;
  let fixed = { pages: [], analyses: [] };
  let run = { runs: [], routers: [], layers: 0, tokens: 0 };

  const go = (href) => () => window.moescope.open(href);
  const word = (text) => String(text).toLowerCase();

  function actions() {
    return [
      { kind: "Action", name: "Light or dark", words: "change the colours", run: () => document.getElementById("scheme").click() },
      { kind: "Action", name: "Copy the link to this view", words: "everything shown is in the address", run: () => navigator.clipboard.writeText(window.location.href) },
      { kind: "Action", name: "Undo", words: "back to the view before", keys: ["u"], run: undo },
      { kind: "Action", name: "Open the lab", words: "with the edits made so far", run: go(selected("/lab")) },
      { kind: "Action", name: "Keys", words: "the list of all keys", keys: ["?"], run: () => keys() },
    ];
  }

  const pageEntries = () => fixed.pages.map((page) => (
    { kind: "Page", name: page.name, words: page.words, keys: page.key ? ["g", page.key] : [], run: go(selected(page.path)) }));

  /* Places typed as numbers: L3·E7, 3.7, L5·H2, L4, #123, F17. */
  function places(text) {
    const found = [];
    const add = (kind, name, words, path, changes) => found.push({ kind, name, words, run: go(selected(path, changes)) });
    const expert = /^l?(\d{1,4})(?:\s*([a-z]{2,}(?:\.\d+)?))?\s*[·.,/:\s]?\s*([es]?)(\d{1,5})$/i.exec(text);
    if (expert) {
      const block = expert[2] || null;
      for (const router of run.routers) {
        if (router.layer !== Number(expert[1]) || (block && !router.name.endsWith(" " + block))) continue;
        const shared = word(expert[3]) === "s";
        const number = Number(expert[4]);
        if (shared ? number < 1 || number > router.shared : number >= router.experts) continue;
        const name = router.name + "·" + (shared ? "S" : "E") + number;
        const where = { layer: router.address, expert: String(shared ? -number : number), head: "" };
        add("Expert", name, "its card", "/experts", where);
        add("Expert", name, "its tokens", "/tokens", where);
      }
    }
    const head = /^l?(\d{1,4})\s*[·.,/:\s]?\s*h(\d{1,4})$/i.exec(text);
    if (head && Number(head[1]) < run.layers) add("Head", "L" + Number(head[1]) + "·H" + Number(head[2]), "its card", "/phenomena", { layer: String(Number(head[1])), head: String(Number(head[2])), expert: "" });
    const layer = /^l(?:ayer)?\s*(\d{1,4})$/i.exec(text);
    for (const router of layer ? run.routers.filter((one) => one.layer === Number(layer[1])) : []) add("Layer", router.name, "its experts", "/experts", { layer: router.address, expert: "" });
    if (layer && Number(layer[1]) < run.layers) add("Layer", "L" + Number(layer[1]), "its tokens", "/tokens", { layer: String(Number(layer[1])), expert: "" });
    const token = /^(?:#|token\s*)(\d{1,15})$/i.exec(text);
    if (token && Number(token[1]) < run.tokens) add("Token", "token " + Number(token[1]), "its card in the text", "/tokens", { token: String(Number(token[1])) });
    const feature = /^f(?:eature)?\s*(\d{1,9})$/i.exec(text);
    if (feature) add("Feature", "feature " + Number(feature[1]), "of the chosen autoencoder", "/features", { feature: String(Number(feature[1])) });
    return found;
  }

  function entries(text) {
    const runs = run.runs.map((name) => ({ kind: "Run", name, words: "show this run", run: () => window.moescope.pickRun(name) }));
    if (!text) return [...pageEntries(), ...actions(), ...runs].slice(0, MOST);
    const analyses = fixed.analyses.map(({ name, words, section }) => (
      { kind: "Analysis", name: name.replace(/_/g, " "), words, also: section + " " + name, run: go(selected("/analyses", { analysis: name })) }));
    const parts = word(text).split(/\s+/);
    const score = (entry) => {
      const name = word(entry.name);
      const all = name + " " + word(entry.words) + " " + word(entry.also || "") + " " + word(entry.kind);
      if (!parts.every((part) => all.includes(part))) return 0;
      return name.startsWith(word(text)) ? 4 : name.includes(word(text)) ? 3 : parts.every((part) => name.includes(part)) ? 2 : 1;
    };
    const matching = [...pageEntries(), ...actions(), ...runs, ...analyses].map((entry) => [score(entry), entry]).filter(([points]) => points);
    matching.sort((one, other) => other[0] - one[0]);
    return [...places(text), ...matching.map(([, entry]) => entry)].slice(0, MOST);
  }

  let dialog = null;
  let shown = [];
  let at = 0;

  function draw(list, field) {
    shown = entries(field.value.trim());
    at = 0;
    list.replaceChildren(...shown.map((entry, i) => made("div", { id: "palette-" + i, role: "option", class: "palette-entry", "aria-selected": "false",
      onclick: () => choose(i), onmousemove: () => mark(list, field, i) },
      made("span", { class: "palette-kind" }, entry.kind),
      made("span", { class: "palette-name foreign" }, entry.name),
      made("span", { class: "palette-words foreign" }, entry.words || ""),
      made("span", { class: "palette-keys" }, ...(entry.keys || []).map((key) => made("kbd", null, key))))));
    if (!shown.length) list.replaceChildren(made("p", { class: "palette-none", role: "option", "aria-disabled": "true", "aria-selected": "false" },
      "Nothing of that name. Try a page, an analysis, L3·E7, L5·H2, #123, f17."));
    mark(list, field, 0);
  }

  function mark(list, field, i) {
    const old = list.children[at];
    if (old) old.setAttribute("aria-selected", "false");
    at = Math.max(0, Math.min(shown.length - 1, i));
    const now = list.children[at];
    if (!shown.length || !now) { field.removeAttribute("aria-activedescendant"); return; }
    now.setAttribute("aria-selected", "true");
    field.setAttribute("aria-activedescendant", now.id);
    now.scrollIntoView({ block: "nearest" });
  }

  function choose(i) {
    const entry = shown[i];
    close();
    if (entry) entry.run();
  }

  function close() {
    if (!dialog) return;
    dialog.close();
    dialog.remove();
    dialog = null;
  }

  function show(content, name) {
    close();
    dialog = made("dialog", { class: "palette", "aria-label": name, onclick: (event) => { if (event.target === dialog) close(); } }, content);
    const own = dialog;
    dialog.addEventListener("close", () => { own.remove(); if (dialog === own) dialog = null; });
    document.body.append(dialog);
    dialog.showModal();
  }

  function open() {
    const list = made("div", { id: "palette-list", role: "listbox", class: "palette-list", "aria-label": "Found" });
    const field = made("input", { type: "text", id: "palette-text", class: "palette-text", role: "combobox", "aria-expanded": "true", "aria-controls": "palette-list",
      "aria-autocomplete": "list", "aria-label": "Search pages, runs, experts, heads, tokens, features, analyses and actions", autocomplete: "off", spellcheck: "false",
      placeholder: "Page, analysis, run, L3·E7, L5·H2, #123, f17 …", oninput: () => draw(list, field) });
    field.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
      if (step) { event.preventDefault(); mark(list, field, at + step); }
      if (event.key === "Enter") { event.preventDefault(); choose(at); }
    });
    show(made("div", { class: "palette-box" }, field, list), "Search and commands");
    draw(list, field);
    field.focus();
  }

  function keys() {
    const rows = [
      [["Ctrl", "K"], "search pages, runs, experts, heads, tokens, features, analyses, actions"],
      [["/"], "to the search field of the page"],
      [["u"], "undo: back to the view before"],
      [["?"], "this list"],
      [["Esc"], "close what is open"],
      ...fixed.pages.filter((page) => page.key).map((page) => [["g", page.key], page.name]),
      [["↑", "↓", "←", "→"], "move in the text of Tokens, in tables and maps; Enter opens the card"],
    ];
    const body = rows.map(([names, words]) => made("tr", null,
      made("td", null, ...names.flatMap((key, i) => (i ? [" ", made("kbd", null, key)] : [made("kbd", null, key)]))), made("td", null, words)));
    show(made("div", { class: "palette-box keys" }, made("h2", { class: "section-title" }, "Keys"), made("table", null, made("tbody", null, ...body)),
      made("button", { type: "button", class: "tool", onclick: close }, "Close")), "Keys");
  }

  window.moescope.palette = { open, keys, pages: () => fixed.pages, toggle: () => (dialog ? close() : open()) };
  document.addEventListener("click", (event) => { if (event.target.closest("#palette-button")) open(); });

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    palette: {
      known(pages, ofRun) {
        fixed = pages || fixed;
        run = ofRun || run;
        return window.dash_clientside.no_update;
      },
    },
  });
})();
