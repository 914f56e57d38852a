/* Coloured tokens of a long text: lines are broken once, and only those in sight are drawn. Text goes through textContent. */
(function () {
  "use strict";
  const LINE = 22, PAD = 10, SPARE = 6, GAP = 1;
  let S = null;   // the view: element, text, paint, lines
  let Q = "", TOKEN = null, PALETTE = [];
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
      if (paint.kind === "experts") {
        const pin = S.pinOf.get(value);
        classes.push(value === paint.absent ? "absent" : pin === undefined ? "rest" : "pin" + pin);
      } else if (value === 255) classes.push("absent");
      else { span.style.background = PALETTE[value][0]; span.style.color = PALETTE[value][1]; }
      if (S.hits && S.hits[t]) classes.push(S.hits[t] === 1 ? "hit" : "hit later");
    }
    if (S.found && S.found[t]) classes.push("found");
    if (t === S.current) classes.push("current");
    if (t === S.cursor) classes.push("cursor");
    if (t === S.selected) classes.push("selected");
    span.className = classes.join(" ");
  }

  function heading(s) {
    const [, sequence, label, source, n] = S.text.sequences[s];
    const line = document.createElement("div");
    line.className = "tokline sequence";
    const link = document.createElement("a");
    link.dataset.sequence = sequence;
    link.href = "#";
    link.textContent = "Sequence " + sequence;
    line.append(link);
    for (const text of [label, source, n.toLocaleString("en") + " tokens"]) {
      if (text === null || text === undefined) continue;
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

  function about(t) {
    const piece = S.numbers[t] === 0 ? "(part of a character)" : JSON.stringify(S.text.pieces[S.numbers[t]].replaceAll("\n", ""));
    let text = piece.slice(0, 80) + " · token " + tokenNumber(t).toLocaleString("en");
    const paint = S.paint;
    if (!paint) return text;
    const value = S.values[t];
    if (paint.kind === "experts") text += value === paint.absent ? " · routing not recorded" : " · E" + value;
    else if (value === 255) text += " · " + paint.name + " not recorded";
    else {
      const number = paint.low + (value / 254) * (paint.high - paint.low);
      const sign = value === 0 ? " ≤ " : value === 254 ? " ≥ " : " ≈ ";
      text += " · " + paint.name + sign + number.toPrecision(2) + (paint.unit ? " " + paint.unit : "");
    }
    if (S.hits && S.hits[t] > 0 && paint.focus !== null) text += " · E" + paint.focus + " in slot " + S.hits[t];
    return text;
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
      if (S && t >= 0) { S.cursor = t; window.moescope.change({ token: tokenNumber(t) }); }
    });
    element.addEventListener("keydown", (event) => {
      if (!S || !S.lineStart) return;
      const here = S.cursor >= 0 ? S.cursor : topToken();
      const line = S.lineOf[here];
      const move = { ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: below(line, 1), ArrowUp: below(line, -1) }[event.key];
      if (event.key === "Enter" && S.cursor >= 0) window.moescope.change({ token: tokenNumber(S.cursor) });
      if (move === undefined) return;
      event.preventDefault();
      S.cursor = Math.min(S.numbers.length - 1, Math.max(0, move));
      reveal(S.cursor);
      draw(true);
      say(S.cursor);
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

  function setText(element, text) {
    const canvas = attach(element);
    S = { element, canvas, text, numbers: unpack(text.numbers), special: new Set(text.special), cursor: -1, selected: -1, current: -1,
          starts: new Set(text.sequences.map(([start]) => start)), paint: null, hits: null, found: null, places: null, at: -1 };
    element.scrollTop = 0;
    breakLines();
  }

  function setPaint(paint) {
    S.paint = paint;
    S.values = unpack(paint);
    S.hits = paint.hits ? unpack(paint.hits) : null;
    S.pinOf = new Map((paint.pins || []).map((expert, i) => [expert, i]));
  }

  function select(token) {
    TOKEN = token;
    if (!S) return;
    S.selected = token === null ? -1 : indexOf(token);
    if (S.selected >= 0) reveal(S.selected);
    draw(true);
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    tokens: {
      show(text, paint, palette) {
        const element = document.getElementById("tokview");
        if (!element) return;
        PALETTE = palette;
        if (!text) { S = null; attach(element).replaceChildren(); return; }
        const fresh = !S || S.element !== element || S.text !== text;
        if (fresh) setText(element, text);
        const before = S.paint && S.paint.wanted;
        if (paint && paint.key === text.key) setPaint(paint);
        if (fresh || (S.paint && S.paint.wanted !== before)) match(TOKEN === null);
        select(TOKEN);
        element.dataset.ready = S.paint ? "painted" : "text";
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
    },
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest && event.target.closest("#match-next, #match-previous");
    if (button) step(button.id === "match-next" ? 1 : -1);
  });
})();
