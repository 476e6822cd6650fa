"""The lm_head, a chunk of rows at a time: logits, log-probabilities, and dL/dhidden."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..basics import devices


@dataclass(frozen=True)
class ChunkSize:
    """How many logits are computed together on a kind of device, while memory allows it.

    Attributes:
        elements: maximal number of logits.
        enough_rows, enough_elements: numbers of rows and of logits at which matrix products reach
            full speed; a chunk has about both. 0: as many as ``elements`` allows.
    """

    elements: int
    enough_rows: int = 0
    enough_elements: int = 0

    def most(self, vocabulary: int) -> int:
        """Maximal number of rows of a chunk."""
        return max(1, self.elements // vocabulary)

    def enough(self, vocabulary: int) -> int:
        """Number of rows that a chunk should have."""
        return min(self.most(vocabulary), max(self.enough_rows, self.enough_elements // vocabulary) or self.elements)


# In fp32: at most 64 MiB on a CPU (about 24 MiB for a vocabulary of 49k), and 512 MiB on a GPU.
CHUNK_SIZES = {"cpu": ChunkSize(2**24, enough_rows=128, enough_elements=2**22), "cuda": ChunkSize(2**27)}
BYTES_PER_ELEMENT = 8  # logits in half precision, log-probabilities in fp32, and their gradient in half precision
SHARE_OF_FREE_MEMORY = 0.25


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that together cover ``rows``."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def chunk_rows(rows: int, weight: Tensor) -> int:
    """Number of rows whose logits are computed together, so that chunks are nearly equal in size.

    It is a constant of the device's kind, halved until it fits into free memory: by halves, so that
    a repeated run computes the same. Call it once per pass, since free memory changes meanwhile.

    Args:
        rows: number of hidden states.
        weight: ``(vocabulary, hidden)``, any dtype; only its shape and device count.
    """
    vocabulary, chunk_size = weight.shape[0], chunk_size_on(weight.device)
    most = chunk_size.most(vocabulary)
    if rows > 1:
        fitting = free_bytes(weight.device) * SHARE_OF_FREE_MEMORY / BYTES_PER_ELEMENT / vocabulary
        while most > 1 and min(most, rows) > fitting:
            most //= 2
    count = max(-(-rows // most), round(rows / chunk_size.enough(vocabulary)))
    return -(-rows // count) if rows else 1


_planned_kind: ContextVar[str | None] = ContextVar("planned_kind", default=None)


@contextmanager
def chunks_as_on(kind: str) -> Iterator[None]:
    """Inside the block, chunks are as large as on an idle device of ``kind``, such as ``"cuda"``.

    A simulation needs it, since its tensors are on the CPU.
    """
    token = _planned_kind.set(kind)
    try:
        yield
    finally:
        _planned_kind.reset(token)


def chunk_size_on(device: torch.device) -> ChunkSize:
    """The chunk size of the device's kind; kinds without an entry take that of a GPU."""
    return CHUNK_SIZES.get(_planned_kind.get() or device.type, CHUNK_SIZES["cuda"])


def free_bytes(device: torch.device) -> float:
    """Bytes that a tensor on ``device`` could take; infinite if unknown or in a simulation."""
    return devices.free_bytes(device) if _planned_kind.get() is None else float("inf")


