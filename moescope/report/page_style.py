"""The style sheet and the script of a report: light and dark, contents at the side, figures drawn when they are seen."""

STYLE = """
:root { color-scheme: light; --page: #fff; --ink: #1a1b1e; --soft: #5c636a; --line: #dee2e6; --faint: #f1f3f5;
  --block: #f8f9fa; --link: #0b5394; --warn: #fff3cd; --warn-line: #b8860b; }
:root[data-theme=dark] { color-scheme: dark; --page: #17191c; --ink: #e3e5e8; --soft: #a3a9b1; --line: #3a3f45;
  --faint: #262a2e; --block: #1f2226; --link: #86b7ff; --warn: #3a3113; --warn-line: #b8860b; }
* { box-sizing: border-box; }
html { scroll-padding-top: 12px; }
body { font: 14px/21px system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif; color: var(--ink); margin: 0;
  background: var(--page); font-variant-numeric: tabular-nums; display: grid; grid-template-columns: 250px minmax(0, 1fr); }
nav { position: sticky; top: 0; height: 100vh; overflow-y: auto; padding: 20px 12px 24px 20px; font-size: 13px; line-height: 19px;
  border-right: 1px solid var(--line); background: var(--block); }
nav ul { list-style: none; margin: 0 0 6px; padding: 0 0 0 12px; }
nav > details > ul { padding: 0; }
nav li { padding: 1px 0; overflow-wrap: break-word; }
nav summary { font-weight: 600; margin-bottom: 6px; }
nav a { color: inherit; text-decoration: none; } nav a:hover, nav a:focus-visible { text-decoration: underline; }
nav ul ul a { color: var(--soft); }
main { padding: 12px 32px 64px; max-width: 1240px; width: 100%; }
a { color: var(--link); }
h1 { font-size: 24px; line-height: 32px; font-weight: 600; margin: 40px 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 17px; line-height: 25px; font-weight: 600; margin: 24px 0 4px; overflow-wrap: anywhere; }
p { max-width: 92ch; margin: 8px 0; overflow-wrap: anywhere; }
section { border-top: 1px solid var(--line); padding-top: 4px; margin-top: 28px; }
table { border-collapse: collapse; font-size: 13px; line-height: 19px; }
th, td { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--faint);
  unicode-bidi: isolate; overflow-wrap: break-word; min-width: 3em; }
thead th { border-bottom: 1px solid var(--line); vertical-align: bottom; position: sticky; top: 0; background: var(--page); }
.n { text-align: right; white-space: nowrap; }
thead th.n { white-space: normal; }
td b { font-weight: 600; }
.facts th { font-weight: 400; color: var(--soft); white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.scroll { max-height: 460px; overflow: auto; }
.wide { overflow-x: auto; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit; }
th button:hover, th button:focus-visible { text-decoration: underline; }
th[aria-sort=ascending] button::after { content: ' \\2191'; } th[aria-sort=descending] button::after { content: ' \\2193'; }
.muted { color: var(--soft); }
.warning { background: var(--warn); border: 1px solid var(--warn-line); padding: 8px 12px; }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12.5px; }
pre { background: var(--block); padding: 12px; overflow: auto; white-space: pre-wrap; }
.figure { min-height: 200px; margin: 8px 0; overflow-x: auto; }
details { margin: 8px 0; } summary { cursor: pointer; }
#theme { font: inherit; font-size: 12px; color: var(--soft); background: none; border: 1px solid var(--line); border-radius: 4px;
  padding: 2px 8px; margin-bottom: 12px; cursor: pointer; }
@media (max-width: 1080px) { body { display: block; } nav { position: static; height: auto; border-right: 0;
  border-bottom: 1px solid var(--line); } main { padding: 8px 20px 48px; } nav > details > ul { columns: 2; }
  nav > details:not([open]) { margin: 0; } }
@media print { body { display: block; } nav { position: static; height: auto; border: 0; background: none; }
  nav > details > ul { columns: 3; } #theme { display: none; } main { max-width: none; padding: 0; }
  .scroll { max-height: none; overflow: visible; } section > details { display: none; } section > details[open] { display: block; }
  h1, h2 { break-after: avoid; } .figure, tr { break-inside: avoid; } thead th { position: static; } }
"""

THEME_SCRIPT = """
document.documentElement.dataset.theme = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';
"""
"""Runs before anything is drawn, so that a dark page never flashes white."""

SCRIPT = """
(() => {
  const root = document.documentElement, read = id => JSON.parse(document.getElementById(id).textContent);
  const themes = {light: read('theme-light'), dark: read('theme-dark')};
  let library = null, printing = false;
  const load = () => library ??= (async () => {
    const packed = Uint8Array.from(atob(document.getElementById('figure-library').textContent), c => c.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
    const script = document.createElement('script');
    script.textContent = await new Response(unpacked).text();
    document.head.append(script);
  })();
  const dressed = layout => ({...layout, template: themes[printing ? 'light' : root.dataset.theme], paper_bgcolor: 'rgba(0,0,0,0)',
    plot_bgcolor: 'rgba(0,0,0,0)', modebar: {bgcolor: 'rgba(0,0,0,0)', color: '#868e96', activecolor: '#1c7ed6'}});
  const draw = holder => {
    if (!window.Plotly) return;
    const figure = read(holder.dataset.figure);
    holder.dataset.drawn = 'yes';
    Plotly.react(holder, figure.data, dressed(figure.layout), {displaylogo: false, responsive: true, plotlyServerURL: '',
      modeBarButtonsToRemove: ['select2d', 'lasso2d', 'sendDataToCloud']});
  };
  const holders = [...document.querySelectorAll('.figure')];
  const failed = () => holders.forEach(h => { h.textContent = 'This figure needs a browser of 2023 or later; its table is below.'; });
  const seen = new IntersectionObserver(entries => entries.filter(e => e.isIntersecting).forEach(e => {
    seen.unobserve(e.target);
    load().then(() => e.target.dataset.drawn || draw(e.target)).catch(failed);
  }), {rootMargin: '500px'});
  holders.forEach(h => seen.observe(h));
  if (holders.length) addEventListener('load', () => setTimeout(() => load().catch(failed), 50));
  const again = all => holders.filter(h => all || h.dataset.drawn).forEach(draw);
  addEventListener('beforeprint', () => { printing = true; again(true); });
  addEventListener('afterprint', () => { printing = false; again(false); });
  const button = document.getElementById('theme');
  const name = () => { button.textContent = root.dataset.theme === 'dark' ? 'Light page' : 'Dark page'; };
  button.addEventListener('click', () => {
    root.dataset.theme = root.dataset.theme === 'dark' ? 'light' : 'dark';
    name(); again(false);
  });
  name();
  const narrow = document.querySelector('nav > details');
  if (innerWidth <= 1080) narrow.open = false;
  addEventListener('beforeprint', () => { narrow.open = true; });
  document.querySelectorAll('table.sortable').forEach(table => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector('button').addEventListener('click', () => {
      const up = head.getAttribute('aria-sort') === 'descending';
      const value = row => { const c = row.cells[column]; return c.dataset.v === undefined ? c.textContent : Number(c.dataset.v); };
      const rank = (a, b) => typeof a === typeof b ? (typeof a === 'number' ? a - b : a.localeCompare(b)) : typeof a === 'number' ? -1 : 1;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return typeof x !== typeof y ? rank(x, y) : up ? rank(x, y) : rank(y, x);
      });
      heads.forEach(h => h.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      table.tBodies[0].append(...rows);
    }));
  });
})();
"""
