"""Fetches Debian packages into a cache folder and unpacks them there; nothing is installed system-wide."""

from __future__ import annotations

import logging
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

logger = logging.getLogger(__name__)

PACKAGE_NAMES: tuple[str, ...] = (
    "bible-kjv-text",
    "linux-doc-6.1",
    "manpages-de",
    "manpages-de-dev",
    "manpages-es",
    "manpages-es-dev",
    "manpages-fr",
    "manpages-fr-dev",
    "manpages-ja",
    "manpages-ja-dev",
    "manpages-zh",
    "perl-doc",
    "wordnet-base",
)
"""Every Debian package that the demo text is taken from."""

DEFAULT_CACHE: Path = Path.home() / ".cache" / "moescope" / "demo-sources"
"""Where packages, extracted text and training checkpoints are kept."""


@dataclass(frozen=True)
class Package:
    """One unpacked Debian package."""

    name: str
    version: str
    root: Path

    def identity(self, path: Path) -> str:
        """The name of one file in it: ``package=version:path inside the package``."""
        return f"{self.name}={self.version}:{path.relative_to(self.root).as_posix()}"


def run_quietly(*command: str, folder: Path) -> None:
    """Run a program in `folder`; raises `subprocess.CalledProcessError`, with its output, where it fails."""
    subprocess.run(command, cwd=folder, check=True, capture_output=True)  # noqa: S603  a fixed command


def fetch_packages(cache: Path) -> dict[str, Package]:
    """Download (where the cache has none) and unpack every package of `PACKAGE_NAMES`.

    Raises `subprocess.CalledProcessError` where apt-get or dpkg-deb fails, for instance because a package is
    unknown to this Debian release.
    """
    cache.mkdir(parents=True, exist_ok=True)
    packages: dict[str, Package] = {}
    for name in PACKAGE_NAMES:
        archives = sorted(cache.glob(f"{name}_*.deb"))
        if not archives:
            logger.info("downloading %s", name)
            run_quietly("apt-get", "download", name, folder=cache)
            archives = sorted(cache.glob(f"{name}_*.deb"))
        version = unquote(archives[-1].name.split("_")[1])
        root = cache / "unpacked" / f"{name}_{version.replace(':', '-')}"
        if not root.exists():
            root.mkdir(parents=True)
            run_quietly("dpkg-deb", "-x", str(archives[-1]), str(root), folder=cache)
        packages[name] = Package(name, version, root)
    return packages
