"""Job `kernel`: linear cross entropy with its gradient, rows x vocabulary, every way that is at hand.

Ours and the Triton candidate at every chunk size; torch's with all logits at once; Liger and cut-cross-entropy where they are installed.
Four operations per row, vocabulary entry and hidden dimension are counted:
the logits and the gradient of the hidden states; the layer is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch

import peft_caft.heads.unembedding as chunking
from peft_caft.basics.tables import markdown_table
from peft_caft.heads.unembedding import ChunkSize, Unembedding
from peft_caft.method.linear_cross_entropy import linear_cross_entropy, plain_cross_entropy

from .measuring import Job, interleaved, peak_bytes, spread

LAYERS = {"Llama-2": (32_000, 4096), "Llama-3.1": (128_256, 4096), "Qwen3 0.6B": (151_936, 1024)}
ROWS = (1024, 4096, 16_384)
EXPONENTS = range(24, 31)  # of two: elements of a chunk's logits
TURNS = 7


class Case:
    """Hidden states, targets and the layer of one size."""

    def __init__(self, rows: int, vocabulary: int, width: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        made = {"device": device, "dtype": torch.bfloat16, "generator": generator}
        self.hidden = torch.randn(rows, width, **made).requires_grad_()
        self.unembedding = Unembedding(torch.randn(vocabulary, width, **made) / width**0.5)
        self.targets = torch.randint(vocabulary, (rows,), device=device, generator=generator)

    def ours(self) -> torch.Tensor:
        return self._differentiated(linear_cross_entropy(self.hidden, self.targets, self.unembedding)[0])

    def torch(self) -> torch.Tensor:
        logits = torch.nn.functional.linear(self.hidden, self.unembedding.weight)
        return self._differentiated(torch.nn.functional.cross_entropy(logits.float(), self.targets, reduction="sum"))

    def triton(self) -> torch.Tensor:
        from .triton_cross_entropy import losses_and_gradient

        return losses_and_gradient(self.hidden.detach(), self.targets, self.unembedding)[1]

    def liger(self) -> torch.Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        weight = self.unembedding.weight
        return self._differentiated(
            liger_fused_linear_cross_entropy(self.hidden, weight, self.targets, reduction="sum")
        )

    def cut_cross_entropy(self) -> torch.Tensor:
        from cut_cross_entropy import linear_cross_entropy as cut

        return self._differentiated(cut(self.hidden, self.unembedding.weight, self.targets, reduction="sum"))

    def _differentiated(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, self.hidden)[0]

    def error(self, gradient: torch.Tensor, rows: int = 256) -> float:
        """Relative error of the first rows' gradient against fp32."""
        hidden = self.hidden[:rows].detach().float().requires_grad_()
        layer = Unembedding(self.unembedding.weight.float())
        (exact,) = torch.autograd.grad(plain_cross_entropy(hidden, self.targets[:rows], layer)[0], hidden)
        return float((gradient[:rows].float() - exact).norm() / exact.norm())


def ways(case: Case, exponents: range, smoke: bool) -> Iterator[tuple[str, int | None, Callable[[], torch.Tensor]]]:
    """Name, chunk size as a power of two or None, and function."""
    rows, vocabulary = len(case.targets), len(case.unembedding.weight)
    yield "torch", None, case.torch
    yield "ours", None, case.ours  # with the chunk size that the package takes
    chunked = [("ours, chunk", case.ours)]
    if find_spec("triton") and not smoke:  # Triton compiles for GPUs alone
        yield "triton", None, case.triton
        chunked.append(("triton, chunk", case.triton))
    sizes = {min(ChunkSize(2**exponent).most(vocabulary), rows): exponent for exponent in reversed(exponents)}
    for name, function in chunked:
        for exponent in sorted(sizes.values()):  # larger ones make the same single chunk
            yield name, exponent, with_chunks(function, 2**exponent)
    for name, package in (("liger", "liger_kernel"), ("cut_cross_entropy", "cut_cross_entropy")):
        if find_spec(package):
            yield name, None, getattr(case, name)


def with_chunks(function: Callable[[], torch.Tensor], elements: int) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        before = dict(chunking.CHUNK_SIZES)
        chunking.CHUNK_SIZES.update(dict.fromkeys(before, ChunkSize(elements)))
        try:
            return function()
        finally:
            chunking.CHUNK_SIZES.update(before)

    return run


def main() -> None:
    job = Job.begin("kernel", __doc__)
    layers = {"tiny": (257, 16)} if job.smoke else LAYERS
    for name, (vocabulary, width) in layers.items():
        for rows in (40,) if job.smoke else ROWS:
            case = Case(rows, vocabulary, width, job.device)
            exponents = range(10, 12) if job.smoke else EXPONENTS
            functions, facts = {}, {}
            for way, exponent, function in ways(case, exponents, job.smoke):
                label = way if exponent is None else f"{way} 2^{exponent}"
                try:
                    facts[label] = {"error": case.error(function()), "peak_bytes": peak_bytes(function, job.device)}
                    functions[label] = function
                except (
                    Exception
                ) as failure:  # no memory, a kernel that does not compile: one way must not end the others
                    job.write(kind="failed", layer=name, rows=rows, way=label, failure=str(failure)[:300])
            for label, values in interleaved(functions, 2 if job.smoke else TURNS, job.device).items():
                job.write(
                    kind="time", layer=name, rows=rows, way=label, operations=4 * rows * vocabulary * width,
                    seconds=spread(values), **facts[label],
                )  # fmt: skip
            del case, functions
            if not job.smoke:
                torch.cuda.empty_cache()
    job.report(table(job.records()))


def table(found: list[dict]) -> str:
    """Every way, over ours with the chunk size that the package takes, and what it makes of the card."""
    ceiling = found[0]["flops_per_second"]
    cases: dict[tuple, dict[str, dict]] = {}
    for record in found:
        if record["kind"] == "time":
            ways_here = cases.setdefault((record["layer"], record["rows"]), {})
            ways_here[record["way"]] = record
    rows = []
    for (layer, count), ways_here in cases.items():
        base = ways_here["ours"]["seconds"]["median"]
        for record in ways_here.values():
            median = record["seconds"]["median"]
            share = record["operations"] / median / ceiling
            rows.append([
                layer, f"{count:,}", record["way"], f"{median * 1000:.2f}", f"{median / base:.2f}", f"{share:.0%}",
                f"{record['peak_bytes'] / 2**20:,.0f}", f"{record['error']:.1e}",
            ])  # fmt: skip
    header = ["layer", "rows", "way, chunk", "ms", "over ours", "of the card", "MiB", "error"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
