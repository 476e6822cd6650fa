"""CAFT with TRL's ``SFTTrainer``: a LoRA script whose ``peft_config`` and callback changed.

Run it with a YAML file, and any field of ``SFTConfig`` or of the two classes below to change what it says:

    python examples/train_with_sft_trainer.py --config examples/sft.yaml --model BASE --heads HEADS --data data.jsonl
    python examples/train_with_sft_trainer.py --config examples/sft_packed.yaml --model BASE --heads HEADS --data data.jsonl

In several processes: ``accelerate launch --config_file examples/accelerate/ddp.yaml`` in place of ``python``, or another file there.
The data are rows of ``messages``, of ``prompt`` and ``completion``, or of ``text``.
"""

from dataclasses import dataclass

from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser

from peft_caft import CAFTCallback, CAFTConfig


@dataclass
class Files:
    """Where to find what is trained."""

    model: str
    data: str
    heads: str | None = None
    way: str = "peft_config"  # or "peft_model": who puts the adapter on the model, the trainer or this script


@dataclass
class CAFTOptions:
    """Fields of ``CAFTConfig`` to set from a YAML file or the command line; it has more."""

    r: int = 8
    lora_alpha: int = 16
    target_modules: str = "all-linear"
    aux_loss_weight: float = 0.01
    aux_token_fraction: float = 1.0


if __name__ == "__main__":
    files, options, args = TrlParser((Files, CAFTOptions, SFTConfig)).parse_args_and_config()
    data = load_dataset("json", data_files=files.data, split="train")
    config = CAFTConfig(heads=files.heads, **vars(options))
    if files.way == "peft_config":
        trainer = SFTTrainer(files.model, args, train_dataset=data, peft_config=config, callbacks=[CAFTCallback()])
    else:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(files.model), config)
        tokenizer = AutoTokenizer.from_pretrained(files.model)
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[CAFTCallback()])
    trainer.train()
    trainer.save_model(args.output_dir)  # a plain LoRA adapter; loads anywhere without peft_caft
