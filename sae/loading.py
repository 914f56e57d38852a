"""Loading autoencoders: from a store, from a folder in SAELens' format, or a published one by release and id.

Whatever is read is data: weights come from safetensors files, configurations from JSON, and nothing is unpickled.
"""

from __future__ import annotations

import difflib
import json
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moescope.core.errors import InputError, RunError
from moescope.core.sites import Site
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.belonging import check_belongs
from moescope.sae.catalogue import CONFIG, WEIGHTS, add_sae, check_files, folder_of, free_sae_name, sae_row
from moescope.sae.hook_names import sites_of_metadata
from moescope.sae.saelens import need_saelens

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.store.store import Store

# Ways of SAELens to read a publisher's own files that unpickle them.
_UNPICKLING = {"connor_rob_hook_z", "goodfire", "deepseek_r1", "qwen_scope", "dictionary_learning_1"}
_OF_SEQUENCES = {"temporal": "it encodes whole sequences, not single vectors"}


def load_autoencoder(
    store: Store,
    name: str,
    *,
    device: str | torch.device = "cpu",
    model: LiveModel | None = None,
    force: bool = False,
) -> Autoencoder:
    """An autoencoder of a store, its weights checked against their checksum.

    Args:
        store: that holds it.
        name: its name or `sae_id`.
        device: where its weights go.
        model: that it shall be used with; None leaves that unchecked.
        force: with `model`, leave out the comparison of models. The width is compared all the same.

    Raises:
        InputError: there is none of that name, or it belongs to another model.
        StoreError: its files are missing or damaged.

    Example:
        >>> import moescope as ms
        >>> from moescope.sae.loading import load_autoencoder
        >>> with ms.Store("runs.duckdb") as store:  # doctest: +SKIP
        ...     sae = load_autoencoder(store, "topk-512-k16")
    """
    row = sae_row(store, name)
    folder = folder_of(store, row)
    check_files(store, row)
    module = opened_module(folder, device)
    loaded = _autoencoder(row, module, folder)
    if model is not None:
        check_belongs(loaded, model, force=force)
    return loaded


def from_disk(
    folder: str | Path,
    *,
    site: str | Site | None = None,
    store: Store | None = None,
    name: str | None = None,
    model: LiveModel | None = None,
    device: str | torch.device = "cpu",
    expert: int | None = None,
    force: bool = False,
) -> Autoencoder:
    """An autoencoder from a folder in SAELens' format (`cfg.json`, `sae_weights.safetensors`), of this or older versions.

    Args:
        folder: with the two files.
        site: where its vectors are read, over what its configuration says.
        store: keep a copy in this store, in today's format; None only loads it.
        name: for the store; None makes one of the folder's name.
        model: that it shall be used with: its anatomy reads paths of modules, and is compared with the autoencoder's.
        device: where its weights go.
        expert: the one expert whose vectors it is of; None for all.
        force: with `model`, leave out the comparison of models. The width is compared all the same.

    Raises:
        InputError: it is no such folder, or one that SAELens cannot read, or its vectors are of no site that is recorded here,
            or it belongs to another model.

    Example:
        >>> from moescope.sae.loading import from_disk
        >>> sae = from_disk("checkpoints/final", site="blocks.8.hook_resid_pre")  # doctest: +SKIP
    """
    path = Path(folder)
    _check_folder(path)
    module = opened_module(path, device)
    row = _row_of(module, name or path.resolve().name, {"folder": str(path.resolve())}, site, expert, model)
    return _taken_in(row, module, path, store, name, model, force=force)


def published(
    release: str,
    sae_id: str,
    *,
    store: Store | None = None,
    name: str | None = None,
    site: str | Site | None = None,
    model: LiveModel | None = None,
    device: str | torch.device = "cpu",
    force: bool = False,
) -> Autoencoder:
    """A published autoencoder, fetched by SAELens from the Hugging Face Hub (or from its cache).

    Args:
        release: a release of SAELens' list, or a repository of the Hub.
        sae_id: which of the release.
        store: keep a copy in this store; None only loads it.
        name: for the store; None makes one of release and id.
        site: where its vectors are read, over what its configuration says.
        model: that it shall be used with.
        device: where its weights go.
        force: with `model`, leave out the comparison of models. The width is compared all the same.

    Raises:
        InputError: there is no such release or id, its files would have to be unpickled, or it belongs to another model.
        RunError: it could not be fetched.

    Example:
        >>> from moescope.sae.loading import published
        >>> sae = published("gpt2-small-res-jb", "blocks.8.hook_resid_pre")  # doctest: +SKIP
    """
    module = _prepared(_fetched(release, sae_id, device))
    row = _row_of(module, name or f"{release}/{sae_id}", {"release": release, "sae_id": sae_id}, site, None, model)
    return _taken_in(row, module, None, store, name, model, force=force)


