"""vLLM's `routed_experts`, as arrays and as responses."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.store.importing.import_trace import import_trace
from moescope.store.store import Store

E, K = 8, 3


def _ids(tokens: int, layers: int, seed: int = 0) -> Any:
    """[token, layer, k] Different experts in every slot, int16 as vLLM has them."""
    random = np.random.default_rng(seed)
    return np.argsort(random.random((tokens, layers, E)), axis=2)[:, :, :K].astype(np.int16)


def _stored(run: Any) -> dict[tuple[int, int, int], list[int]]:
    """(sequence, position, layer) → experts."""
    query = """
        SELECT t.sequence_id, t.position, r.layer, r.experts
        FROM routing r JOIN tokens t USING (run_id, token) WHERE run_id = $run
    """
    return {(s, p, layer): experts for s, p, layer, experts in run.sql(query).fetchall()}


def _by_place(arrays: dict[tuple[int, int], Any], layers: list[int]) -> dict[tuple[int, int, int], list[int]]:
    """The same from arrays: (sequence, first position) → [token, layer, k]."""
    return {
        (sequence, first + n, layer): ids[n, place].tolist()
        for (sequence, first), ids in arrays.items()
        for n in range(len(ids))
        for place, layer in enumerate(layers)
    }


def test_an_array_is_one_sequence(store: Store, tmp_path: Path) -> None:
    ids = _ids(9, 4)
    np.save(tmp_path / "a.npy", ids)
    run = import_trace(store, tmp_path / "a.npy", name="a", n_experts=E)
    assert run.status == "complete"
    assert _stored(run) == _by_place({(0, 0): ids}, [0, 1, 2, 3])
    run = import_trace(store, tmp_path / "a.npy", name="b", n_experts=E, layers=[1, 2, 3, 26])
    assert _stored(run) == _by_place({(0, 0): ids}, [1, 2, 3, 26])


def test_arrays_of_an_archive_are_one_sequence_each(store: Store, tmp_path: Path) -> None:
    arrays = [_ids(n, 2, seed=n) for n in (3, 1, 6)]
    np.savez(tmp_path / "a.npz", *arrays)
    run = import_trace(store, tmp_path / "a.npz", name="a", n_experts=E)
    assert _stored(run) == _by_place({(n, 0): ids for n, ids in enumerate(arrays)}, [0, 1])


def test_prompt_and_answer_of_an_archive_are_one_sequence(store: Store, tmp_path: Path) -> None:
    prompt, answer = _ids(4, 2), _ids(3, 2, seed=1)
    np.savez(tmp_path / "a.npz", prompt_routed_experts=prompt, routed_experts=answer)
    run = import_trace(store, tmp_path / "a.npz", name="a", n_experts=E)
    assert _stored(run) == _by_place({(0, 0): prompt, (0, 4): answer}, [0, 1])
    assert run.sql("SELECT phase FROM tokens WHERE run_id = $run ORDER BY token").fetchall() == [
        *[("prefill",)] * 4,
        *[("decode",)] * 3,
    ]


def _npy(array: Any) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_responses_share_a_prompt_between_choices_once(
    store: Store, tmp_path: Path, encoded: bool, suffix: str
) -> None:
    given = _npy if encoded else lambda array: array.tolist()
    prompt, first, second, other = (_ids(n, 2, seed=n) for n in (4, 3, 2, 5))
    answers = [
        {
            "prompt_token_ids": [5, 6, 7, 8],
            "prompt_routed_experts": given(prompt),
            "choices": [
                {"routed_experts": given(first), "token_ids": [10, 11, 12]},
                {"routed_experts": given(second), "token_ids": [20, 21]},
            ],
        },
        {"prompt_routed_experts": given(other), "choices": [{"routed_experts": None}]},
    ]
    path = tmp_path / f"a{suffix}"
    path.write_text(json.dumps(answers) if suffix == ".json" else "\n".join(map(json.dumps, answers)))
    run = import_trace(store, path, name="a", n_experts=E)
    assert run.status == "complete", run.coverage.df()
    places = {(0, 0): prompt, (0, 4): first, (1, 4): second, (2, 0): other}
    assert _stored(run) == _by_place(places, [0, 1])
    ids = run.sql("SELECT token_id FROM tokens WHERE run_id = $run ORDER BY token").fetchall()
    assert [n for (n,) in ids] == [5, 6, 7, 8, 10, 11, 12, 20, 21, None, None, None, None, None]


def test_one_array_for_prompt_and_answer_is_told_apart_by_the_prompts_ids(store: Store, tmp_path: Path) -> None:
    ids = _ids(6, 2)
    answer = {"prompt_token_ids": [1, 2, 3, 4], "outputs": [{"routed_experts": ids.tolist(), "token_ids": [9, 8, 7]}]}
    (tmp_path / "a.json").write_text(json.dumps(answer))
    run = import_trace(store, tmp_path / "a.json", name="a", n_experts=E)
    rows = run.sql("SELECT position, phase, token_id FROM tokens WHERE run_id = $run ORDER BY token").fetchall()
    assert rows == [*((n, "prefill", n + 1) for n in range(4)), (4, "decode", 9), (5, "decode", 8)]
    assert _stored(run) == _by_place({(0, 0): ids}, [0, 1])


def test_dense_layers_are_left_out_and_named(store: Store, tmp_path: Path) -> None:
    ids = _ids(5, 4)
    ids[:, 0] = 0
    ids[:, 2] = -1
    np.save(tmp_path / "a.npy", ids)
    run = import_trace(store, tmp_path / "a.npy", name="a", n_experts=E)
    assert run.status == "complete"
    assert run.sql("SELECT layer FROM layers WHERE run_id = $run ORDER BY layer").fetchall() == [(1,), (3,)]
    assert any("layers 0, 2 " in note for note in run.info["summary"]["notes"])


def test_positions_from_the_prefix_cache_make_the_run_short(store: Store, tmp_path: Path, gaps: Any) -> None:
    ids = _ids(5, 2)
    ids[:2] = -1
    np.save(tmp_path / "a.npy", ids)
    run = import_trace(store, tmp_path / "a.npy", name="a", n_experts=E)
    assert run.status == "incomplete"
    found = gaps(run)
    assert set(found) == {"blocks.0.mlp.hook_expert_indices", "blocks.1.mlp.hook_expert_indices"}
    assert "not recorded" in found["blocks.0.mlp.hook_expert_indices"][1]
    assert run.rows("routing") == 6


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "no routed experts"),
        ('{"choices": []}', "no routed experts"),
        ('{"routed_experts": [[1, 2]]}', "not an array of expert ids"),
        ('{"routed_experts": [[[1, 2]], [[1]]]}', "different lengths"),
        ('{"routed_experts": [[[0.5, 1.5]]]}', "not an array of expert ids"),
        ('{"routed_experts": "!!"}', "cannot be decoded"),
        ("[1]", "holds a int"),
        ("{", "is not JSON"),
        ('{"prompt_token_ids": [1], "prompt_routed_experts": [[[1,2]],[[2,1]]]}', "1 token ids for 2 tokens"),
    ],
)
def test_responses_that_do_not_fit_are_refused(store: Store, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=says):
        import_trace(store, tmp_path / "a.json", name="a", n_experts=E)


def test_layers_must_be_as_many_as_there_are(store: Store, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", _ids(2, 4))
    with pytest.raises(InputError, match=r"names 3 layers, and .* have 4"):
        import_trace(store, tmp_path / "a.npy", name="a", n_experts=E, layers=[1, 2, 3])
