"""What can go wrong with the place that a run writes to: another run writes there too, or the disk is full."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: two runs into one output are not noticed there
    fcntl = None  # type: ignore[assignment]

NO_ROOM = 2**20  # bytes: less than that is a full disk


def lock(file: IO[bytes], output: Path, wait: bool = False) -> None:
    """Lock an open file until it is closed or the process ends, however it ends.

    Args:
        wait: until another process, which holds it, lets go.

    Raises:
        BlockingIOError: if another process holds it, and so writes ``output``.
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
    """Turn what a full disk makes libraries raise into one OSError that says what to do.

    Args:
        output: file or folder that is written.
        kept: what is not lost, as ``"All batches that were finished are"``.

    Raises:
        OSError: if the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error, output):
            raise
        raise OSError(
            f"output: the disk of {output} is full. {kept} kept: make room there and run the same command again to go on."
        ) from error


def _is_full(error: Exception, output: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # torch.save and safetensors do not pass the system's error on.
    folder = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    return "No space left" in str(error) or shutil.disk_usage(folder).free < NO_ROOM
