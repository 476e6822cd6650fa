"""The plan of a comparison of arms, read from YAML and checked before any work.

    model: HuggingFaceTB/SmolLM2-135M-Instruct   # folder or Hub id; or `embedded`, the demo model
    task: task.py                                # paths are relative to this file
    sizes: {train: 15000, dev: 500, test: 1000}  # rows; built unless `data` names a folder
    settings: {heads: ../heads, max_length: 256} # options of `peft-caft train`, for every arm
    training: {num_train_epochs: 2}              # fields of TrainingArguments, for every arm
    evaluation: {batch_size: 32}                 # options of `peft-caft evaluate`
    seeds: [1, 2, 3]
    tuning: {seed: 0, learning_rates: [1e-4, 3e-4]}
    arms:                                        # the others are compared with the first
      lora: {label: LoRA, settings: {method: lora}}
      caft: {label: CAFT}
      lora-flops: {label: LoRA given CAFT's FLOPs, settings: {method: lora}, flops_of: caft}
      adapted: {label: "CAFT, heads adapted first", adapt_heads: {num_train_epochs: 1}}
    scales:                                      # --scale replaces these; `arms` lists names
      smoke: {sizes: {train: 32, dev: 8, test: 8}, seeds: [1], arms: [lora, caft]}

Arms are paired: one seed gives all of them the same initial adapter and order of data. So whatever
decides these must be the same in all arms.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..basics.reading import read_yaml, require_file
from ..hub.embedded_model import embedded_model
from ..training.defaults import STAGE_1, STAGE_2
from ..training.settings import FineTuningSettings, unused_settings
from .comparison_values import (
    SET_BY_RUN,
    mapping,
    rate_values,
    seed_values,
    settings_values,
    size_values,
    text,
    training_values,
)
from .settings import EvaluationSettings

KEYS = ("model", "task", "data", "sizes", "settings", "training", "evaluation", "seeds", "tuning", "arms", "scales")
ARM_KEYS = ("label", "settings", "training", "learning_rates", "flops_of", "adapt_heads")
# The initial adapter and the order of the data depend on these, besides seed and data. Fields of
# LoraConfig are paired as a whole: each may add parameters, as DoRA does.
PAIRED_SETTINGS = ("r", "target_modules", "lora", "max_length", "dtype", "load_in_4bit", "load_in_8bit")
PAIRED_TRAINING = ("per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy")


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        name: name of its folder.
        label: name in reports.
        settings: fields of `FineTuningSettings` that the plan does not set itself.
        training: fields of TrainingArguments.
        learning_rates: rates to choose from on dev.
        flops_of: arm whose operations this one may spend, by training for more steps.
        adapt_heads: TrainingArguments of an earlier stage that trains heads on the data, or None.
    """

    name: str
    label: str
    settings: dict[str, Any]
    training: dict[str, Any]
    learning_rates: tuple[float, ...]
    flops_of: str | None = None
    adapt_heads: dict[str, Any] | None = None

    @property
    def method(self) -> str:
        return self.settings.get("method", FineTuningSettings.method)


