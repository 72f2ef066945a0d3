"""Files are written whole or not at all: on a full disk, under a umask, through links, and by two processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from full_disk import full_disk

from effformer.files import append_lines, write_together, write_whole

MANY = b"x" * 200_000


@pytest.fixture
def umask() -> Iterator[Callable[[int], object]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [b"new", bytearray(b"new"), memoryview(b"new"), "new"])
def test_a_file_is_made_or_replaced(tmp_path: Path, content: bytes | bytearray | memoryview | str) -> None:
    path = tmp_path / "a" / "b" / "file"
    for _ in range(2):
        write_whole(str(path), content)
        assert path.read_bytes() == b"new"
        path.write_bytes(b"something longer")
    assert names(path.parent) == ["file"]


def test_text_is_utf_8(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "naïve\n")
    assert (tmp_path / "file").read_bytes() == b"na\xc3\xafve\n"


def test_modes(tmp_path: Path, umask: Callable[[int], object]) -> None:
    """A new file's mode is that of the umask, an old file keeps its own."""
    for mask, wanted in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        umask(mask)
        write_whole(tmp_path / f"{mask}", "new")
        assert mode(tmp_path / f"{mask}") == wanted
    (tmp_path / "old").write_text("old")
    (tmp_path / "old").chmod(0o640)
    write_whole(tmp_path / "old", "new")
    assert mode(tmp_path / "old") == 0o640


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("old")
    for path in (old, tmp_path / "new"):
        with full_disk(100_000), pytest.raises(OSError, match=f"^{path} cannot be written: File too large$"):
            write_whole(path, MANY)
    assert old.read_text() == "old"
    assert names(tmp_path) == ["old"]


def test_a_reader_of_the_old_file_reads_on(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as reader:
        write_whole(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_the_target_of_a_link_is_replaced(tmp_path: Path) -> None:
    for folder in ("data", "links"):
        (tmp_path / folder).mkdir()
    target, link, second = tmp_path / "data" / "target", tmp_path / "links" / "link", tmp_path / "links" / "second"
    link.symlink_to("../data/target")
    second.symlink_to("link")
    for content in ("first", "second"):  # the first write makes the target
        write_whole(second, content)
        assert target.read_text() == content
    assert link.is_symlink()
    assert second.is_symlink()
    with full_disk(100_000), pytest.raises(OSError, match="links/link cannot be written"):
        write_whole(link, MANY)
    assert target.read_text() == "second"
    assert (names(tmp_path / "links"), names(tmp_path / "data")) == (["link", "second"], ["target"])


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path, "it is not a regular file"),
        (tmp_path / "pipe", "it is not a regular file"),
        (tmp_path / "circle", "it is a symbolic link in a circle"),
        (tmp_path / "file" / "below", "(File exists|Not a directory)"),
    ):
        with pytest.raises(OSError, match=f"^{path} cannot be written: {reason}$"):
            write_whole(path, "new")
    monkeypatch.setattr(os, "access", lambda path, kind: kind != os.W_OK)  # tests may run as root
    with pytest.raises(PermissionError, match="it is read-only"):
        write_whole(tmp_path / "file", "new")
    assert names(tmp_path) == ["circle", "file", "pipe"]
    assert (tmp_path / "file").read_text() == "old"


def test_files_that_belong_together(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "else" / "other"
    write_together({one: "1", other: b"1"})
    for files in ({one: "2", other: MANY}, {other: MANY, one: "2"}):
        with full_disk(100_000), pytest.raises(OSError, match=f"^{other} cannot be written"):
            write_together(files)
        assert (one.read_text(), other.read_text()) == ("1", "1")
    assert (names(tmp_path), names(other.parent)) == (["else", "one"], ["other"])


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_lines_are_added_all_or_none(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lines"
    append_lines(path, ["one", "zwölf"])
    append_lines(str(path), iter(["three"]))
    assert path.read_bytes() == "one\nzwölf\nthree\n".encode()
    number = path.stat().st_ino
    with full_disk(100_000), pytest.raises(OSError, match=f"^{path} cannot be written: File too large$"):
        append_lines(path, ["four", MANY.decode()])
    assert path.read_bytes() == "one\nzwölf\nthree\n".encode()
    assert path.stat().st_ino == number  # another process that has it open adds to the same file
    assert names(path.parent) == ["lines"]


@pytest.mark.parametrize("left", ["", "whole\n"])
def test_an_incomplete_last_line_is_removed(tmp_path: Path, left: str) -> None:
    path = tmp_path / "lines"
    path.write_text(left + "hal")
    with full_disk(100_000), pytest.raises(OSError, match="cannot be written"):
        append_lines(path, [MANY.decode()])
    assert path.read_text() == left
    path.write_text(left + "hal")
    append_lines(path, ["next"])
    assert path.read_text() == left + "next\n"


def test_the_stand_in_for_a_full_disk_ends(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.suppress(OSError), full_disk(10):
        (tmp_path / "file").write_bytes(MANY)
    assert (tmp_path / "file").stat().st_size == 10
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before


def test_a_complete_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}')  # as an editor leaves it
    append_lines(path, ['{"c": 3}'])
    assert path.read_text().splitlines() == ['{"a": 1}', '{"b": 2}', '{"c": 3}']


def test_processes_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(append_lines, [path] * 100, [[f'{{"n": {n}, "x": "{"x" * 5000}"}}'] for n in range(100)]))
    assert sorted(json.loads(line)["n"] for line in path.read_text().splitlines()) == list(range(100))
