"""Options that a command passes on: fields of ``TrainingArguments`` and ``LoraConfig``."""

import dataclasses
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import torch
from peft import LoraConfig
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..basics.checks import described, fits, is_plain, parsed
from ..basics.reading import read_json, read_yaml, require_file
from .defaults import COMMON, IRRELEVANT, NOT_HONOURED
from .settings import LORA_SET_ELSEWHERE

SET_BY_COMMAND = {
    "output_dir": "--output says where the run is kept",
    "resume_from_checkpoint": "an interrupted run in --output is resumed by itself",
}
ON_CARDS = (
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("optim", "lr_scheduler_type", "warmup_steps", "weight_decay", "train_sampling_strategy", "seed", "data_seed"),
)

WITHOUT_OPTIM_ARGS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor")


def trainer_arguments(
    output: str,
    defaults: dict[str, Any],
    yaml_file: str | None = None,
    options: list[str] | None = None,
    set_by_command: Mapping[str, str] | None = None,
    unused: Mapping[str, str] | None = None,
    also_known: Iterable[str] = (),
) -> TrainingArguments:
    """TrainingArguments: options go before fields in the YAML file, and both before the defaults.

    Args:
        output: run folder; checkpoints go below it.
        options: as on a command line, e.g. ``["--learning_rate", "1e-4"]``.
        set_by_command: field -> reason, for fields that the command would overwrite.
        unused: field -> reason, for further fields that the command has no use for.
        also_known: further names of options, to be suggested for an unknown one.

    Raises:
        FileNotFoundError: if there is no such YAML file.
        ValueError: if TrainingArguments refuses a field, or the command would set or ignore it.
    """
    own = _yaml(yaml_file)
    given = [*own, *(_name(word) for word in options or [] if word.startswith("--"))]
    for name, reason in (SET_BY_COMMAND | dict(set_by_command or {})).items():
        if name in given:
            raise ValueError(f"{name}: given, but this command sets it: {reason}. Leave it out.")
    # Pinning for a CPU or for Apple's devices only warns.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    pins = accelerator is not None and accelerator.type != "mps"
    values = {"dataloader_pin_memory": pins} | COMMON | defaults | own
    parser = HfArgumentParser(TrainingArguments, exit_on_error=False, allow_abbrev=False)
    parser.set_defaults(**values)
    try:
        arguments, unknown = parser.parse_args_into_dataclasses(
            ["--output_dir", str(Path(output) / "checkpoints"), *(options or [])], return_remaining_strings=True
        )
    except (ArgumentError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(f"training options: {error}. Expected a value that TrainingArguments takes.") from error
    if unknown:
        raise _unknown(unknown[0], also_known)
    require_honoured(arguments, unused or {})
    for name, reason in _without_effect(arguments).items():
        if name in given:
            raise ValueError(f"{name}: given with {reason}, where it has no effect. Leave one of them out.")
    return arguments


def lora_option_types() -> dict[str, Any]:
    """Field of ``LoraConfig`` -> annotated type, for the fields that a command line can give."""
    return {
        name: hint
        for name, hint in get_type_hints(LoraConfig).items()
        if is_plain(hint) and name not in LORA_SET_ELSEWHERE
    }


def lora_options(options: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Fields of ``LoraConfig`` among options, and the other options.

    A field that is true or false needs no value. `basics.checks.parsed` says how lists look.

    Raises:
        ValueError: if only Python can give a field, or a value has another type.
    """
    types, names = lora_option_types(), {field.name for field in dataclasses.fields(LoraConfig)}
    found: dict[str, Any] = {}
    others: list[str] = []
    words = list(options)
    while words:  # argparse takes an unknown option with a space in it for a value
        word = words.pop(0)
        name = _name(word)
        if not word.startswith("--") or name not in names:
            others.append(word)
            continue
        text: str | None = word.partition("=")[2] if "=" in word else None
        if text is None and words and not words[0].startswith("--"):
            text = words.pop(0)
        if name in LORA_SET_ELSEWHERE:
            raise ValueError(f"--{name}: given, but this command sets it: {LORA_SET_ELSEWHERE[name]}. Leave it out.")
        if name not in types:
            raise ValueError(
                f"--{name}: a command line cannot give it, since it is an object of PEFT, expected it in Python: "
                f"CAFTConfig({name}=...) and a Trainer."
            )
        if text is None and types[name] is not bool:
            raise ValueError(f"--{name}: got no value, expected {described(types[name])}.")
        found[name] = parsed(f"--{name}", "true" if text is None else text, types[name])
    return found, others


def training_settings(args: TrainingArguments) -> dict[str, Any]:
    """The trainer arguments that decide a result, for the record of a run."""
    values = args.to_dict()
    return {name: values[name] for name in ON_CARDS}


def identity(args: TrainingArguments) -> dict[str, Any]:
    """The trainer arguments that a run must be resumed with: all that may change its result."""
    irrelevant = set(IRRELEVANT | NOT_HONOURED)
    if args.load_best_model_at_end:  # which of the saved ones is the best
        irrelevant -= {"save_strategy", "save_steps"}
    values = {name: value for name, value in args.to_dict().items() if name not in irrelevant}
    values["mixed_precision"] = args.mixed_precision  # `accelerate launch` may have set it
    if isinstance(args.deepspeed, str):
        values["deepspeed"] = read_json(args.deepspeed)
    return values


def require_honoured(args: TrainingArguments, unused: Mapping[str, str]) -> None:
    """Raise a ValueError that names the first argument that is not used, or breaks the run.

    Args:
        unused: field -> reason, for fields that this run has no use for besides `NOT_HONOURED`.
    """
    # Not those of other TrainingArguments, which would reset accelerate's and DeepSpeed's state.
    fields = dataclasses.fields(TrainingArguments)
    defaults = {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields}
    for name, reason in (NOT_HONOURED | dict(unused)).items():
        value, default = _plain(getattr(args, name)), _plain(defaults[name])
        if (value or None) != (default or None) and not (
            name == "do_eval" and args.eval_strategy != "no"
        ):  # which sets do_eval
            got = "a text" if name == "hub_token" else repr(value)
            raise ValueError(f"{name}: got {got}, expected {default!r}: {reason}. Leave it out.")
    least = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
    for name, smallest in (least | {"neftune_noise_alpha": 0, "max_grad_norm": 0}).items():
        if (value := getattr(args, name)) is not None and value < smallest:
            raise ValueError(f"{name}: got {value}, expected at least {smallest}.")
    if args.max_steps == 0 or args.max_steps < -1 or (args.max_steps == -1 and args.num_train_epochs <= 0):
        name = "num_train_epochs" if args.max_steps == -1 else "max_steps"
        raise ValueError(f"{name}: got {getattr(args, name)}, expected more than 0, or nothing would be trained.")
    missing = set(args.report_to) - set(get_available_reporting_integrations())
    if missing:
        raise ValueError(
            f"report_to: got {min(missing)!r}, whose package is not installed. Install it, or leave it out."
        )


def _plain(value: Any) -> Any:
    """The text of an option that transformers keeps as a member of an enumeration."""
    return getattr(value, "value", value)


def _without_effect(args: TrainingArguments) -> dict[str, str]:
    """Fields that others leave no effect, with the reason; defaults may be among them."""
    found: dict[str, str] = {}
    for names, is_so, reason in (
        ("eval_steps", args.eval_strategy != "steps", f"eval_strategy={str(args.eval_strategy.value)!r}"),
        ("eval_delay", args.eval_strategy == "no", "eval_strategy='no'"),
        ("save_steps", args.save_strategy != "steps", f"save_strategy={str(args.save_strategy.value)!r}"),
        ("save_total_limit", args.save_strategy == "no", "save_strategy='no'"),
        ("logging_steps", args.logging_strategy != "steps", f"logging_strategy={str(args.logging_strategy.value)!r}"),
        (
            "metric_for_best_model greater_is_better",
            not args.load_best_model_at_end
            and args.save_strategy != "best"
            and args.lr_scheduler_type != "reduce_lr_on_plateau",
            "nothing that looks for the best: load_best_model_at_end or save_strategy 'best'",
        ),
        (
            "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
            not args.activation_checkpointing,
            "activation_checkpointing=False",
        ),
        ("liger_kernel_config", not args.use_liger_kernel, "use_liger_kernel=False"),
        ("fsdp_config", not args.fsdp, "fsdp unset"),
        (
            "dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order",
            args.dataloader_num_workers == 0,
            "dataloader_num_workers=0",
        ),
        ("optim_target_modules", not args.optim.startswith(("galore", "apollo")), f"optim={str(args.optim.value)!r}"),
        ("optim_args", _plain(args.optim) in WITHOUT_OPTIM_ARGS, f"optim={str(args.optim.value)!r}"),
    ):
        found |= dict.fromkeys(names.split(), reason) if is_so else {}
    return found


def _unknown(option: str, also_known: Iterable[str]) -> ValueError:
    known = [*also_known, *(field.name for field in dataclasses.fields(TrainingArguments))]
    near = get_close_matches(_name(option), known, n=1, cutoff=0.7)
    return ValueError(
        f"{option}: unknown option, expected one of this command or a field of transformers.TrainingArguments such as --learning_rate "
        "or --num_train_epochs" + (f". Did you mean --{near[0]}?" if near else ".")
    )


def _name(word: str) -> str:
    """``--use-dora=true`` -> ``use_dora``."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def _yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    require_file("--training-yaml", Path(path), "a YAML mapping of TrainingArguments")
    values = read_yaml(path)
    for name, hint in get_type_hints(TrainingArguments).items():
        value = values.get(name, "")  # a text is parsed as on a command line
        if not isinstance(value, str) and is_plain(hint) and not fits(value, hint):
            raise ValueError(f"{path}: {name}: got {value!r}, expected {described(hint)}.")
    if wrong := sorted(map(repr, values.keys() - {field.name for field in dataclasses.fields(TrainingArguments)})):
        raise ValueError(
            f"{path}: got {', '.join(wrong)}, expected a mapping of fields of transformers.TrainingArguments."
        )
    return values
