"""Atomic replacement: a file is complete, either old or new, in every case."""

import os
import signal
import subprocess
import sys

import pytest

from gradl1_fast import _files as files


def half_written(path):
    path.write_bytes(b"ne")
    raise RuntimeError("half way")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("one", "zwei ä\n"):
        files.write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert names(tmp_path) == ["a.txt"]


def test_the_temporary_file_has_the_same_extension(tmp_path):
    with files.replacing(tmp_path / "a.npz") as partial:
        assert partial.suffix == ".npz"
        assert partial.parent == tmp_path
        partial.touch()


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="half"), files.replacing(path) as partial:
        half_written(partial)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_kill_during_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")
    code = f"""
import os, signal
from gradl1_fast._files import replacing
with replacing({str(path)!r}) as partial:
    partial.write_bytes(b"ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", code], check=False)
    assert run.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_the_content_is_flushed_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    files.write_bytes(tmp_path / "a", b"x")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.write_bytes(tmp_path / "nowhere" / "a", b"x")
