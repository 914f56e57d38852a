/* The overview: two runs ticked are compared; findings are asked for a few at a time until all are there or someone cancels. */
(function () {
  "use strict";
  const no = () => window.dash_clientside.no_update;
  const set = (id, props) => window.dash_clientside.set_props(id, props);
  /* One round a page view or press of a button: what an older round still brings is left aside. */
  let round = 0;
  let cancelled = false;

  function ask(run, names, at) {
    set("ov-next", { data: { run, names, at, round } });
  }

  const many = (n) => n.toLocaleString("en-US");

  function progress(done, total, plan, rows) {
    const rest = plan.later.length;
    const missing = plan.absent ? `; ${plan.absent} need records that this run does not have` : "";
    const waiting = rest && total === plan.names.length
      ? `; ${rest} more read all ${many(plan.decisions)} decisions and wait for your word`
      : "";
    const text = done < total
      ? `${done} of ${total} analyses asked${cancelled ? ", cancelled" : " …"}`
      : `${rows} findings of ${total} analyses${missing}${waiting}`;
    set("ov-progress", { children: text });
    set("ov-cancel", { children: cancelled ? "Go on" : "Cancel", style: { display: done < total ? "" : "none" } });
    set("ov-more", { style: { display: done >= total && waiting ? "" : "none" } });
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    overview: {
      ticked(rows) {
        const n = (rows || []).length;
        if (n === 2) return ["Compare the two", false];
        return [n > 2 ? "Tick only two to compare" : "Tick two to compare", true];
      },
      /* The panel of a finding that was just chosen comes into view. */
      reveal(children) {
        const panel = document.getElementById("ov-finding-panel");
        if (children && panel) requestAnimationFrame(() => panel.scrollIntoView({ block: "nearest" }));
        return no();
      },
      /* The older of the two is the one the other is held against. */
      compare(clicks, rows) {
        if (!clicks || !rows || rows.length !== 2) return no();
        const [first, second] = [...rows].sort((a, b) => (a.begun < b.begun ? -1 : 1));
        const query = new URLSearchParams([["run", first.name], ["other", second.name]]);
        window.moescope.open("/compare?" + query);
        return no();
      },
      begin(plan, more) {
        if (!plan) return no();
        const again = window.dash_clientside.callback_context.triggered.some(({ prop_id: id }) => id.startsWith("ov-more"));
        const names = again && more ? [...plan.names, ...plan.later] : plan.names;
        round += 1;
        cancelled = false;
        if (!names.length) { progress(0, 0, plan, 0); return no(); }
        const mine = round;
        /* What is in view comes first. */
        setTimeout(() => { if (mine === round) ask(plan.run, names, again ? plan.names.length : 0); }, again ? 0 : 700);
        return no();
      },
      cancel(clicks, plan) {
        if (!clicks || !plan) return no();
        cancelled = !cancelled;
        const next = window.moescopeFindings;
        if (next && next.run === plan.run) {
          progress(next.at, next.names.length, plan, next.rows);
          if (!cancelled && !next.busy) { next.busy = true; ask(plan.run, next.names, next.at); }
        }
        return no();
      },
      take(part, held, plan) {
        if (!part || !plan || part.run !== plan.run || part.round !== round) return [no(), no()];
        const names = part.total === plan.names.length ? plan.names : [...plan.names, ...plan.later];
        const known = new Set(part.rows.map(({ id }) => id));
        const rows = [...held.rows.filter(({ id }) => !known.has(id)), ...part.rows];
        const refused = [...held.refused, ...part.refused];
        const over = part.at >= part.total;
        window.moescopeFindings = { run: plan.run, names, at: part.at, rows: rows.length, busy: !over && !cancelled };
        progress(part.at, part.total, plan, rows.length);
        if (!over && !cancelled) ask(plan.run, names, part.at);
        if (over) {
          const words = refused.map(({ name, reason }) => `${name}: ${reason}`).join("; ");
          set("ov-refused", { children: words ? `Without an answer: ${words}.` : "", className: "muted foreign" });
        }
        return [rows, { rows, refused }];
      },
    },
  });
})();
