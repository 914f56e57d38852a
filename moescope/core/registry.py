"""Registries: a new analysis, probe, edit or page is one new file, found without a list to maintain."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Generic, TypeVar

from moescope.core.errors import InputError
from moescope.core.plugins import load_plugins

T = TypeVar("T")

_MANY = 40  # names that a message still lists where some of them are near


class Registry(Generic[T]):
    """Named items of one kind, collected from the modules of some packages the first time they are asked for.

    Packages of others join in by an entry point of the group `moescope` (`moescope.core.plugins`).

    Args:
        kind: what an item is called in messages, singular ("analysis").
        packages: packages whose modules register items when imported. Each is walked by itself, because in an
            editable install the path of `moescope` does not show the folders mapped into it. Compiled kernels, in modules
            named …_kernel or …_kernels, are left until they are used.

    Example:
        >>> colours = Registry[str]("colour")
        >>> colours.add("amber", "#E69F00")
        >>> colours["amber"]
        '#E69F00'
    """

    def __init__(self, kind: str, *packages: str) -> None:
        self.kind = kind
        self._packages = packages
        self._items: dict[str, T] = {}
        self._discovered = False

    def add(self, name: str, item: T) -> None:
        """Register `item` as `name`. A name already held by another item is an error; a reload replaces its own."""
        held = self._items.get(name)
        if held is not None and _origin(held) != _origin(item):
            raise InputError(
                f"the {self.kind} {name!r} is registered twice", found=f"{_origin(held)} and {_origin(item)}"
            )
        self._items[name] = item

    def __getitem__(self, name: str) -> T:
        self._discover()
        if name not in self._items:
            near = difflib.get_close_matches(name, self._items, n=3, cutoff=0.4)
            near += [other for other in sorted(self._items) if name and name in other and other not in near][:5]
            told = near if near and len(self._items) > _MANY else sorted(self._items)
            more = f" (of {len(self._items)})" if len(told) < len(self._items) else ""
            raise InputError(
                f"there is no {self.kind} called {name!r}",
                expected=f"one of {', '.join(told) or '(none installed)'}{more}",
                fix=f"did you mean {' or '.join(repr(n) for n in near[:3])}?" if near else None,
            )
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._items

    def __iter__(self) -> Iterator[T]:
        self._discover()
        return iter([self._items[name] for name in sorted(self._items)])

    def names(self) -> list[str]:
        """All names, sorted."""
        self._discover()
        return sorted(self._items)

    def _discover(self) -> None:
        if self._discovered:
            return
        for package_name in self._packages:
            package = importlib.import_module(package_name)
            for module in pkgutil.walk_packages(package.__path__, prefix=package_name + "."):
                # Kernels register nothing, and loading their compiler takes time.
                if not module.name.endswith(("_kernel", "_kernels")):
                    importlib.import_module(module.name)
        if self._packages:
            load_plugins()
        self._discovered = True


def _origin(item: object) -> str:
    target = getattr(item, "function", None) or getattr(item, "layout", item)
    return f"{getattr(target, '__module__', type(item).__module__)}.{getattr(target, '__qualname__', repr(item))}"
