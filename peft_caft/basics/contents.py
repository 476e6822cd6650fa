"""What a model or heads hold, told by hashes or a commit, whatever their folder is called."""

import functools
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.utils.hub import cached_file

from .file_names import CONFIG_NAME
from .files import file_sha256

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
READ = (".json", ".jinja", ".model", ".txt", ".codes", ".py")  # configuration and tokenizer; no card


def contents_of(name: str, source: str | None, revision: str | None = None) -> dict[str, str]:
    """The identity of what ``source``, a folder or Hub id, holds, for the record of a run.

    A folder's weights are hashed, at the speed of a disk (about 1 GiB/s a core; each file once in a
    process), since neither size nor time tell two trainings of one model apart. On the Hub the
    commit says it all.

    Args:
        name: first word of the names in the record.

    Returns:
        ``NAME_weights_sha256`` and ``NAME_files_sha256``, or ``NAME_commit``; nothing for None.
    """
    if source is None:
        return {}
    folder = Path(source)
    if not folder.is_dir():
        path = cached_file(source, CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        return {} if path is None else {f"{name}_commit": Path(path).parent.name}
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
