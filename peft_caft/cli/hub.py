"""Commands that make, describe and publish: ``merge``, ``inspect``, ``push``, ``import-heads``."""

from typing import Annotated

import typer

from ..heads.config import HeadInput
from ..training.settings import Precision


def merge_command(
    adapter: Annotated[str, typer.Argument(help="Folder of a LoRA or CAFT adapter.")],
    output: Annotated[str, typer.Argument(help="Folder to make.")],
    model: Annotated[str | None, typer.Option(help="Base model; unset takes the one that the adapter names.")] = None,
    dtype: Annotated[
        Precision, typer.Option(help="Precision to load the base model in; auto takes the checkpoint's.")
    ] = "auto",
) -> None:
    """Merge an adapter into its base model: a plain model folder that serves without peft or
    peft-caft.
    """
    from ..hub.merging import merge

    merge(adapter, output, model, dtype)
    typer.echo(f"Merged model written to {output}")


def push_command(
    folder: Annotated[str, typer.Argument(help="Folder of heads or of an adapter.")],
    repo_id: Annotated[str, typer.Argument(help="Hub repository, ORG/NAME; it is made if there is none.")],
    heads: Annotated[
        str | None,
        typer.Option(
            help="ORG/NAME[@REVISION] of the heads that an adapter was trained with, if that was a local folder.",
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, if that was a local folder.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence to state, such as apache-2.0.")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; it is made if there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace whatever the repository holds; its heads or adapter files are removed."),
    ] = False,
) -> None:
    """Publish heads or an adapter on the Hub, with a model card, in one commit.

    Uses the token of HF_TOKEN or `hf auth login`. Uploads configuration, weights, card, plot and
    tokenizer, nothing else.
    """
    from ..heads.repository import Destination
    from ..hub.publishing import push

    to = Destination(repo_id, message, private, revision=revision, create_pr=create_pr)
    commit = push(folder, to, heads=heads, base_model=base_model, license=license, force=force)
    typer.echo(f"Published at {commit.pr_url or commit.repo_url}, commit {commit.oid}")


def import_heads_command(
    heads: Annotated[str, typer.Argument(help="heads.pth of caft-llm, or a Hub repository that holds one.")],
    model: Annotated[str, typer.Option(help="Base model that the heads were trained for: folder or Hub id.")],
    output: Annotated[str, typer.Option(help="Folder to make.")],
    head_input: Annotated[
        HeadInput,
        typer.Option(
            help="What the heads read. caft-llm trains them on the input of the last layer, so that is what they predict "
            "best from; its fine-tuning then feeds them the last hidden state, so take that to repeat its runs."
        ),
    ] = "last_layer_input",
    base_model_id: Annotated[
        str | None, typer.Option(help="Hub id to record as the base model, where --model is a local copy.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the heads, such as apache-2.0.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the heads on the Hub.")] = None,
) -> None:
    """Turn heads of the CAFT authors' package caft-llm into heads of this one.

    Residual and decoder-layer heads alike. Nothing in the file is executed, and nothing in it is
    left out.
    """
    from ..hub.import_caft_llm import import_heads

    config = import_heads(heads, model, output, head_input, base_model_id, license, revision).config
    typer.echo(
        f"{config.num_heads} {config.head_type} heads of {config.head_num_layers} layer(s), which read the "
        f"{config.head_input}, written to {output}"
    )


def inspect_command(
    artifact: Annotated[str, typer.Argument(help="Heads or an adapter: folder or Hub id.")],
    model: Annotated[
        str | None, typer.Option(help="Base model to compare with, folder or Hub id; exit code 1 if it does not fit.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the artifact on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the whole configuration.")] = False,
) -> None:
    """Say what heads or an adapter are, how they came to be, how good they are, and whether they
    fit a base model.
    """
    from ..hub.inspection import inspect

    found = inspect(artifact, model, revision)
    typer.echo(found.to_json() if as_json else found.text())
    if found.misfit is not None:
        raise typer.Exit(1)
