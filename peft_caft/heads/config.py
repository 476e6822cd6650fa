"""`HeadsConfig`: description of auxiliary heads, their base model and their training."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..basics.checks import require_choices, require_counts

if TYPE_CHECKING:
    from torch import Tensor

HeadType = Literal["residual", "decoder_layer"]
HeadInput = Literal["last_layer_input", "last_hidden_state"]
HEAD_TYPES: tuple[HeadType, ...] = get_args(HeadType)
DEFAULT_NUM_HEADS = 4  # n = 5, as in CAFT's experiments
FORMAT_VERSION = 1
FINGERPRINT_ROWS = 16
FINGERPRINT_TOLERANCE = 0.02  # bf16 and fp16 roundings of one matrix differ by about 0.002, two matrices by about 1


@dataclass
class HeadsConfig:
    """Description of an `AuxiliaryHeads` artifact, its ``config.json``.

    Attributes:
        head_type: ``"residual"`` or ``"decoder_layer"``.
        head_input: ``"last_layer_input"`` or ``"last_hidden_state"``.
        num_heads: number of heads, n - 1; head k = 2 ... n predicts the token k ahead.
        head_num_layers: number of blocks or layers per head.
        final_norm: whether the base model's final norm follows a head.
        hidden_size, vocab_size: sizes of the base model's unembedding.
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

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> HeadsConfig:
        """Read a heads ``config.json``.

        Raises:
            ValueError: if it is not JSON, describes no heads, or has an unknown version or type.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON ({error}). Download or save the heads again.") from error
        values = values if isinstance(values, dict) else {}
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

    def require_base_model(self, unembedding: Tensor, source: str) -> None:
        """Check that the heads belong to the model with this unembedding, ``(vocabulary, hidden)``.

        Raises:
            ValueError: naming the field, what the base model has and what the heads expect.
        """
        made_for = f"made for {self.base_model_name_or_path or 'another base model'}"
        advice = "Load that base model, or train heads for this one with `peft-caft train-heads`."
        vocab_size, hidden_size = unembedding.shape
        for name, got in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
            expected = getattr(self, name)
            if got != expected:
                raise ValueError(
                    f"{name}: got {got} in the base model, expected {expected} by the heads {source!r} ({made_for}). {advice}"
                )
        got_fingerprint = fingerprint(unembedding)
        if got_fingerprint is None:
            return
        if len(self.unembedding_fingerprint) != len(got_fingerprint):
            raise ValueError(
                f"unembedding_fingerprint: got {len(self.unembedding_fingerprint)} numbers in the heads {source!r}, "
                f"expected {len(got_fingerprint)}. Download or save the heads again."
            )
        distance = max(abs(a - b) for a, b in zip(got_fingerprint, self.unembedding_fingerprint, strict=True))
        if not distance <= FINGERPRINT_TOLERANCE:
            raise ValueError(
                f"unembedding_fingerprint: got {got_fingerprint[:3]}... from the base model's lm_head, expected "
                f"{self.unembedding_fingerprint[:3]}... by the heads {source!r} ({made_for}), largest difference "
                f"{distance:.3f} > {FINGERPRINT_TOLERANCE}. Same sizes, but another model. {advice}"
            )


def fingerprint(unembedding: Tensor) -> list[float] | None:
    """Sixteen numbers of about 1 that tell one unembedding from another, in whatever dtype.

    Each is the cosine between one row and a fixed wave: unlike a hash, it survives rounding.

    Args:
        unembedding: ``(vocabulary, hidden)``, any floating dtype.

    Returns:
        the numbers, rounded to 4 digits; None for a tensor without data (meta device).
    """
    import torch  # here, since the command line reads the constants above without torch

    if unembedding.is_meta:
        return None
    vocabulary, hidden = unembedding.shape
    picked = torch.linspace(0, vocabulary - 1, FINGERPRINT_ROWS).long().to(unembedding.device)
    rows = unembedding.detach()[picked].cpu().double()  # some devices have no double
    wave = torch.cos(torch.arange(hidden, dtype=torch.float64) ** 2)
    cosines = (rows @ wave) / (rows.norm(dim=1) * wave.norm()).clamp_min(1e-12)
    # An ordinary row has a cosine of about 1 / sqrt(hidden) with the wave: scale it to about 1.
    return [round(value, 4) for value in (cosines * hidden**0.5).clamp(-8, 8).tolist()]