def opened_module(folder: Path, device: str | torch.device = "cpu") -> Any:
    """SAELens' module in a folder of its format, ready for use: evaluation mode, gradients off, heads side by side.

    Args:
        folder: with `cfg.json` and `sae_weights.safetensors`.
        device: where its weights go.

    Raises:
        InputError: SAELens cannot read it.
    """
    return _prepared(_opened(folder, device))


def row_of_metadata(module: Any) -> dict[str, Any]:
    """Columns of `saes` that a module of SAELens tells itself: its form, its widths, its model.

    Args:
        module: an SAE of SAELens.
    """
    metadata = module.cfg.metadata
    return {
        "architecture": module.cfg.architecture(),
        "trained_as": metadata.get("training_architecture") or module.cfg.architecture(),
        "d_in": int(module.cfg.d_in),
        "d_sae": int(module.cfg.d_sae),
        "model": metadata.get("model_name"),
    }


def _taken_in(
    row: dict[str, Any],
    module: Any,
    folder: Path | None,
    store: Store | None,
    name: str | None,
    model: LiveModel | None,
    *,
    force: bool,
) -> Autoencoder:
    """Check against the model; keep a copy where a store is given."""
    loaded = _autoencoder(row, module, folder)
    if model is not None:
        check_belongs(loaded, model, force=force)
    if store is None:
        return loaded
    chosen = name or free_sae_name(store, str(row["name"]))

    def write(into: Path) -> None:
        module.save_model(into)

    kept = add_sae(store, {**row, "name": chosen}, write)
    return _autoencoder(kept, module, folder_of(store, kept))


def _row_of(
    module: Any,
    name: str,
    source: Mapping[str, Any],
    site: str | Site | None,
    expert: int | None,
    model: LiveModel | None,
) -> dict[str, Any]:
    metadata = module.cfg.metadata.to_dict()
    anatomy = None if model is None else model.anatomy
    chosen, target, head = sites_of_metadata(metadata, anatomy, site=site)
    ours = metadata.get("moescope")  # what our own training notes in what it saves
    ours = ours if isinstance(ours, dict) else {}
    data = ours.get("data")
    noted = {**(data if isinstance(data, dict) else {}), "head": head, "revision": ours.get("revision")}
    return {
        "sae_id": str(uuid.uuid4()),
        "name": name,
        "site": str(chosen),
        "target_site": None if target is None else str(target),
        "expert": ours.get("expert") if expert is None else expert,
        **row_of_metadata(module),
        "anatomy_digest": ours.get("anatomy_digest"),
        "trained_on": _run_id(ours.get("run_id")),
        "corpus_fingerprint": ours.get("corpus_fingerprint"),
        "settings": {key: value for key, value in noted.items() if value is not None},
        "source": {**source, "hook_name": metadata.get("hook_name"), "sae_lens": metadata.get("sae_lens_version")},
    }


def _run_id(told: Any) -> str | None:
    """The id of a run, where a file that anybody may have written has one."""
    try:
        return str(uuid.UUID(str(told)))
    except ValueError:
        return None


def _autoencoder(row: dict[str, Any], module: Any, folder: Path | None) -> Autoencoder:
    target = row.get("target_site")
    return Autoencoder(
        sae_id=str(row["sae_id"]),
        name=str(row["name"]),
        site=Site.parse(str(row["site"])),
        target_site=Site.parse(str(target)) if target else None,
        expert=row.get("expert"),
        module=module,
        row=row,
        folder=folder,
    )


