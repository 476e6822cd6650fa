"""Commands of ``peft-caft`` that make, describe and publish heads. Heavy imports happen inside them."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .cli_options import (
    PASS_THROUGH,
    DType,
    MaxLength,
    Model,
    Output,
    Overwrite,
    TrainingYaml,
    settings_of,
)
from .training_defaults import STAGE_1, training_note

app = typer.Typer()


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
    from .head_training import HeadTrainingSettings, train_heads
    from .trainer_arguments import trainer_arguments

    arguments = trainer_arguments(output, STAGE_1, training_yaml, context.args)
    settings = settings_of(HeadTrainingSettings, locals())
    summary = train_heads(settings, arguments, overwrite)
    if arguments.process_index:
        return
    from .tables import evaluation_table

    for evaluation in summary["evaluations"]:
        typer.echo(f"\n{evaluation['name']}, before -> after\n{evaluation_table(evaluation)}")
    typer.echo(f"Heads written to {output}")


@app.command("push")
def push_command(
    folder: Annotated[str, typer.Argument(help="Folder of heads or of an adapter.")],
    repo_id: Annotated[str, typer.Argument(help="Hub repository, ORG/NAME; it is made if there is none.")],
    heads: Annotated[
        str | None,
        typer.Option(
            help="ORG/NAME[@REVISION] of the heads that an adapter was trained with, if that was a local folder.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, if that was a local folder.", show_default=False)
    ] = None,
    license: Annotated[str | None, typer.Option(help="Such as apache-2.0.", show_default=False)] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a new repository.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch; it is made if there is none.", show_default=False)
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default=False)] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Publish over something else too, whose heads or adapter files go.")
    ] = False,
) -> None:
    """Publish heads or an adapter on the Hub, with a model card, in one commit.

    Uses the token of HF_TOKEN or `hf auth login`. Uploads configuration, weights, card, plot and tokenizer, nothing else.
    """
    from .hub_repository import Destination
    from .publishing import push

    to = Destination(repo_id, message, private, revision=revision, create_pr=create_pr)
    commit = push(folder, to, heads=heads, base_model=base_model, license=license, force=force)
    typer.echo(f"Published at {commit.pr_url or commit.repo_url}, commit {commit.oid}")


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
    from .distillation import DistillationSettings, distill, distillation_table
    from .tables import markdown_table

    record = distill(settings_of(DistillationSettings, locals()), overwrite)
    if record:
        typer.echo(markdown_table(["", "count"], distillation_table(record)))
        typer.echo(f"Answers written to {output}")


@app.command("import-heads")
def import_heads_command(
    heads: Annotated[str, typer.Argument(help="heads.pth of caft-llm, or a Hub repository that holds one.")],
    model: Annotated[str, typer.Option(help="Base model that the heads were trained for: folder or Hub id.")],
    output: Annotated[str, typer.Option(help="Folder to make.")],
    head_input: Annotated[
        Literal["last_layer_input", "last_hidden_state"],
        typer.Option(
            help="What the heads read. caft-llm trains them on the input of the last layer, so that is what they predict "
            "best from; its fine-tuning then feeds them the last hidden state, so take that to repeat its runs."
        ),
    ] = "last_layer_input",
    base_model_id: Annotated[
        str | None,
        typer.Option(help="Hub id to record as the base model, where --model is a local copy.", show_default=False),
    ] = None,
    license: Annotated[str | None, typer.Option(help="Of the heads, such as apache-2.0.", show_default=False)] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the heads on the Hub.", show_default=False)
    ] = None,
) -> None:
    """Turn heads of the CAFT authors' package caft-llm into heads of this one.

    Residual and decoder-layer heads alike. Nothing in the file is executed, and nothing in it is left out.
    """
    from .import_heads import import_heads

    config = import_heads(heads, model, output, head_input, base_model_id, license, revision).config
    typer.echo(
        f"{config.num_heads} {config.head_type} heads of {config.head_num_layers} layer(s), which read the "
        f"{config.head_input}, written to {output}"
    )


@app.command("inspect")
def inspect_command(
    artifact: Annotated[str, typer.Argument(help="Heads or an adapter: folder or Hub id.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model to compare with, folder or Hub id; exit code 1 if it does not fit.", show_default=False
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the artifact on the Hub.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the whole configuration.")] = False,
) -> None:
    """Say what heads or an adapter are, how they came to be, how good they are, and whether they fit a base model."""
    from .inspection import inspect

    found = inspect(artifact, model, revision)
    typer.echo(found.to_json() if as_json else found.text())
    if found.misfit is not None:
        raise typer.Exit(1)
