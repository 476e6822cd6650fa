"""CAFT with ``transformers.Trainer``: a LoRA script whose configuration line and callback changed.

Run it with a base model, pretrained heads and a JSONL file (``messages``, or ``prompt`` and ``completion``):

    python examples/train_with_trainer.py BASE_MODEL HEADS data.jsonl out
"""

import sys

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_caft import CAFTCallback, CAFTConfig
from peft_caft.training.data import collator, encode, read_jsonl

base, heads, data_file, out = sys.argv[1:5]
tokenizer = AutoTokenizer.from_pretrained(base)
data = encode(read_jsonl(data_file), tokenizer, max_length=512).rows  # loss on the answers only
collate = collator(tokenizer)

model = AutoModelForCausalLM.from_pretrained(base)
model = get_peft_model(model, CAFTConfig(heads=heads, r=8, lora_alpha=16, target_modules="all-linear"))
args = TrainingArguments(out, learning_rate=1e-4, per_device_train_batch_size=8, num_train_epochs=1)
trainer = Trainer(model, args, train_dataset=data, data_collator=collate, callbacks=[CAFTCallback()])
trainer.train()
model.save_pretrained(out)  # a plain LoRA adapter; loads anywhere without peft_caft
merged = model.merge_and_unload()  # the plain base model class; no trace of the heads
merged.save_pretrained(f"{out}/merged")
