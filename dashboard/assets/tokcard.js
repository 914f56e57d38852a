/* A token's path through the layers: a compact table, drawn from plain data. Text goes through textContent. */
(function () {
  "use strict";

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function anchor(text, href, className) {
    const made = element("a", className, text);
    made.href = href;
    made.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      window.moescope.open(href);
    });
    return made;
  }

  function experts(row) {
    if (typeof row.experts === "string") return element("span", "soft", row.experts);
    const list = element("div", "path-experts");
    for (const { name, href, weight, norm } of row.experts) {
      const chip = element("span", "path-expert");
      chip.append(anchor(name, href), " " + weight);
      if (norm) chip.append(element("span", "soft", " ‖" + norm + "‖"));
      list.append(chip);
    }
    return list;
  }

  function number(text) {
    const cell = element("td", "number");
    cell.append(/^[\d−—.,]/.test(text) ? text : element("span", "soft", text));
    return cell;
  }

  function residual(row) {
    const cell = number(row.residual);
    if (row.largest.length) cell.title = "largest: " + row.largest.join("; ");
    if (row.massive.length) {
      cell.prepend(element("span", "massive-mark", "▲ "));
      cell.title = "massive activation, " + row.massive.join("; ");
    }
    return cell;
  }

  function line(row) {
    const made = element("tr", row.here ? "path-here" : "");
    const name = element("td", "soft");
    name.append(anchor(row.name, row.href));
    const chosen = element("td");
    chosen.append(experts(row));
    made.append(name, chosen, number(row.margin), number(row.entropy), residual(row));
    return made;
  }

  function massive(rows) {
    const found = rows.filter((row) => row.massive.length);
    if (!found.length) return null;
    const note = element("p", "muted massive-note");
    note.append(element("span", "massive-mark", "▲ "), "Massive activation at the output of ");
    note.append(found.map((row) => row.name + " (" + row.massive.join("; ") + ")").join(", ") + ".");
    return note;
  }

  function channels(rows) {
    const found = rows.filter((row) => row.largest.length);
    if (!found.length) return null;
    const details = element("details", "path-channels");
    details.append(element("summary", "", "Largest channels of the residual stream"));
    const list = element("table", "small-table path-largest");
    for (const row of found) {
      const made = element("tr");
      made.append(element("td", "soft", row.name), ...row.largest.map((text) => element("td", "number", text.replace("channel ", "c"))));
      list.append(made);
    }
    details.append(list);
    return details;
  }

  function fill(place, rows) {
    const table = element("table", "small-table path");
    const head = element("tr");
    ["layer", "experts · weight" + (rows.some((r) => r.experts.some && r.experts.some((e) => e.norm)) ? " ‖output‖" : ""), "margin", "entropy", "‖residual‖"]
      .forEach((name, i) => head.append(element("th", i > 1 ? "number" : "", name)));
    const body = element("tbody");
    body.append(...rows.map(line));
    const top = element("thead");
    top.append(head);
    table.append(top, body);
    const note = element("p", "muted", "Entropy in nats; experts by weight; norms at the layer's output.");
    place.replaceChildren(...[massive(rows), table, note, channels(rows)].filter(Boolean));
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    tokens: Object.assign({}, window.dash_clientside && window.dash_clientside.tokens, {
      path(data) {
        let tries = 120;
        (function look() {
          const place = document.getElementById("token-path");
          if (!data) return;
          if (place) fill(place, data.rows);
          else if ((tries -= 1) > 0) requestAnimationFrame(look);
        })();
      },
    }),
  });
})();
