"""Ray: started on this machine, or joined; what it has, and what each worker gets of it."""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moescope.core.errors import InputError, RunError

# A local Ray carries little: tasks and their outcomes. Shards go through files.
_OBJECT_STORE = 256 << 20


@dataclass(frozen=True)
class Share:
    """What one worker gets.

    Attributes:
        threads: of torch, and as many CPUs of Ray.
        gpus: whole ones.
    """

    threads: int
    gpus: int


def import_ray() -> Any:
    """The library; raises `InputError` naming the extra where it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError as missing:
        raise InputError(
            "several workers need Ray, which is not installed",
            found=str(missing),
            fix="pip install 'moescope[ray]', or record with one worker",
        ) from missing


@contextmanager
def ray_running(address: str | None) -> Iterator[Any]:
    """Ray, ready: the one this process uses already, the cluster at `address`, or a new one on this machine.

    One that was started here has the CPUs and GPUs that Ray finds, and is stopped at the end. It runs no dashboard and reports
    nothing to anybody; of its clients it wants a token (since Ray 2.59), for its ports are open to the network.

    Args:
        address: of a cluster (`auto`, `host:port`, `ray://…`); None for this machine.

    Raises:
        InputError: Ray is not installed, or there is no cluster.
        RunError: Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init(
                "local",
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                **quiet,
            )
        else:
            ray.init(address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as refused:
        ray.shutdown()
        text = " ".join(str(refused).split())[:400]
        if address is not None:
            raise InputError(
                f"there is no Ray cluster at {address}", found=text, fix="start one: ray start --head"
            ) from refused
        raise RunError("Ray does not start on this machine", found=text) from refused
    try:
        yield ray
    finally:
        ray.shutdown()


def share_of(ray: Any, workers: int, *, threads: int | None, device: str, spread: bool) -> Share:
    """What each of so many workers gets.

    Args:
        ray: running.
        workers: how many.
        threads: asked for; None to divide the CPUs.
        device: `auto` for a GPU where there are any.
        spread: each model lies on several GPUs.

    Raises:
        InputError: there is not as much.
    """
    there = ray.cluster_resources()
    cpus, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
    if re.fullmatch(r"\w+:\d+", device):
        raise InputError(
            "Ray gives each worker a device of its own",
            found=f"device={device!r}",
            fix=f"pass {device.split(':', maxsplit=1)[0]!r}",
        )
    wanted = gpus > 0 and device in ("auto", "cuda")
    each = 0 if not wanted else max(1, gpus // workers) if spread else 1
    chosen = threads if threads is not None else max(1, cpus // workers)
    if (device == "cuda" and gpus == 0) or workers * each > gpus > 0 or workers * chosen > cpus:
        raise InputError(
            f"there is not enough for {workers} workers",
            expected=f"{workers * each} GPUs and {workers * chosen} CPUs"
            if each or device == "cuda"
            else f"{workers * chosen} CPUs",
            found=f"{gpus} GPUs and {cpus} CPUs in Ray",
            fix="use fewer workers, or fewer threads for each",
        )
    return Share(chosen, each)
