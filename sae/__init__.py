"""Sparse autoencoders over recorded vectors: train, judge, read, join to experts, steer. Public names are in `moescope.sae`.

`train` on the vectors of a run (recorded with `sites`), `judge`, `read` what each latent fires on, `feature_experts` for
where experts and latents meet; `contrastive_mean`, `probe_direction` and others find steering vectors, `dose_response`
measures them; `load` and `listed` find autoencoders again, `published` and `from_disk` take those of others (the `sae` extra).

    >>> import moescope as ms
    >>> ms.sae.SaeSpec.parse("topk:d=1024,k=16").d_sae
    1024

Names resolve when first used, so that importing this loads neither torch nor SAELens.
"""

from __future__ import annotations

import importlib
from typing import Any

# Name → module, and the name it has there where that is another. Those that answer with a `Result` lie in the façade,
# `moescope.sae_api`, which knows measures and analyses alike.
_HOME: dict[str, str] = {
    "Autoencoder": "moescope.sae.autoencoder",
    "Concept": "moescope.sae.concepts.concept",
    "LatentTarget": "moescope.sae.steering.targets",
    "ProbeTarget": "moescope.sae.steering.targets",
    "SaeSpec": "moescope.sae.training.specs",
    "Steering": "moescope.sae.steering.steering",
    "TokenTarget": "moescope.sae.steering.targets",
    "ablate_writers": "moescope.sae_api",
    "associate": "moescope.sae_api",
    "attention_shift": "moescope.sae.steering.attention_shift",
    "best_layer": "moescope.sae.steering.contrast",
    "listed": "moescope.sae.displays",
    "circuit_task": "moescope.sae.circuits.prompts",
    "compare_neurons": "moescope.sae_api",
    "completion_command": "moescope.sae.concepts.command",
    "contrastive_labels": "moescope.sae.steering.contrast",
    "contrastive_mean": "moescope.sae.steering.contrast",
    "delete": "moescope.sae.catalogue:delete_saes",
    "descend_to": "moescope.sae.steering.descend",
    "descend_to_label": "moescope.sae.steering.descend",
    "describe": "moescope.sae_api",
    "dose_response": "moescope.sae_api",
    "expert_sparsity": "moescope.sae_api",
    "export": "moescope.sae.catalogue:export_sae",
    "feature_experts": "moescope.sae_api",
    "feature_set": "moescope.sae.steering.latent_edit",
    "from_disk": "moescope.sae.loading",
    "head_circuit": "moescope.sae_api",
    "judge": "moescope.sae_api",
    "latent_edit": "moescope.sae.steering.latent_edit",
    "load": "moescope.sae.loading:load_autoencoder",
    "mlp_students": "moescope.sae_api",
    "neurons_as_features": "moescope.sae.experts.neurons",
    "of_next_class": "moescope.sae.concepts.concept",
    "of_token_ids": "moescope.sae.concepts.concept",
    "paraphrase_agreement": "moescope.sae.steering.agreement",
    "probe_direction": "moescope.sae.steering.probe_direction",
    "published": "moescope.sae.loading",
    "read": "moescope.sae_api",
    "record": "moescope.sae.recording:record_vectors",
    "register_neurons": "moescope.sae.experts.neurons",
    "rename": "moescope.sae.catalogue:rename_sae",
    "sparse_probes": "moescope.sae_api",
    "study": "moescope.sae_study",
    "train": "moescope.sae.training.train",
}

__all__ = sorted(_HOME)  # noqa: PLE0605  it is a list of str


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moescope.sae' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, other = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), other or name)


def __dir__() -> list[str]:
    return list(__all__)
