"""safetensors files, read with errors that name the file, the tensor and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .reading import is_file


@dataclass(frozen=True)
class Tensors:
    """The header of a safetensors file."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: set[str]
    size: int  # bytes of the file

    @classmethod
    def of(cls, path: Path) -> Tensors:
        """Read the header alone.

        Raises:
            OSError: if the file is not there or may not be read.
            ValueError: if it is damaged.
        """
        with _explained(path), safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
            return cls(shapes, {s.get_dtype() for s in slices.values()}, path.stat().st_size)

    def text(self) -> str:
        count = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        dtypes = ", ".join(sorted(self.dtypes))
        return f"{count:,} in {len(self.shapes)} tensors, {dtypes}, {self.size / 2**20:,.1f} MiB on disk"


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def shape_difference(got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str | None:
    """A sentence about the first tensor whose name or shape differs; None if none does."""
    wrong = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
    if not wrong:
        return None
    first = f"{wrong[0]!r}: got {got.get(wrong[0], 'nothing')}, expected {expected.get(wrong[0], 'nothing')}"
    return f"{len(wrong)} tensor(s) differ; first {first}."


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor as saved, on the CPU.

    Raises:
        OSError: if the file is not there or may not be read.
        ValueError: if it is damaged, or a tensor is not finite or not of floating point.
    """
    with _explained(path):
        tensors = load_file(path)
    require_finite(tensors, os.fspath(path))
    return tensors


def one_tensor(path: Path, name: str) -> Tensor | None:
    """A tensor of a file, read alone; None if the file has none of this name."""
    with _explained(path), safe_open(path, framework="pt") as file:
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (not a mapping)


def require_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raise a ValueError unless all tensors are of floating point and hold finite numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"{where}: {name!r} is {tensor.dtype}, expected floating point of 2 bytes or more.")
        if not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(
                f"{where}: {name!r} holds infinite values or NaN, expected finite ones. Get the file again, or train again: the run "
                "that made it diverged."
            )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        if not is_file(path):
            raise FileNotFoundError(f"{path}: no such file, expected a safetensors file.")
        yield
    except PermissionError as error:
        raise PermissionError(f"{path}: cannot be read ({error.strerror}). Change its permissions.") from error
    except (SafetensorError, OverflowError, KeyError) as error:
        raise ValueError(
            f"{path}: damaged or truncated, not a readable safetensors file ({error}). Download or save it again."
        ) from error
