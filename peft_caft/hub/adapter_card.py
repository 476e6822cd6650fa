"""The model card of a published adapter."""

from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..basics.provenance import listed
from ..heads.card import PAPER, duration, front_matter, optimiser_line
from ..method.config import CAFTConfig

# PEFT's save_pretrained writes this into a card for its user to fill in.
PLACEHOLDER = "[More Information Needed]"


def adapter_card(
    config: LoraConfig,
    repo_id: str,
    license: str | None = None,
    settings: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
) -> str:
    """Markdown with Hub metadata: base model, heads, training, and how to load the adapter.

    Args:
        config: of the published adapter, whose base model and heads are Hub ids.
        settings, summary: ``run.json`` and ``summary.json`` of ``peft-caft train``, if it ran.
    """
    base, caft = str(config.base_model_name_or_path), isinstance(config, CAFTConfig)
    revision = f', revision="{config.revision}"' if config.revision else ""
    method = f"concept-aware fine-tuning ({PAPER}) with `peft-caft`" if caft else "LoRA fine-tuning with `peft-caft`"
    lines = [
        front_matter(
            "peft", license, ["caft", "lora"] if caft else ["lora"], base_model=base, base_model_relation="adapter"
        ),
        f"# LoRA adapter for {base}",
        "",
        f"Trained by {method}. It is an ordinary LoRA adapter: it loads with plain PEFT, and costs nothing more than LoRA at "
        "inference.",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{revision})',
        f'model = PeftModel.from_pretrained(base, "{repo_id}").merge_and_unload()',
        "```",
        "",
        "## Training",
        "",
        f"- Base model: `{base}`" + (f", revision `{config.revision}`" if config.revision else ""),
        *(_caft_lines(config) if isinstance(config, CAFTConfig) else []),
        f"- LoRA: rank {config.r}, alpha {config.lora_alpha}, dropout {config.lora_dropout:g}",
        *_variant_lines(settings or {}),
        *_run_lines(settings or {}, summary or {}),
    ]
    return "\n".join(lines) + "\n"


def _variant_lines(settings: dict[str, Any]) -> list[str]:
    """Further fields of LoraConfig, and the bits of a quantised base model, from ``run.json``."""
    lora = [f"{name} {value}" for name, value in (settings.get("lora") or {}).items()]
    bits = [f"- Trained on the base model in {bits} bits" for bits in (4, 8) if settings.get(f"load_in_{bits}bit")]
    return ([f"- LoRA settings: {', '.join(lora)}"] if lora else []) + bits


def _caft_lines(config: CAFTConfig) -> list[str]:
    heads = "fresh ones, not pretrained"
    if config.heads is not None:
        heads = f"[`{config.heads}`](https://huggingface.co/{config.heads}/tree/{config.heads_revision})"
        heads += f", revision `{config.heads_revision}`"
    trained = {"frozen": "frozen", "lora": "trained along with LoRA", "full": "trained along in full"}
    note = trained[config.train_heads] + ("" if config.train_heads == "frozen" else ", not part of this repository")
    return [
        f"- Auxiliary heads: {heads}; the first {config.num_auxiliary_heads}, {note}",
        f"- Auxiliary loss: beta {config.aux_loss_weight:g}, alpha {config.aux_loss_decay:g}, gamma "
        f"`{config.aux_loss_schedule}`, {config.aux_token_fraction:.0%} of the positions",
    ]


def _run_lines(settings: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    lines = []
    if settings.get("data") and summary.get("data_sha256"):
        lines.append(f"- Data: `{Path(settings['data']).name}`, sha256 `{summary['data_sha256'][:12]}`")
    if "learning_rate" in settings:
        lines.append(f"{optimiser_line(dict(settings))}, {settings['num_train_epochs']:g} epoch(s)")
    if summary.get("eval_loss_after") is not None:
        lines.append(
            f"- Held-out next-token loss: {summary['eval_loss_before']:.4f} -> {summary['eval_loss_after']:.4f} nats/token"
        )
    if "train_seconds" in summary:
        lines.append(f"- Run: {duration(summary['train_seconds'])} on {summary.get('machine', 'an unnamed machine')}")
    if summary.get("versions"):
        lines.append("- Versions: " + listed(summary["versions"]))
    if summary.get("command"):
        lines += ["", "```bash", summary["command"], "```"]
    return lines
