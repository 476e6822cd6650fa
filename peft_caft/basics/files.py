"""Files written whole or not at all, by one writer; their hashes; the cache folder."""

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, where two runs into one output are not noticed
    fcntl = None  # type: ignore[assignment]

KEPT = "All other files are kept."
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_ROOM = 2**20  # bytes; a disk with less is full


class FullDiskError(OSError):
    """A disk is full; the message says what was kept."""


@contextmanager
def writable(target: Path) -> Iterator[None]:
    """Name ``target`` in the system's errors, except for a full disk's (`full_disk_explained`).

    For blocks that do nothing but write there: errors of reading would be taken for its.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno in FULL:  # without a number, the error is one of ours
            raise
        raise type(error)(
            f"output: {target} cannot be written ({error.strerror or error}). Choose another place, or change what lies there."
        ) from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to ``path`` on success and removed on error.

    What a killed process left of writing the same file is removed.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    with writable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        temporary.touch()
    try:
        with _in_use(temporary):
            yield temporary
            with writable(target):
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def filling(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder, whose files are moved into ``folder``, one by one, on success.

    No file in ``folder`` is ever half written, and other files in it stay.
    """
    target = Path(folder)
    with full_disk_explained(target, KEPT), _scratch(target) as scratch:
        with writable(target):
            target.mkdir(exist_ok=True)
        yield Path(scratch)
        with writable(target):
            for path in sorted(Path(scratch).iterdir()):
                os.replace(path, target / path.name)


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path; on success the folder made there is renamed to ``folder``.

    So ``folder``, which must be new or empty, appears whole or not at all.
    """
    target = Path(folder)
    with full_disk_explained(target, KEPT), _scratch(target) as scratch:
        made = Path(scratch, target.name)
        yield made
        with writable(target):
            made.rename(target)


@contextmanager
def _scratch(target: Path) -> Iterator[str]:
    with writable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        folder = tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", suffix=".tmp", dir=target.parent, ignore_cleanup_errors=True
        )
    with folder as scratch, _in_use(Path(scratch)):
        yield scratch


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file or folder; the lock ends with the process.

    Raises:
        OSError: if another process has locked it, or there are no locks in its file system.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _in_use(temporary: Path) -> Iterator[None]:
    """Lock a temporary file or folder, where that is possible, so that others do not remove it."""
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(_locked(temporary))
        yield


def _remove_abandoned(target: Path) -> None:
    """Remove temporary files and folders for ``target`` that killed processes left."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.????????.tmp"):
        with suppress(OSError), _locked(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """Write one row a line as UTF-8, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def lock(file: IO[bytes], output: Path, wait: bool = False) -> None:
    """Lock an open file until it is closed or the process ends, however it ends.

    Args:
        file: the open file.
        output: what the lock protects, for the message.
        wait: whether to wait until another process releases the lock.

    Raises:
        BlockingIOError: if another process holds the lock.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise BlockingIOError(
            f"output: {output} is being written by another process. Wait for it or stop it, or choose another output."
        ) from error


@contextmanager
def full_disk_explained(output: Path, kept: str) -> Iterator[None]:
    """Turn the errors that libraries raise on a full disk into one OSError that says what to do.

    Args:
        output: file or folder that is written.
        kept: a sentence about what is kept.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error, output):
            raise
        raise FullDiskError(
            f"output: the disk of {output} is full. {kept} Make room there and run the same command again to go on."
        ) from error


def _is_full(error: Exception, output: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL or isinstance(error, FullDiskError)  # of a file in it: the folder's says more
    # torch.save and safetensors raise errors of their own, without the system's number.
    folder = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    return "No space left" in str(error) or shutil.disk_usage(folder).free < NO_ROOM


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def default_cache_dir() -> Path:
    """``$PEFT_CAFT_CACHE``, else ``$XDG_CACHE_HOME/peft-caft``, else ``~/.cache/peft-caft``."""
    if chosen := os.environ.get("PEFT_CAFT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-caft"
