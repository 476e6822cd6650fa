"""The model card that lies beside auxiliary heads, and its plot."""

import importlib.util
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..basics.file_names import CARD_NAME, PLOT_NAME
from ..basics.files import write_text
from ..basics.provenance import listed
from ..basics.tables import markdown_table
from .config import DEFAULT_NUM_HEADS, HeadsConfig

PAPER = "[CAFT, arXiv 2506.07833](https://arxiv.org/abs/2506.07833)"
UNTRAINED = "These heads are **not trained**: they carry no knowledge of the base model yet."


def write_card(folder: Path, config: HeadsConfig, repo_id: str | None = None) -> None:
    """Write ``README.md`` into an artifact's folder, and ``heads.png`` if the heads were evaluated.

    Without matplotlib, an existing plot stays; without evaluations, it is removed. ``repo_id`` is
    the repository from which the card loads the heads; None means the folder.
    """
    plot = folder / PLOT_NAME
    evaluations = evaluations_of(config)
    if evaluations and importlib.util.find_spec("matplotlib"):
        from .plots import plot_evaluations

        plot_evaluations(plot, {e["name"]: (e["before"]["heads"], e["after"]["heads"]) for e in evaluations})
    elif not evaluations:
        plot.unlink(missing_ok=True)
    write_text(folder / CARD_NAME, heads_card(config, repo_id, has_plot=plot.exists()))


def evaluations_of(config: HeadsConfig) -> list[dict[str, Any]]:
    """Evaluations before and after training that the heads' configuration records."""
    return [e for e in config.training.get("evaluations") or [] if e.get("before") and e.get("after")]


def heads_card(config: HeadsConfig, repo_id: str | None = None, has_plot: bool = False) -> str:
    """The card in Markdown with the Hub's metadata; it is for a folder if ``repo_id`` is None."""
    base = config.base_model_name_or_path or "(unnamed base model)"
    n = config.num_heads + 1
    metadata = {"base_model": base, "base_model_relation": "adapter"} if "/" in base else {}
    lines = [
        front_matter(
            **metadata,
            library_name="peft-caft",
            license=config.license,
            tags=["caft", "auxiliary-heads", "multi-token-prediction"],
        ),
        f"# Auxiliary heads for {base}",
        "",
        f"{config.num_heads} heads that predict the tokens 2 to {n} ahead, for concept-aware fine-tuning ({PAPER}) with "
        "`peft-caft`. They add a multi-token loss while an adapter is trained and are dropped afterwards: the fine-tuned "
        "model pays nothing for them.",
        *([] if config.training else ["", UNTRAINED]),
        "",
        *_description(config, base),
        "",
        "## Use",
        "",
        *_usage(config, repo_id, base),
    ]
    if evaluations := evaluations_of(config):
        lines += ["", "## How good they are", "", "Held-out data, before -> after training."]
        for evaluation in evaluations:
            lines += ["", *_data_lines(evaluation, f"**{evaluation['name']}**:"), "", evaluation_table(evaluation)]
        if has_plot:
            lines += ["", f"![Accuracy and cross entropy of each head, before and after training]({PLOT_NAME})"]
    if config.training:
        lines += ["", "## Training", "", *training_lines(config.training)]
    lines += ["", "## Limits", "", *_limits(base, config.training, bool(evaluations))]
    return "\n".join(lines) + "\n"


