"""What the package imports is declared, what is declared is imported, and what a release needs lies at the top."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = ("moescope", "store", "probes", "routing", "sae", "dashboard")
# Distribution → the name it is imported by, where they differ.
MODULES = {"pyyaml": "yaml", "kaleido": "kaleido", "dash-ag-grid": "dash_ag_grid"}
# Imported → the declared distribution that cannot be installed without it.
BROUGHT = {
    "flask": "dash",
    "werkzeug": "dash",
    "safetensors": "transformers",
    "tokenizers": "transformers",
    "jinja2": "torch",
}
# Looked for in a running notebook and never installed: where it is missing, there is no notebook.
ONLY_WHERE_IT_RUNS = {"IPython", "ipykernel"}
# Declared for others: transformers asks for them by itself to load .gguf files; objects of these are taken where users have them.
NOT_IMPORTED = {"gguf", "accelerate", "datasets"}
_TOOLS = {"docs", "test", "all"}


def _named(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower()


def _declared() -> dict[str, str]:
    """Modules that dependencies and extras promise, with their distribution."""
    listed = list(PROJECT["dependencies"])
    for extra, requirements in PROJECT["optional-dependencies"].items():
        listed += [] if extra in _TOOLS else requirements
    names = [_named(requirement) for requirement in listed]
    return {MODULES.get(name, name.replace("-", "_")): name for name in names}


@functools.cache
def _imported() -> dict[str, str]:
    """Top-level names that the package imports anywhere, with a file that does."""
    found: dict[str, str] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in _of_file(path):
                found.setdefault(name, str(path.relative_to(ROOT)))
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names and name != "moescope"}


def _of_file(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".import_module", ".find_spec")):
            yield from (str(word.value).split(".")[0] for word in node.args[:1] if isinstance(word, ast.Constant))


def test_every_import_is_declared_or_brought_by_what_is() -> None:
    known = {*_declared(), *BROUGHT, *ONLY_WHERE_IT_RUNS, "tqdm"}
    missing = {name: path for name, path in _imported().items() if name not in known}
    assert not missing


@pytest.mark.parametrize("module", BROUGHT)
def test_what_is_brought_is_required_by_who_brings_it(module: str) -> None:
    assert BROUGHT[module] in _declared().values()
    required = {
        _named(line).replace("_", "-")
        for line in importlib.metadata.requires(BROUGHT[module]) or ()
        if "extra ==" not in line
    }
    assert module in required


def test_every_dependency_is_imported() -> None:
    imported = _imported()
    unused = [name for module, name in _declared().items() if module not in imported and name not in NOT_IMPORTED]
    assert not unused


def test_the_extra_all_holds_every_extra_that_users_have() -> None:
    (line,) = PROJECT["optional-dependencies"]["all"]
    held = set(re.search(r"\[(.*)\]", line)[1].split(","))  # type: ignore[index]  # there is one
    assert held == set(PROJECT["optional-dependencies"]) - _TOOLS


def test_no_dependency_is_held_below_a_version() -> None:
    listed = [
        *PROJECT["dependencies"],
        *(line for lines in PROJECT["optional-dependencies"].values() for line in lines),
    ]
    assert not [line for line in listed if "<" in line or "==" in line]


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "constraints.txt"]
)
def test_a_release_has_its_files(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8")) > 300


def test_the_changelog_has_the_version_and_dates_that_fall() -> None:
    heads = re.findall(
        r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    versions = [version for version, _ in heads]
    assert versions[0] == "Unreleased"
    assert PROJECT["version"] in versions
    dates = [date for _, date in heads[1:]]
    assert all(dates)
    assert dates == sorted(dates, reverse=True)
    numbers = [tuple(map(int, version.split("."))) for version in versions[1:]]
    assert numbers == sorted(numbers, reverse=True)


def test_the_changelog_uses_the_words_of_its_form() -> None:
    kinds = set(re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_whole_and_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(cited)
    assert cited["type"] == "software"
    assert cited["version"] == PROJECT["version"]
    assert cited["license"] == PROJECT["license"]
    assert cited["authors"] == [{"name": "moescope developers"}]


def test_links_of_the_pages_at_the_top_lead_somewhere() -> None:
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text(encoding="utf-8")):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"
