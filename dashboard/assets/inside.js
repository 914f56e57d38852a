/* Rows of tables of heads, autoencoders and latents → address. */
(function () {
  "use strict";
  const no = () => window.dash_clientside.no_update;
  let searched = null;
  const linked = (cell) => cell && cell.value !== undefined && document.activeElement && document.activeElement.closest("a.cell-link");

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    inside: {
      row_to_head(cell) {
        if (cell && cell.rowId) { const [layer, head] = cell.rowId.split("|"); window.moescope.change({ layer, head }); }
        return no();
      },
      row_to_feature(cell) {
        if (cell && cell.rowId && !linked(cell)) window.moescope.change({ feature: cell.rowId });
        return no();
      },
      /* Another search: rows that were fetched before are dropped, and those in view asked for again. */
      search_again(search) {
        const grid = search !== undefined && document.getElementById("latent-grid");
        if (grid && searched !== null && searched !== search) {
          window.dash_ag_grid.getApiAsync("latent-grid").then((api) => { api.ensureIndexVisible(0); api.purgeInfiniteCache(); });
        }
        searched = search;
        return no();
      },
    },
  });
})();
