"""Reading and writing files: only regular ones are read, and what is written appears whole.

A path that a user gives may be anything: a device that never ends, a pipe that nobody writes to, a
link, a file that is not to be written, or `-` for standard output.
"""

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from .errors import AlvtsError

STDOUT = Path("-")
"""As a file to write: standard output."""


def open_regular(path: Path, what: str = "file") -> BinaryIO:
    """A regular file (links are followed), open for reading bytes.

    Args:
        path: of the file.
        what: what it is to hold, for the message.

    Raises:
        AlvtsError: there is none, it cannot be read, or it is a folder, a device or a pipe: those
            may never end.
    """
    try:
        # A pipe without a writer would hold up anything but a non-blocking open.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise AlvtsError(f"there is no {what} {path}") from None
    except (OSError, ValueError) as error:
        raise AlvtsError(f"cannot read {path}: {_reason(error)}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise AlvtsError(f"cannot read {path}: it is {kind}; name a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, what: str = "file") -> bytes:
    """The whole of a regular file; the errors of `open_regular`."""
    with open_regular(path, what) as file:
        try:
            return file.read()
        except OSError as error:
            raise AlvtsError(f"cannot read {path}: {_reason(error)}") from None


def read_text(path: Path, what: str = "file") -> str:
    """The whole of a regular file of UTF-8 text.

    Raises:
        AlvtsError: as `open_regular`, or other bytes than UTF-8.
    """
    try:
        return read_bytes(path, what).decode()
    except UnicodeDecodeError:
        raise AlvtsError(f"{path} is not UTF-8 text") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, or leave what was there (nothing, or the old file) as it was.

    A link is followed. Into standard output (`-`), a device or a pipe the bytes are written as they
    are: these cannot be replaced.

    Raises:
        AlvtsError: it cannot be written, or is there and read-only.
    """
    target = path if path == STDOUT else _target(path)
    try:
        if is_stdout(path):
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
            return
        if _is_stream(path):
            path.write_bytes(data)
            return
        temporary = _temporary(target)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            temporary.replace(target)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except (OSError, ValueError) as error:
        raise AlvtsError(f"cannot write {path}: {_reason(error)}") from error


def check_writable(
    path: Path, regular: bool = False, read: Iterable[Path | str | None] = ()
) -> None:
    """Find out before a long run whether `write_whole(path, ...)` will do.

    Args:
        path: of the file.
        regular: refuse standard output, devices and pipes too.
        read: what the run reads and must not lose; None and what is no file here do not matter.

    Raises:
        AlvtsError: it will not, or it is one of those that are read.
    """
    for one in read:
        if one is not None and is_same(path, one):
            raise AlvtsError(f"cannot write {path}: it is read by this command; name another file")
    target = path if path == STDOUT else _target(path)
    try:
        if is_stdout(path) or _is_stream(path):
            if regular:
                raise AlvtsError(f"cannot write {path}: it is not a regular file; name one")
            return
        probe = _temporary(target)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise AlvtsError(f"cannot write {path}: {_reason(error)}") from error


def make_folder(path: Path) -> None:
    """Make a folder for what a long run will keep, and all above it; it may be there.

    Raises:
        AlvtsError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise AlvtsError(f"cannot make the folder {path}: {_reason(error)}") from None


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Be the only process that works on the output `path`; nothing is left behind.

    Args:
        path: what is being made, a file or a folder.
        doing: what the other run is, for the message.

    Raises:
        AlvtsError: another process is at it, or the lock's file cannot be made.
    """
    from filelock import FileLock, Timeout

    target = Path(os.path.realpath(path))
    file = target.with_name(f".{target.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise AlvtsError(
            f"{doing} into {path} is running already; wait for it, or name another place"
        ) from None
    except OSError as error:
        raise AlvtsError(f"cannot write {file}: {_reason(error)}") from None
    try:
        yield
    finally:
        # Before it is let go: whoever waits for the lock sees that its file is gone.
        file.unlink(missing_ok=True)
        lock.release()


def is_stdout(path: Path) -> bool:
    """Whether `path` is standard output: `-`, /dev/stdout, or the file it is redirected to."""
    if path == STDOUT:
        return True
    try:
        return os.path.samestat(os.fstat(1), path.stat())
    except (OSError, ValueError):
        return False


def is_same(path: Path, other: Path | str) -> bool:
    """Whether both are one regular file."""
    try:
        return path.is_file() and path.samefile(other)
    except (OSError, ValueError):
        return False


def _target(path: Path) -> Path:
    """What is to be written, behind all links.

    Raises:
        AlvtsError: a folder, or a file that is there and read-only (also for root, who could).
    """
    try:
        target = Path(os.path.realpath(path))
        # Not `exists`, which takes a link to itself for nothing.
        mode = path.stat().st_mode if os.path.lexists(target) else None
    except (OSError, ValueError) as error:
        raise AlvtsError(f"cannot write {path}: {_reason(error)}") from None
    if mode is not None and stat.S_ISDIR(mode):
        raise AlvtsError(f"cannot write {path}: it is a folder; name a file")
    if mode is not None and not (mode & 0o222 and os.access(path, os.W_OK)):
        raise AlvtsError(f"cannot write {path}: it is read-only; name another file")
    return target


def _is_stream(path: Path) -> bool:
    """Whether it is there and not a regular file."""
    return path.exists() and not path.is_file()


def _temporary(target: Path) -> Path:
    # Short, for a name may be as long as the file system allows already.
    return target.with_name(f".alvts-{os.getpid()}-{uuid4().hex[:8]}.tmp")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