def front_matter(library_name: str, license: str | None, tags: list[str], **values: Any) -> str:
    """The YAML head of a card, which the Hub reads; ``None`` values are left out."""
    data = ModelCardData(
        library_name=library_name, license=license, pipeline_tag="text-generation", tags=tags, **values
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _description(config: HeadsConfig, base: str) -> list[str]:
    bias = " + b" if config.residual_bias else ""
    kind = {
        "residual": f"residual block, `x + SiLU(W x{bias})`",
        "decoder_layer": "decoder layer of the base model's kind",
    }
    reads = {"last_layer_input": "the input of the last decoder layer", "last_hidden_state": "the last hidden state"}
    norm = "final norm and unembedding" if config.final_norm else "unembedding, without its final norm"
    revision = f", revision `{config.base_model_revision}`" if config.base_model_revision else ""
    return [
        f"- Base model: `{base}`{revision} (`{config.base_model_class or 'class unknown'}`, hidden size "
        f"{config.hidden_size:,}, vocabulary {config.vocab_size:,})",
        f"- Each head: {config.head_num_layers} x {kind[config.head_type]}, on {reads[config.head_input]}",
        f"- Output: through the base model's own frozen {norm}, which the files do not hold",
    ]


def _usage(config: HeadsConfig, repo_id: str | None, base: str) -> list[str]:
    revision = f', revision="{config.base_model_revision}"' if config.base_model_revision and "/" in base else ""
    fewer = f", num_auxiliary_heads={config.num_heads}" if config.num_heads < DEFAULT_NUM_HEADS else ""
    return [
        "```python",
        "from peft import get_peft_model",
        "from peft_caft import CAFTCallback, CAFTConfig",
        "from transformers import AutoModelForCausalLM, Trainer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{revision})',
        f'config = CAFTConfig(heads="{repo_id or "path/to/this/folder"}"{fewer}, target_modules="all-linear")',
        "model = get_peft_model(base, config)",
        "Trainer(model, args, train_dataset=data, callbacks=[CAFTCallback()]).train()",
        'model.save_pretrained("adapter")  # a plain LoRA adapter',
        "```",
    ]


def training_lines(training: dict[str, Any]) -> list[str]:
    """The record of stage 1 as Markdown lines; fields without a sentence follow as a list."""
    rest = {k: v for k, v in training.items() if v is not None and not isinstance(v, (dict, list))}
    lines = [
        line for file in training.get("data") or [] if isinstance(file, dict) for line in _data_lines(file, "- Data:")
    ]
    if isinstance(base := training.get("base_model_weights"), dict):
        lines.append(
            "- Weights of the base model: " + "; ".join(str(base[k]) for k in ("source", "conversion") if k in base)
        )
    if targets := rest.pop("targets", None):
        meaning = {"soft": "the base model's own distributions", "hard": "the tokens of the text"}
        decay = f", head k weighing {rest.pop('aux_loss_decay')}^(k-1)" if "aux_loss_decay" in rest else ""
        fraction = rest.pop("aux_token_fraction", 1)
        share = f", at {fraction:.0%} of the positions, drawn anew each step" if fraction != 1 else ""
        lines.append(f"- Targets: {targets} ({meaning.get(targets, 'see the command')}){share}{decay}")
    if "learning_rate" in rest:
        lines.append(optimiser_line(rest))
    if "steps" in rest:
        steps, epochs = rest.pop("steps"), rest.pop("epochs", None)
        for asked_for in ("max_steps", "num_train_epochs"):
            rest.pop(asked_for, None)
        early = "; stopped early" if rest.pop("stopped_early", False) else ""
        over = f" ({epochs:.3g} epochs)" if epochs else ""
        took = f" in {duration(rest.pop('seconds'))}" if "seconds" in rest else ""
        machine = f" on {rest.pop('machine')}" if "machine" in rest else ""
        lines.append(f"- Run: {steps:,} steps{over}{took}{machine}{early}")
    if initial := rest.pop("initial_heads", None):
        lines.append(f"- Started from the heads `{initial}`")
    command, commit = rest.pop("command", None), rest.pop("git_commit", None)
    lines += [f"- {name.replace('_', ' ')}: {_shown(value)}" for name, value in rest.items()]
    if versions := training.get("versions"):
        lines.append(f"- Versions: {listed(versions)}" + (f" (commit `{commit[:12]}`)" if commit else ""))
    if command:
        lines += ["", "```bash", command, "```"]
    return lines


def optimiser_line(settings: dict[str, Any]) -> str:
    """A line about the optimiser; the fields that it names are taken out of ``settings``."""
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
    batch = " x ".join(str(settings.pop(name, 1)) for name in sizes)
    optimiser = f"{settings.pop('optim')}, " if "optim" in settings else ""
    return (
        f"- Optimiser: {optimiser}learning rate {settings.pop('learning_rate'):g}, {settings.pop('lr_scheduler_type', 'unknown')} "
        f"schedule, {settings.pop('warmup_steps', 0):g} warm-up steps, weight decay {settings.pop('weight_decay', 0):g}, "
        f"{batch} rows a step (batch x accumulation x processes), rows of at most "
        f"{settings.pop('max_length', 'unknown')} tokens, seed {settings.pop('seed', 'unknown')}"
    )


def _data_lines(file: dict[str, Any], start: str) -> list[str]:
    counts = [f"{file[key]:,} {what}" for key, what in _COUNTS.items() if isinstance(file.get(key), int)]
    line = f"{start} " + ", ".join([f"`{file.get('file', 'unnamed')}`", *counts])
    if file.get("sha256"):
        line += f", sha256 `{file['sha256'][:12]}`"
    provenance = file.get("provenance")
    if not isinstance(provenance, dict):
        return [line]
    # `peft-caft distill` records all its settings under this name.
    settings = provenance.get("settings")
    settings = settings if isinstance(settings, dict) else provenance
    known = {k: v for k, v in settings.items() if isinstance(v, (str, int, float, bool)) and k not in _NO_NEWS}
    what = known.pop("what", None)
    kind = "self-distilled" if "model" in known else "made with" if what is None else _shown(what)
    facts = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in known.items())
    told = ": ".join(part for part in (kind, facts) if part)
    return [line, f"  - {told}"] if facts or what else [line]


_COUNTS = {"rows": "rows", "tokens": "tokens", "supervised_tokens": "of them supervised"}
_NO_NEWS = ("command", "git_commit", "machine", "seconds", "format_version")


def _shown(value: object) -> str:
    text = str(value)
    return f"`{text[:12]}`" if len(text) in (40, 64) and text.isalnum() else text


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _limits(base: str, training: dict[str, Any], are_evaluated: bool) -> list[str]:
    converted = isinstance(training.get("base_model_weights"), dict)
    return [
        f"- They fit `{base}` alone. Loading them beside a model with another unembedding is an error; a model fine-tuned "
        "far from it deserves heads of its own.",
        "- They are a training signal, not a language model and not a drafter for speculative decoding. Acceptance length "
        "is measured on given text, not while generating.",
        *(
            [f"- They were trained and measured on the weights named above, not on those of `{base}`."]
            if converted
            else []
        ),
        "- Their accuracy elsewhere than on the held-out data above is unknown."
        if are_evaluated
        else "- Their accuracy has not been recorded.",
    ]


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """Per-head metrics and acceptance length on one held-out set, before and after training."""
    before, after = evaluation["before"], evaluation["after"]
    table = markdown_table(
        ["head (tokens ahead)", "cross entropy (nats/token)", "top-1", "top-5"],
        [
            [
                f"{a['tokens_ahead']:d}",
                f"{b['cross_entropy']:.3f} -> {a['cross_entropy']:.3f}",
                f"{b['top1']:.1%} -> {a['top1']:.1%}",
                f"{b['top5']:.1%} -> {a['top5']:.1%}",
            ]
            for b, a in zip(before["heads"], after["heads"], strict=True)
        ],
    )
    lengths = f"{before['acceptance_length']:.2f} -> {after['acceptance_length']:.2f}"
    return f"{table}\n\nAcceptance length: {lengths} of {len(after['heads'])} heads."
