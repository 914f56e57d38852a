"""The causal score against plain passes, and programs as completion functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError, RunError
from moescope.edits import Ablate, Intervention
from moescope.sae.concepts.activity import read_activity
from moescope.sae.concepts.causal import causal_score, log_p_lost, taken_out
from moescope.sae.concepts.command import completion_command
from moescope.sae.concepts.describe import describe
from moescope.sae.concepts.windows import active_windows


def test_log_p_lost_is_that_of_two_plain_passes(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    import torch

    import moescope as ms

    module, sequences = tiny_model("qwen3_moe"), token_ids([14, 9, 20, 11])
    run = record_ids(module, sequences, batch_size=2)
    activity = read_activity(run, "expert", [3], sae=None, layer=1, block="mlp", model=None, most=10_000, seed=0)
    windows = active_windows(activity, 3, count=4, width=6, top=2, random=np.random.default_rng(0))
    lists = {0: np.array([5, 9]), 1: np.array([7])}
    model = ms.load(module)
    sums, counts, documents = log_p_lost(
        model,
        activity,
        windows,
        taken_out("expert", 3, sae=None, layer=1, block="mlp"),
        lists,
        sources=None,
        batch_size=3,
    )
    for number, window in enumerate(windows):
        ids = torch.tensor([sequences[window.sequence]])
        with torch.no_grad():
            plain = module(input_ids=ids).logits[0].log_softmax(-1)
            with model.edited(Intervention([Ablate(layer=1, experts=[3])])):
                cut = module(input_ids=ids).logits[0].log_softmax(-1)
        at = [window.first + i for i, on in enumerate(window.active) if on]
        assert counts[number] == len(at) > 0
        for name, listed in lists.items():
            expected = sum(float((plain - cut)[p, listed].mean()) for p in at)
            assert sums[name][number] == pytest.approx(expected, abs=1e-4)
    assert documents.tolist() == [window.document for window in windows]
    found = causal_score(sums[0], counts, documents, draws=50, seed=0)
    assert found.value == pytest.approx(sums[0].sum() / counts.sum())


def test_a_planted_latent_that_writes_a_word_is_told_by_it(
    store: Any, components: Any, tiny_model: Callable[..., Any]
) -> None:
    """A latent is one component of the last block's output: the token whose logit it raises most loses, the one it lowers gains."""
    import moescope as ms

    class Tokenizer:
        """Word wN is token N."""

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            del add_special_tokens
            return [int(text.strip().removeprefix("w"))]

    module = tiny_model("llama")
    model = ms.load(module)
    ids = np.random.default_rng(0).integers(1, 90, (16, 12)).tolist()
    run = ms.record(
        model, ms.Corpus.from_token_ids(ids), store, name="run", probes=("tokens", "activations"),
        sites=["blocks.1.hook_resid_post"], progress=False,
    )  # fmt: skip
    sae = components(32, "blocks.1.hook_resid_post")
    norm, head = module.model.norm.weight, module.lm_head.weight
    latent = 4
    raised, lowered = (int((sign * norm * head)[:, latent].argmax()) for sign in (1, -1))

    texts = iter(["the raising one", "the other one"])

    def complete(prompt: str) -> str:
        if "DESCRIPTION:" in prompt:
            return f"DESCRIPTION: {next(texts)}"
        return f"WORDS: w{raised}" if "raising" in prompt else f"WORDS: w{lowered}"

    model.tokenizer = Tokenizer()
    found = describe(
        store, run, units=[latent, 9], sae=sae, model=model, scores=("causal",), draws=50, progress=False, complete=complete,
    )  # fmt: skip
    row = next(row for row in found.rows if row["unit"] == latent)
    assert row["metric"] == "causal"
    assert row["ci_low"] > 0 > row["null_value"]
    assert row["null_kind"] == "another unit's description"


def test_a_program_reads_the_prompt_and_writes_the_answer(tmp_path: Path) -> None:
    script = tmp_path / "answer it.py"
    script.write_text("import sys; print(sys.stdin.read().upper(), end='')")
    assert completion_command(f"{sys.executable} '{script}'")("ask ⟦me⟧\n") == "ASK ⟦ME⟧\n"


def test_no_shell_takes_part() -> None:
    assert completion_command("echo '$HOME' ; | cat")("x") == "$HOME ; | cat\n"


@pytest.mark.parametrize(
    ("command", "said"), [("", "empty"), ("no-such-program -x", "no program"), ("echo 'open", "cannot be read")]
)
def test_commands_that_cannot_be_are_refused(command: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        completion_command(command)


def test_a_program_that_fails_or_takes_too_long_is_told(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("import sys; print('out of credit', file=sys.stderr); sys.exit(3)")
    with pytest.raises(RunError, match="exit code 3: out of credit"):
        completion_command(f"{sys.executable} {script}")("x")
    with pytest.raises(RunError, match=r"no answer within 0\.1 seconds"):
        completion_command("sleep 5", timeout=0.1)("x")
