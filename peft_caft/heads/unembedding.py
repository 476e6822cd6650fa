"""The lm_head: from final hidden states to logits and log-probabilities, and back to dL/dhidden, a
chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkSize:
    """How many logits are computed together on a kind of device, while memory allows it.

    Attributes:
        elements: at most so many logits.
        enough_rows, enough_elements: about as many rows as have both: matrix products are at full
            speed, and what calling them costs is hidden. 0: as many as ``elements`` allows.
    """

    elements: int
    enough_rows: int = 0
    enough_elements: int = 0

    def most(self, vocabulary: int) -> int:
        """Rows that a chunk may have."""
        return max(1, self.elements // vocabulary)

    def enough(self, vocabulary: int) -> int:
        """Rows that a chunk should have."""
        return min(self.most(vocabulary), max(self.enough_rows, self.enough_elements // vocabulary) or self.elements)


# In fp32 these are at most 64 MiB on a CPU (about 24 MiB for a vocabulary of 49k), and 512 MiB on a
# GPU.
CHUNK_SIZES = {"cpu": ChunkSize(2**24, enough_rows=128, enough_elements=2**22), "cuda": ChunkSize(2**27)}


BYTES_PER_ELEMENT = 8  # logits in half precision, log-probabilities in fp32, and their gradient in half precision
SHARE_OF_FREE_MEMORY = 0.25


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size``, as `chunk_rows` gives it, that together cover ``rows``."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def chunk_rows(rows: int, weight: Tensor) -> int:
    """Rows whose logits are computed together: a constant for each kind of device, halved while
    memory is short of it.

    Chunks are nearly equal in size. Call it once per pass: free memory changes meanwhile. It
    follows free memory no more closely than by halves, so that a repeated run computes the same.

    Args:
        rows: number of hidden states.
        weight: ``(vocabulary, hidden)``, of which only the shape and the device count.
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
    """Inside the block, chunks have the size that they have on an idle device of ``kind``, such as
    ``"cuda"``.

    For simulations: their tensors say that they are on the CPU, and free memory here says nothing
        about the planned device.
    """
    token = _planned_kind.set(kind)
    try:
        yield
    finally:
        _planned_kind.reset(token)


def chunk_size_on(device: torch.device) -> ChunkSize:
    """The size for the kind of ``device``; kinds that have no entry of their own take that of a
    GPU.
    """
    return CHUNK_SIZES.get(_planned_kind.get() or device.type, CHUNK_SIZES["cuda"])


def free_bytes(device: torch.device) -> float:
    """Bytes that a tensor on ``device`` could take; infinite where torch does not say, and in a
    simulation.
    """
    if _planned_kind.get() is not None:
        return float("inf")
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available if device.type == "cpu" else float("inf")


@dataclass(frozen=True)
class Unembedding:
    """An lm_head and what the architecture does to its logits.

    Attributes:
        weight: ``(vocabulary, hidden)``; with graph where it is trained (full fine-tuning).
        bias: ``(vocabulary,)`` or None, likewise.
        scale: factor on the logits.
        softcap: c of ``c * tanh(logits / c)``, applied after the factor, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def trained(self) -> list[Tensor]:
        """Weight and bias, as far as they get a gradient."""
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
        """The same layer in the dtype of autocast, where that is on, for use with autocast switched
        off.
        """
        if not torch.is_autocast_enabled(device_type):
            return self
        dtype = torch.get_autocast_dtype(device_type)
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(rows, vocabulary)``, fp32 or better, of ``(rows, hidden)`` in the dtype of the
        weight.
        """
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).to(self.logits_dtype)
        return self._scaled_and_capped(logits)

    def _scaled_and_capped(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def workspace(self, size: int) -> Tensor:
        """Room for the linear map of chunks of ``size`` rows, to be used for all chunks in turn.

        Memory that is new to the process is slow: with a buffer per chunk a step of a 128k
            vocabulary took 1.3 times as long.
        """
        return self.weight.new_empty(size, self.weight.shape[0])

    def log_probs(self, hidden: Tensor, workspace: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of a chunk, and its logits where `backward` needs them (with a soft
        cap).

        Args:
            hidden: ``(rows, hidden)`` in the dtype of the weight.
            workspace: `workspace` for at least as many rows; its content is lost.

        Returns:
            ``(rows, vocabulary)``, fp32 or better, which may lie in the workspace; and logits of
            that shape, or None.
        """
        logits = workspace[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=logits)
        scaled = self._scaled_and_capped(logits.to(self.logits_dtype))
        if self.softcap is None:
            return torch.log_softmax(scaled, dim=1, out=scaled), None  # which reads a row before it writes it
        return torch.log_softmax(scaled, dim=1), scaled

    def backward(self, grad_logits: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """From dL/dlogits, which is overwritten, and, with a soft cap, the logits.

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
        # grad_linear @ weight, transposed: of few rows a CPU computes this a tenth faster.
        return (self.weight.T @ grad_linear.T).T, grad_linear


def target_scores(states: Tensor, targets: Tensor, unembedding: Unembedding, top: int = 1) -> tuple[Tensor, Tensor]:
    """Scores of hidden states, a chunk of logits at a time.

    Args:
        states: ``(rows, hidden)``.
        targets: int64 ``(rows,)``.
        unembedding: what makes logits of the states.
        top: how many of the most likely tokens to compare with; at most the vocabulary.

    Returns:
        cross entropy, fp32 ``(rows,)``, nats; and which of the most likely tokens is the target,
        the first one first, bool ``(rows, top)``.
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
