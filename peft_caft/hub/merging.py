"""Merges an adapter into its base model: a plain folder that needs neither peft nor peft_caft."""

from pathlib import Path

from peft import PeftModel
from torch import nn

from ..basics.adapters import named_base_model, of_vocabulary, tokenizer_of, whole_model, with_adapter
from ..basics.files import new_folder


def merge(adapter: str, output: str, model: str | None = None, dtype: str = "auto") -> None:
    """Merge an adapter into its base model, and save it with the tokenizer, whole or not at all.

    The tokenizer is the one beside the adapter, if there is one; the embedding has its tokens.

    Args:
        adapter: LoRA or CAFT adapter, folder or Hub id.
        output: folder to make.
        model: base model, folder or Hub id; None takes the one that the adapter names.
        dtype: ``"auto"`` takes the base model's.

    Raises:
        FileNotFoundError: if ``adapter`` holds no adapter.
        FileExistsError: if ``output`` exists.
        ValueError: if no base model is known, or the adapter does not fit it.
    """
    if Path(output).exists():
        raise FileExistsError(f"output: {output} exists, expected a new folder. Remove it or choose another one.")
    model, revision = named_base_model(adapter, model)
    base = whole_model(model, dtype=dtype, revision=revision)
    tokenizer = tokenizer_of(model, adapter, revision)
    adapted = [name for tensors in of_vocabulary(base, adapter).values() for name in tensors if ".lora_" in name]
    peft_model = with_adapter(base, adapter, tokenizer)
    if adapted:
        _untie(peft_model)
    merged = peft_model.merge_and_unload()
    with new_folder(output) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _untie(model: PeftModel) -> None:
    """Give the lm_head weights of its own, where LoRA changes it or the embedding, but not both.

    PEFT (0.21) would merge the change into the tied weight, and so into the other one.
    """
    base = model.get_base_model()
    embedding, lm_head = (
        getattr(module, "base_layer", module) for module in (base.get_input_embeddings(), base.get_output_embeddings())
    )
    if lm_head.weight is embedding.weight and not model.active_peft_config.ensure_weight_tying:
        lm_head.weight = nn.Parameter(lm_head.weight.detach().clone())
        base.config.get_text_config(decoder=True).tie_word_embeddings = base.config.tie_word_embeddings = False