@dataclass(frozen=True)
class Unembedding:
    """An lm_head and what the architecture does to its logits.

    Attributes:
        weight: ``(vocabulary, hidden)``, any floating dtype; with graph if it is trained.
        bias: ``(vocabulary,)`` in the same dtype, with graph if it is trained; or None.
        scale: factor on the logits.
        softcap: c of ``c * tanh(logits / c)``, applied after the factor, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def trained(self) -> list[Tensor]:
        """Those of weight and bias that get a gradient."""
        return [tensor for tensor in (self.weight, self.bias) if tensor is not None and tensor.requires_grad]

    def detached(self) -> Unembedding:
        """The same layer as a constant."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    @property
    def logits_dtype(self) -> torch.dtype:
        """Dtype of logits and losses: fp32, or the weight's if that is wider."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def in_compute_dtype(self, device_type: str) -> Unembedding:
        """The same layer in the dtype of autocast, to be used with autocast switched off."""
        if not torch.is_autocast_enabled(device_type):
            return self
        dtype = torch.get_autocast_dtype(device_type)
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(rows, vocabulary)`` in `logits_dtype`.

        Args:
            hidden: ``(rows, hidden)`` in the dtype of the weight.
        """
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).to(self.logits_dtype)
        return self._scaled_and_capped(logits)

    def changed(self, linear: Tensor) -> Tensor:
        """What the architecture makes of the lm_head's output, ``(..., vocabulary)``, any dtype."""
        return self._scaled_and_capped(linear.to(self.logits_dtype, copy=True))

    def _scaled_and_capped(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def workspace(self, size: int) -> Tensor:
        """Buffer ``(size, vocabulary)`` in the weight's dtype, to be used for all chunks in turn.

        With a new buffer for each chunk, a step with a vocabulary of 128k took 1.3 times as long.
        """
        return self.weight.new_empty(size, self.weight.shape[0])

    def log_probs(self, hidden: Tensor, workspace: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of a chunk, and its logits if `backward` needs them for a soft cap.

        Args:
            hidden: ``(rows, hidden)`` in the dtype of the weight.
            workspace: `workspace` for at least as many rows; its content is lost.

        Returns:
            log-probabilities ``(rows, vocabulary)`` in `logits_dtype`, nats, which may lie in the
            workspace; and logits of that shape and dtype, or None.
        """
        logits = workspace[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=logits)
        scaled = self._scaled_and_capped(logits.to(self.logits_dtype))
        if self.softcap is None:
            return torch.log_softmax(scaled, dim=1, out=scaled), None  # it reads a row before it writes it
        return torch.log_softmax(scaled, dim=1), scaled

    def backward(self, grad_logits: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """The way back from the gradient of the logits.

        Args:
            grad_logits: dL/dlogits, ``(rows, vocabulary)`` in `logits_dtype`; it is overwritten.
            logits: second result of `log_probs`, ``(rows, vocabulary)`` or None.

        Returns:
            dL/dhidden ``(rows, hidden)`` and the gradient of the linear map's result, ``(rows,
            vocabulary)``, both in the dtype of the weight.
        """
        if self.softcap is not None:
            assert logits is not None
            grad_logits *= 1 - (logits / self.softcap) ** 2
        if self.scale != 1.0:
            grad_logits *= self.scale
        grad_linear = grad_logits.to(self.weight.dtype)
        # grad_linear @ weight, transposed: with few rows a CPU computes this a tenth faster.
        return (self.weight.T @ grad_linear.T).T, grad_linear


def target_scores(states: Tensor, targets: Tensor, unembedding: Unembedding, top: int = 1) -> tuple[Tensor, Tensor]:
    """Cross entropies and hits of hidden states, a chunk at a time, under ``torch.no_grad``.

    Args:
        states: ``(rows, hidden)``, any floating dtype.
        targets: int64 ``(rows,)``, token ids.
        top: number of the most likely tokens that are compared; at most the vocabulary.

    Returns:
        cross entropies, fp32 ``(rows,)``, nats; and whether the i-th most likely token is the
        target, bool ``(rows, top)``.
    """
    top = min(top, len(unembedding.weight))
    cross_entropies = [states.new_zeros(0, dtype=torch.float32)]
    hits = [torch.zeros(0, top, dtype=torch.bool, device=states.device)]
    size = chunk_rows(len(targets), unembedding.weight)
    workspace = unembedding.workspace(size)
    for chunk in chunks(len(targets), size):
        target = targets[chunk, None]
        log_probs, _ = unembedding.log_probs(states[chunk].to(unembedding.weight.dtype), workspace)
        cross_entropies.append(-log_probs.gather(1, target)[:, 0].float())
        hits.append(log_probs.topk(top, dim=1).indices == target)
    return torch.cat(cross_entropies), torch.cat(hits)
