"""`load` takes what it says it takes, and refuses everything else with what was expected, found, and what to do."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moescope as ms
from moescope.probes.demo import MODEL_DIR


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    """A model folder: config, safetensors, and the demo's tokenizer."""
    path = tmp_path / "model"
    tiny_model("qwen3_moe", vocab_size=4096).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, path)
    return path


def refused(source: Any, **options: Any) -> str:
    """The message with which `load` refuses."""
    with pytest.raises(ms.InputError) as error:
        ms.load(source, **options)
    assert error.value.exit_code == 2
    return str(error.value)


def test_a_folder_gives_the_weights_that_lie_in_it(folder: Path, tiny_model: Callable[..., Any], store: Any) -> None:
    model = ms.load(folder)
    written = tiny_model("qwen3_moe", vocab_size=4096)
    for (name, loaded), (_, original) in zip(model.module.named_parameters(), written.named_parameters(), strict=True):
        assert torch.equal(loaded, original), name
    assert not model.module.training
    assert model.name == str(folder)
    assert ms.record(model, ["A text."], store, name="run", progress=False).status == "complete"


def test_a_folder_without_tokenizer_records_token_ids_and_refuses_texts(folder: Path, store: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    model = ms.load(folder)
    with pytest.raises(ms.InputError, match="no tokenizer"):
        ms.record(model, ["A text."], store, name="texts", progress=False)
    corpus = ms.Corpus.from_token_ids([[5, 6, 7]])
    assert ms.record(model, corpus, store, name="ids", progress=False).status == "complete"


def test_a_tokenizer_that_is_passed_is_used(folder: Path, demo_model: Any) -> None:
    assert ms.load(folder, tokenizer=demo_model.tokenizer).tokenizer is demo_model.tokenizer


def test_the_revision_of_local_weights_changes_with_them(folder: Path) -> None:
    first = ms.load(folder).revision
    assert ms.load(folder).revision == first
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert ms.load(folder).revision != first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_what_was_asked_for_of_a_folder_and_of_a_module(
    dtype: str, folder: Path, tiny_model: Callable[..., Any]
) -> None:
    assert ms.load(folder, dtype=dtype).dtype == getattr(torch, dtype)
    assert ms.load(tiny_model("qwen3_moe"), dtype=dtype).dtype == getattr(torch, dtype)


def test_a_module_is_taken_as_it_is(tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("qwen3_moe", dtype="bfloat16").train()
    model = ms.load(module)
    assert model.module is module
    assert model.dtype == torch.bfloat16
    assert not module.training, "dropout must not take part"
    assert model.name == "Qwen3MoeForCausalLM"


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "config.json" in refused(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "pass the file itself" in refused(tmp_path)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refused(folder)


def test_pickled_weights_are_never_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither alone nor beside safetensors of another name is a pickle opened."""
    opened: list[Any] = []
    monkeypatch.setattr(pickle, "Unpickler", lambda *a, **k: opened.append(a))
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append(a))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickled weights, which moescope never loads" in refused(folder)
    (folder / "other.safetensors").write_bytes(b"")
    refused(folder)
    assert opened == []


@pytest.mark.parametrize("damage", ["truncated", "cut tail", "garbage", "empty"])
def test_damaged_weights_are_refused(damage: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[:300], "cut tail": whole[:-100], "garbage": b"garbage" * 100, "empty": b""}[damage]
    )
    message = refused(folder)
    assert "damaged" in message
    assert str(folder) in message


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_lack_a_tensor_are_refused(name: str, folder: Path) -> None:
    """transformers would fill it at random and only log a warning."""
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert name in refused(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 4000}), encoding="utf-8")
    refused(folder)


@pytest.mark.parametrize(
    "config", ["{not json", "{}", "[]", '{"model_type": "no_such_model"}', '{"model_type": "vit"}']
)
def test_a_config_of_no_causal_language_model_is_refused(config: str, folder: Path) -> None:
    (folder / "config.json").write_text(config, encoding="utf-8")
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("content", [None, b"", b"not gguf at all", b"GGUF" + bytes(60)])
def test_a_gguf_file_that_is_missing_or_damaged_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused(path)


@pytest.mark.parametrize("device", ["warp", "cuda:99", "", "cpu:0:0"])
def test_a_device_that_is_not_here_is_refused(device: str, tiny_model: Callable[..., Any]) -> None:
    for source in ("demo", tiny_model("llama")):
        assert f"no device {device!r}" in refused(source, device=device)


@pytest.mark.parametrize("dtype", ["int8", "fp32", "", "torch.float32"])
def test_a_dtype_that_is_none_is_refused(dtype: str, tiny_model: Callable[..., Any]) -> None:
    for source in ("demo", tiny_model("llama")):
        assert "float32, bfloat16, float16" in refused(source, dtype=dtype)


@pytest.mark.parametrize("source", ["/no/such/folder", "a/b/c", "with space", "demo.json", 5, None, b"demo"])
def test_a_name_that_is_nothing_is_refused(source: Any) -> None:
    assert "Expected" in refused(source) or "cannot" in refused(source)


def test_a_file_of_another_kind_is_refused(folder: Path) -> None:
    assert "a file of another kind" in refused(folder / "config.json")


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Linear(3, 3),
        torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU()),
        torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)) for _ in range(2)),
        torch.nn.Transformer(8, 2, 1, 1, 8, batch_first=True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_that_is_no_language_model_is_refused(module: torch.nn.Module) -> None:
    message = refused(module)
    assert type(module).__name__ in message
    assert "a causal language model" in message


def test_a_model_without_a_head_is_refused(tiny_model: Callable[..., Any]) -> None:
    """`Qwen3MoeModel` gives hidden states and no logits: neither losses nor predictions could be recorded."""
    refused(tiny_model("qwen3_moe").model)


def test_experts_that_cannot_be_reached_are_refused(
    tiny_model: Callable[..., Any],
) -> None:
    """A family whose experts are modules of a list must not pass for a dense model."""
    module = tiny_model("qwen3_moe")
    for layer in module.model.layers:
        layer.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(8))
    assert "experts that moescope cannot reach" in refused(module)
