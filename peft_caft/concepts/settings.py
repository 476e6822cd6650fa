"""Settings of ``peft-caft concepts``. It imports no torch."""

from dataclasses import dataclass, fields
from typing import Literal

from ..basics.checks import require_choices, require_counts
from ..basics.settings import DATA, REPORT, same_setting, setting
from ..training.settings import DistillationSettings, FineTuningSettings, Precision

BASE = "base"  # the name of the base model's scores


@dataclass(frozen=True)
class ConceptsSettings:
    """Data, models and kind of terms; each field is an option of ``peft-caft concepts``.

    Raises:
        ValueError: if a field is out of range, or --no-loss comes with models to score.
    """

    data: str = setting("Data, JSONL: 'messages', or 'prompt' and 'completion', or 'text'.", group=DATA)
    model: str = setting("Base model: folder or Hub id. With --no-loss its tokenizer is enough.", group=DATA)
    output: str = setting("Folder to write concepts.json, .md, .html and plots to.", group=DATA)
    adapter: list[str] = setting(
        "NAME=FOLDER of a LoRA or CAFT adapter, or of a whole model with the same tokenizer, to score too. Give it again for "
        "more; the first is compared with the base model, and the others with the first. A name given several times is one model "
        "in several runs, such as seeds.",
        default_factory=list,
        group=DATA,
    )
    heads: str | None = setting(
        "Pretrained heads, folder or Hub id: how much they know of these data.", None, group=DATA
    )
    max_rows: int | None = setting("Rows to use at most, the first ones; all if unset.", None, group=DATA)
    max_length: int = same_setting(FineTuningSettings, "max_length")
    dtype: Precision = same_setting(DistillationSettings, "dtype")
    unit: Literal["auto", "prose", "code", "chemistry"] = setting(
        "What a term is: words; identifiers, keywords, literals and operators; or the fragments of SMILES and the words of names. "
        "auto guesses from the answers.",
        "auto",
        group=REPORT,
    )
    loss: bool = setting("Score the model; without, only terms are counted.", True, group=REPORT)
    plots: bool = setting("Draw PNG plots, which needs matplotlib.", True, group=REPORT)
    examples: int = setting("Rows to show in concepts.html, the first ones.", 12, group=REPORT)
    resamples: int = setting("Draws of rows for the 95 % intervals.", 1000, group=REPORT)
    batch_size: int = setting("Rows per forward pass.", 8)
    seed: int = setting("Seed of the draws for the intervals.", 0)

    def __post_init__(self) -> None:
        require_choices(self)
        require_counts(self, "max_rows", "max_length", "batch_size", "resamples")
        if self.examples < 0:
            raise ValueError(f"examples: got {self.examples}, expected at least 0.")
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("dtype", "batch_size", "resamples", "seed"):
            if not self.loss and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} with --no-loss, which has no use for it. Leave it out."
                )
        if not self.loss and (self.adapter or self.heads):
            given = "adapter" if self.adapter else "heads"
            raise ValueError(
                f"{given}: given with --no-loss, which reads no weights, expected one or the other. Leave --no-loss out to score "
                f"the {given}."
            )
        _ = self.adapters

    @property
    def adapters(self) -> dict[str, list[str]]:
        """Name -> folders or Hub ids of its runs, in the order given."""
        found: dict[str, list[str]] = {}
        for given in self.adapter:
            name, separator, source = given.partition("=")
            if not separator or not name.strip() or not source:
                raise ValueError(f"adapter: got {given!r}, expected NAME=FOLDER, such as LoRA=runs/lora.")
            if name.strip() == BASE:
                raise ValueError(f"adapter: got the name {BASE!r}, which is the base model's, expected another one.")
            found.setdefault(name.strip(), []).append(source)
        if len({len(sources) for sources in found.values()}) > 1:
            counts = ", ".join(f"{len(sources)} of {name!r}" for name, sources in found.items())
            raise ValueError(
                f"adapter: got {counts}, expected as many runs of each, since they are compared in pairs."
            )
        return found
