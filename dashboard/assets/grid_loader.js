/* The grid's scripts are large: they are asked for by the first grid, and not by pages without one. */
(function () {
  "use strict";
  const address = document.querySelector("meta[name=moescope-grid]");
  if (window.dash_ag_grid || !address || !address.content) return;
  let loading = null;
  let real = null;

  function load() {
    loading = loading || new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = address.content;
      script.onload = () => {
        real = window.dash_ag_grid;
        window.dash_ag_grid = standing;
        resolve(real);
      };
      script.onerror = () => { loading = null; reject(new Error("the grid's script could not be loaded")); };
      document.head.append(script);
    });
    return loading;
  }

  const Grid = React.lazy(() => load().then((grid) => ({ default: grid.AgGrid })));
  function AgGrid(props) {
    const place = React.createElement("div", { id: typeof props.id === "string" ? props.id : undefined, style: props.style });
    return React.createElement(React.Suspense, { fallback: place }, React.createElement(Grid, props));
  }
  /* The renderer reads these from a component's class. */
  AgGrid.dashRenderType = true;
  AgGrid.dashPersistence = { persisted_props: ["selectedRows"], persistence_type: "local" };

  const standing = {
    AgGrid,
    getApi: (id) => { if (real) return real.getApi(id); throw new Error("no grid is there yet with id: " + id); },
    getApiAsync: (id) => load().then((grid) => grid.getApiAsync(id)),
  };
  window.dash_ag_grid = standing;
})();
