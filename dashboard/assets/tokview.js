/* Coloured tokens of a long text: lines are broken once, and only those in sight are drawn. Text goes through textContent.
   It is one file because drawing, moving, selecting and colouring all work on one view in one closure, which no other script
   may reach. */
(function () {
  "use strict";
  const LINE = 22, PAD = 10, SPARE = 6, GAP = 1;
  let S = null;   // the view: element, text, paint, lines
  let Q = "", TOKEN = null, PALETTE = [], BESIDE = null, CHOSEN = null, ASKED = "", PAINT = null, WANTED = null, VIEW = null;
  const attached = new WeakMap();

  function unpack(packed) {
    const raw = atob(packed.data);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return packed.width === 1 ? bytes : packed.width === 2 ? new Uint16Array(bytes.buffer) : new Uint32Array(bytes.buffer);
  }

  function ruler(element) {
    const style = getComputedStyle(element);
    const context = document.createElement("canvas").getContext("2d");
    context.font = style.fontSize + " " + style.fontFamily;
    return (text) => context.measureText(text).width;
  }

  /* A piece as parts that each fit a line; a part that ends a line carries a line break. */
  function partsOf(piece, width, measure) {
    const parts = [];
    for (const line of piece.split(/(?<=\n)/)) {
      const text = line.replace(/\n$/, "");
      const ends = line !== text;
      const wide = measure(text);
      if (wide <= width) { parts.push({ text, ends, width: wide }); continue; }
      const characters = Array.from(text);
      const step = Math.max(1, Math.floor((characters.length * width) / wide * 0.9));
      for (let i = 0; i < characters.length; i += step) {
        const piece = characters.slice(i, i + step).join("");
        parts.push({ text: piece, ends: ends && i + step >= characters.length, width: measure(piece) });
      }
    }
    return parts;
  }

  const OPENS = /^[\s\u2E80-\u9FFF\uAC00-\uD7AF\uF900-\uFAFF\uFF00-\uFFEF]/u;

  /* Lines are broken before a space or an ideograph where one is near, else between tokens. */
  function breakLines() {
    const { text, numbers, element } = S;
    const width = element.clientWidth - 2 * PAD - SPARE;
    if (width <= 0) return;
    const measure = ruler(element);
    const parts = text.pieces.map((piece, i) => partsOf(i === 0 ? "·" : piece, width, measure));
    const segToken = [], segPart = [], lineStart = [], lineHead = [];
    const lineOf = new Int32Array(numbers.length);
    text.sequences.forEach(([start, , , , n], s) => {
      if (s) { lineStart.push(segToken.length); lineHead.push(-2); }
      lineStart.push(segToken.length); lineHead.push(s);
      let x = Infinity, opening = -1, before = 0;
      for (let t = start; t < start + n; t++) {
        parts[numbers[t]].forEach((part, p) => {
          const opens = OPENS.test(part.text);
          if (x + part.width > width) {
            const carried = x - before;
            const back = !opens && opening > 0 && carried + part.width < 0.4 * width;
            lineStart.push(back ? opening : segToken.length);
            lineHead.push(-1);
            x = back ? carried : 0;
            if (back) for (let g = opening; g < segToken.length; g++) if (g === 0 || segToken[g - 1] !== segToken[g]) lineOf[segToken[g]]++;
            opening = -1;
          } else if (opens) { opening = segToken.length; before = x; }
          if (p === 0) lineOf[t] = lineStart.length - 1;
          segToken.push(t); segPart.push(part);
          x = part.ends ? Infinity : x + part.width + GAP;
        });
      }
    });
    lineStart.push(segToken.length);
    Object.assign(S, { segToken, segPart, lineStart, lineHead, lineOf, width: element.clientWidth });
    S.canvas.style.height = (lineStart.length - 1) * LINE + 2 * PAD + "px";
    S.drawn = null;
  }

  function tokenNumber(index) {
    const stretches = S.text.stretches;
    let low = 0, high = stretches.length - 1;
    while (low < high) { const middle = (low + high + 1) >> 1; if (stretches[middle][0] <= index) low = middle; else high = middle - 1; }
    return stretches[low][1] + index - stretches[low][0];
  }

  function indexOf(token) {
    const stretches = S.text.stretches;
    for (let i = stretches.length - 1; i >= 0; i--) {
      const index = stretches[i][0] + token - stretches[i][1];
      const end = i + 1 < stretches.length ? stretches[i + 1][0] : S.numbers.length;
      if (token >= stretches[i][1] && index < end) return index;
    }
    return -1;
  }

  function dress(span, t) {
    const classes = ["tok"];
    if (S.numbers[t] === 0) classes.push("part");
    if (S.special.has(S.numbers[t])) classes.push("special");
    const paint = S.paint;
    if (paint) {
      const value = S.values[t];
      if (paint.kind === "changes") classes.push(changed(value));
      else if (paint.kind === "experts") {
        const pin = S.pinOf.get(value);
        classes.push(value === paint.absent ? "absent" : pin === undefined ? "rest" : "pin" + pin);
      } else if (value === 255) classes.push(paint.silent ? "unseen" : "absent");
      else if (paint.silent && value === 0) classes.push("rest");
      else { span.style.background = PALETTE[value][0]; span.style.color = PALETTE[value][1]; }
      if (S.hits && S.hits[t]) classes.push(S.hits[t] === 1 ? "hit" : "hit later");
    }
    if (S.found && S.found[t]) classes.push("found");
    if (S.range && t >= S.range[0] && t <= S.range[1]) classes.push("ranged");
    if (t === S.current) classes.push("current");
    if (t === S.cursor) classes.push("cursor");
    if (t === S.selected) classes.push("selected");
    span.className = classes.join(" ");
  }

  /* What the switch leaves out stays plain. */
  function changed(code) {
    const kind = ["same", "changed", "lost", "gained"][code];
    if (kind === undefined) return "absent";
    const wanted = S.paint.change;
    if (kind === "same") return "rest";
    return wanted === "all" || wanted === "changed" || wanted === kind ? "change-" + kind : "rest";
  }

  function heading(s) {
    const [, sequence, label, source, n, document_] = S.text.sequences[s];
    const line = document.createElement("div");
    line.className = "tokline sequence";
    const link = document.createElement("a");
    link.dataset.sequence = sequence;
    link.href = "#";
    link.textContent = "Sequence " + sequence;
    line.append(link);
    for (const text of [label, document_, source, n.toLocaleString("en") + " tokens"]) {
      if (text === null || text === undefined || text === "") continue;
      const span = document.createElement("span");
      span.className = "about";
      span.textContent = text;
      line.append(span);
    }
    return line;
  }

  function draw(force) {
    if (!S || !S.lineStart) return;
    const { element, lineStart, lineHead } = S;
    const first = Math.max(0, Math.floor((element.scrollTop - PAD) / LINE) - 5);
    const last = Math.min(lineStart.length - 2, Math.ceil((element.scrollTop + element.clientHeight) / LINE) + 5);
    if (!force && S.drawn && S.drawn[0] === first && S.drawn[1] === last) return;
    S.drawn = [first, last];
    const fragment = document.createDocumentFragment();
    for (let l = first; l <= last; l++) {
      const line = lineHead[l] >= 0 ? heading(lineHead[l]) : document.createElement("div");
      if (lineHead[l] < 0) line.className = "tokline";
      line.style.top = PAD + l * LINE + "px";
      if (lineHead[l] === -1) {
        for (let g = lineStart[l]; g < lineStart[l + 1]; g++) {
          const span = document.createElement("span");
          span.dataset.i = S.segToken[g];
          span.textContent = S.segPart[g].text;
          dress(span, S.segToken[g]);
          line.append(span);
        }
      }
      fragment.append(line);
    }
    S.canvas.replaceChildren(fragment);
    clearTimeout(S.waiting);
    S.waiting = setTimeout(askChosen, 150);
  }

  /* The experts of the tokens in sight, for the line under the text; asked for once the view has come to rest. */
  function askChosen() {
    if (!S || !S.drawn || !S.paint || !document.getElementById("tokview")) return;
    const from = S.segToken[S.lineStart[S.drawn[0]]], to = S.segToken[Math.min(S.lineStart[S.drawn[1] + 1], S.segToken.length) - 1];
    if (from === undefined || to === undefined) return;
    const layer = new URLSearchParams(window.location.search).get("layer");
    const asked = { view: layer ? "?layer=" + layer : "?", first: tokenNumber(from), last: tokenNumber(to) };
    const key = JSON.stringify([S.text.key, asked]);
    if (key === ASKED) return;
    ASKED = key;
    window.dash_clientside.set_props("token-window", { data: asked });
  }

  function reveal(t) {
    const top = S.lineOf[t] * LINE;
    const { scrollTop, clientHeight } = S.element;
    if (top < scrollTop || top > scrollTop + clientHeight - 2 * LINE) S.element.scrollTop = Math.max(0, top - clientHeight / 3);
  }

  function topToken() {
    const line = Math.max(0, Math.floor((S.element.scrollTop - PAD) / LINE));
    return S.lineStart ? S.segToken[Math.min(S.lineStart[line], S.segToken.length - 1)] : 0;
  }

  function sequenceOf(t) {
    const all = S.text.sequences;
    let low = 0, high = all.length - 1;
    while (low < high) { const middle = (low + high + 1) >> 1; if (all[middle][0] <= t) low = middle; else high = middle - 1; }
    return low;
  }

  /* All chosen experts with their weights where they have come, else the one that colours the token. */
  function experts(t) {
    const layer = new URLSearchParams(window.location.search).get("layer");
    const known = CHOSEN && CHOSEN.view === (layer ? "?layer=" + layer : "?") ? CHOSEN.chosen[tokenNumber(t)] : undefined;
    if (known) return " · " + CHOSEN.router + ": " + known[0].map((e, i) => "E" + e + (known[1][i] === undefined || known[1][i] === null ? "" : " " + known[1][i].toFixed(3))).join(", ");
    if (S.paint.kind !== "experts") return "";
    const value = S.values[t];
    return value === S.paint.absent ? " · routing not recorded" : " · E" + value;
  }

  function about(t) {
    const piece = S.numbers[t] === 0 ? "(part of a character)" : JSON.stringify(S.text.pieces[S.numbers[t]].replaceAll("\n", ""));
    const s = sequenceOf(t), [start, sequence, , , length] = S.text.sequences[s];
    let text = piece.slice(0, 80) + " · token " + tokenNumber(t).toLocaleString("en") + " · " + (t - start + 1).toLocaleString("en") +
      " of " + length.toLocaleString("en") + " in sequence " + sequence;
    const paint = S.paint;
    if (!paint) return text;
    text += experts(t);
    const value = S.values[t];
    if (paint.kind === "changes") text += " · " + difference(t);
    else if (paint.kind === "scale") {
      if (value === 255) text += " · " + paint.name + " not recorded";
      else {
        const number = paint.low + (value / 254) * (paint.high - paint.low);
        const sign = paint.silent ? (value === 0 ? " = " : " ≈ ") : value === 0 ? " ≤ " : value === 254 ? " ≥ " : " ≈ ";
        text += " · " + paint.name + sign + (value === 0 && paint.silent ? "0" : number.toPrecision(2)) + (paint.unit ? " " + paint.unit : "");
      }
    }
    if (S.hits && S.hits[t] > 0 && paint.focus !== null && paint.kind !== "changes") text += " · E" + paint.focus + " in slot " + S.hits[t];
    return text;
  }

  function difference(t) {
    const swapped = S.swapped[t];
    if (swapped === 255) return "not recorded in both runs";
    const kind = { 2: ", E" + S.paint.focus + " lost", 3: ", E" + S.paint.focus + " gained" }[S.values[t]] || "";
    return (swapped === 0 ? "the same experts as in " : swapped + (swapped === 1 ? " expert differs from " : " experts differ from ")) + S.paint.other + kind;
  }

  /* Matches are the hits of the filter, the text searched for, or tokens that are both. */
  function match(jump) {
    S.found = null;
    const wanted = Q.toLowerCase();
    if (wanted) {
      const lower = S.text.pieces.map((piece) => piece.replaceAll("↵\n", "\n").toLowerCase());
      const offsets = new Int32Array(S.numbers.length + 1);
      const texts = [];
      for (let t = 0; t < S.numbers.length; t++) {
        const piece = S.starts.has(t) ? "\u0000" + lower[S.numbers[t]] : lower[S.numbers[t]];
        texts.push(piece);
        offsets[t + 1] = offsets[t] + piece.length;
      }
      const whole = texts.join("");
      S.found = new Uint8Array(S.numbers.length);
      let t = 0;
      S.places = [];
      for (let at = whole.indexOf(wanted); at >= 0; at = whole.indexOf(wanted, at + wanted.length)) {
        while (offsets[t + 1] <= at) t++;
        const start = t;
        let any = !S.hits;
        for (let u = t; u < S.numbers.length && offsets[u] < at + wanted.length; u++) any = any || S.hits[u] > 0;
        if (!any) continue;
        for (let u = t; u < S.numbers.length && offsets[u] < at + wanted.length; u++) S.found[u] = 1;
        S.places.push(start);
      }
    } else if (S.hits) S.places = Array.from(S.hits.keys()).filter((t) => S.hits[t] > 0);
    else S.places = null;
    S.at = -1;
    S.current = -1;
    if (S.places && S.places.length && jump) step(1, topToken()); else count();
  }

  function step(by, from) {
    if (!S || !S.places || !S.places.length) return;
    if (from !== undefined) S.at = Math.max(0, S.places.findIndex((t) => t >= from));
    else S.at = (S.at + by + S.places.length) % S.places.length;
    S.current = S.places[S.at];
    reveal(S.current);
    draw(true);
    count();
  }

  function count() {
    const box = document.getElementById("match-box");
    if (!box) return;
    box.style.visibility = S.places ? "visible" : "hidden";
    const n = S.places ? S.places.length : 0;
    document.getElementById("match-count").textContent =
      n === 0 ? "no match" : (S.hits && Q ? "both: " : "") + (S.at >= 0 ? (S.at + 1).toLocaleString("en") + " of " : "") + n.toLocaleString("en");
  }

  function attach(element) {
    if (attached.has(element)) return attached.get(element);
    const canvas = document.createElement("div");
    canvas.className = "tokcanvas";
    const tip = document.createElement("div");
    tip.className = "toktip";
    tip.setAttribute("role", "status");
    element.replaceChildren(canvas);
    element.after(tip);
    attached.set(element, canvas);
    const at = (event) => { const span = event.target.closest("[data-i]"); return span ? Number(span.dataset.i) : -1; };
    const say = (t) => { tip.textContent = S === null || t < 0 ? "" : about(t); };
    element.addEventListener("mouseover", (event) => say(at(event)));
    element.addEventListener("mouseleave", () => say(-1));
    element.addEventListener("click", (event) => {
      const sequence = event.target.closest("[data-sequence]");
      if (sequence) { event.preventDefault(); window.moescope.change({ sequence: sequence.dataset.sequence, token: "", page: "" }); return; }
      const t = at(event);
      if (S && t >= 0 && event.shiftKey && S.cursor >= 0) { reach(S.cursor, t); return; }
      if (!S || t < 0 || String(window.getSelection()).length > 0) return;  // text was just selected
      S.range = null;
      { S.cursor = t; window.moescope.change({ token: tokenNumber(t) }); }
    });
    element.addEventListener("keydown", (event) => {
      if (!S || !S.lineStart) return;
      const here = event.shiftKey && S.range ? S.far : S.cursor >= 0 ? S.cursor : topToken();
      const line = S.lineOf[here];
      const move = { ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: below(line, 1), ArrowUp: below(line, -1) }[event.key];
      const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
      if (plain && { n: 1, p: -1 }[event.key]) { step({ n: 1, p: -1 }[event.key]); return; }
      if (plain && { "]": 1, "[": -1 }[event.key]) { turn({ "]": 1, "[": -1 }[event.key]); return; }
      if (event.key === "Escape" && S.range) { S.range = null; draw(true); return; }
      if (event.key === "Enter" && S.cursor >= 0) window.moescope.change({ token: tokenNumber(S.cursor) });
      if (move === undefined) return;
      event.preventDefault();
      const there = Math.min(S.numbers.length - 1, Math.max(0, move));
      if (event.shiftKey) {
        if (S.cursor < 0) S.cursor = topToken();
        reveal(there);
        reach(S.cursor, there);
        say(there);
        return;
      }
      S.range = null;
      S.cursor = there;
      reveal(S.cursor);
      draw(true);
      say(S.cursor);
    });
    element.addEventListener("copy", (event) => {
      const range = S && (S.range || marked());
      if (!range || !event.clipboardData) return;
      event.clipboardData.setData("text/plain", plainText(range));
      event.preventDefault();
    });
    let waiting = false;
    element.addEventListener("scroll", () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; draw(false); });
    });
    new ResizeObserver(() => {
      if (!S || S.element !== element || element.clientWidth === 0) return;
      if (element.clientWidth !== S.width) {
        const top = element.scrollTop > 0 ? topToken() : -1;
        breakLines();
        element.scrollTop = top < 0 ? 0 : S.lineOf[top] * LINE;
        if (S.selected >= 0) reveal(S.selected);
      }
      draw(true);
    }).observe(element);
    return canvas;
  }

  function below(line, by) {
    let l = line + by;
    while (l >= 0 && l < S.lineHead.length && (S.lineHead[l] !== -1 || S.lineStart[l] === S.lineStart[l + 1])) l += by;
    return l >= 0 && l < S.lineHead.length ? S.segToken[S.lineStart[l]] : S.cursor;
  }

  /* Tokens that stay selected when their lines are no longer drawn. */
  function reach(from, to) {
    S.far = to;
    S.range = [Math.min(from, to), Math.max(from, to)];
    draw(true);
  }

  /* The tokens of the browser's own selection. */
  function marked() {
    const selection = window.getSelection();
    if (!selection || selection.isCollapsed) return null;
    const ends = [selection.anchorNode, selection.focusNode].map((node) => {
      const span = node && (node.nodeType === 1 ? node : node.parentElement)?.closest("[data-i]");
      return span && S.element.contains(span) ? Number(span.dataset.i) : -1;
    });
    return ends.includes(-1) ? null : [Math.min(...ends), Math.max(...ends)];
  }

  /* The text of tokens without the marks that show line breaks; sequences are parted by an empty line. */
  function plainText([from, to]) {
    const parts = [];
    for (let t = from; t <= to; t++) {
      if (t > from && S.starts.has(t)) parts.push("\n\n");
      parts.push(S.text.pieces[S.numbers[t]].replaceAll("↵\n", "\n"));
    }
    return parts.join("");
  }

  /* To the next sequence: in sight where this page has it, else on the next page, or the neighbour of the only one shown. */
  function turn(by) {
    if (!S || !S.lineStart) return;
    const all = S.text.sequences;
    const params = new URLSearchParams(window.location.search);
    if (all.length === 1 && params.get("sequence")) {
      const next = BESIDE && BESIDE[by > 0 ? 1 : 0];
      if (next !== null && next !== undefined) window.moescope.change({ sequence: next, token: "" });
      return;
    }
    let s = S.turned !== undefined && Math.abs(S.turnedTop - S.element.scrollTop) < 2 ? S.turned : sequenceOf(topToken());
    s += by;
    if (s < 0 || s >= all.length) {
      const page = Number(params.get("page") || 1) + by;
      const last = Number(document.getElementById("tokens-page")?.dataset.pages || 1);
      if (page >= 1 && page <= last) window.moescope.change({ page: page === 1 ? "" : page, token: "" });
      return;
    }
    const head = S.lineHead.indexOf(s);
    S.element.scrollTop = Math.max(0, head * LINE);
    S.cursor = all[s][0];
    S.turned = s;
    S.turnedTop = S.element.scrollTop;
    draw(true);
  }

  function setText(element, text) {
    const canvas = attach(element);
    S = { element, canvas, text, numbers: unpack(text.numbers), special: new Set(text.special), cursor: -1, selected: -1, current: -1,
          starts: new Set(text.sequences.map(([start]) => start)), paint: null, swapped: null, range: null, far: -1, hits: null, found: null, places: null, at: -1 };
    element.scrollTop = 0;
    breakLines();
  }

  function setPaint(paint) {
    S.paint = paint;
    S.values = unpack(paint);
    S.hits = paint.hits ? unpack(paint.hits) : null;
    S.swapped = paint.swapped ? unpack(paint.swapped) : null;
    S.pinOf = new Map((paint.pins || []).map((expert, i) => [expert, i]));
  }

  function select(token) {
    TOKEN = token;
    if (!S) return;
    S.selected = token === null ? -1 : indexOf(token);
    if (S.selected >= 0) reveal(S.selected);
    draw(true);
  }

  /* Colours are asked for by the view itself, as soon as the address changes: the frame's controls follow in their own time. */
  function wantColours(run) {
    const page = document.getElementById("tokens-page");
    if (!page || window.location.pathname !== "/tokens") return;
    const params = new URLSearchParams(window.location.search), kept = new URLSearchParams();
    kept.set("run", params.get("run") || run);
    if (kept.get("run") !== run) return;  // another run: its page is on its way
    for (const name of page.dataset.paint.split(".")) if (params.get(name)) kept.set(name, params.get(name));
    const wanted = kept.toString();
    if (wanted === WANTED && document.getElementById("tokview") === VIEW) return;
    WANTED = wanted;
    VIEW = document.getElementById("tokview");
    fetch("/tokens/colours?" + wanted).then((answer) => (answer.ok ? answer.json() : null)).then((paint) => {
      if (wanted !== WANTED) return;
      const before = S && S.paint && S.paint.wanted;
      PAINT = paint;
      if (!S || S.element !== VIEW) return;
      if (paint && paint.key === S.text.key) {
        setPaint(paint);
        S.element.dataset.ready = "painted";
      } else if (!paint) { Object.assign(S, { paint: null, hits: null }); S.element.dataset.ready = "text"; }
      if (!paint || S.paint && S.paint.wanted !== before) match(TOKEN === null);
      draw(true);
    }).catch(() => { if (wanted === WANTED) WANTED = null; });
  }

  window.addEventListener("popstate", () => {
    const run = document.getElementById("tokens-page")?.dataset.run;
    if (run) wantColours(run);
  });

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    tokens: Object.assign({}, window.dash_clientside && window.dash_clientside.tokens, {
      show(text, palette) {
        const element = document.getElementById("tokview");
        if (!element) return;
        PALETTE = palette;
        if (!text) { S = null; attach(element).replaceChildren(); return; }
        setText(element, text);
        if (PAINT && PAINT.key === text.key) setPaint(PAINT);
        match(TOKEN === null);
        select(TOKEN);
        element.dataset.ready = S.paint ? "painted" : "text";
      },
      paint(_search, run) { if (run) wantColours(run); },
      /* The address of the text: what is in focus decides it only where the filter asks for that. */
      part(search, wanted, current) {
        const params = new URLSearchParams(search || "");
        const of = { expert: ["layer", "expert"], feature: ["sae", "feature"] }[params.get("only")] || [];
        const conditional = ["layer", "expert", "sae", "feature"];
        return window.dash_clientside.moescope.slice(search, wanted.filter((name) => !conditional.includes(name) || of.includes(name)), current);
      },
      chosen(data) { CHOSEN = data; },
      beside(data) { BESIDE = data; },
      arranged(view, mode) {
        const page = document.getElementById("tokens-page");
        if (page) { page.dataset.view = view || "text"; page.dataset.mode = mode || ""; }
      },
      find(q) {
        if (Q === (q || "")) return;
        Q = q || "";
        if (!S) return;
        match(true);
        draw(true);
      },
      select(search) {
        const token = new URLSearchParams(search || "").get("token");
        select(/^\d+$/.test(token || "") ? Number(token) : null);
      },
    }),
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest && event.target.closest("#match-next, #match-previous, #sequence-next, #sequence-previous");
    if (button) (button.id.startsWith("match") ? step : turn)(button.id.endsWith("next") ? 1 : -1);
  });
})();
