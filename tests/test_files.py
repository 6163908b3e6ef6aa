"""What is read must be a regular file; what is written appears whole, wherever the path leads."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from alvts_cli import AlvtsError
from alvts_cli.files import check_writable, locked, open_regular, read_bytes, read_text, write_whole

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX files")


@posix
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/stdin"])
def test_a_device_is_not_read(device: str) -> None:
    with pytest.raises(AlvtsError, match=r"cannot read .*: it is a device or a pipe"):
        read_bytes(Path(device))


@posix
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AlvtsError, match="it is a device or a pipe"):
        open_regular(tmp_path / "pipe")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(AlvtsError, match=r"there is no picture .*none"):
        read_bytes(tmp_path / "none", "picture")
    with pytest.raises(AlvtsError, match="it is a folder"):
        read_bytes(tmp_path)
    (tmp_path / "text").write_bytes(b"caf\xe9")
    with pytest.raises(AlvtsError, match="not UTF-8"):
        read_text(tmp_path / "text")
    with pytest.raises(AlvtsError, match="cannot read"):
        read_bytes(Path("a\0b"))


@posix
def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "ahead").symlink_to("later")
    (tmp_path / "loop").symlink_to("loop")
    assert read_text(tmp_path / "link") == "old"
    write_whole(tmp_path / "link", b"new")
    write_whole(tmp_path / "ahead", b"made")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "ahead").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "later").read_text() == "made"
    for work in (check_writable, lambda path: write_whole(path, b"")):
        with pytest.raises(AlvtsError, match="cannot write"):
            work(tmp_path / "loop")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"real", "link", "ahead", "later", "loop"}


@posix
def test_a_read_only_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    path.chmod(0o444)
    (tmp_path / "link").symlink_to("kept")
    for name in ("kept", "link"):
        with pytest.raises(AlvtsError, match="it is read-only"):
            check_writable(tmp_path / name)
        with pytest.raises(AlvtsError, match="it is read-only"):
            write_whole(tmp_path / name, b"new")
    assert path.read_text() == "old"


@posix
def test_the_rights_of_a_replaced_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "private"
    path.write_text("old")
    path.chmod(0o600)
    write_whole(path, b"new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600


@posix
def test_devices_and_pipes_are_written_through(tmp_path: Path) -> None:
    node = Path("/dev/null").stat()
    write_whole(Path("/dev/null"), b"gone")
    check_writable(Path("/dev/null"))
    assert Path("/dev/null").stat().st_ino == node.st_ino
    with pytest.raises(AlvtsError, match="not a regular file"):
        check_writable(Path("/dev/null"), regular=True)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"through")
    reader.join(600)
    assert got == [b"through"] and pipe.is_fifo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device_is_one_line() -> None:
    with pytest.raises(AlvtsError, match="cannot write /dev/full: No space left"):
        write_whole(Path("/dev/full"), b"x")


def test_a_dash_is_standard_output(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable(Path("-"))
    write_whole(Path("-"), b"\x00\xff")
    write_whole(Path("/dev/stdout"), b"!")
    assert capfdbinary.readouterr().out == b"\x00\xff!"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AlvtsError, match="not a regular file"):
        check_writable(Path("-"), regular=True)


def test_a_name_as_long_as_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 255)
    check_writable(path)
    write_whole(path, b"x")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(AlvtsError, match="cannot write"):
        check_writable(tmp_path / ("a" * 256))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys, pathlib; from alvts_cli.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), 'a run'):\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(out)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with (
            pytest.raises(AlvtsError, match=r"a run into .*out is running already"),
            locked(out, "a run"),
        ):
            pytest.fail("two at once")
        other.kill()
    # A process that was killed holds nothing.
    for _ in range(2):
        with locked(out, "a run"):
            time.sleep(0)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    with pytest.raises(AlvtsError, match="cannot write"), locked(out, "a run"):
        pytest.fail("there can be no such file")
