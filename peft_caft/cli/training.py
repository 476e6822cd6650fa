"""Commands that train: ``train``, ``train-heads``, ``distill``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ..training.defaults import STAGE_1, STAGE_2, training_note
from .options import (
    PASS_THROUGH,
    Data,
    DType,
    EvalData,
    EvalRows,
    MaxLength,
    MaxRows,
    Model,
    Output,
    Overwrite,
    TrainingYaml,
    settings_of,
)

app = typer.Typer()


@app.command("train", context_settings=PASS_THROUGH, epilog=training_note(STAGE_2))
def train_command(
    context: typer.Context,
    model: Model,
    data: Data,
    output: Output,
    method: Annotated[
        Literal["caft", "lora", "caft_full", "full"],
        typer.Option(help="LoRA with the auxiliary loss or without it; or all parameters, with it or without it."),
    ] = "caft",
    heads: Annotated[
        str | None,
        typer.Option(help="Pretrained heads: folder or Hub id; unset makes fresh ones.", show_default=False),
    ] = None,
    heads_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the heads on the Hub.", show_default=False)
    ] = None,
    eval_data: EvalData = None,
    eval_rows: EvalRows = 200,
    max_rows: MaxRows = None,
    max_length: MaxLength = 512,
    dtype: DType = "auto",
    freeze_unembedding: Annotated[
        bool,
        typer.Option("--freeze-unembedding", help="With caft_full and full: leave the lm_head as it is."),
    ] = False,
    r: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    lora_alpha: Annotated[int, typer.Option(help="LoRA scale; updates weigh lora_alpha / r.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="LoRA dropout probability.")] = 0.0,
    target_modules: Annotated[str, typer.Option(help="'all-linear', or module names with commas.")] = "all-linear",
    num_auxiliary_heads: Annotated[int, typer.Option(help="n - 1; at most what the heads hold.")] = 4,
    aux_loss_weight: Annotated[float, typer.Option(help="beta: weight of all auxiliary losses together.")] = 0.01,
    aux_loss_decay: Annotated[float, typer.Option(help="alpha: head k weighs alpha^(k-1).")] = 0.8,
    aux_loss_schedule: Annotated[
        Literal["reflected_sine", "sine", "linear", "linear_decay", "constant"],
        typer.Option(help="gamma: course of the auxiliary weight over the run."),
    ] = "reflected_sine",
    train_heads: Annotated[
        Literal["frozen", "lora", "full"], typer.Option(help="Whether the heads are trained along.")
    ] = "frozen",
    aux_token_fraction: Annotated[
        float, typer.Option(help="p: share of positions that the heads see, for less compute.")
    ] = 1.0,
    training_yaml: TrainingYaml = None,
    overwrite: Overwrite = False,
) -> None:
    """Stage 2: fine-tune with CAFT, or without it from the same seed and order of data.

    Writes a plain LoRA adapter, or with caft_full and full a plain model, which loads anywhere without this package. Where all
    parameters are trained, --dtype auto is float32 (add --bf16 true for autocast), and a smaller learning rate is usual.
    """
    from ..training.arguments import trainer_arguments
    from ..training.fine_tuning import FineTuningSettings, fine_tune

    arguments = trainer_arguments(output, STAGE_2, training_yaml, context.args)
    settings = settings_of(FineTuningSettings, locals())
    summary = fine_tune(settings, arguments, overwrite)
    if arguments.process_index > 0:
        return
    if summary["eval_loss_after"] is not None:
        typer.echo(
            f"Held-out next-token loss: {summary['eval_loss_before']:.4f} -> {summary['eval_loss_after']:.4f} nats/token"
        )
    typer.echo(f"{'Model' if settings.trains_all else 'Adapter'} written to {output}")


@app.command("train-heads", context_settings=PASS_THROUGH, epilog=training_note(STAGE_1))
def train_heads_command(
    context: typer.Context,
    model: Model,
    data: Annotated[
        list[str],
        typer.Option(
            help="Training data, JSONL: 'messages', or 'prompt' and 'completion', or 'text'. Give it again for more files."
        ),
    ],
    output: Output,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out data, JSONL; give it again for more sets, reported one by one. [default: the last tenth of each "
            "training file]",
            show_default=False,
        ),
    ] = None,
    eval_rows: Annotated[int, typer.Option(help="Rows to use at most of each held-out set.")] = 200,
    base_model_id: Annotated[
        str | None,
        typer.Option(help="Hub id to record as the base model, where --model is a local copy.", show_default=False),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="For the card, such as apache-2.0; see the base model's.", show_default=False),
    ] = None,
    init_heads: Annotated[
        str | None,
        typer.Option(
            help="Heads to go on from, folder or Hub id: adapts them to the data of a task, best with --targets hard, since the "
            "base model does not know the task yet. [default: fresh ones]",
            show_default=False,
        ),
    ] = None,
    num_heads: Annotated[
        int | None,
        typer.Option(help="Heads, n - 1; they predict 2 ... n tokens ahead. [default: 4]", show_default=False),
    ] = None,
    head_type: Annotated[
        Literal["residual", "decoder_layer"] | None,
        typer.Option(help="x + SiLU(W x), or a copy of the last layer. [default: decoder_layer]", show_default=False),
    ] = None,
    head_input: Annotated[
        Literal["last_layer_input", "last_hidden_state"] | None,
        typer.Option(
            help="What heads read: before the last layer, or after the final norm. [default: last_layer_input]",
            show_default=False,
        ),
    ] = None,
    head_num_layers: Annotated[
        int | None, typer.Option(help="Blocks or layers per head. [default: 1]", show_default=False)
    ] = None,
    targets: Annotated[
        Literal["soft", "hard"],
        typer.Option(help="What heads learn: the base model's own distributions for the text, or its tokens."),
    ] = "soft",
    aux_loss_decay: Annotated[float, typer.Option(help="alpha: head k weighs alpha^(k-1).")] = 0.8,
    aux_token_fraction: Annotated[
        float,
        typer.Option(
            help="p: share of the positions, drawn anew each step, that teach the heads. Steps are cheaper, so that the same "
            "time sees more text; the gradient stays unbiased."
        ),
    ] = 1.0,
    max_length: MaxLength = 512,
    max_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows to use at most of each training file, the held-out ones among them; all if unset.",
            show_default=False,
        ),
    ] = None,
    dtype: DType = "auto",
    cache: Annotated[
        str | None,
        typer.Option(
            help="Folder that keeps the base model's hidden states, so that later epochs and runs over the same data need "
            "its last layer alone; tokens x hidden size x 2 bytes in bf16.",
            show_default=False,
        ),
    ] = None,
    early_stopping_patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many evaluations (--eval_steps) without a better held-out loss, and keep the best heads.",
            show_default=False,
        ),
    ] = None,
    training_yaml: TrainingYaml = None,
    overwrite: Overwrite = False,
) -> None:
    """Stage 1: train auxiliary heads with the base model frozen, once per base model.

    Reports cross entropy, top-1 and top-5 accuracy of every head and the acceptance length on held-out rows, before, during
    and after. bfloat16 base models train in mixed precision; --bf16 true does so for float32 ones.
    """
    from ..training.arguments import trainer_arguments
    from ..training.head_training import HeadTrainingSettings, train_heads

    arguments = trainer_arguments(output, STAGE_1, training_yaml, context.args)
    settings = settings_of(HeadTrainingSettings, locals())
    summary = train_heads(settings, arguments, overwrite)
    if arguments.process_index:
        return
    from ..heads.card import evaluation_table

    for evaluation in summary["evaluations"]:
        typer.echo(f"\n{evaluation['name']}, before -> after\n{evaluation_table(evaluation)}")
    typer.echo(f"Heads written to {output}")


@app.command("distill")
def distill_command(
    model: Model,
    prompts: Annotated[
        str,
        typer.Option(
            help="JSONL with 'prompt' or 'messages' (answers at the end of a chat are cut off), or a dataset: hf:NAME, "
            "hf:NAME:CONFIG, hf:FOLDER; those need peft-caft[datasets]."
        ),
    ],
    output: Annotated[str, typer.Option(help="JSONL file to write. An interrupted run is resumed.")],
    split: Annotated[str | None, typer.Option(help="Split of a dataset. [default: train]", show_default=False)] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Field with the prompt or chat. [default: messages or prompt]", show_default=False),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message for prompts that have none.", show_default=False)
    ] = None,
    max_prompts: Annotated[
        int | None, typer.Option(help="Take the first so many prompts; all if unset.", show_default=False)
    ] = None,
    samples_per_prompt: Annotated[int, typer.Option(help="Answers to each prompt; equal ones count once.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens; longer ones are cut off.")] = 512,
    temperature: Annotated[
        float,
        typer.Option(help="Of sampling; 1 is the model's own distribution, which heads are to learn. 0: greedy."),
    ] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0 is off.")] = 0,
    max_repetition: Annotated[
        float, typer.Option(help="Leave out answers of which a larger share of 8-token runs is repeated; 1 is off.")
    ] = 0.5,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Prompts at a time on each process. A larger one is faster and needs more memory. [default: 32; 1024 with "
            "vllm]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: DType = "auto",
    backend: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(
            help="What generates. vllm needs peft-caft[vllm]; its code here has not been run by the authors."
        ),
    ] = "transformers",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output, or an interrupted run.")] = False,
) -> None:
    """Let the base model answer prompts: training data for heads in the model's own words (self-distillation).

    Writes FILE.jsonl and FILE.provenance.json. `accelerate launch --config_file examples/accelerate/ddp.yaml -m
    peft_caft.cli distill ...` splits the prompts over processes.
    """
    from ..basics.tables import markdown_table
    from ..training.distillation import DistillationSettings, distill, distillation_table

    record = distill(settings_of(DistillationSettings, locals()), overwrite)
    if record:
        typer.echo(markdown_table(["", "count"], distillation_table(record)))
        typer.echo(f"Answers written to {output}")
