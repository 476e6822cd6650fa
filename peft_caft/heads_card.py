"""The model card that is written beside auxiliary heads."""

from __future__ import annotations

from .heads_config import HeadsConfig
from .tables import head_table


def heads_card(config: HeadsConfig) -> str:
    """Markdown with Hub metadata: what the heads are, for which base model, how to use them, how good they are."""
    base = config.base_model_name_or_path or "(unnamed base model)"
    n = config.num_heads + 1
    front = ["---", "library_name: peft-caft", "tags:", "- caft", "- auxiliary-heads", "- multi-token-prediction"]
    if "/" in base:  # a Hub id; a local folder was recorded by its name alone
        front.append(f"base_model: {config.base_model_name_or_path}")
    reads = {"last_layer_input": "the input of the last decoder layer", "last_hidden_state": "the last hidden state"}
    kind = {
        "residual": "residual blocks `x + SiLU(W x)`",
        "decoder_layer": "decoder layers of the base model's own kind",
    }
    lines = [
        *front,
        "---",
        "",
        f"# Auxiliary heads for {base}",
        "",
        f"{config.num_heads} heads that predict the tokens 2 to {n} ahead, for concept-aware fine-tuning "
        "([CAFT, arXiv 2506.07833](https://arxiv.org/abs/2506.07833)) with "
        "`peft-caft`. They are used while fine-tuning and dropped for inference.",
        "",
        f"- Head: {config.head_num_layers} x {kind[config.head_type]}, reading {reads[config.head_input]}",
        f"- Base model: `{base}`, revision `{config.base_model_revision or 'unknown'}`, class "
        f"`{config.base_model_class or 'unknown'}`; its final norm "
        + ("stands" if config.final_norm else "does not stand")
        + " between head and unembedding",
        "",
        "```python",
        "from peft import get_peft_model",
        "from peft_caft import CAFTCallback, CAFTConfig",
        "",
        'model = get_peft_model(base_model, CAFTConfig(heads="<this folder or repository>", target_modules="all-linear"))',
        "# transformers.Trainer(model, ..., callbacks=[CAFTCallback()])",
        "```",
        "",
        "## Training",
        "",
        *_training_section(config),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _training_section(config: HeadsConfig) -> list[str]:
    training = config.training
    if not training:
        return ["These heads are **not trained**: they carry no knowledge of the base model yet."]
    lines = [f"- {name}: {value}" for name, value in training.items() if not isinstance(value, (dict, list))]
    if "versions" in training:
        lines.append("- versions: " + ", ".join(f"{name} {value}" for name, value in training["versions"].items()))
    after, before = training.get("metrics_after"), training.get("metrics_before")
    if after and before:
        lines += ["", "Held-out data, before -> after training:", "", head_table(before, after)]
    return lines
