"""Hidden states of stage 1's data, computed once and read from disk in later epochs and runs.

The cache keeps the input of the base model's last layer at every position. From it the last layer,
the final norm and every kind of head are computed at a thirtieth of the model's cost.
``hidden_states.bin`` holds the rows one after the other, ``done.bin`` one byte per batch, 1 once it
is on disk, and ``cache.json`` says what model and data they belong to.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from ..basics.files import write_text
from ..basics.provenance import weights_digest
from ..basics.reading import is_file, json_or_none
from ..basics.run_folder import first_difference
from ..heads.backbone import Backbone
from ..heads.config import fingerprint

RECORD_NAME, STATES_NAME, DONE_NAME = "cache.json", "hidden_states.bin", "done.bin"
BATCH_TOKENS = 4096  # padded tokens per forward pass that fills the cache
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class CachedRows(torch.utils.data.Dataset):
    """Encoded rows with hidden states, ``(tokens, hidden)``, under the key ``hidden_states``.

    Args:
        states: ``(tokens of all rows, hidden)``, the bits of ``dtype`` as uint16 or uint32, mapped.
    """

    def __init__(self, rows: list[dict[str, list[int]]], states: np.ndarray, dtype: torch.dtype) -> None:
        self.rows = rows
        self.dtype = dtype
        self._states = states
        self._offsets = np.cumsum([0, *(len(row["input_ids"]) for row in rows)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        states = torch.from_numpy(self._states[self._offsets[index] : self._offsets[index + 1]].copy())
        return self.rows[index] | {"hidden_states": states.view(self.dtype)}

    def write(self, index: int, states: Tensor) -> None:
        """Write the hidden states of one row, ``(tokens, hidden)`` in ``dtype``, to the disk."""
        bits = states.contiguous().view(getattr(torch, self._states.dtype.name)).numpy()
        self._states[self._offsets[index] : self._offsets[index + 1]] = bits

    def flush(self) -> None:
        self._states.flush()  # type: ignore[attr-defined]


def cached_rows(
    folder: Path, rows: list[dict[str, list[int]]], model: nn.Module, collate: Callable, state: PartialState
) -> CachedRows:
    """Rows with hidden states from the cache in ``folder``, which is completed first.

    Args:
        folder: on a disk that all processes share.
        model: the base model, in evaluation mode.
        collate: makes a batch of int64 tensors ``(batch, tokens)`` of some rows.

    Raises:
        ValueError: if the folder holds the cache of another model, other data or another precision.
        OSError: if the disk has no room for the cache.
        TypeError: if the model cannot continue from the input of its last layer.
    """
    backbone = Backbone.of(model)
    dtype = backbone.lm_head.weight.dtype
    batches = _batches(rows)
    shape = (sum(len(row["input_ids"]) for row in rows), backbone.hidden_size)
    identity = _identity(rows, backbone)
    with state.main_process_first():  # the others find the files that the first one made
        _prepare(folder, identity, shape[0] * shape[1] * dtype.itemsize, len(batches))
    bits = np.uint16 if dtype.itemsize == 2 else np.uint32
    data = CachedRows(rows, np.memmap(folder / STATES_NAME, dtype=bits, mode="r+", shape=shape), dtype)
    done = np.memmap(folder / DONE_NAME, dtype=np.uint8, mode="r+")
    mine = [index for index in range(state.process_index, len(batches), state.num_processes) if not done[index]]
    disable = not (mine and state.is_main_process)
    tokens = sum(len(rows[row]["input_ids"]) for index in mine for row in batches[index])
    with tqdm(total=tokens, desc="Caching hidden states", unit=" tokens", unit_scale=True, disable=disable) as bar:
        for index in mine:
            bar.update(_write_batch(data, batches[index], backbone, collate))
            data.flush()  # the mark below must not reach the disk before its batch does
            done[index] = 1
    done.flush()
    state.wait_for_everyone()
    _check(data, backbone, collate)
    return data


@torch.no_grad()
def _write_batch(data: CachedRows, indices: list[int], backbone: Backbone, collate: Callable) -> int:
    batch = collate([data.rows[index] for index in indices]).to(backbone.lm_head.weight.device)
    with backbone.capture() as records:
        backbone.trunk(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    lengths = [len(data.rows[index]["input_ids"]) for index in indices]
    for index, length, states in zip(indices, lengths, records[-1].last_layer_input.cpu(), strict=True):
        data.write(index, states[:length])
    return sum(lengths)


def with_hidden_states(collate: Callable) -> Callable:
    """``collate`` that pads hidden states too, if any, to ``(batch, tokens, hidden)``."""

    def collate_with(rows: list[dict[str, Any]]) -> Any:
        if "hidden_states" not in rows[0]:
            return collate(rows)
        states = [row["hidden_states"] for row in rows]
        batch = collate([{name: value for name, value in row.items() if name != "hidden_states"} for row in rows])
        batch["hidden_states"] = nn.utils.rnn.pad_sequence(states, batch_first=True)
        return batch

    return collate_with


def _identity(rows: list[dict[str, list[int]]], backbone: Backbone) -> dict[str, Any]:
    """The properties of model and data that must be equal for a cache to be reused."""
    tokens = hashlib.sha256()
    for row in rows:
        tokens.update(np.asarray(row["input_ids"], dtype=np.int64).tobytes() + b"|")
    return {
        "dtype": str(backbone.lm_head.weight.dtype).removeprefix("torch."),
        "unembedding_fingerprint": fingerprint(backbone.lm_head.weight),
        "base_model_class": type(backbone.model).__name__,
        "num_hidden_layers": len(backbone.layers),
        "weights_sha256": weights_digest(backbone.model),
        "tokens_sha256": tokens.hexdigest(),
        "rows": len(rows),
    }


def _prepare(folder: Path, identity: dict[str, Any], size: int, batches: int) -> None:
    """Make the files of a new cache of ``size`` bytes, or check those of an earlier one."""
    recorded_path, states_path, done_path = (folder / name for name in (RECORD_NAME, STATES_NAME, DONE_NAME))
    if (recorded := json_or_none(recorded_path)) is not None:
        if different := first_difference(recorded, identity):
            raise ValueError(
                f"cache: {folder} holds hidden states of something else; {different}. Choose another folder, or remove this one."
            )
        if all(is_file(p) and p.stat().st_size == n for p, n in ((states_path, size), (done_path, batches))):
            return
    folder.mkdir(parents=True, exist_ok=True)
    recorded_path.unlink(missing_ok=True)
    states_path.unlink(missing_ok=True)  # frees the room that an interrupted run took
    free = shutil.disk_usage(folder).free
    print(f"Cache of hidden states: {size / 2**20:,.0f} MiB in {folder}, where {free / 2**20:,.0f} MiB are free")
    if size > free:
        raise OSError(
            f"cache: got {free / 2**20:,.0f} MiB of free disk in {folder}, expected {size / 2**20:,.0f} MiB. Free some, "
            "choose another folder, use fewer rows, or train without --cache."
        )
    done_path.write_bytes(bytes(batches))
    with open(states_path, "wb") as file:
        if hasattr(os, "posix_fallocate") and size:  # a sparse file would crash the process when the disk runs full
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)
    write_text(recorded_path, json.dumps(identity, indent=2) + "\n")


def _batches(rows: list[dict[str, list[int]]]) -> list[list[int]]:
    """Rows by index, longest first, in batches of ``BATCH_TOKENS`` padded tokens or one row."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    batches: list[list[int]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * len(rows[batches[-1][0]]["input_ids"]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


@torch.no_grad()
def _check(data: CachedRows, backbone: Backbone, collate: Callable) -> None:
    """Compare the shortest row's cached states, and its last layer, with a whole pass."""
    index = min(range(len(data)), key=lambda i: len(data.rows[i]["input_ids"]))
    batch = with_hidden_states(collate)([data[index]]).to(backbone.lm_head.weight.device)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    with backbone.capture() as records:
        backbone.trunk(**inputs)
        with backbone.starting_at_last_layer(batch["hidden_states"]):
            backbone.trunk(**inputs)
    whole, replayed = records
    for name in ("last_layer_input", "last_hidden_state"):
        expected, got = getattr(whole, name).float(), getattr(replayed, name).float()
        if not (got - expected).norm() <= TOLERANCE[data.dtype] * expected.norm():
            raise TypeError(
                f"cache: the {name} of {type(backbone.model).__name__} from cached hidden states differs from a whole pass, "
                "expected the same. The cache is damaged (remove it), or this architecture carries more than hidden states "
                "from layer to layer: then train without --cache."
            )
