"""The sparse step beside SAELens' dense one: the same losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

D_IN, D_SAE, ROWS = 24, 64, 40


def _pair(form: str, **options: Any) -> tuple[Any, Any]:
    import sae_lens

    from moescope.sae.training import sparse_topk

    config_class = getattr(sae_lens, f"{form}TrainingSAEConfig")
    k = 5 if form == "TopK" else 4.5
    classes = (getattr(sae_lens, f"{form}TrainingSAE"), getattr(sparse_topk, f"Sparse{form}Training"))
    made = [cls(config_class(d_in=D_IN, d_sae=D_SAE, k=k, **options)) for cls in classes]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in made[0].parameters():
            parameter.data = 0.3 * torch.randn_like(parameter)
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


@pytest.mark.parametrize("form", ["TopK", "BatchTopK"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dead", [0, 9, 30])
def test_losses_and_gradients_are_those_of_saelens(form: str, rescale: bool, dead: int) -> None:
    from sae_lens.saes.sae import TrainStepInput

    dense, sparse = _pair(form, rescale_acts_by_decoder_norm=rescale)
    x = 2 * torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(D_SAE) % D_SAE < dead if dead else None
    outputs = []
    for module in (dense, sparse):
        output = module.training_forward_pass(TrainStepInput(x, {}, mask, 0, False))
        output.loss.backward()
        outputs.append(output)
    expected, found = outputs
    assert expected.losses.keys() == found.losses.keys()
    for name in expected.losses:
        torch.testing.assert_close(found.losses[name], expected.losses[name])
    torch.testing.assert_close(found.feature_acts.to_dense(), expected.feature_acts)
    torch.testing.assert_close(found.sae_out, expected.sae_out)
    for (name, parameter), other in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        assert float(parameter.grad.abs().max()) > 0, name
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-4, msg=name)
    if form == "BatchTopK":
        assert float(sparse.topk_threshold) == float(dense.topk_threshold) > 0


def test_trainer_counts_firing_from_sparse_activations_alike() -> None:
    from moescope.sae.training.modules import trainer_of
    from moescope.sae.training.specs import SaeSpec

    spec = SaeSpec(d_sae=D_SAE, k=5)
    trainers = [trainer_of(module, spec, batch_size=ROWS, steps=10) for module in _pair("TopK")]
    for step in range(10):
        x = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(step))
        for trainer in trainers:
            trainer.step(x)
            trainer.n_training_steps += 1
    torch.testing.assert_close(trainers[1].act_freq_scores, trainers[0].act_freq_scores, rtol=0, atol=1)
    assert float(trainers[0].act_freq_scores.sum()) > 0
    for one, other in zip(trainers[0].sae.parameters(), trainers[1].sae.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