def _prepared(module: Any) -> Any:
    """In evaluation mode, its gradients off, heads side by side in one vector; refused where a weight is no number."""
    module.eval()
    module.requires_grad_(False)
    module.turn_off_forward_pass_hook_z_reshaping()
    if getattr(module.cfg, "normalize_activations", None) in ("expected_average_only_in", "covariance_whitening"):
        raise InputError(
            "this autoencoder takes vectors that were scaled, and the scale is not folded into its weights",
            fix="fold it in (SAELens: sae.fold_activation_norm_scaling_factor(factor)) and save it again",
        )
    broken = [name for name, weight in module.state_dict().items() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise InputError(
            f"weights of this autoencoder are not finite: {', '.join(broken)}",
            fix="get another copy, or train it again",
        )
    return module


def _check_folder(path: Path) -> None:
    missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
    if not missing:
        return
    there = sorted(file.name for file in path.iterdir())[:10] if path.is_dir() else []
    pickled = [name for name in there if name.endswith((".pt", ".pth", ".pkl", ".bin"))]
    found = "no such folder" if not path.is_dir() else ", ".join(there) or "an empty folder"
    raise InputError(
        f"{path} is no folder of SAELens",
        expected=f"{CONFIG} and {WEIGHTS}",
        found=found,
        fix=(
            "files of pickles are not read: convert it with SAELens where you trust it, and save it by save_model"
            if pickled
            else "name the folder that holds both files"
        ),
    )


def _opened(path: Path, device: str | torch.device) -> Any:
    """The module in a folder, as SAELens reads it; what it cannot read explained."""
    need_saelens()
    from sae_lens import SAE

    told = _version_of(path)
    try:
        with _quiet():
            return SAE.load_from_disk(path, device=str(device))
    except InputError:
        raise
    # Whatever a file from elsewhere makes SAELens raise is a file that cannot be read.
    except Exception as failed:
        architecture = told.get("architecture", "standard")
        if isinstance(failed, KeyError) and failed.args == (architecture,):
            problem = f"this SAELens ({version('sae_lens')}) knows no architecture {architecture!r}"
        else:
            problem = f"SAELens {version('sae_lens')} cannot read {path}"
        raise InputError(
            problem,
            found=f"{type(failed).__name__}: {' '.join(str(failed).split())[:300]}; written by SAELens {told['by']}",
            fix="open it with the SAELens that wrote it and save it again by save_model, or update sae-lens",
        ) from failed


def _version_of(path: Path) -> dict[str, Any]:
    """What a configuration says it is; refused where it is no JSON object or of a kind that cannot be used here."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError) as failed:
        raise InputError(f"{path / CONFIG} is no JSON", found=str(failed)[:200], fix="get another copy") from failed
    if not isinstance(config, dict):
        raise InputError(f"{path / CONFIG} is no configuration", expected="a JSON object", found=type(config).__name__)
    given = config.get("metadata")
    metadata: dict[str, Any] = given if isinstance(given, dict) else {}
    by = config.get("sae_lens_version") or metadata.get("sae_lens_version") or "before 6, or another program"
    architecture = str(config.get("architecture", "standard"))
    if why := _OF_SEQUENCES.get(architecture):
        raise InputError(f"autoencoders of the form {architecture!r} cannot be used here", found=why)
    return {"by": by, "architecture": architecture}


def _fetched(release: str, sae_id: str, device: str | torch.device) -> Any:
    need_saelens()
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    if release in known:
        entry = known[release]
        if sae_id not in entry.saes_map:
            near = difflib.get_close_matches(sae_id, entry.saes_map, n=3, cutoff=0.3) or list(entry.saes_map)[:3]
            raise InputError(f"release {release!r} has no autoencoder {sae_id!r}", fix=f"nearest: {', '.join(near)}")
        if entry.conversion_func in _UNPICKLING:
            raise InputError(
                f"release {release!r} is published as pickled files, which are not read",
                fix="convert it with SAELens where you trust it, save it by save_model, and load that folder",
            )
    elif "/" not in release:
        near = difflib.get_close_matches(release, known, n=3, cutoff=0.4)
        raise InputError(
            f"SAELens knows no release {release!r}",
            expected="a release of its list, or a repository owner/name",
            fix=f"nearest: {', '.join(near)}" if near else None,
        )
    try:
        with _quiet():
            return SAE.from_pretrained(release, sae_id, device=str(device))
    # Whatever the network, the Hub or the files on it make SAELens raise: it could not be fetched.
    except Exception as failed:
        raise RunError(
            f"{release} {sae_id} could not be fetched",
            found=f"{type(failed).__name__}: {' '.join(str(failed).split())[:300]}",
            fix="check the network and HF_HUB_OFFLINE, or download its folder and load that",
        ) from failed


@contextmanager
def _quiet() -> Iterator[None]:
    """SAELens' remarks about how it would like its models loaded say nothing here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
