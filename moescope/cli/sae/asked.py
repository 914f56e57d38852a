"""What commands about autoencoders check before they begin, and what a dry run of them says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moescope.cli.output import as_json, facts
from moescope.cli.store_check import check_store
from moescope.core.errors import InputError


def check_documents(documents: str) -> None:
    """Raise `InputError` where `--documents` is none of its words."""
    if documents not in ("held_out", "all"):
        raise InputError(f"--documents cannot be {documents!r}", expected="held_out or all")


def tell_plan(
    store: Path, *, run: str | None, saes: Sequence[str], model: Any, json: bool, any_run: bool = False, **more: Any
) -> None:
    """Look up what a command was given, read the store alone, and say it.

    Args:
        store: the path of the store.
        run: the run's name; None for the only one.
        saes: names of autoencoders.
        model: what would be loaded, or the model that was.
        json: print JSON.
        any_run: whether the command needs no run that is there already.
        more: what else to say.

    Raises:
        InputError: the store holds no such run or autoencoder.
    """
    from moescope.cli.export import only_run
    from moescope.sae.catalogue import sae_row
    from moescope.store.store import Store

    told: dict[str, Any] = {"store": str(store)}
    if store.exists():
        with Store(store, read_only=True) as opened:
            if run is not None or not any_run:
                found = only_run(opened, run)
                told |= {"run": found.name, "tokens of the run": found.info["summary"].get("tokens", 0)}
            rows = [sae_row(opened, name) for name in saes]
            told |= {"autoencoders": ", ".join(f"{row['name']} at {row['site']}" for row in rows)} if rows else {}
    elif run is not None or saes or not any_run:
        check_store(store)
    told |= {} if model is None else {"model": model if isinstance(model, str) else repr(model)}
    told |= more
    as_json(told) if json else facts(told)
