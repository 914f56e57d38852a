"""One plain pass over one sequence of token ids."""

from __future__ import annotations

from collections.abc import Sequence as Numbers

import numpy as np
import torch

from moescope.probes.batches import Batch, Sequence
from moescope.probes.corpus import Document
from moescope.probes.forward import inputs_of, named_arguments, to_device
from moescope.probes.live_model import LiveModel


def run_ids(model: LiveModel, ids: Numbers[int]) -> None:
    """Run it without a cache; of its logits only what the model cannot leave out is made."""
    taken = named_arguments(model.module)
    less = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
    cache = {"use_cache": False} if "use_cache" in taken else {}
    batch = Batch(0, (Sequence(0, 0, Document("", None, ""), 0, "", np.array(ids, np.int64)),), 0)
    with torch.no_grad():
        model.module(**inputs_of(model, to_device(batch, model)), **less, **cache)
