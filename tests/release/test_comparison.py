"""What README says of other libraries in bold: run here, on a family whose router does more than a softmax."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"
ROOT = README.parent


@pytest.fixture(scope="module")
def used(tiny_model: Callable[..., Any]) -> tuple[Any, Any, Any, list[Any]]:
    """A tiny DeepSeek-V3, a padded batch, its mask, and the ids that each experts module was given."""
    import torch

    module = tiny_model("deepseek_v3")
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    given: list[Any] = []
    experts = [m for name, m in module.named_modules() if name.endswith("mlp.experts")]
    handles = [m.register_forward_pre_hook(lambda _, args: given.append(args[1].clone())) for m in experts]
    with torch.no_grad():
        module(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return module, ids, mask, given


def test_top_k_of_transformers_router_logits_is_not_what_was_used(used: tuple[Any, Any, Any, list[Any]]) -> None:
    import torch

    module, ids, mask, given = used
    with torch.no_grad():
        output = module(input_ids=ids, attention_mask=mask, output_router_logits=True)
    if getattr(output, "router_logits", None) is None:
        return  # this family hands none over: it is not had at all
    chosen = [layer.topk(given[0].shape[-1], dim=-1).indices for layer in output.router_logits]
    same = [torch.equal(a.sort(-1).values, b.sort(-1).values) for a, b in zip(chosen, given, strict=True)]
    assert not all(same)


def test_router_logits_of_transformers_hold_the_padding_too(tiny_model: Callable[..., Any]) -> None:
    import torch

    module = tiny_model("olmoe")
    ids, mask = torch.randint(3, 90, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with torch.no_grad():
        output = module(input_ids=ids, attention_mask=mask, output_router_logits=True)
    assert output.router_logits[0].shape[0] == mask.numel() > int(mask.sum())


def test_the_bridge_of_transformer_lens_names_no_hook_for_the_decision_of_deepseek_v3(
    used: tuple[Any, Any, Any, list[Any]],
) -> None:
    import copy

    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    module = copy.deepcopy(used[0])
    module.config.architectures = [type(module).__name__]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>")),
        unk_token="<unk>", eos_token="<eos>", bos_token="<eos>", pad_token="<eos>",
        add_bos_token=True, name_or_path="",
    )  # fmt: skip
    bridge = TransformerBridge.boot_transformers("bridge", hf_model=module, tokenizer=tokenizer, device="cpu")
    names = [name for name in bridge.hook_dict if "mlp" in name]
    assert names, "it has hooks in these layers"
    assert not [name for name in names if re.search(r"indices|expert_weights|experts\.\d", name)]


def test_nnsight_reaches_what_the_experts_are_given_by_hand(used: tuple[Any, Any, Any, list[Any]]) -> None:
    import nnsight
    import torch

    module, ids, mask, given = used
    model = nnsight.NNsight(module)
    with torch.no_grad(), model.trace(input_ids=ids, attention_mask=mask):
        seen = model.model.layers[1].mlp.experts.inputs[0][1].save()
    assert torch.equal(seen, given[0])


def test_every_mark_of_ours_names_a_test_that_is_there() -> None:
    table = README.read_text(encoding="utf-8").split("## How it compares")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "|---|" not in line][1:]
    assert len(rows) >= 10
    for row in rows:
        (held,) = re.findall(r"\]\((tests/[^)]+)\)", row)
        assert "def test_" in (ROOT / held).read_text(encoding="utf-8"), row
        assert row.split("|")[6].strip() in {"✓", "◐"}, row


def test_the_versions_named_are_those_installed_here() -> None:
    from importlib.metadata import version

    head = next(line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| | transformers"))
    for name, package in (
        ("transformers", "transformers"), ("TransformerLens", "transformer-lens"),
        ("nnsight", "nnsight"), ("SAELens", "sae-lens"),
    ):  # fmt: skip
        (named,) = re.findall(rf"{name} (\d+\.\d+)", head)
        assert version(package).startswith(named + "."), f"{name} {version(package)} is here, README says {named}"
