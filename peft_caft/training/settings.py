"""Settings of ``peft-caft train``, ``train-heads`` and ``distill``. It imports no torch."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ..basics.checks import (
    described,
    fits,
    is_plain,
    require_choices,
    require_counts,
    require_decay,
    require_pattern,
    require_token_fraction,
)
from ..basics.settings import ADAPTER, ANSWERS, DATA, HEADS, OBJECTIVE, same_setting, setting
from ..heads.config import HeadInput, HeadType
from ..method.objective_config import ObjectiveConfig
from .defaults import SET_BY_EARLY_STOPPING, UNUSED_1, UNUSED_2, UNUSED_BESIDE_HEADS, UNUSED_WITHOUT_EVAL_DATA

ADAPTER_FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "lora", "load_in_4bit", "load_in_8bit")
LORA_SET_ELSEWHERE = {
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules"), "the setting of that name says it"),
    "task_type": "causal language models are trained",
    "peft_type": "method says it",
    "base_model_name_or_path": "model says it",
    "revision": "the base model is the one in model",
    "inference_mode": "the adapter is trained",
    "auto_mapping": "PEFT sets it",
    "peft_version": "PEFT sets it",
}
# Fields that PEFT 0.21 takes along when an adapter out of the base weights becomes a plain one.
CONVERTED_TO_PLAIN = (
    *("init_lora_weights", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
)
LORA_OFF: tuple[Any, ...] = (None, False, "none", [], {})  # values that change nothing
INITIALISED_IN_PYTHON = ("corda", "eva", "loftq", "lora_ga")  # by a pass over data, or an object of PEFT
Targets = Literal["soft", "hard"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class FineTuningSettings(ObjectiveConfig):
    """What to fine-tune, and how; each field is an option of ``peft-caft train``.

    Raises:
        ValueError: if a field is out of range, or has no use beside the others.
    """

    model: str = setting("Base model: folder or Hub id.", group=DATA)
    data: str = setting("Training data, JSONL: 'messages', or 'prompt' and 'completion', or 'text'.", group=DATA)
    output: str = setting("Folder to write. An interrupted run in it is resumed.", group=DATA)
    eval_data: str | None = setting("Held-out data, JSONL.", None, group=DATA)
    eval_rows: int = setting("Held-out rows to use at most.", 200, group=DATA)
    max_rows: int | None = setting("Training rows to use at most; all if unset.", None, group=DATA)
    max_length: int = setting("Longest row in tokens; longer rows lose their end.", 512, group=DATA)
    dtype: Precision = setting(
        "Precision to load the base model in; auto takes the checkpoint's, and float32 where all parameters are trained.",
        "auto",
        group=DATA,
    )
    load_in_4bit: bool = setting(
        "Load the base model in 4 bits (NF4, nested), for QLoRA; needs bitsandbytes.", False, group=DATA
    )
    load_in_8bit: bool = setting("Load the base model in 8 bits; needs bitsandbytes.", False, group=DATA)
    method: Literal["caft", "lora", "caft_full", "full"] = setting(
        "LoRA with the auxiliary loss or without it; or all parameters, with it or without it.", "caft", group=ADAPTER
    )
    freeze_unembedding: bool = setting("With caft_full and full: leave the lm_head as it is.", False, group=ADAPTER)
    r: int = setting("LoRA rank.", 8, group=ADAPTER)
    lora_alpha: int = setting("LoRA scale; updates weigh lora_alpha / r.", 16, group=ADAPTER)
    lora_dropout: float = setting("LoRA dropout probability.", 0.0, group=ADAPTER)
    target_modules: str = setting("'all-linear', or module names with commas.", "all-linear", group=ADAPTER)
    lora: dict[str, Any] = setting("Further fields of peft.LoraConfig.", default_factory=dict, group=ADAPTER)

    def __post_init__(self) -> None:
        require_choices(self)
        require_counts(self, "eval_rows", "max_rows", "max_length", "r", "lora_alpha")
        self.require_valid_objective()
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: got {self.lora_dropout}, expected a probability: at least 0, below 1.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_8bit: got True together with load_in_4bit, expected one of them. Leave one out.")
        if self.lora:
            _require_lora_fields(self.lora)
        lora = {name: value for name, value in self.lora.items() if value not in LORA_OFF}
        if self.changes_base_weights and "use_rslora" in lora and {"rank_pattern", "alpha_pattern"} & lora.keys():
            raise ValueError(
                f"lora.use_rslora: got True with init_lora_weights={self.lora['init_lora_weights']!r} and a rank or alpha pattern, "
                "which PEFT cannot convert into a plain adapter. Leave one of them out."
            )
        defaults = {field.name: field.default for field in fields(self)} | {"lora": {}}
        values = vars(self) | {f"lora.{name}": value for name, value in lora.items()}
        for name, why in self._out_of_place().items():
            if values.get(name) != defaults.get(name):
                raise ValueError(f"{name}: got {values[name]!r} {why}. Leave it out.")

    def _out_of_place(self) -> dict[str, str]:
        """Fields that the others leave no use for, with the reason."""
        method = f"with method={self.method!r}"
        found = dict.fromkeys(unused_settings(self.method), f"{method}, which has no use for it")
        if self.heads is None:
            found["heads_revision"] = "without heads, expected heads beside it"
        else:
            their_own = ("head_type", "head_num_layers", "head_input")
            found |= dict.fromkeys(their_own, "beside heads, which have their own")
            if Path(self.heads).is_dir():
                found["heads_revision"] = "beside a folder of heads, which has no revisions"
        if self.eval_data is None:
            found["eval_rows"] = "without eval_data"
        if self.has_auxiliary_loss:
            found["total_steps"] = "beside a Trainer, which counts the steps"
            if self.aux_loss_weight == 0:
                of_the_loss = ("train_heads", "aux_loss_decay", "aux_loss_schedule", "aux_token_fraction")
                found |= dict.fromkeys(of_the_loss, "with aux_loss_weight=0, which leaves no auxiliary loss")
            found["lora.layer_replication"] = (
                f"{method}, expected it with 'lora' alone: the heads are made for the layers of the base model"
            )
        if self.changes_base_weights:
            start = f"with init_lora_weights={self.lora['init_lora_weights']!r}"
            lost = [f"lora.{name}" for name in self.lora if name not in CONVERTED_TO_PLAIN]
            found |= dict.fromkeys(lost, f"{start}, which PEFT then cannot convert into a plain adapter")
            if self.load_in_4bit or self.load_in_8bit:
                found["lora.init_lora_weights"] = (
                    "with a quantised base model, whose weights cannot be changed exactly"
                )
        return found

    @property
    def set_by_command(self) -> dict[str, str]:
        """Fields of TrainingArguments that fine-tuning sets, with the reason."""
        return {"eval_on_start": "held-out data are evaluated at the start, unless a run is resumed"}

    @property
    def unused_arguments(self) -> dict[str, str]:
        """Fields of TrainingArguments that this fine-tuning has no use for, with the reason."""
        trains_heads = self.has_auxiliary_loss and self.train_heads != "frozen"
        found = UNUSED_2 | (UNUSED_BESIDE_HEADS if trains_heads else {})
        return found | (UNUSED_WITHOUT_EVAL_DATA if self.eval_data is None else {})

    @property
    def has_auxiliary_loss(self) -> bool:
        return self.method in ("caft", "caft_full")

    @property
    def trains_all(self) -> bool:
        """Whether all parameters of the base model are trained, in place of LoRA adapters."""
        return self.method in ("caft_full", "full")

    @property
    def changes_base_weights(self) -> bool:
        """Whether the initial adapter is taken out of the base model's weights (PiSSA, OLoRA)."""
        return str(self.lora.get("init_lora_weights")).lower().startswith(("pissa", "olora"))

    @property
    def loading_dtype(self) -> str:
        """Dtype to load the model in: half precision would lose the updates of a whole model."""
        return "float32" if self.dtype == "auto" and self.trains_all else self.dtype


