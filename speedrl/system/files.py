"""Files and folders that are either whole or not there."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from speedrl.system.errors import one_line

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"


@contextmanager
def locked(path: Path) -> Iterator[str | None]:
    """Within, this process alone holds the lock of a file, which is made and in the end removed.

    The system frees the lock of a process that dies, however it dies, and processes that it forked do not hold it.
    Yields None, or in a few words why there is no lock, where the file system has none. BlockingIOError, one line with
    who holds it, where another process does; OSError where the file cannot be made.
    """
    handle, missing = open_locked(path)
    try:
        with suppress(OSError):  # a full disk has no place for a name
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield missing
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def open_locked(path: Path) -> tuple[int, str | None]:
    """The open file of `locked`, and what it yields."""
    while True:
        handle, missing = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), None
        try:
            if fcntl is None:
                raise OSError("not a POSIX system")
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # as systems have it
            holder = os.read(handle, 300).decode("utf-8", "replace") or "another process"
            os.close(handle)
            advice = "wait until it ends, or give another `out`"
            raise BlockingIOError(f"{path.parent} is in use by {holder}: {advice}") from None
        except OSError as error:
            missing = one_line(error)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle, missing
        os.close(handle)  # of a file that its holder has removed by now


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a temporary file beside `path`, then renames it: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)  # on a full disk, its space is wanted
        raise


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON, atomically."""
    write_atomically(path, lambda partial: partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def append_lines(path: Path, lines: list[str]) -> None:
    """Appends all lines to a file and empties the list, or, with OSError, changes neither."""
    end = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
    except OSError:
        if path.exists():
            os.truncate(path, end)
        raise
    lines.clear()


def sync(path: Path) -> None:
    """Returns when a file's or folder's contents are on the disk, where a loss of power leaves them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Writes the sizes and checksums of a folder's files to its manifest.json; all is on the disk when it returns."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    sums = {path.name: {"bytes": path.stat().st_size, "sha256": checksum(path)} for path in files}
    write_json(folder / MANIFEST, sums)
    for path in (*files, folder / MANIFEST, folder):
        sync(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in a few words; None where every file is as it was sealed.

    Only plain files of the folder itself count: a name that leads elsewhere or a symbolic link is damage.
    """
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in sums.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    for name, (size, expected) in listed.items():
        path = folder / name
        if name in ("", ".", "..") or Path(name).name != name or path.is_symlink():
            return f"{name!r} leads out of the folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if checksum(path) != expected:
            return f"{name} has another checksum"
    unknown = {path.name for path in folder.iterdir()} - listed.keys() - {MANIFEST}
    return f"{min(unknown)} is not in {MANIFEST}" if unknown else None


def replace_folder(partial: Path, folder: Path) -> None:
    """Renames `partial` to `folder`; what stood there is away only after that."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