@dataclass(frozen=True)
class ComparisonPlan:
    """A checked plan; the module's docstring shows its fields.

    Attributes:
        tuning_seed: seed of the runs that choose learning rates; not one of ``seeds``, so that no
            arm is tested with the seed that it was tuned with.
        arms: the arms to run; the others are compared with the first.
        references: arms that ``flops_of`` names and that are not run themselves.
    """

    model: str
    task: str
    data: str | None
    sizes: dict[str, int]
    evaluation: dict[str, Any]
    seeds: tuple[int, ...]
    tuning_seed: int
    arms: tuple[Arm, ...]
    references: tuple[Arm, ...] = ()

    def arm(self, name: str) -> Arm:
        return next(arm for arm in (*self.arms, *self.references) if arm.name == name)

    def record(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        arms = {
            kind: [asdict(arm) | {"learning_rates": list(arm.learning_rates)} for arm in getattr(self, kind)]
            for kind in ("arms", "references")
        }
        return asdict(self) | {"seeds": list(self.seeds)} | arms


def read_plan(
    path: str | Path,
    scale: str | None = None,
    model: str | None = None,
    heads: str | None = None,
    data: str | None = None,
) -> ComparisonPlan:
    """Read and check a plan; ``model``, ``heads`` and ``data`` replace its own.

    Args:
        path: YAML file.
        scale: name of one of its ``scales``; None takes the plan as it is.
        heads: an arm that sets ``heads`` itself keeps its own.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a field is wrong, naming the field, its value and what was expected.
    """
    path = Path(path)
    require_file("plan", path, "a YAML file. Copy examples/molecules/compare.yaml")
    values = _scaled(mapping("plan", read_yaml(path), KEYS), scale)
    if data is not None:
        values["data"] = str(Path(data).resolve())
    return _plan(values, path.parent, model, heads)


def _scaled(values: dict[str, Any], scale: str | None) -> dict[str, Any]:
    scales = mapping("scales", values.pop("scales", {}))
    if scale is None:
        return values
    if scale not in scales:
        raise ValueError(
            f"scale: got {scale!r}, expected one of {', '.join(map(repr, scales)) or 'none: the plan has no scales'}."
        )
    for key, value in mapping(f"scales.{scale}", scales[scale], KEYS[:-1]).items():
        if key == "arms":
            arms = mapping("arms", values.get("arms"))
            if not isinstance(value, list) or not value or set(value) - set(arms):
                raise ValueError(f"scales.{scale}.arms: got {value!r}, expected a list of some of {', '.join(arms)}.")
            values["chosen_arms"] = value
        elif isinstance(value, Mapping):
            values[key] = mapping(key, values.get(key, {})) | dict(value)
        else:
            values[key] = value
    return values


def _plan(values: dict[str, Any], folder: Path, model: str | None, heads: str | None) -> ComparisonPlan:
    model = model or _located(folder, text("model", values.get("model")))
    tuning = mapping("tuning", values.get("tuning"), ("seed", "learning_rates"))
    common = Arm(
        "",
        "",
        _located_heads(folder, settings_values("settings", values.get("settings", {}), FineTuningSettings)),
        training_values("training", values.get("training", {}), STAGE_2),
        rate_values("tuning.learning_rates", tuning.get("learning_rates")),
    )
    if heads is not None:
        common.settings["heads"] = heads
    arms = {name: _arm(name, own, common, folder) for name, own in mapping("arms", values.get("arms")).items()}
    if not arms:
        raise ValueError("arms: got none, expected at least one, such as lora: {settings: {method: lora}}.")
    _require_paired(tuple(arms.values()))
    chosen = values.get("chosen_arms", list(arms))
    for arm in arms.values():
        _require_flops_of(arm, arms)
    for name in common.settings:
        if all(name in unused_settings(arm.method) for arm in arms.values()):
            raise ValueError(f"settings.{name}: given, but no arm has a method with a use for it. Leave it out.")
    if heads is not None and not any(arm.settings.get("heads") == heads for arm in arms.values()):
        raise ValueError(f"heads: got {heads!r}, but no arm takes heads from outside of the plan. Leave --heads out.")
    evaluation = settings_values("evaluation", values.get("evaluation", {}), EvaluationSettings)
    EvaluationSettings(task="", data="", output="", **evaluation)  # refuses what does not go together
    named = {arms[name].flops_of for name in chosen} - {None, *chosen}
    seeds = seed_values("seeds", values.get("seeds"))
    (tuning_seed,) = seed_values("tuning.seed", [tuning.get("seed", 0)])
    if tuning_seed in seeds:
        raise ValueError(
            f"tuning.seed: got {tuning_seed}, which is one of seeds, expected another: a run that chose the learning rate is no test of it."
        )
    return ComparisonPlan(
        model=str(embedded_model()) if model == "embedded" else model,
        task=_located(folder, text("task", values.get("task"))),
        data=_located(folder, text("data", values["data"])) if values.get("data") is not None else None,
        sizes=size_values(values.get("sizes")),
        evaluation=evaluation,
        seeds=seeds,
        tuning_seed=tuning_seed,
        arms=tuple(arms[name] for name in chosen),
        references=tuple(arms[name] for name in arms if name in named),
    )


def _arm(name: Any, values: Any, common: Arm, folder: Path) -> Arm:
    where = f"arms.{name}"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"arms: got the name {name!r}, expected letters, digits, '-', '_', '.': it names a folder.")
    values = mapping(where, values or {}, ARM_KEYS)
    own = _located_heads(folder, settings_values(f"{where}.settings", values.get("settings", {}), FineTuningSettings))
    adapt_heads = values.get("adapt_heads")
    if adapt_heads is not None:
        adapt_heads = training_values(f"{where}.adapt_heads", adapt_heads, STAGE_1, SET_BY_RUN[1:])
    method = own.get("method", common.method)
    unused = unused_settings(method)
    if "heads" in unused and (own.get("heads") or adapt_heads is not None):
        raise ValueError(f"{where}: got heads with method={method!r}, expected them with 'caft' or 'caft_full'.")
    settings = {name: value for name, value in common.settings.items() if name not in unused} | own
    FineTuningSettings(model="", data="", output="", **settings)  # refuses what does not go together
    rates = values.get("learning_rates")
    return Arm(
        name=name,
        label=text(f"{where}.label", values.get("label", name)),
        settings=settings,
        training=common.training | training_values(f"{where}.training", values.get("training", {}), STAGE_2),
        learning_rates=common.learning_rates if rates is None else rate_values(f"{where}.learning_rates", rates),
        flops_of=values.get("flops_of"),
        adapt_heads=adapt_heads,
    )


def _require_flops_of(arm: Arm, arms: dict[str, Arm]) -> None:
    if arm.flops_of is None:
        return
    other = arms.get(arm.flops_of)
    methods = (arm.method, other and other.method)
    if methods != ("lora", "caft"):
        raise ValueError(
            f"arms.{arm.name}.flops_of: got {arm.flops_of!r} for method={methods[0]!r}, expected the name of an arm of method 'caft', for "
            "one of 'lora'."
        )


def _require_paired(arms: tuple[Arm, ...]) -> None:
    first = arms[0]
    defaults = {field.name: field.default for field in fields(FineTuningSettings)} | {"lora": {}} | STAGE_2
    for arm in arms[1:]:
        unused = {name for one in (first, arm) for name in unused_settings(one.method)}
        shared = [name for name in PAIRED_SETTINGS if name not in unused]
        for kind, names in (("settings", shared), ("training", PAIRED_TRAINING)):
            for name in names:
                expected, got = (getattr(one, kind).get(name, defaults.get(name)) for one in (first, arm))
                if got != expected:
                    raise ValueError(
                        f"arms.{arm.name}.{kind}.{name}: got {got!r}, expected {expected!r} as in {first.name}: arms are paired by initial "
                        f"adapter and order of data. Set it for all, in {kind} of the plan."
                    )


def _located(folder: Path, value: str) -> str:
    """``value`` relative to the plan's folder if that exists; else as it is, such as a Hub id."""
    return str((folder / value).resolve()) if (folder / value).exists() else value


def _located_heads(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    heads = settings.get("heads")
    return settings | {"heads": _located(folder, heads)} if heads else settings
