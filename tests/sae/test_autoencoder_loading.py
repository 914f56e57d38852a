"""Autoencoders from folders, from the Hub's cache, and from a store; and what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moescope.core.errors import InputError, RunError, StoreError
from moescope.sae.catalogue import CONFIG, WEIGHTS, sae_rows
from moescope.sae.hook_names import site_of_hook
from moescope.sae.loading import from_disk, load_autoencoder, published

_NOW = {"sae_lens_version": "6.54.12"}
WIDTH = 32  # of the tiny models in tests/conftest.py


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(metadata…, form="TopK", d_in=32, folder="sae", config={…})`: a folder that SAELens wrote."""

    def write(
        *,
        form: str = "TopK",
        d_in: int = WIDTH,
        folder: str = "sae",
        config: dict[str, Any] | None = None,
        **metadata: Any,
    ) -> Path:
        import sae_lens
        from sae_lens.saes.sae import SAEMetadata

        extra = {"k": 3} if form == "TopK" else {}
        made = getattr(sae_lens, f"{form}SAEConfig")(
            d_in=d_in, d_sae=12, **extra, **(config or {}), metadata=SAEMetadata(**metadata)
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = getattr(sae_lens, f"{form}SAE")(made)
            for parameter in module.parameters():
                parameter.data = torch.randn_like(parameter)
        module.save_model(tmp_path / folder)
        return tmp_path / folder

    return write


@pytest.fixture
def live(tiny_model: Callable[..., Any]) -> Any:
    import moescope as ms

    return ms.load(tiny_model("qwen3_moe"))


def test_folder_is_read_as_stock_saelens_reads_it(saved: Callable[..., Path]) -> None:
    from sae_lens import SAE

    folder = saved(hook_name="blocks.1.hook_resid_pre", model_name="gpt2-small")
    found, stock = from_disk(folder), SAE.load_from_disk(folder)
    x = torch.randn(2, 5, WIDTH)
    assert torch.equal(found.encode(x), stock.encode(x))
    assert torch.equal(found.decode(found.encode(x)), stock(x))
    assert (str(found.site), found.name, found.expert, found.head) == ("blocks.1.hook_resid_pre", "sae", None, None)
    assert (found.row["model"], found.row["architecture"], found.d_in, found.d_sae) == ("gpt2-small", "topk", WIDTH, 12)
    assert not found.module.training
    assert not any(p.requires_grad for p in found.module.parameters())


def test_store_keeps_a_copy_and_gives_it_back(saved: Callable[..., Path], store: Any) -> None:
    folder = saved(hook_name="blocks.1.hook_mlp_out", model_name="m")
    found = from_disk(folder, store=store, name="mine")
    shutil.rmtree(folder)
    for name in ("mine", found.sae_id):
        again = load_autoencoder(store, name)
        x = torch.randn(4, WIDTH)
        assert torch.equal(again.encode(x), found.encode(x))
        assert again.row["source"]["folder"] == str(folder.resolve())


def test_decoder_rows_are_what_a_unit_of_a_latent_adds(saved: Callable[..., Path]) -> None:
    for rescale in (False, True):
        found = from_disk(
            saved(
                hook_name="blocks.0.hook_resid_pre",
                config={"rescale_acts_by_decoder_norm": rescale},
                folder=f"r{rescale}",
            )
        )
        nothing = torch.zeros(12)
        for latent in range(12):
            one = nothing.clone()
            one[latent] = 1.0
            torch.testing.assert_close(found.decode(one) - found.decode(nothing), found.decoder[latent])


def test_heads_lie_side_by_side(saved: Callable[..., Path]) -> None:
    folder = saved(form="Standard", hook_name="blocks.1.attn.hook_z", config={"reshape_activations": "hook_z"})
    found = from_disk(folder)
    assert found.encode(torch.randn(3, WIDTH)).shape == (3, 12)
    assert found.decode(torch.rand(3, 12)).shape == (3, WIDTH)
    assert from_disk(saved(hook_name="blocks.1.attn.hook_z", hook_head_index=2, d_in=8, folder="head")).head == 2


def test_vectors_normalised_one_by_one_need_themselves_to_decode(saved: Callable[..., Path]) -> None:
    folder = saved(form="Standard", hook_name="blocks.1.hook_resid_pre", config={"normalize_activations": "layer_norm"})
    found = from_disk(folder)
    x = 7 * torch.randn(5, WIDTH) + 3
    acts = found.encode(x)
    found.encode(torch.randn(2, WIDTH))  # another in between
    from sae_lens import SAE

    torch.testing.assert_close(found.decode(acts, x), SAE.load_from_disk(folder)(x))
    with pytest.raises(InputError, match="pass the vectors"):
        found.decode(acts)


def test_folders_of_saelens_before_version_6_are_read(saved: Callable[..., Path]) -> None:
    folder = saved(form="Standard", hook_name="blocks.1.hook_resid_pre")
    expected = from_disk(folder).encode(x := torch.randn(4, WIDTH))
    old = {
        "hook_point": "blocks.1.hook_resid_pre", "d_in": WIDTH, "d_sae": 12, "dtype": "float32", "device": "cpu",
        "model_name": "gpt2-small", "hook_point_head_index": None, "activation_fn_str": "relu", "context_size": 128,
        "normalize_activations": False, "sae_lens_training_version": "2.1.0",
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(old))
    found = from_disk(folder)
    assert torch.equal(found.encode(x), expected)
    assert (str(found.site), found.row["model"]) == ("blocks.1.hook_resid_pre", "gpt2-small")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "is no folder of SAELens"),
        (lambda f: (f / CONFIG).unlink(), "is no folder of SAELens"),
        (shutil.rmtree, "no such folder"),
        (lambda f: (f / CONFIG).write_text("{"), "is no JSON"),
        (lambda f: (f / CONFIG).write_text("[1]"), "is no configuration"),
        (lambda f: _edit(f, architecture="quantum"), "knows no architecture 'quantum'"),
        (lambda f: _edit(f, architecture="temporal"), "encodes whole sequences"),
        (lambda f: _edit(f, d_sae=99), "cannot read"),
        (lambda f: _edit(f, metadata={"sae_lens_version": "99.0.0"}, d_in=3), "written by SAELens 99.0.0"),
        (lambda f: (f / WEIGHTS).write_bytes(b"nothing"), "cannot read"),
        (lambda f: (f / WEIGHTS).rename(f / "weights.pt"), "files of pickles are not read"),
        (lambda f: _edit(f, metadata={}), "does not say where"),
        (lambda f: _edit(f, metadata={**_NOW, "hook_name": "blocks.1.hook_mlp_in"}), "before its norm"),
        (lambda f: _edit(f, metadata={**_NOW, "hook_name": "somewhere"}), "not a site"),
    ],
)
def test_what_cannot_be_read_is_explained(saved: Callable[..., Path], change: Callable[[Path], Any], said: str) -> None:
    folder = saved(hook_name="blocks.1.hook_resid_pre")
    change(folder)
    with pytest.raises(InputError, match=said):
        from_disk(folder)


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def test_weights_that_are_no_numbers_are_refused(saved: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(hook_name="blocks.1.hook_resid_pre")
    weights = load_file(folder / WEIGHTS)
    weights["W_dec"][2, 3] = float("nan")
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(InputError, match=r"not finite: W_dec"):
        from_disk(folder)


def test_site_can_be_said_where_the_name_is_no_site(saved: Callable[..., Path]) -> None:
    folder = saved(hook_name="blocks.1.ln2.hook_normalized")
    with pytest.raises(InputError, match="before that norm's gain"):
        from_disk(folder)
    assert str(from_disk(folder, site="blocks.1.hook_resid_post").site) == "blocks.1.hook_resid_post"


def test_paths_of_modules_are_read_with_the_model(saved: Callable[..., Path], live: Any) -> None:
    folder = saved(hf_hook_name="model.layers.1", model_name=live.name)
    assert str(from_disk(folder, model=live).site) == "blocks.1.hook_resid_post"


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.8.hook_resid_pre", "blocks.8.hook_resid_pre"),
        ("blocks.3.hook_mlp_out", "blocks.3.hook_mlp_out"),
        ("blocks.3.mlp.hook_out", "blocks.3.hook_mlp_out"),
        ("blocks.3.attn.hook_z", "blocks.3.attn.hook_z"),
    ],
)
def test_hooks_are_read_as_sites(hook: str, site: str) -> None:
    assert str(site_of_hook(hook)) == site


