"""What a model or heads hold, told by hashes or a commit, whatever their folder is called."""

import functools
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .file_names import CONFIG_NAME
from .files import file_sha256
from .hub_errors import file_of

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
READ = (".json", ".jinja", ".model", ".txt", ".codes", ".py")  # configuration and tokenizer; no card


def contents_of(
    name: str, source: str | None, revision: str | None = None, field: str | None = None
) -> dict[str, str]:
    """The identity of what ``source``, a folder or Hub id, holds, for the record of a run.

    A folder's weights are hashed, at the speed of a disk (about 1 GiB/s a core; each file once in a
    process), since neither size nor time tell two trainings of one model apart. On the Hub the
    commit says it all.

    Args:
        name: first word of the names in the record.
        field: name of the argument that gave ``source``, for messages; None is ``name``.

    Returns:
        ``NAME_weights_sha256`` and ``NAME_files_sha256``, or ``NAME_commit``; nothing for None.

    Raises:
        FileNotFoundError: if there is no such folder or repository, or it holds neither.
        PermissionError, ConnectionError: if the Hub refuses it or cannot be reached.
    """
    if source is None:
        return {}
    field, folder = field or name, Path(source)
    if not folder.is_dir():
        path = file_of(field, source, CONFIG_NAME, revision)
        if path is None:
            raise FileNotFoundError(
                f"{field}: no {CONFIG_NAME} in the Hub repository {source!r} (revision {revision or 'main'}), expected one of a whole "
                "model or of heads. Check the name; merge an adapter first, with `peft-caft merge`."
            )
        return {f"{name}_commit": path.parent.name}
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    weights = [path for path in files if path.suffix in WEIGHTS]
    if any(path.suffix == ".safetensors" for path in weights):  # which goes before other formats
        weights = [path for path in weights if path.suffix == ".safetensors"]
    others = [path for path in files if path.suffix in READ and path.name not in OF_A_RUN]
    return {f"{name}_weights_sha256": _digest(weights), f"{name}_files_sha256": _digest(others)}


OF_A_RUN = ("run.json", "summary.json")  # say how the folder was made, and are not read by a model


def _digest(paths: Iterable[Path]) -> str:
    """Hex digest of the names and contents of files, hashed side by side."""
    paths = list(paths)
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(_hash, paths)
        lines = [f"{path.name} {sha256}\n" for path, sha256 in zip(paths, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash(path: Path) -> str:
    found = path.stat()
    return _hash_of_version(path, found.st_size, found.st_mtime_ns)


@functools.cache
def _hash_of_version(path: Path, size: int, mtime_ns: int) -> str:
    return file_sha256(path)
