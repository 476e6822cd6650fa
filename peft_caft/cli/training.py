"""Commands that train: ``distill``, ``train-heads``, ``train``."""

import dataclasses

import typer

from ..training.defaults import STAGE_1, STAGE_2
from ..training.settings import DistillationSettings, FineTuningSettings, HeadTrainingSettings
from .options import Overwrite, TrainingYaml, with_settings


@with_settings(DistillationSettings)
def distill_command(settings: DistillationSettings, overwrite: Overwrite = False) -> None:
    """Let the base model answer prompts: training data for heads in the model's own words
    (self-distillation).

    Writes FILE.jsonl and FILE.provenance.json. `accelerate launch --config_file
    examples/accelerate/ddp.yaml -m peft_caft.cli distill ...` splits the prompts over processes.
    """
    from ..basics.tables import markdown_table
    from ..training.distillation import distill, distillation_table

    record = distill(settings, overwrite)
    if record:
        typer.echo(markdown_table(["", "count"], distillation_table(record)))
        typer.echo(f"Answers written to {settings.output}")


@with_settings(HeadTrainingSettings)
def train_heads_command(
    context: typer.Context,
    settings: HeadTrainingSettings,
    training_yaml: TrainingYaml = None,
    overwrite: Overwrite = False,
) -> None:
    """Train auxiliary heads with the base model frozen, once per base model (stage 1).

    Reports cross entropy, top-1 and top-5 accuracy of every head and the acceptance length on
    held-out rows, before, during and after. bfloat16 base models train in mixed precision; --bf16
    true does so for float32 ones.
    """
    from ..heads.card import evaluation_table
    from ..training.arguments import trainer_arguments
    from ..training.head_training import train_heads

    arguments = trainer_arguments(
        settings.output, STAGE_1, training_yaml, context.args, settings.set_by_command, settings.unused_arguments
    )
    summary = train_heads(settings, arguments, overwrite)
    if arguments.process_index:
        return
    for evaluation in summary["evaluations"]:
        typer.echo(f"\n{evaluation['name']}, before -> after\n{evaluation_table(evaluation)}")
    typer.echo(f"Heads written to {settings.output}")


@with_settings(FineTuningSettings, leave_out=("lora", "heads_commit", "total_steps"))
def train_command(
    context: typer.Context,
    settings: FineTuningSettings,
    training_yaml: TrainingYaml = None,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune with CAFT, or without it from the same seed and order of data (stage 2).

    Writes a plain LoRA adapter, or with caft_full and full a plain model, which loads anywhere
    without this package. Where all parameters are trained, --dtype auto is float32 (add --bf16 true
    for autocast), and a smaller learning rate is usual.

    Any field of peft.LoraConfig that text can give is an option too, such as --use-dora,
    --use-rslora, --modules-to-save lm_head, --rank-pattern '{"q_proj": 16}' (JSON), or
    --init-lora-weights pissa. Hyphens and underscores are the same in options.
    """
    from ..training.arguments import lora_option_types, lora_options, trainer_arguments
    from ..training.fine_tuning import fine_tune

    lora, others = lora_options(context.args)
    settings = dataclasses.replace(settings, lora=lora)
    arguments = trainer_arguments(
        *(settings.output, STAGE_2, training_yaml, others),
        *(settings.set_by_command, settings.unused_arguments, lora_option_types()),
    )
    summary = fine_tune(settings, arguments, overwrite)
    if arguments.process_index > 0:
        return
    if summary["eval_loss_after"] is not None:
        typer.echo(
            f"Held-out next-token loss: {summary['eval_loss_before']:.4f} -> {summary['eval_loss_after']:.4f} nats/token"
        )
    typer.echo(f"{'Model' if settings.trains_all else 'Adapter'} written to {settings.output}")