def test_another_models_autoencoder_is_refused_unless_forced(saved: Callable[..., Path], live: Any, store: Any) -> None:
    folder = saved(hook_name="blocks.1.hook_resid_post", model_name="gpt2-small")
    with pytest.raises(InputError, match=r"another model: .*gpt2-small.*force=True") as told:
        from_disk(folder, model=live)
    assert live.name in str(told.value)
    forced = from_disk(folder, model=live, force=True, store=store, name="forced")
    assert forced.row["model"] == "gpt2-small"
    with pytest.raises(InputError, match="another model"):
        load_autoencoder(store, "forced", model=live)
    load_autoencoder(store, "forced", model=live, force=True)


def test_width_cannot_be_forced(saved: Callable[..., Path], live: Any) -> None:
    folder = saved(hook_name="blocks.1.hook_resid_post", model_name=live.name, d_in=48)
    with pytest.raises(InputError, match=r"width .* 32 components.*48"):
        from_disk(folder, model=live, force=True)
    folder = saved(hook_name="blocks.9.hook_resid_post", model_name=live.name, folder="deep")
    with pytest.raises(InputError, match="2 blocks"):
        from_disk(folder, model=live, force=True)


def test_own_model_is_known_by_its_anatomy_and_its_weights(
    saved: Callable[..., Path], live: Any, tiny_model: Callable[..., Any]
) -> None:
    import moescope as ms
    from moescope.sae.belonging import check_belongs

    found = from_disk(saved(hook_name="blocks.1.hook_resid_post", model_name=live.name), model=live)
    found.row["anatomy_digest"] = live.anatomy.digest
    check_belongs(found, live)
    other = ms.load(tiny_model("qwen3_moe", num_experts=4))
    with pytest.raises(InputError, match="digest"):
        check_belongs(found, other)
    found.row["anatomy_digest"] = None
    found.row["settings"] = {"anatomy": {**live.anatomy.facts(), "vocabulary": 12}}
    with pytest.raises(InputError, match="vocabulary 12"):
        check_belongs(found, live)
    found.row["settings"] = {"revision": "sha256-sampled:aa"}
    live.revision = "sha256-sampled:bb"
    with pytest.raises(InputError, match="weights with digest"):
        check_belongs(found, live)
    found.row.update(settings={"revision": live.revision}, model="the same, under an older path")
    check_belongs(found, live)


