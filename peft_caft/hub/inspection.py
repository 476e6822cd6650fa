"""``peft-caft inspect``: describes heads or an adapter, and checks whether they fit a base model.

Of the weights it reads the headers of the artifact's files, and the base model's unembedding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from ..basics.adapter_files import misfit, read_lora_config
from ..basics.adapters import saved_vocabulary_rows, whole_model
from ..basics.checkpoints import load_config, readable
from ..basics.file_names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CAFT_CONFIG_NAME, CONFIG_NAME
from ..basics.hub_errors import file_of
from ..basics.reading import read_json
from ..basics.tables import markdown_table
from ..basics.tensors import Tensors, one_tensor, shape_difference, shapes_of
from ..heads.artifact import find_heads, require_record
from ..heads.auxiliary_heads import AuxiliaryHeads
from ..heads.backbone import Backbone
from ..heads.card import evaluation_table, evaluations_of, training_lines
from ..heads.config import HeadsConfig
from ..method.config import CAFTConfig


@dataclass
class Inspection:
    """What `inspect` found.

    Attributes:
        facts: label -> fact, in the order in which a person would ask.
        record: the configurations of the artifact.
        misfit: why it does not fit the base model; None if it fits, or if no model was given.
        note: in what that base model differs from the heads' own, though they fit.
        training: provenance of heads, lines of Markdown.
        evaluations: figures of heads before and after training, from their configuration.
    """

    facts: dict[str, str]
    record: dict[str, Any]
    misfit: str | None
    note: str | None = None
    training: list[str] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def text(self) -> str:
        """Text for a terminal, which is also valid Markdown."""
        parts = [markdown_table(["", ""], [[name, value] for name, value in self.facts.items()])]
        if self.training:
            parts.append("Training\n\n" + "\n".join(self.training))
        parts += [f"Held-out {e['name']}, before -> after training\n\n{evaluation_table(e)}" for e in self.evaluations]
        return "\n\n".join(parts)

    def to_json(self) -> str:
        return json.dumps({"facts": self.facts, "misfit": self.misfit, "config": self.record}, indent=2)


def inspect(artifact: str, model: str | None = None, revision: str | None = None) -> Inspection:
    """Describe heads or an adapter, and compare it with a base model if one is given.

    Args:
        artifact: folder or Hub id, like ``model``.
        revision: branch, tag or commit of the artifact on the Hub.

    Raises:
        FileNotFoundError: if there is no such artifact.
        PermissionError, ConnectionError: if the Hub refuses it or cannot be reached.
        ValueError: if it is damaged.
    """
    if revision is not None and Path(artifact).is_dir():
        raise ValueError(f"revision: got {revision!r} for the folder {artifact!r}, which has none. Leave it out.")
    try:
        adapter_config = file_of("artifact", artifact, ADAPTER_CONFIG_NAME, revision)
    except (FileNotFoundError, ConnectionError):  # offline mode, or the Hub cannot be reached
        if not isinstance(try_to_load_from_cache(artifact, CONFIG_NAME, revision=revision), str):
            raise
        adapter_config = None
    if adapter_config is not None:
        if not Path(artifact).is_dir():
            revision = adapter_config.parent.name  # the cache keeps a file under snapshots/COMMIT
        found = _inspect_adapter(artifact, adapter_config, model, revision)
    elif file_of("artifact", artifact, CONFIG_NAME, revision) is not None:
        found = _inspect_heads(artifact, model, revision)
    else:
        raise FileNotFoundError(
            f"artifact: neither {ADAPTER_CONFIG_NAME} nor {CONFIG_NAME} in {artifact!r}, expected a folder or repository of "
            "heads (peft-caft train-heads) or of an adapter (peft-caft train)."
        )
    if model is not None:
        verdict = ["yes" if found.misfit is None else "NO", found.misfit or found.note]
        found.facts["fits the model"] = f"{Path(model).name}: {'. '.join(filter(None, verdict))}"
    return found


def _inspect_heads(source: str, model: str | None, revision: str | None) -> Inspection:
    files = find_heads(source, "artifact", revision)
    config, tensors = files.read_config(), Tensors.of(files.weights)
    bias = " with bias" if config.residual_bias else ""
    facts = {
        "kind": f"{config.num_heads} auxiliary heads, for 2 to {config.num_heads + 1} tokens ahead",
        "each head": f"{config.head_num_layers} x {config.head_type}{bias}, reads {config.head_input}, "
        f"{'with' if config.final_norm else 'without'} the base model's final norm after it",
        "parameters": tensors.text(),
        "weights": "sha256 not recorded" if config.weights_sha256 is None else "sha256 as recorded in config.json",
        "base model": f"{config.base_model_name_or_path or 'unknown'}, revision {config.base_model_revision or 'unknown'}, "
        f"{config.base_model_class or 'class unknown'}, hidden size {config.hidden_size:,}, vocabulary "
        f"{config.vocab_size:,}",
        "licence": config.license or "not stated",
        "format version": str(config.format_version),
    }
    if files.commit is not None:
        facts["from"] = f"{files.repo_id} at commit {files.commit}"
    if not config.training:
        facts["training"] = "none: these heads know nothing of the base model yet"
    record = json.loads(config.to_json())
    misfit, note = (None, None) if model is None else _fit_of_heads(config, tensors, model, source)
    require_record(config, files.config)
    return Inspection(facts, record, misfit, note, training_lines(config.training), evaluations_of(config))


def _inspect_adapter(source: str, config_path: Path, model: str | None, revision: str | None) -> Inspection:
    weights = file_of("artifact", source, ADAPTER_WEIGHTS_NAME, revision)
    if weights is None:
        raise FileNotFoundError(
            f"artifact: no {ADAPTER_WEIGHTS_NAME} in {source!r}, expected one beside {ADAPTER_CONFIG_NAME}. Pickled weights "
            "(.bin) are not read; save the adapter again with PeftModel.save_pretrained."
        )
    folder, tensors = str(config_path.parent), Tensors.of(weights)
    is_caft = file_of("artifact", source, CAFT_CONFIG_NAME, revision) is not None
    lora = read_lora_config(folder)
    targets = (
        lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(sorted(lora.target_modules or []))
    )
    facts = {
        "kind": f"LoRA adapter, trained with {'CAFT' if is_caft else 'something else than CAFT'}; plain PEFT loads it",
        "LoRA": f"rank {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout}, on {targets}",
        "parameters": tensors.text(),
        "base model": f"{lora.base_model_name_or_path or 'unknown'}, revision {lora.revision or 'unknown'}",
    }
    record = {"adapter_config": read_json(config_path)}
    if is_caft:
        caft = CAFTConfig.from_pretrained(folder)
        heads_commit = caft.heads_revision or caft.heads_commit or "not recorded"
        facts |= {
            "heads": f"{caft.heads}, revision {heads_commit}" if caft.heads else "fresh ones, not pretrained",
            "auxiliary loss": f"{caft.num_auxiliary_heads} heads ({caft.head_type}, {caft.head_input}, {caft.train_heads}), "
            f"beta {caft.aux_loss_weight:g}, alpha {caft.aux_loss_decay:g}, gamma {caft.aux_loss_schedule}",
        }
        record["caft_config"] = read_json(Path(folder, CAFT_CONFIG_NAME))
    misfit = None if model is None else _misfit_of_adapter(lora, tensors, model, folder)
    return Inspection(facts, record, misfit)


def _fit_of_heads(config: HeadsConfig, tensors: Tensors, model: str, source: str) -> tuple[str | None, str | None]:
    """The misfit and the note of an `Inspection`."""
    base = _on_meta(model)
    unembedding = _unembedding(model, base)
    try:
        note = config.require_base_model(unembedding, source)
        heads = AuxiliaryHeads.from_config(config, Backbone.of(base))
    except (ValueError, TypeError) as error:
        return str(error), None
    return shape_difference(tensors.shapes, shapes_of(heads.state_dict())), note


def _misfit_of_adapter(lora: LoraConfig, tensors: Tensors, model: str, folder: str) -> str | None:
    base = _on_meta(model)
    if held := saved_vocabulary_rows(base, folder):
        base.resize_token_embeddings(max(held.values()), mean_resizing=False)
    try:
        with torch.device("meta"):
            peft_model = get_peft_model(base, lora)
    except ValueError as error:  # target modules that the model lacks
        return str(error)
    return misfit(tensors.shapes, peft_model)


def _on_meta(model: str) -> PreTrainedModel:
    config = load_config(model)
    with readable("model", model, "a causal language model"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _unembedding(model: str, base: PreTrainedModel) -> Tensor:
    """The unembedding ``(vocabulary, hidden)``, dtype of the checkpoint, read alone if possible."""
    unembedding = base.get_output_embeddings().weight
    names = [name for name, p in base.named_parameters(remove_duplicate=False) if p is unembedding]  # two where tied
    index = cached_file(model, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    files = dict.fromkeys(names, "model.safetensors") if index is None else read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(
            f"{index}: weight_map: got {files!r}, expected names of tensors and files. Download it again."
        )
    for name in names:
        path = cached_file(model, files[name], _raise_exceptions_for_missing_entries=False) if name in files else None
        if path is None:
            continue
        if (found := one_tensor(Path(path), name)) is not None:
            return found
    return whole_model(model, dtype="auto").get_output_embeddings().weight.detach()