def unused_settings(method: str) -> tuple[str, ...]:
    """Names of the fields of `FineTuningSettings` that a method has no use for."""
    objective = () if method.startswith("caft") else tuple(field.name for field in fields(ObjectiveConfig))
    return objective + (ADAPTER_FIELDS if method in ("caft_full", "full") else ("freeze_unembedding",))


def _require_lora_fields(lora: dict[str, Any]) -> None:
    from peft import LoraConfig  # here, so that the command line can read the settings without it

    if str(lora.get("init_lora_weights")).lower() in INITIALISED_IN_PYTHON:
        raise ValueError(
            f"lora.init_lora_weights: got {lora['init_lora_weights']!r}, which takes a preparation by PEFT in Python, expected an "
            "initialisation from the weights alone, such as 'pissa' or 'olora'. Or use CAFTConfig and a Trainer."
        )
    known = get_type_hints(LoraConfig)
    for name, value in lora.items():
        if name in LORA_SET_ELSEWHERE:
            raise ValueError(f"lora.{name}: given, expected it left out: {LORA_SET_ELSEWHERE[name]}.")
        if name not in known:
            raise ValueError(
                f"lora.{name}: not a field of peft.LoraConfig, expected one of {', '.join(sorted(known))}."
            )
        if name in ("exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
            for pattern in [value] if isinstance(value, str) else value or []:
                require_pattern(f"lora.{name}", pattern)
        if is_plain(known[name]) and not fits(value, known[name]):
            raise ValueError(f"lora.{name}: got {value!r}, expected {described(known[name])}.")


@dataclass
class HeadTrainingSettings:
    """What heads to train, on what; each field is an option of ``peft-caft train-heads``.

    Raises:
        ValueError: if a field is out of range, or fresh heads are described beside initial ones.
    """

    model: str = same_setting(FineTuningSettings, "model")
    data: list[str] = setting(
        "Training data, JSONL: 'messages', or 'prompt' and 'completion', or 'text'. Give it again for more files.",
        group=DATA,
    )
    output: str = same_setting(FineTuningSettings, "output")
    eval_data: list[str] | None = setting(
        "Held-out data, JSONL; give it again for more sets, reported one by one. [default: the last tenth of each training file]",
        None,
        group=DATA,
    )
    eval_rows: int = setting("Rows to use at most of each held-out set.", 200, group=DATA)
    max_rows: int | None = setting(
        "Rows to use at most of each training file, the held-out ones among them; all if unset.", None, group=DATA
    )
    max_length: int = same_setting(FineTuningSettings, "max_length")
    dtype: Precision = same_setting(
        FineTuningSettings, "dtype", help="Precision to load the base model in; auto takes the checkpoint's."
    )
    cache: str | None = setting(
        "Folder that keeps the base model's hidden states, so that later epochs and runs over the same data need its last "
        "layer alone; tokens x hidden size x 2 bytes in bf16.",
        None,
        group=DATA,
    )
    init_heads: str | None = setting(
        "Heads to start from, folder or Hub id. They are adapted to the data of a task, best with --targets hard, since the "
        "base model does not know the task yet. [default: fresh ones]",
        None,
        group=HEADS,
    )
    num_heads: int | None = setting("Heads, n - 1; they predict 2 ... n tokens ahead. [default: 4]", None, group=HEADS)
    head_type: HeadType | None = setting(
        "x + SiLU(W x), or a copy of the last layer. [default: decoder_layer]", None, group=HEADS
    )
    head_input: HeadInput | None = setting(
        "What heads read: before the last layer, or after the final norm. [default: last_layer_input]",
        None,
        group=HEADS,
    )
    head_num_layers: int | None = setting("Blocks or layers per head. [default: 1]", None, group=HEADS)
    base_model_id: str | None = setting(
        "Hub id to record as the base model, where --model is a local copy.", None, group=HEADS
    )
    license: str | None = setting("For the card, such as apache-2.0; see the base model's.", None, group=HEADS)
    targets: Targets = setting(
        "What heads learn: the base model's own distributions for the text, or its tokens.", "soft", group=OBJECTIVE
    )
    aux_loss_decay: float = same_setting(ObjectiveConfig, "aux_loss_decay")
    aux_token_fraction: float = setting(
        "p: share of the positions, drawn anew each step, that teach the heads. Steps are cheaper, so that the same time sees "
        "more text; the gradient stays unbiased.",
        1.0,
        group=OBJECTIVE,
    )
    early_stopping_patience: int | None = setting(
        "Stop after so many evaluations (--eval_steps) without a better held-out loss, and keep the best heads.", None
    )

    def __post_init__(self) -> None:
        require_choices(self)
        counts = ("eval_rows", "max_rows", "max_length", "num_heads", "head_num_layers", "early_stopping_patience")
        require_counts(self, *counts)
        require_decay(self.aux_loss_decay)
        require_token_fraction(self.aux_token_fraction)
        if self.init_heads is not None and self.fresh_heads():
            name, value = next(iter(self.fresh_heads().items()))
            raise ValueError(
                f"{name}: got {value!r} together with init_heads={self.init_heads!r}, expected it unset, since the initial heads "
                "have their own. Drop one of the two."
            )

    @property
    def set_by_command(self) -> dict[str, str]:
        """Fields of TrainingArguments that the training of heads sets, with the reason."""
        found = {"label_smoothing_factor": "heads learn from whole labels"}
        if self.early_stopping_patience is not None:
            reason = (
                "--early-stopping-patience keeps the heads of the best evaluation, and saves as often as it evaluates"
            )
            found |= dict.fromkeys(SET_BY_EARLY_STOPPING, reason)
        return found

    @property
    def unused_arguments(self) -> dict[str, str]:
        """Fields of TrainingArguments that training heads has no use for, with the reason."""
        return UNUSED_1 | (UNUSED_2 if self.early_stopping_patience is None else {})

    def fresh_heads(self) -> dict[str, Any]:
        """The arguments for `AuxiliaryHeads.from_base_model` that were given."""
        names = ("num_heads", "head_type", "head_input", "head_num_layers")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass
class DistillationSettings:
    """Which prompts to answer, and how; each field is an option of ``peft-caft distill``.

    Raises:
        IsADirectoryError: if the output is a folder.
        ValueError: if a field is out of range, or the output would replace the prompts.
    """

    model: str = same_setting(FineTuningSettings, "model")
    prompts: str = setting(
        "JSONL with 'prompt' or 'messages' (answers at the end of a chat are cut off), or a dataset: hf:NAME, hf:NAME:CONFIG, "
        "hf:FOLDER; those need peft-caft[datasets].",
        group=DATA,
    )
    output: str = setting("JSONL file to write. An interrupted run is resumed.", group=DATA)
    split: str | None = setting("Split of a dataset. [default: train]", None, group=DATA)
    column: str | None = setting("Field with the prompt or chat. [default: messages or prompt]", None, group=DATA)
    system: str | None = setting("System message for prompts that have none.", None, group=DATA)
    max_prompts: int | None = setting("Prompts to take at most, the first ones; all if unset.", None, group=DATA)
    samples_per_prompt: int = setting("Answers to each prompt; equal ones count once.", 1, group=ANSWERS)
    max_new_tokens: int = setting("Longest answer in tokens; longer ones are cut off.", 512, group=ANSWERS)
    temperature: float = setting(
        "Temperature of sampling; 1 is the model's own distribution, which heads are to learn, and 0 is greedy.",
        1.0,
        group=ANSWERS,
    )
    top_p: float = setting("Draw from the likeliest tokens of this probability; 1 is off.", 1.0, group=ANSWERS)
    top_k: int = setting("Draw from so many likeliest tokens; 0 is off.", 0, group=ANSWERS)
    max_repetition: float = setting(
        "Leave out answers of which a larger share of 8-token runs is repeated; 1 is off.", 0.5, group=ANSWERS
    )
    batch_size: int | None = setting(
        "Prompts at a time on each process. A larger one is faster and needs more memory. [default: 32; 1024 with vllm]",
        None,
    )
    seed: int = setting("Seed of the sampling.", 0)
    dtype: Precision = same_setting(HeadTrainingSettings, "dtype")
    backend: Literal["transformers", "vllm"] = setting(
        "What generates. vllm needs peft-caft[vllm]; its code here has not been run by the authors.", "transformers"
    )

    def __post_init__(self) -> None:
        require_choices(self)
        require_counts(self, "batch_size", "samples_per_prompt", "max_prompts")
        for name, off in (("top_p", 1), ("top_k", 0), ("samples_per_prompt", 1)):
            if self.temperature == 0 and getattr(self, name) != off:
                raise ValueError(
                    f"{name}: got {getattr(self, name)} with temperature=0, expected {off}: the likeliest token is taken each time. "
                    "Leave one of them out."
                )
        if not 0 < self.max_repetition <= 1:
            raise ValueError(f"max_repetition: got {self.max_repetition}, expected a share above 0, at most 1 (off).")
        if Path(self.output).is_dir():
            raise IsADirectoryError(f"output: {self.output} is a folder, expected a JSONL file to write.")
        if Path(self.output).resolve() == Path(self.prompts).resolve():
            raise ValueError(f"output: got {self.output}, the prompts themselves, expected another file.")