def test_damaged_weights_are_told(saved: Callable[..., Path], store: Any) -> None:
    found = from_disk(saved(hook_name="blocks.1.hook_resid_pre"), store=store, name="mine")
    path = found.folder / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(StoreError, match="not the file that was written"):
        load_autoencoder(store, "mine")
    path.unlink()
    with pytest.raises(StoreError, match="is missing"):
        load_autoencoder(store, "mine")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | Exception], None]:
    """`hub(folder)`: the Hub gives the files of a folder, whatever is asked; `hub(error)`: it fails so."""

    def answer(with_what: Path | Exception) -> None:
        def download(repo_id: str, filename: str, **_: Any) -> str:
            if isinstance(with_what, Exception):
                raise with_what
            path = with_what / Path(filename).name
            if not path.exists():
                from huggingface_hub.utils import EntryNotFoundError

                raise EntryNotFoundError(f"no {filename} in {repo_id}")
            return str(path)

        monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.hf_hub_download", download)

    return answer


def test_published_autoencoders_load_by_release_and_id(
    saved: Callable[..., Path], store: Any, hub: Callable[..., None]
) -> None:
    folder = saved(form="Standard", hook_name="blocks.8.hook_resid_pre", model_name="gpt2-small")
    hub(folder)
    found = published("gpt2-small-res-jb", "blocks.8.hook_resid_pre", store=store)
    x = torch.randn(3, WIDTH)
    assert torch.equal(found.encode(x), from_disk(folder).encode(x))
    assert str(found.site) == "blocks.8.hook_resid_pre"
    (row,) = sae_rows(store)
    assert (row["source"]["release"], row["source"]["sae_id"]) == ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    assert (row["trained_on"], row["name"]) == (None, "gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert torch.equal(load_autoencoder(store, row["name"]).encode(x), found.encode(x))


def test_failing_network_is_told(hub: Callable[..., None]) -> None:
    hub(ConnectionError("no route to host"))
    with pytest.raises(RunError, match=r"could not be fetched.*no route to host.*network"):
        published("gpt2-small-res-jb", "blocks.8.hook_resid_pre")


@pytest.mark.parametrize(
    ("release", "sae_id", "said"),
    [
        ("gpt2-small-res-jc", "x", "no release 'gpt2-small-res-jc'.*gpt2-small-res-jb"),
        ("gpt2-small-res-jb", "blocks.99.hook_resid_pre", "has no autoencoder"),
        ("gpt2-small-hook-z-kk", "blocks.0.hook_z", "pickled files"),
    ],
)
def test_what_is_not_published_so_is_refused(release: str, sae_id: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        published(release, sae_id)
