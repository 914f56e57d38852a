/* The lab: the list of edits, and what follows from them, painted from data. Every text goes through textContent.
   It is one file because painting, requests and callbacks all read and write one state, the edits and their answer, which no
   other script may reach. */
(function () {
  "use strict";
  const no = () => window.dash_clientside.no_update;
  const set = (id, props) => window.dash_clientside.set_props(id, props);
  const here = () => document.getElementById("lab-page");
  const at = (id) => document.getElementById(id);
  const params = () => new URLSearchParams(window.location.search);
  const SLIDER_MS = 70, TYPING_MS = 400, WRITE_MS = 120, LONGEST_PROMPT = 1500, MOST_STEPS = 100;

  /* Elements: el("div", {class: "x"}, children); strings become text. */
  function el(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else made.setAttribute(key, value === true ? "" : String(value));
    }
    made.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return made;
  }
  function fill(id, ...children) {
    const place = at(id);
    if (place) place.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
    return place;
  }

  /* Numbers, as everywhere in the app. */
  const MISSING = "—";
  const minus = (text) => text.replace("-", "−");
  const number = (x, places) => (x === null || x === undefined ? MISSING : minus((x === 0 ? 0 : x).toFixed(places ?? 3)));
  const signed = (x, places) => (x === null || x === undefined ? MISSING : (x > 0 ? "+" : "") + number(x, places));
  function percent(p) {
    if (p === null || p === undefined) return MISSING;
    const x = 100 * p;
    if (x === 0) return "0 %";
    if (x > 0 && x < 0.1) return "<0.1 %";
    return (x >= 99.95 && x < 100 ? ">99.9 %" : x.toFixed(1) + " %");
  }
  const points = (p) => (Math.abs(100 * p) < 0.05 ? "0.0" : (p > 0 ? "+" : "") + minus((100 * p).toFixed(1)));
  const count = (n) => n.toLocaleString("en-US");
  const visible = (piece) => piece.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍") || "∅";
  const router = ({ layer, block }) => "L" + layer + (block === "mlp" ? "" : " " + block);

  /* ---- the list of edits: the address holds it, and this tab what no address can hold ---- */
  const split = (text) => (text || "").split(";").map((line) => line.trim()).filter(Boolean);
  const lines = () => split(params().get("edits"));
  const known = new Map();      // line → what the server says of it
  const before = new Map();     // line without strength → the strength it had when it was switched off
  let kept = null, refused = null, answer = null, past = [], future = [], seen = null, travelling = false;

  const STRENGTH = / strength=(-?[\d.]+(?:e[-+]?\d+)?)$/;
  function infoOf(line) {
    if (known.has(line)) return known.get(line);
    const found = STRENGTH.exec(line);
    const base = known.get(found ? line.slice(0, found.index) : line);
    if (!found || !base || base.problem) return null;
    return { ...base, line, strength: Number(found[1]) };
  }
  const withStrength = (info, strength) => info.base + (strength === 1 ? "" : " strength=" + strength);

  function write(list) { window.moescope.change({ edits: list.join(";") }); }

  /* Undo and redo follow the list alone; Back undoes everything. */
  function remember() {
    const now = params().get("edits") || "";
    if (seen !== null && now !== seen && !travelling) { past = [...past, seen].slice(-MOST_STEPS); future = []; }
    seen = now;
    travelling = false;
  }
  function travel(from, to) {
    if (!from.length) return;
    to.push(seen || "");
    travelling = true;
    window.moescope.change({ edits: from.pop() });
  }
  const undo = () => travel(past, future);
  const redo = () => travel(future, past);

  function strengthOfKept(index, strength) {
    const data = JSON.parse(kept.json);
    data.edits[index].strength = strength;
    const rows = kept.rows.map((row, i) => (i === index ? { ...row, strength } : row));
    set("lab-kept", { data: { json: JSON.stringify(data), rows } });
  }
  function withoutKept(index) {
    const data = JSON.parse(kept.json);
    data.edits.splice(index, 1);
    const rows = kept.rows.filter((_row, i) => i !== index);
    set("lab-kept", { data: rows.length ? { json: JSON.stringify(data), rows } : null });
  }

  let timer = null;
  function soon(action) { clearTimeout(timer); timer = setTimeout(action, SLIDER_MS); }

  function entries() {
    const list = lines().map((line, place) => ({ line, place, info: infoOf(line), kept: false }));
    return [...list, ...(kept ? kept.rows : []).map((info, place) => ({ line: info.line, place, info, kept: true }))];
  }
  function changeStrength(entry, strength) {
    if (entry.kept) return strengthOfKept(entry.place, strength);
    const list = lines();
    list[entry.place] = withStrength(entry.info, strength);
    write(list);
  }
  function move(place, by) {
    const list = lines(), other = place + by;
    if (other < 0 || other >= list.length) return;
    [list[place], list[other]] = [list[other], list[place]];
    write(list);
  }

  function problemOf(entry, index) {
    if (entry.info && entry.info.problem) return entry.info.problem;
    if (refused && refused.place === index) return refused;
    return null;
  }
  function refusal(problem) {
    const parts = [["Expected", problem.expected], ["Found", problem.found], ["What to do", problem.fix]];
    return el("div", { class: "lab-problem foreign" }, el("strong", {}, problem.problem + ". "),
      parts.filter(([, text]) => text).map(([name, text]) => el("span", {}, name + ": " + text + ". ")));
  }

  /* Rows stay where their edit is the same, so that a slider that is being moved is not taken away. */
  function paintEdits() {
    const place = at("lab-edits");
    if (!place) return;
    const list = entries(), rows = [...place.children];
    list.forEach((entry, index) => {
      const key = (entry.kept ? "kept " : "") + (entry.info && entry.info.base ? entry.info.base : entry.line);
      const row = rows[index] && rows[index].dataset.key === key ? rows[index] : newRow(key);
      if (row !== rows[index]) { if (rows[index]) rows[index].replaceWith(row); else place.append(row); }
      updateRow(row, entry, index, list.length);
    });
    rows.slice(list.length).forEach((row) => row.remove());
    if (!list.length) place.replaceChildren(el("li", { class: "muted lab-none", "data-key": "" },
      "No edits yet. Add one below, or from any page: experts, heads and features can be sent here."));
    for (const [id, stack] of [["lab-undo", past], ["lab-redo", future]]) if (at(id)) at(id).disabled = !stack.length;
    const together = refused && refused.place === null ? refused : null;
    fill("lab-refused", together ? refusal(together) : null);
  }
  function newRow(key) {
    const row = el("li", { class: "lab-edit", "data-key": key });
    const on = el("input", { type: "checkbox", class: "lab-on" });
    const range = el("input", { type: "range", class: "lab-slider" });
    const exact = el("input", { type: "number", class: "lab-exact" });
    const up = el("button", { type: "button", class: "lab-button lab-up" }, "↑");
    const down = el("button", { type: "button", class: "lab-button lab-down" }, "↓");
    const gone = el("button", { type: "button", class: "lab-button lab-gone" }, "×");
    row.append(el("div", { class: "lab-edit-words" }, el("label", {}, on, el("span", { class: "mono foreign lab-edit-text" })),
      el("span", { class: "lab-edit-buttons" }, up, down, gone)),
      el("div", { class: "lab-edit-how" }, el("span", { class: "muted" }, "strength"), range, exact), el("div", { class: "lab-edit-problem" }));
    const entry = () => row.entry;
    on.addEventListener("change", () => {
      const { info } = entry();
      if (!info) return;
      if (!on.checked) before.set(info.base || info.line, info.strength);
      const back = before.get(info.base || info.line);
      changeStrength(entry(), on.checked ? (back === undefined || back === 0 ? 1 : back) : 0);
    });
    range.addEventListener("input", () => {
      exact.value = range.value;
      window.moescope_lab.moved = performance.now();
      soon(() => changeStrength(entry(), Number(range.value)));
    });
    exact.addEventListener("change", () => { if (exact.value !== "") changeStrength(entry(), Number(exact.value)); });
    up.addEventListener("click", () => move(entry().place, -1));
    down.addEventListener("click", () => move(entry().place, 1));
    gone.addEventListener("click", () => {
      if (entry().kept) return withoutKept(entry().place);
      const list = lines();
      list.splice(entry().place, 1);
      write(list);
    });
    return row;
  }
  function updateRow(row, entry, index, n) {
    row.entry = entry;
    const { info } = entry, part = (name) => row.querySelector(".lab-" + name);
    const words = (info && info.base) || entry.line, sound = Boolean(info && !info.problem);
    part("edit-text").textContent = words + (entry.kept ? "  (in this tab only)" : "");
    part("edit-how").hidden = !sound;
    part("on").disabled = !sound;
    if (sound) {
      part("on").checked = info.strength !== 0;
      for (const name of ["slider", "exact"]) {
        const input = part(name);
        if (name === "slider") { input.min = Math.min(info.low, info.strength); input.max = Math.max(info.high, info.strength); }
        input.step = name === "slider" ? info.step : "any";
        if (document.activeElement !== input || Number(input.value) === info.strength) input.value = info.strength;
        input.setAttribute("aria-label", "Strength of " + words);
      }
    }
    part("on").setAttribute("aria-label", "On: " + words);
    part("up").disabled = entry.kept || index === 0;
    part("down").disabled = entry.kept || index === lines().length - 1 || n < 2;
    for (const [name, say] of [["up", "Earlier: "], ["down", "Later: "], ["gone", "Remove: "]]) part(name).setAttribute("aria-label", say + words);
    const problem = problemOf(entry, index);
    row.classList.toggle("lab-wrong", Boolean(problem));
    part("edit-problem").replaceChildren(...(problem ? [refusal(problem)] : []));
  }

  /* ---- what follows ---- */
  const notBase = () => answer.edited;
  const runName = () => params().get("run") || "";
  function href(path, extra) {
    const query = new URLSearchParams();
    if (runName()) query.set("run", runName());
    for (const [name, value] of Object.entries(extra)) query.set(name, value);
    return path + "?" + query.toString();
  }
  function anchor(words, address, attributes) {
    if (!runName()) return el("span", attributes, words);
    const follow = (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      window.moescope.open(address);
    };
    return el("a", { href: address, onclick: follow, ...attributes }, words);
  }
  function table(caption, names, rows, attributes) {
    const head = el("thead", {}, el("tr", {}, names.map((name) => el("th", { scope: "col" }, name))));
    return el("table", { class: "lab-grid", ...attributes }, el("caption", { class: "muted" }, caption), head, el("tbody", {}, rows));
  }
  const cell = (content, attributes) => el("td", { class: "number", ...attributes }, content);

  function paintSummary() {
    const s = answer.summary;
    const cards = [
      ["ΔNLL", signed(s.delta_nll, 4), "nats a token; unedited " + number(s.base_nll, 3), "delta_nll", s.delta_nll],
      ["KL", number(s.kl, 4), "nats a token, unedited ‖ edited", "kl", s.kl],
      ["Top token flips", percent(s.flips), count(Math.round((s.flips || 0) * s.n)) + " of " + count(s.n) + " predictions", "flips", s.flips],
    ];
    if (answer.moe) cards.push(["Decisions switched", percent(s.decisions ? s.switched / s.decisions : null),
      count(s.switched) + " of " + count(s.decisions), "switched", s.switched]);
    const made = cards.map(([name, value, detail, measure, exact]) =>
      el("div", { class: "lab-card", "data-measure": measure, "data-value": exact, title: exact },
        el("div", { class: "card-label" }, name), el("div", { class: "lab-value mono" }, notBase() ? value : MISSING), el("div", { class: "card-detail" }, notBase() ? detail : "no edit in force")));
    const note = notBase() && s.n
      ? "On " + count(s.n) + " predicted tokens of these prompts, without controls: whether another edit of the same size does as much is not known until they are run (below)."
      : "The unedited model on " + count(s.n) + " predicted tokens, NLL " + number(s.base_nll, 3) + " nats a token. Add an edit to change it.";
    fill("lab-summary", el("div", { class: "lab-cards" }, made), el("p", { class: "muted lab-note" }, note));
  }

  function paintNext() {
    const prompt = answer.prompts[answer.row], piece = prompt.pieces[answer.at];
    const last = answer.at === prompt.pieces.length - 1;
    const side = (name, list, edited) => table(name, edited ? ["token", "p", "Δ points", "rank"] : ["token", "p", notBase() ? "rank edited" : "rank"], list.map((one) => {
      const moved = one.rank === one.other_rank ? "=" : edited ? one.other_rank + " → " + one.rank : one.rank + " → " + one.other_rank;
      return el("tr", { "data-token": one.id, "data-p": one.p, class: one.rank === one.other_rank ? null : "lab-moved" },
        el("th", { scope: "row" }, anchor(visible(one.piece), href("/tokens", { piece: one.id }), { class: "piece foreign", title: "where the run has this token" })),
        cell(percent(one.p), { title: one.p }), edited ? cell(points(one.delta), { title: one.delta }) : null,
        cell(notBase() ? moved : String(one.rank)));
    }), { "data-side": edited ? "edited" : "base" });
    const text = el("p", { class: "muted lab-note" }, last ? "After the last token, " : "After token " + answer.at + ", ",
      el("span", { class: "piece foreign" }, visible(piece)), answer.prompts.length > 1 ? ", of prompt " + (answer.row + 1) : "",
      ". Choose another token below.");
    fill("lab-next", text, el("div", { class: "lab-sides" }, side("Unedited", answer.next.base, false),
      answer.next.edited ? side("Edited", answer.next.edited, true) : el("p", { class: "muted" }, refused ? "The edit is refused: see it beside the edit. The unedited answer stays." : "No edit is in force.")));
  }

  const VALUES = { delta: "delta_nll", kl: "kl", switched: "switched" };
  const UNIT = { delta: "ΔNLL, nats", kl: "KL, nats", switched: "routers that switched" };
  const tint = () => (VALUES[params().get("tint")] ? params().get("tint") : "delta");
  function limitOf(values) {
    const sizes = values.filter((x) => x !== null).map(Math.abs).sort((a, b) => a - b);
    return Math.max(sizes.length ? sizes[Math.floor(0.98 * (sizes.length - 1))] : 0, 1e-9);
  }
  function paintTokens() {
    const name = VALUES[tint()], values = answer.prompts.flatMap((prompt) => prompt[name]);
    const limit = tint() === "delta" ? Math.max(limitOf(values), 0.02) : limitOf(values);
    const strips = answer.prompts.map((prompt, row) => el("div", { class: "lab-strip mono", role: "group", tabindex: "0", "data-row": row,
      "aria-label": "Prompt " + (row + 1) + ": arrow keys choose a token" },
    prompt.pieces.map((piece, place) => {
      const value = prompt[name][place], size = value === null || !notBase() ? 0 : Math.min(1, Math.abs(value) / limit);
      const chosen = row === answer.row && place === answer.at;
      const mark = size > 0.25 ? (value > 0 ? " lab-up-mark" : " lab-down-mark") : "";
      const made = el("span", { class: "lab-tok foreign" + mark + (chosen ? " lab-chosen" : ""), "data-at": place }, visible(piece));
      if (size > 0) made.style.background = "color-mix(in srgb, var(" + (value > 0 ? "--lab-more" : "--lab-less") + ") " + (55 * size).toFixed(0) + "%, transparent)";
      return made;
    })));
    fill("lab-tokens", strips);
    const ends = tint() === "delta"
      ? [el("span", { class: "lab-tok lab-down-mark lab-less" }, "−" + limit.toPrecision(2) + " likelier"), " to ", el("span", { class: "lab-tok lab-up-mark lab-more" }, "+" + limit.toPrecision(2) + " less likely")]
      : ["0 to ", el("span", { class: "lab-tok lab-up-mark lab-more" }, limit.toPrecision(2))];
    fill("lab-legend", UNIT[tint()] + ", edited against unedited: ", ends, "; underlined from a quarter of that on. The first token of a prompt is not predicted.");
    readout(answer.row, answer.at);
    const prompt = answer.prompts[answer.row];
    const open = at("lab-table") && at("lab-table").querySelector("details[open]");
    const details = el("details", { class: "lab-more", open: Boolean(open) }, el("summary", {}, "All tokens of prompt " + (answer.row + 1) + " in a table"));
    const paint = () => { if (details.open && details.children.length < 2) details.append(tokenTable(prompt)); };
    details.addEventListener("toggle", paint);
    fill("lab-table", details);
    paint();
  }
  function tokenTable(prompt) {
    const rows = prompt.pieces.map((piece, i) => el("tr", {}, cell(String(i)), el("th", { scope: "row" }, el("span", { class: "piece foreign" }, visible(piece))),
      cell(number(prompt.base_nll[i])), cell(prompt.base_nll[i] === null ? MISSING : number(prompt.base_nll[i] + prompt.delta_nll[i])), cell(signed(prompt.delta_nll[i])),
      cell(number(prompt.kl[i], 4)), cell(prompt.flips[i] ? "flips" : ""), answer.moe ? cell(prompt.switched[i] + " of " + answer.layers.length) : null));
    return el("div", { class: "lab-scroll lab-tall", tabindex: "0", role: "group", "aria-label": "All tokens" },
      table("NLL in nats", ["#", "token", "NLL", "edited", "Δ", "KL", "top token", ...(answer.moe ? ["switched"] : [])], rows));
  }
  function readout(row, place) {
    const prompt = answer.prompts[row], words = ["#" + place + " ", el("span", { class: "piece foreign" }, visible(prompt.pieces[place]))];
    if (prompt.base_nll[place] === null) words.push(" · not predicted");
    else words.push(" · NLL " + number(prompt.base_nll[place]) + (notBase() ? " → " + number(prompt.base_nll[place] + prompt.delta_nll[place]) + " · Δ " + signed(prompt.delta_nll[place]) + " · KL " + number(prompt.kl[place], 4) + (prompt.flips[place] ? " · top token flips" : "") : ""));
    if (answer.moe && notBase()) words.push(" · " + prompt.switched[place] + " of " + answer.layers.length + " routers switched");
    fill("lab-readout", words);
  }

  const letter = (expert) => (expert >= 0 ? "E" + expert : "S" + -expert);
  function paintRouting() {
    const part = at("lab-routing-part");
    if (part) part.hidden = !answer.moe;
    if (!answer.moe) return;
    const chosen = answer.prompts[answer.row].pieces[answer.at];
    const expert = (where, id, other) => anchor(letter(id), href("/experts", { layer: where.layer + (where.block === "mlp" ? "" : "." + where.block), expert: id }),
      { class: "lab-expert" + (other && !other.includes(id) ? " lab-switched" : "") });
    const listed = (where, ids, other) => (ids ? ids.flatMap((id, i) => (i ? [" ", expert(where, id, other)] : [expert(where, id, other)])) : [MISSING]);
    const rows = answer.layers.map((layer, i) => {
      const one = answer.routers[i], share = layer.n ? layer.switched / layer.n : 0;
      const bar = el("span", { class: "lab-bar-line" });
      bar.style.width = (60 * share).toFixed(1) + "px";
      return el("tr", { "data-layer": layer.layer, "data-switched": layer.switched }, el("th", { scope: "row" }, router(layer)),
        cell(notBase() ? [bar, percent(share)] : MISSING), cell(notBase() ? count(layer.switched) + " of " + count(layer.n) : MISSING),
        cell(listed(one, one.base, one.edited)), cell(listed(one, one.edited, one.base)));
    });
    fill("lab-routing", el("p", { class: "muted lab-note" }, "A decision is switched where the set of experts is another. The experts are those of token ",
      el("span", { class: "piece foreign" }, visible(chosen)), "; those underlined are chosen in one pass only."),
    el("div", { class: "lab-scroll" }, table("Decisions of every router", ["router", "switched", "decisions", "unedited", "edited"], rows)));
  }

  function paint() {
    if (!here() || !answer || answer.state !== "answered") return;
    paintNext();
    window.moescope_lab.painted = performance.now();
    window.moescope_lab.stamp = answer.stamp;
    paintSummary();
    paintTokens();
    paintRouting();
  }
  function paintState() {
    const place = at("lab-state");
    if (!place || !answer) return;
    here().classList.toggle("lab-empty", answer.state !== "answered");
    if (answer.state === "no model") {
      fill("lab-state", el("div", { class: "empty" }, el("h2", { class: "section-title" }, "No model is loaded"),
        el("p", { class: "muted" }, "The lab runs your prompts on a live model, as it is and under your edits. Choose one above and press Load: demo is the bundled mixture of experts; a folder, a .gguf file or a Hub id work too. Or start with"),
        el("code", { class: "command mono" }, "moescope dashboard STORE --model demo")));
    } else if (answer.state === "refused") fill("lab-state", refusal(answer.problem));
    else fill("lab-state", el("span", { class: "muted" }, "Answered by ", el("span", { class: "foreign" }, answer.model), " in " + Math.round(answer.ms) + " ms"));
  }

  const written = { now: null };
  function paintWritten() {
    const w = written.now;
    if (!w || !at("lab-writing")) return;
    if (w.state === "refused") return fill("lab-writing", refusal(w.problem));
    if (w.state !== "answered") return fill("lab-writing");
    const side = (pieces, which) => {
      const spans = [];
      const other = w.parts || [["equal", 0, pieces.length, 0, pieces.length]];
      for (const [kind, a, b, c, d] of other) {
        const [first, end] = which === "base" ? [a, b] : [c, d];
        for (let i = first; i < end; i++) {
          const differs = kind !== "equal", parting = w.parting === i;
          if (parting) spans.push(el("span", { class: "lab-parting", title: "first token that differs" }, "▸"));
          spans.push(el("span", { class: "foreign" + (differs ? (which === "base" ? " lab-only-base" : " lab-only-edited") : "") }, pieces[i].replace(/\r/g, "␍")));
        }
      }
      return el("div", {}, el("h3", { class: "lab-h3" }, which === "base" ? "Unedited" : "Edited"),
        el("div", { class: "passage lab-passage", "data-side": which }, spans));
    };
    const differ = w.edited === null ? "No edit is in force." : w.parting === null ? "Both write the same " + w.base.length + " tokens."
      : "They part at token " + (w.parting + 1) + " (▸). Dotted: only in the unedited text; solid: only in the edited one.";
    const names = { repetition: "repetition (share of 4-grams seen before)", distinct_1: "distinct 1-grams", distinct_2: "distinct 2-grams", distinct_3: "distinct 3-grams", length: "tokens" };
    const health = table("Health of what is written", ["", "unedited", ...(w.edited ? ["edited"] : [])], Object.keys(names).map((name) => el("tr", {},
      el("th", { scope: "row" }, names[name]), cell(name === "length" ? String(w.health.base[name]) : number(w.health.base[name])),
      w.edited ? cell(name === "length" ? String(w.health.edited[name]) : number(w.health.edited[name])) : null)));
    fill("lab-writing", el("p", { class: "muted lab-note" }, (w.temperature ? "Drawn at temperature " + w.temperature + ", both with the same seed. " : "The most likely token each time. ") + differ + " After prompt " + (w.row + 1) + "."),
      el("div", { class: "lab-sides" }, side(w.base, "base"), w.edited ? side(w.edited, "edited") : null), el("div", { class: "lab-scroll" }, health));
  }

  /* ---- requests ---- */
  const tab = Math.random().toString(36).slice(2, 10);
  let stamp = 0, wait = null, dim = null;
  const long = () => (params().get("long") ? window.sessionStorage.getItem("moescope-lab-prompt") : null);
  const promptOf = (usual) => params().get("prompt") || long() || usual || "";
  window.moescope_lab = { moved: 0, painted: 0, stamp: 0 };

  function selectToken(row, place) {
    const prompt = answer && answer.prompts[row];
    if (!prompt || place < 0 || place >= prompt.pieces.length) return;
    const last = place === prompt.pieces.length - 1;
    window.moescope.change({ row: row ? row : "", at: last ? "" : place });
  }
  document.addEventListener("click", (event) => {
    const token = event.target.closest && event.target.closest(".lab-strip .lab-tok");
    if (token) selectToken(Number(token.parentElement.dataset.row), Number(token.dataset.at));
    const id = event.target.closest && event.target.closest("button") && event.target.closest("button").id;
    if (id === "lab-add-button") wish();
    if (id === "lab-undo") undo();
    if (id === "lab-redo") redo();
    if (id === "lab-clear") { set("lab-kept", { data: null }); write([]); }
  });
  /* What stands in the box at this moment, whether or not the frame has heard of its last letters. */
  function wish() { set("lab-wish", { data: { line: at("lab-line").value, stamp: Date.now() } }); }
  document.addEventListener("mouseover", (event) => {
    const token = event.target.closest && event.target.closest(".lab-strip .lab-tok");
    if (token && answer && answer.state === "answered") readout(Number(token.parentElement.dataset.row), Number(token.dataset.at));
  });
  document.addEventListener("keydown", (event) => {
    if (!here()) return;
    if (event.key === "Enter" && event.target.id === "lab-line") wish();
    const strip = event.target.closest && event.target.closest(".lab-strip");
    if (strip && answer && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
      event.preventDefault();
      const row = Number(strip.dataset.row), from = row === answer.row ? answer.at : -1;
      selectToken(row, Math.max(0, from + (event.key === "ArrowRight" ? 1 : -1)));
    }
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && !/^(checkbox|range)$/.test(event.target.type);
    if ((event.ctrlKey || event.metaKey) && !typing && event.key.toLowerCase() === "z") {
      event.preventDefault();
      if (event.shiftKey) redo(); else undo();
    }
  });

  const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : "'" + text.replace(/'/g, "'\"'\"'") + "'");
  let typed = null;

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    lab: {
      /* What is asked of the model, and the lines of the list that are not known yet. */
      ask(search, modelStamp, keptNow, _long, usual) {
        if (window.location.pathname !== "/lab") return [no(), no()];
        remember();
        kept = keptNow || null;
        const address = new URLSearchParams(search || ""), list = split(address.get("edits"));
        refused = null;
        paintEdits();
        const unknown = list.filter((line) => !infoOf(line));
        const whole = (name) => (/^\d{1,6}$/.test(address.get(name) || "") ? Number(address.get(name)) : null);
        const ask = {
          tab, prompt: promptOf(usual), edits: list, kept: kept ? kept.json : null, row: whole("row") || 0, at: whole("at"),
          tokens: Math.min(256, whole("tokens") ?? 24), temperature: Math.max(0, Number(address.get("temperature")) || 0), seed: whole("seed") || 0,
          model: modelStamp || null,
        };
        const plain = JSON.stringify(ask);
        if (plain === typed && here() && answer) { paintEdits(); return [no(), unknown.length ? unknown : no()]; }
        typed = plain;
        stamp += 1;
        clearTimeout(wait);
        clearTimeout(dim);
        dim = setTimeout(() => here() && here().classList.add("lab-stale"), 150);
        return [{ ...ask, stamp }, unknown.length ? unknown : no()];
      },
      known(rows) {
        for (const info of rows || []) {
          known.set(info.line, info);
          if (info.base) known.set(info.base, { ...info, line: info.base, strength: 1 });
        }
        paintEdits();
        return no();
      },
      show(data, _tint) {
        if (!data) return no();
        const news = data !== answer;
        answer = data;
        clearTimeout(dim);
        if (here()) here().classList.remove("lab-stale");
        refused = data.state === "answered" ? data.refused : null;
        if (news) paintState();
        paintEdits();
        paint();
        if (!news || data.state !== "answered") return no();
        clearTimeout(wait);
        const ask = { ...JSON.parse(typed || "{}"), stamp: data.stamp };
        if (!ask.tokens) { written.now = null; fill("lab-writing", el("p", { class: "muted" }, "No tokens are asked for.")); return no(); }
        // An edit that is refused is not written under; the unedited text is there all the same.
        if (refused || (data.rows || []).some(Boolean)) Object.assign(ask, { edits: [], kept: null });
        wait = setTimeout(() => here() && set("lab-write", { data: ask }), WRITE_MS);
        return no();
      },
      show_written(data) { if (data) { written.now = data; paintWritten(); } return no(); },
      fill_prompt(_search, usual, current) {
        const prompt = promptOf(usual), note = params().get("long");
        fill("lab-prompt-note", note ? (long() ? "Too long for the address: kept in this tab, and not in its link." : "The prompt of this link was too long for an address, and stayed where it was written.") : null);
        return prompt === current ? no() : prompt;
      },
      type_prompt(value, usual) {
        if (value === null || value === undefined) return no();
        clearTimeout(window.moescope_lab.typing);
        window.moescope_lab.typing = setTimeout(() => {
          if (!here() || value === promptOf(usual)) return;
          const tooLong = value.length > LONGEST_PROMPT;
          if (tooLong) window.sessionStorage.setItem("moescope-lab-prompt", value);
          window.moescope.change({ prompt: tooLong || value === usual ? "" : value, long: tooLong ? 1 : "", at: "", row: "" });
          if (tooLong) set("lab-long", { data: Date.now() });
        }, TYPING_MS);
        return no();
      },
      added(data) {
        if (!data) return no();
        if (data.replace) { set("lab-kept", { data: data.kept }); write(data.lines); return no(); }
        if (data.kept) {
          const more = JSON.parse(data.kept.json), all = kept ? JSON.parse(kept.json) : { ...more, edits: [] };
          all.edits = [...all.edits, ...more.edits];
          set("lab-kept", { data: { json: JSON.stringify(all), rows: [...(kept ? kept.rows : []), ...data.kept.rows] } });
        }
        if (data.lines.length) write([...lines(), ...data.lines]);
        return no();
      },
      /* Fields of the form → the line. */
      compose(values, ids, kind) {
        if (!kind || !ids.length) return no();
        const words = [kind.kind];
        ids.forEach((id, i) => {
          const name = id["lab-field"];
          const value = Array.isArray(values[i]) ? [...values[i]].map(Number).sort((a, b) => a - b).join(",") : (values[i] ?? "").toString().trim();
          if (value !== "" && value !== kind.defaults[name]) words.push(name + "=" + quoted(value));
        });
        return words.join(" ");
      },
      copy(data) {
        if (!data) return no();
        navigator.clipboard.writeText(data.text).then(
          () => set("lab-copied", { children: "Copied" }), () => set("lab-copied", { children: "The browser did not allow it" }));
        return "…";
      },
      versions(clicks, _when, name, kept_) {
        const versions = kept_ || {};
        const pressed = (window.dash_clientside.callback_context.triggered[0] || {}).prop_id === "lab-version-keep.n_clicks";
        if (pressed && clicks && (name || "").trim()) versions[name.trim().slice(0, 60)] = window.location.search;
        const options = Object.keys(versions).sort().map((one) => ({ value: one, label: one }));
        return [pressed && clicks ? { ...versions } : no(), options];
      },
      go_back(name, versions) {
        if (name && versions && versions[name] !== undefined) window.moescope.open("/lab" + versions[name]);
        return no();
      },
    },
  });
})();
