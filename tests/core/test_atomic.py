"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moescope.core.atomic import written_whole
from moescope.core.errors import InputError


def test_file_appears_only_when_the_writer_is_done(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with written_whole(target) as partial:
        partial.write_text("half")
        assert not target.exists()
        partial.write_text("whole")
    assert target.read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def _half(target: Path, error: BaseException | type[BaseException]) -> None:
    with written_whole(target) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_writer_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        _half(tmp_path / "a.txt", error)
    assert list(tmp_path.iterdir()) == []


def test_writer_that_fails_leaves_the_file_before_it_untouched(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ValueError, match="on the way"):
        _half(target, ValueError("on the way"))
    assert target.read_text() == "old"


def test_file_before_it_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("a much longer old text")
    with written_whole(target) as partial:
        partial.write_text("new")
    assert target.read_text() == "new"


def test_reader_of_the_file_before_it_goes_on_reading_that(tmp_path: Path) -> None:
    """The name changes hands at once: nobody ever sees half of the new file, or the old one emptied."""
    target = tmp_path / "a.txt"
    target.write_text("old")
    with target.open() as reader:
        with written_whole(target) as partial:
            partial.write_text("new")
        assert reader.read() == "old"
    assert target.read_text() == "new"


def test_missing_folder_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    target = tmp_path / "no" / "such" / "a.txt"
    with pytest.raises(InputError, match=r"no such folder.*mkdir -p .*no/such"), written_whole(target):
        pytest.fail("the writer must not be called")
    assert list(tmp_path.iterdir()) == []


def test_folder_under_the_targets_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.html").mkdir()
    with pytest.raises(InputError, match="folder"), written_whole(tmp_path / "a.html") as partial:
        partial.write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="no permission"), written_whole(tmp_path / "a.txt") as partial:
            partial.write_text("x")
    finally:
        tmp_path.chmod(0o700)
