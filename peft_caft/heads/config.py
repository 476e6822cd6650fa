"""`HeadsConfig`: description of auxiliary heads, their base model and their training."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..basics.checks import require_choices, require_counts, require_types
from ..basics.reading import read_json

if TYPE_CHECKING:
    from torch import Tensor

HeadType = Literal["residual", "decoder_layer"]
HeadInput = Literal["last_layer_input", "last_hidden_state"]
HEAD_TYPES: tuple[HeadType, ...] = get_args(HeadType)
DEFAULT_NUM_HEADS = 4  # n = 5, as in CAFT's experiments
FORMAT_VERSION = 1
FINGERPRINT_ROWS = 16
FINGERPRINT_TOLERANCE = 0.02  # bf16 and fp16 roundings of one matrix differ by about 0.002, two matrices by about 1
MIN_SHARED_ROWS = 4
SHARE_THAT_AGREES = 0.75
MOST_BLOCKS = 1000  # of all heads; more are a damaged number, and would fill the memory


def require_number_of_blocks(name: str, heads: int, layers: int) -> None:
    """Raise a ValueError unless ``heads``, the field ``name``, of ``layers`` each can be meant."""
    if heads * layers > MOST_BLOCKS:
        raise ValueError(
            f"{name}: got {heads:,} with head_num_layers={layers:,}, expected at most {MOST_BLOCKS:,} blocks or layers in all."
        )


@dataclass
class HeadsConfig:
    """Description of an `AuxiliaryHeads` artifact, its ``config.json``.

    Attributes:
        head_type: ``"residual"`` or ``"decoder_layer"``.
        head_input: ``"last_layer_input"`` or ``"last_hidden_state"``.
        num_heads: number of heads, n - 1; head k = 2 ... n predicts the token k ahead.
        head_num_layers: number of blocks or layers per head.
        final_norm: whether the base model's final norm follows a head.
        hidden_size, vocab_size: sizes of the base model's unembedding. The heads hold nothing of
            the vocabulary's size, which says which rows the fingerprint is of.
        unembedding_fingerprint: numbers by which `fingerprint` tells unembeddings apart.
        residual_bias: whether residual blocks are ``x + SiLU(W x + b)``, like those of caft-llm.
        base_model_name_or_path, base_model_revision, base_model_class: source of the base model.
        license: identifier on the Hub, such as ``"apache-2.0"``; None if unknown.
        training: record of stage 1 (data, settings, versions, metrics); empty if untrained.
        weights_sha256: hash of ``model.safetensors``, set when saving.
    """

    head_type: HeadType
    head_input: HeadInput
    num_heads: int
    head_num_layers: int
    final_norm: bool
    hidden_size: int
    vocab_size: int
    unembedding_fingerprint: list[float]
    residual_bias: bool = False
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_class: str | None = None
    license: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version: got {self.format_version!r}, expected {FORMAT_VERSION}. These heads were written by "
                "another version of peft-caft; install that version or make the heads again."
            )
        require_choices(self)
        require_counts(self, "num_heads", "head_num_layers", "hidden_size", "vocab_size")
        require_types(self)
        require_number_of_blocks("num_heads", self.num_heads, self.head_num_layers)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> HeadsConfig:
        """Read a heads ``config.json``.

        Raises:
            ValueError: if it is not JSON, describes no heads, or has an unknown version or type.
        """
        values = read_json(path, "Download or save the heads again.")
        known = {f.name for f in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
        if "model_type" in values and "head_type" not in values:
            raise ValueError(
                f"{path}: got the configuration of a whole model ({values['model_type']}), expected that of auxiliary heads or an "
                "adapter. To publish a whole model, such as `peft-caft merge` or `peft-caft train --method caft_full` writes, call "
                "its push_to_hub, or use `hf upload`."
            )
        if missing := sorted(required - set(values)):
            raise ValueError(
                f"{path}: not the configuration of auxiliary heads, {', '.join(missing)} missing. Expected a folder "
                "that AuxiliaryHeads.save_pretrained wrote."
            )
        if values.get("format_version") == FORMAT_VERSION and set(values) - known:
            raise ValueError(f"{path}: unknown field(s) {', '.join(sorted(set(values) - known))}.")
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def require_base_model(self, unembedding: Tensor, source: str) -> str | None:
        """Check that the heads belong to the model with this unembedding, ``(vocabulary, hidden)``.

        Its vocabulary may have been resized, and a few of its rows rewritten: `agree` has the rule.

        Returns:
            a note on such differences, or None.

        Raises:
            ValueError: naming the field, what the base model has and what the heads expect.
        """
        made_for = f"made for {self.base_model_name_or_path or 'another base model'}"
        advice = "Load that base model, or train heads for this one with `peft-caft train-heads`."
        vocab_size, hidden_size = unembedding.shape
        if hidden_size != self.hidden_size:
            raise ValueError(
                f"hidden_size: got {hidden_size} in the base model, expected {self.hidden_size} by the heads {source!r} "
                f"({made_for}). {advice}"
            )
        sizes = (
            f"vocab_size: got {vocab_size} in the base model, {self.vocab_size} in the heads {source!r} ({made_for})"
        )
        resized = f"{sizes}. It was resized, which heads allow, since they hold nothing of the vocabulary's size"
        got = fingerprint(unembedding, self.vocab_size)
        if got is None:
            return None if vocab_size == self.vocab_size else f"{resized}."
        expected = self.unembedding_fingerprint[: len(got)]
        if len(self.unembedding_fingerprint) != FINGERPRINT_ROWS:
            raise ValueError(
                f"unembedding_fingerprint: got {len(self.unembedding_fingerprint)} numbers in the heads {source!r}, "
                f"expected {FINGERPRINT_ROWS}. Download or save the heads again."
            )
        if len(got) < MIN_SHARED_ROWS:
            raise ValueError(
                f"{sizes}, expected at least a quarter of it: only {len(got)} of the {FINGERPRINT_ROWS} rows by which models are told "
                f"apart are left. {advice}"
            )
        equal = sum(map(agree, got, expected))
        rows = f"{equal} of {len(got)} compared rows of the unembedding are as recorded"
        if equal < SHARE_THAT_AGREES * len(got):
            raise ValueError(
                f"unembedding_fingerprint: got {got[:3]}... from the base model's lm_head, expected {expected[:3]}... by the heads "
                f"{source!r} ({made_for}): {rows}, expected at least {SHARE_THAT_AGREES:.0%}. The hidden size fits, but it is another "
                f"model, or its tokens were numbered anew. {advice}"
            )
        if vocab_size != self.vocab_size:
            return f"{resized}; {rows}."
        return (
            None
            if equal == len(got)
            else f"unembedding_fingerprint: {rows} by the heads {source!r}; the others were rewritten."
        )


def agree(first: float, second: float) -> bool:
    """Whether two numbers of a `fingerprint` stand for the same row, rounding aside.

    Two models are the same one if `SHARE_THAT_AGREES` of the rows that both have agree, and both
    have `MIN_SHARED_ROWS` of the 16. Another model passes with a probability of 2e-19, or of 1e-5
    if twelve rows are left out. The same one with 5 % new rows is refused with one of 9e-4.
    """
    return abs(first - second) <= FINGERPRINT_TOLERANCE


def fingerprint(unembedding: Tensor, vocabulary: int | None = None) -> list[float] | None:
    """Sixteen numbers of about 1 that tell one unembedding from another, in whatever dtype.

    Each is the cosine between one row and a fixed wave: unlike a hash, it survives rounding.

    Args:
        unembedding: ``(rows, hidden)``, any floating dtype.
        vocabulary: size over which the compared rows are spread, that of another unembedding; None
            for the number of ``rows``.

    Returns:
        the numbers, rounded to 4 digits, without those of rows that the unembedding lacks; None for
        a tensor without data (meta device).
    """
    import torch  # here, since the command line reads the constants above without torch

    if unembedding.is_meta:
        return None
    rows, hidden = unembedding.shape
    # With a dtype and a device, since a program may have set other defaults, which round otherwise.
    picked = torch.linspace(0, (vocabulary or rows) - 1, FINGERPRINT_ROWS, dtype=torch.float32, device="cpu").long()
    found = (
        unembedding.detach()[picked[picked < rows].to(unembedding.device)].cpu().double()
    )  # some devices have no double
    wave = torch.cos(torch.arange(hidden, dtype=torch.float64, device="cpu") ** 2)
    cosines = (found @ wave) / (found.norm(dim=1) * wave.norm()).clamp_min(1e-12)
    # An ordinary row has a cosine of about 1 / sqrt(hidden) with the wave: scale it to about 1.
    return [round(value, 4) for value in (cosines * hidden**0.5).clamp(-8, 8).tolist()]
