"""Packages of others that add analyses, probes, edits or pages: importing what their entry points name is enough."""

from __future__ import annotations

import functools
import importlib.metadata

from moescope.core.errors import InputError

GROUP = "moescope"
"""The group of entry points: `[project.entry-points.moescope]` in the pyproject.toml of the other package."""


@functools.cache
def load_plugins() -> None:
    """Import every module that an installed package names under the group, once in a process.

    Raises:
        InputError: one of them cannot be imported; the message names its package.
    """
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name):
        try:
            point.load()
        except Exception as failure:  # code of others may raise anything, and is told by the name of its package
            package = point.dist.name if point.dist else point.value
            raise InputError(
                f"the package {package} cannot add to moescope what its entry point {point.name!r} names",
                expected=f"that {point.value} can be imported",
                found=f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}",
                fix=f"mend it, or pip uninstall {package}",
            ) from failure
