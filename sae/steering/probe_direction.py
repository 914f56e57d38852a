"""Steering along a sparse probe: its few units moved in proportion to their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moescope.core.edit import Edit
from moescope.core.edit_kinds.features import Latents
from moescope.core.edit_kinds.stream import Add
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.sites import Site
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.steering.steering import Steering, in_block

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.store.store import Store

_PROBES = """
    SELECT DISTINCT probe_id::VARCHAR AS probe_id, site, k, ranking, units, coefficients, value
    FROM sparse_probes
    WHERE concept = $concept AND unit_kind = $kind AND metric = 'F1' AND k > 0
        AND ($sae IS NULL OR sae_id::VARCHAR = $sae)
        AND ($site IS NULL OR site = $site)
        AND ($k IS NULL OR k = $k)
        AND ($ranking IS NULL OR ranking = $ranking)
    ORDER BY value DESC, k, probe_id
    LIMIT 1
"""
_CONCEPTS = "SELECT DISTINCT concept FROM sparse_probes WHERE unit_kind = ? ORDER BY concept"
_MEANS = "SELECT feature, sum(mean * active) / nullif(sum(active), 0) FROM features WHERE sae_id = ? GROUP BY feature"


def probe_direction(
    store: Store,
    concept: str,
    *,
    units: Literal["latent", "neuron"] = "latent",
    sae: Autoencoder | None = None,
    model: LiveModel | None = None,
    site: str | None = None,
    k: int | None = None,
    ranking: str | None = None,
    norm: float | None = None,
    name: str | None = None,
) -> Steering:
    """Move the units of a stored sparse probe in proportion to its weights, towards its concept.

    Latents are moved by weight · mean activation where active (table `features`; by the weight alone where that was not
    read), each writing its decoder row: in the stream, a direction of k decoder rows. Neurons of a dense MLP are moved
    where they pass its last projection, which writes their columns.

    Args:
        store: with the table `sparse_probes`.
        concept: as the probe was stored.
        units: what it reads.
        sae: the autoencoder of the latents.
        model: for neurons, to know how many there are.
        site: of the neurons, where several sites were probed.
        k, ranking: of the probe; None for the one of highest F1 on held-out text.
        norm: length of what is written, in units of activation; None for what the weights give.
        name: of the intervention.

    Raises:
        InputError: no such probe, or no autoencoder or model where one is needed.
    """
    if (sae is None) if units == "latent" else (model is None):
        raise InputError(f"a probe of {units}s needs {'its autoencoder (sae=…)' if units == 'latent' else 'model=…'}")
    asked = {"concept": concept, "kind": units, "sae": None if sae is None else sae.sae_id, "site": site}
    found = store.sql(_PROBES, asked | {"k": k, "ranking": ranking}).to_arrow_table().to_pylist()
    if not found:
        known = ", ".join(str(row[0]) for row in store.fetch(_CONCEPTS, [units]))
        raise InputError(
            f"the store has no such sparse probe of {units}s for {concept!r}",
            expected=known or "probes",
            fix="probe first: moescope sae probe",
        )
    probe = found[0]
    numbers = np.array(probe["units"], np.int64)
    weights = np.array(probe["coefficients"], np.float64)
    told: dict[str, Any] = {
        "method": "sparse probe",
        "concept": concept,
        "units": numbers.tolist(),
        "f1": probe["value"],
    }
    told |= {"k": int(probe["k"]), "ranking": probe["ranking"], "site": probe["site"]}
    edit: Edit
    if sae is not None and units == "latent":
        edit, length = _of_latents(store, sae, numbers, weights, norm)
    else:
        assert model is not None
        edit, length = _of_neurons(model, Site.parse(probe["site"]), numbers, weights, norm)
    return Steering(Intervention([edit], name=name or f"towards {concept}"), told | {"norm": length})


def _of_latents(
    store: Store, sae: Autoencoder, latents: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], norm: float | None
) -> tuple[Edit, float]:
    means = {int(i): mean for i, mean in store.fetch(_MEANS, [sae.sae_id])}
    values = weights * np.array([means.get(int(i)) or 1.0 for i in latents])
    rows = sae.decoder.float().cpu().numpy()[latents]
    length = float(np.linalg.norm(values @ rows))
    values = values if norm is None else values * (norm / length)
    place = sae.target_site or sae.site
    edit = Latents(
        layer=place.layer,
        site=in_block(place),  # type: ignore[arg-type]  # checked with the edit
        sae=sae.name,
        latents=latents.tolist(),
        values=values.tolist(),
    )
    return edit, length if norm is None else norm


def _of_neurons(
    model: LiveModel, site: Site, neurons: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], norm: float | None
) -> tuple[Edit, float]:
    width = next((s.d_expert for s in model.anatomy.sublayers if s.layer == site.layer and s.kind == "dense"), None)
    if in_block(site) != "mlp.hook_post" or width is None:
        raise InputError(
            f"neurons of {site} cannot be moved as a vector", expected="those of a dense MLP, mlp.hook_post"
        )
    length = float(np.linalg.norm(weights))
    vector = np.zeros(width)
    vector[neurons] = weights if norm is None else weights * (norm / length)
    return Add(layer=site.layer, site="mlp.hook_post", vector=vector.tolist()), length if norm is None else norm
