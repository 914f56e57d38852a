/* The frame: links that keep the selection, chips, keys, undo, and a server that went away. */
(function () {
  "use strict";
  const no = () => window.dash_clientside.no_update;
  const SHARED = ["run", "layer", "expert", "head", "token", "sae", "feature", "edits"];
  window.moescope = window.moescope || {};
  const frame = (window.moescope.frame = {});

  /* Text in an element; nothing is ever read as HTML. */
  function made(tag, props, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(props || {}))
      if (name === "class") element.className = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  frame.made = made;

  const READABLE = { "%3D": "=", "%2C": ",", "%3B": ";", "%3A": ":", "%2F": "/" };
  const written = (params) => params.toString().replace(/%(3D|2C|3B|3A|2F)/g, (code) => READABLE[code]);

  /* A page, with what is selected now and some of it changed. */
  function selected(path, changes) {
    const now = new URLSearchParams(window.location.search);
    const kept = new URLSearchParams();
    for (const name of SHARED) {
      const value = changes && name in changes ? changes[name] : now.get(name);
      if (value !== null && value !== undefined && value !== "") kept.set(name, value);
    }
    for (const [name, value] of Object.entries(changes || {}))
      if (!SHARED.includes(name) && value !== null && value !== "") kept.set(name, value);
    const query = written(kept);
    return path + (query ? "?" + query : "");
  }
  frame.selected = selected;

  function follow(event) {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    window.moescope.open(event.currentTarget.getAttribute("href"));
  }

  /* What is selected, as words, the page that shows it, and what taking it away changes. */
  function selection(params) {
    const [layer, expert, head, token] = ["layer", "expert", "head", "token"].map((name) => params.get(name));
    const place = layer === null ? null : "L" + layer.replace(".", " ");
    const whose = (letter, number) => (place === null ? "" : place + "·") + letter + number;
    const chips = [];
    if (expert !== null) {
      const name = Number(expert) < 0 ? whose("S", -Number(expert)) : whose("E", expert);
      chips.push([name, "/experts", head === null ? { expert: "", layer: "" } : { expert: "" }]);
    }
    if (head !== null) chips.push([whose("H", head), "/phenomena", expert === null ? { head: "", layer: "" } : { head: "" }]);
    if (layer !== null && expert === null && head === null) chips.push([place, "/experts", { layer: "" }]);
    if (token !== null) chips.push(["token " + token, "/tokens", { token: "" }]);
    const sae = params.get("sae");
    const feature = params.get("feature");
    if (feature !== null) chips.push(["feature " + feature, "/features", { feature: "" }]);
    else if (sae !== null) chips.push(["SAE " + sae, "/features", { sae: "" }]);
    const edits = (params.get("edits") || "").split(";").filter((edit) => edit.trim()).length;
    if (edits) chips.push([edits + (edits === 1 ? " edit → Lab" : " edits → Lab"), "/lab", { edits: "" }]);
    return chips;
  }

  /* Views of this visit, for the undo button: Back must not leave the app. */
  const visited = [];
  function visit() {
    const here = window.location.pathname + window.location.search;
    if (visited[visited.length - 1] === here) return;
    if (visited[visited.length - 2] === here) visited.pop();
    else visited.push(here);
  }
  frame.undo = () => { if (visited.length > 1) window.history.back(); };

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    frame: {
      links(pathname, _search, active, ids) {
        const run = active && active.run ? { run: new URLSearchParams(window.location.search).get("run") || active.run } : {};
        return [ids.map(({ nav }) => selected(nav, run)), ids.map(({ nav }) => nav === pathname)];
      },
      chips(_pathname, search) {
        visit();
        const box = document.getElementById("chips");
        if (!box) return no();
        const chips = selection(new URLSearchParams(search || "")).map(([name, path, without]) =>
          made("span", { class: "selected" },
            made("a", { href: selected(path), class: "foreign", onclick: follow }, name),
            made("button", { type: "button", "aria-label": "Remove " + name + " from the selection", title: "Remove",
              onclick: () => window.moescope.change(without) }, "×")));
        box.replaceChildren(...chips);
        const button = document.getElementById("undo");
        if (button) button.disabled = visited.length < 2;
        return no();
      },
    },
  });

  document.addEventListener("click", (event) => {
    if (event.target.closest("#undo")) frame.undo();
    const opener = event.target.closest("[data-open]");
    if (opener) window.moescope.open(opener.dataset.open);
    /* The skip link moves the focus without a word in the address. */
    if (event.target.closest(".skip")) { event.preventDefault(); document.getElementById("content").focus(); }
  });

  /* Keys, never while something is typed. */
  const typing = (target) => target.closest && target.closest("input, textarea, select, [contenteditable=true], .ag-cell-inline-editing, dialog");
  let waiting = false;
  function search() {
    const field = [...document.querySelectorAll(".content input[type=search], .content [data-search], .content [id*='\"url\":\"q\"'], .content input[type=text], .content textarea")]
      .find((input) => input.offsetParent !== null && !input.disabled);
    if (field) field.focus(); else window.moescope.palette.open();
  }
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && !event.altKey && event.key.toLowerCase() === "k") {
      event.preventDefault();
      window.moescope.palette.toggle();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || typing(event.target)) { waiting = false; return; }
    const key = event.key;
    if (waiting) {
      waiting = false;
      const page = window.moescope.palette.pages().find((entry) => entry.key === key.toLowerCase());
      if (page) { event.preventDefault(); window.moescope.open(selected(page.path)); }
      return;
    }
    if (key === "g") { waiting = true; setTimeout(() => { waiting = false; }, 1500); return; }
    const action = { "/": search, "?": () => window.moescope.palette.keys(), u: frame.undo }[key];
    if (action) { event.preventDefault(); action(); }
  });

  /* The server went away: say so, and send what could not be sent once it is back. */
  const plain = window.fetch.bind(window);
  let back = null;
  function lost() {
    if (back) return back;
    const box = document.getElementById("lost");
    const command = "moescope dashboard " + (box ? box.dataset.store : "STORE") + (window.location.port ? " --port " + window.location.port : "");
    if (box) {
      const words = "The server does not answer: it was stopped, or this machine slept. What is on the page still holds, and what you asked is asked again once the server is back. Start it again: ";
      box.replaceChildren(made("span", { "aria-hidden": "true" }, "▲ "), words, made("code", { class: "foreign" }, command));
    }
    back = new Promise((resolve) => {
      const timer = setInterval(() => {
        plain("/assets/app.css", { method: "HEAD", cache: "no-store" }).then((answer) => {
          if (!answer.ok) return;
          clearInterval(timer);
          back = null;
          if (box) box.replaceChildren();
          resolve();
        }, () => undefined);
      }, 1500);
    });
    return back;
  }
  window.fetch = function (resource, options) {
    const own = String(resource && resource.url ? resource.url : resource);
    if (!/_dash-(update-component|layout|dependencies)/.test(own)) return plain(resource, options);
    const attempt = () => plain(resource, options).catch((failure) => {
      const aborted = failure && failure.name === "AbortError";
      if (aborted || (options && options.signal && options.signal.aborted)) throw failure;
      return lost().then(attempt);
    });
    return attempt();
  };
})();
