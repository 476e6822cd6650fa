"""Every command on files of which one is damaged, and what may come of it: a refusal in our words, or a result."""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import peft_caft
from peft_caft import AuxiliaryHeads, CAFTConfig, load_adapter
from peft_caft.basics.checkpoints import load_config
from peft_caft.basics.parts import Parts
from peft_caft.basics.run_folder import RunFolder
from peft_caft.concepts.concepts import concepts
from peft_caft.concepts.settings import ConceptsSettings
from peft_caft.evaluation.comparison import compare
from peft_caft.evaluation.comparison_plan import read_plan
from peft_caft.evaluation.evaluation import evaluate
from peft_caft.evaluation.settings import EvaluationSettings
from peft_caft.hub.import_caft_llm import import_heads
from peft_caft.hub.inspection import inspect
from peft_caft.hub.merging import merge
from peft_caft.training.arguments import trainer_arguments
from peft_caft.training.defaults import STAGE_1, STAGE_2
from peft_caft.training.distillation import distill
from peft_caft.training.fine_tuning import fine_tune
from peft_caft.training.head_training import train_heads
from peft_caft.training.settings import DistillationSettings, FineTuningSettings, HeadTrainingSettings

from . import toy_task
from .damage import damage
from .places import ROOT
from .tiny_checkpoint import WORDS, save_checkpoint, write_chats

TOY = Path(toy_task.__file__)
AUTHORS = ROOT / "tests" / "support" / "authors_heads"
PACKAGE = str(Path(peft_caft.__file__).parent)
SOURCES = {str(path): path.read_text().splitlines() for path in Path(PACKAGE).rglob("*.py")}  # as they were imported
SHOWN = (
    ValueError,
    TypeError,
    OSError,
    ModuleNotFoundError,
    RuntimeError,
)  # what the command line prints as one message
SECONDS = 60  # for one try; more is a hang
ROOM = 8 * 2**30  # bytes of addresses that a try may take beyond those in use; more is a waste of memory
SMALL = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": 3,
}


class Hang(BaseException):
    """The time of a try is over."""


class Interrupted(BaseException):
    """Stands for the end of a process."""


@dataclass(frozen=True)
class Command:
    """A command whose files are damaged.

    Attributes:
        files: patterns of the files to damage, below the folder of all files.
        folders: what is put back after each try.
        run: carries it out, and gives back what can be compared.
        slow: whether it takes longer than about 50 ms.
    """

    name: str
    files: tuple[str, ...]
    run: Callable[[Path], Any]
    folders: tuple[str, ...]
    slow: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a try ended.

    Attributes:
        kind: ``"refused"`` in our words; ``"done"``, as without damage; ``"other"``, done as the damaged file now says; ``"failed"``.
        text: what shows it.
    """

    kind: str
    text: str
    result: Any = None


def digest(module: nn.Module | dict[str, Any]) -> str:
    state = module.state_dict() if isinstance(module, nn.Module) else module
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode() + tensor.detach().float().numpy().tobytes())
    return found.hexdigest()


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def make_files(folder: Path) -> None:
    """A base model and another one, heads and adapters of either, the authors' heads, data, plans, options."""
    for name, changes in (("model", {}), ("other", {"hidden_size": 48})):
        save_checkpoint(folder / name, **changes)
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        heads = AuxiliaryHeads.from_base_model(model, 2, "residual")
        figures = {
            "heads": [
                {"tokens_ahead": k, "cross_entropy": 3.0, "top1": 0.2, "top5": 0.5, "tokens": 9} for k in (2, 3)
            ],
            "acceptance_length": 0.5,
        }
        heads.config.training = {
            "data": [{"file": "a.jsonl", "rows": 7, "tokens": 90, "sha256": "ab" * 32, "provenance": {"model": "m"}}],
            "targets": "soft",
            "aux_loss_decay": 0.8,
            "aux_token_fraction": 0.5,
            "learning_rate": 1e-3,
            "warmup_steps": 3,
            "steps": 7,
            "epochs": 1.0,
            "seconds": 3.5,
            "machine": "a",
            "evaluations": [{"name": "a", "file": "a.jsonl", "rows": 7, "before": figures, "after": figures}],
            "versions": {"torch": "2"},
            "git_commit": "c" * 40,
            "command": "peft-caft train-heads",
        }
        heads.save_pretrained(folder / f"heads-{name}")
        for kind, config in (
            (
                "caft",
                CAFTConfig(heads=str(folder / f"heads-{name}"), num_auxiliary_heads=2, r=2, target_modules=["q_proj"]),
            ),
            ("lora", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")),
        ):
            with contextlib.redirect_stdout(io.StringIO()):
                adapted = get_peft_model(model, config)
            for parameter in (p for n, p in adapted.named_parameters() if "lora_B" in n):
                nn.init.normal_(parameter, std=0.1)
            adapted.save_pretrained(folder / f"{kind}-{name}")
            model = adapted.unload()
    shutil.copytree(AUTHORS / "base", folder / "authors" / "base")
    for kind in ("residual", "decoder"):
        shutil.copy(AUTHORS / f"heads_{kind}.pth", folder / "authors")
    (folder / "files").mkdir()
    (folder / "files" / "training.yaml").write_text(
        yaml.safe_dump({"learning_rate": 1e-3, "seed": 3, "optim": "adamw_torch"})
    )
    plan = {
        "model": str(folder / "model"),
        "task": str(TOY),
        "sizes": {"train": 12, "dev": 4, "test": 6},
        "settings": {"max_length": 64, "r": 4},
        "training": SMALL,
        "evaluation": {"batch_size": 4},
        "seeds": [1, 2],
        "tuning": {"seed": 0, "learning_rates": ["1e-3"]},
        "arms": {
            "lora": {"label": "LoRA", "settings": {"method": "lora"}},
            "caft": {
                "label": "CAFT",
                "settings": {"aux_loss_weight": 0.5, "heads": str(folder / "heads-model"), "num_auxiliary_heads": 2},
            },
        },
        "scales": {"smoke": {"seeds": [1], "arms": ["lora"]}},
    }
    (folder / "files" / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    write_chats(folder / "files" / "data.jsonl", 20)
    (folder / "files" / "data.provenance.json").write_text('{"settings": {"model": "m", "seed": 3}, "command": "c"}')
    prompts = "".join(f'{{"prompt": "name {word}"}}\n' for word in WORDS)
    (folder / "files" / "prompts.jsonl").write_text(prompts)


def make_runs(folder: Path) -> None:
    """Interrupted runs of every command that is resumed: all is done but the end."""
    for command, stop in (
        (train, (RunFolder, "finish")),
        (train_heads_of, (RunFolder, "finish")),
        (distill_of, (Parts, "discard")),
        (evaluate_of, (Parts, "discard")),
        (compare_of, (RunFolder, "finish")),
    ):
        _interrupted(lambda command=command: command(folder), *stop)
    for finished in ("train", "heads"):
        for checkpoint in (folder / "runs" / finished / "checkpoints").glob("checkpoint-*"):
            if checkpoint.name != "checkpoint-2":
                shutil.rmtree(checkpoint)
    for parts in (folder / "runs").glob("*/.*.parts/part-0.jsonl"):
        lines = parts.read_text().splitlines(keepends=True)
        parts.write_text("".join(lines[:-1]))
        for done in parts.parents[1].glob("[!.]*.json*"):
            done.unlink()


def _interrupted(run: Callable[[], Any], cls: type, method: str) -> None:
    original = getattr(cls, method)
    calls = {"discard": 0, "finish": 0}

    def stop(*arguments: Any, **named: Any) -> Any:
        if isinstance(arguments[0], RunFolder) and arguments[0].path.parent.name != "runs":
            return original(*arguments, **named)  # of a run inside of a comparison
        calls[method] += 1
        raise Interrupted

    setattr(cls, method, stop)
    try:
        run()
    except Interrupted:
        pass
    finally:
        setattr(cls, method, original)


def train(folder: Path) -> Any:
    output = folder / "runs" / "train"
    settings = FineTuningSettings(
        model=str(folder / "model"),
        data=str(folder / "files" / "data.jsonl"),
        output=str(output),
        heads=str(folder / "heads-model"),
        num_auxiliary_heads=2,
        train_heads="full",
        max_length=64,
        r=2,
    )
    fine_tune(settings, trainer_arguments(str(output), STAGE_2 | SMALL))
    return (output / "adapter_model.safetensors").read_bytes()


def train_heads_of(folder: Path) -> Any:
    output = folder / "runs" / "heads"
    settings = HeadTrainingSettings(
        model=str(folder / "model"),
        data=[str(folder / "files" / "data.jsonl")],
        output=str(output),
        cache=str(folder / "runs" / "cache"),
        init_heads=str(folder / "heads-model"),
        max_length=64,
    )
    train_heads(settings, trainer_arguments(str(output), STAGE_1 | SMALL))
    return (output / "model.safetensors").read_bytes()


def train_with_heads(folder: Path) -> Any:
    output = folder / "fresh"
    settings = FineTuningSettings(
        model=str(folder / "model"),
        data=str(folder / "files" / "data.jsonl"),
        output=str(output),
        heads=str(folder / "heads-model"),
        num_auxiliary_heads=2,
        max_length=64,
        r=2,
    )
    fine_tune(settings, trainer_arguments(str(output), STAGE_2 | SMALL | {"max_steps": 1}))
    return (output / "adapter_model.safetensors").read_bytes()


def distill_of(folder: Path) -> Any:
    output = folder / "runs" / "distill" / "answers.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = DistillationSettings(
        str(folder / "model"), str(folder / "files" / "prompts.jsonl"), str(output), max_new_tokens=4, batch_size=3
    )
    distill(settings)
    return output.read_text()


def evaluate_of(folder: Path) -> Any:
    from peft_caft.evaluation.task import load_task
    from peft_caft.evaluation.task_building import build_task

    data = folder / "runs" / "data"
    if not data.exists():
        build_task(load_task(TOY), data, {"test": 6})
    output = folder / "runs" / "evaluate"
    settings = EvaluationSettings(
        task=str(TOY), data=str(data / "test.jsonl"), output=str(output), adapter=str(folder / "caft-model"),
        model=str(folder / "model"), batch_size=2
    )  # fmt: skip
    evaluate(settings)
    return (output / "rows.jsonl").read_text()


def compare_of(folder: Path) -> Any:
    output = folder / "runs" / "compare"
    return compare(read_plan(folder / "files" / "plan.yaml", "smoke"), output)["metrics"]


def concepts_of(folder: Path) -> Any:
    settings = ConceptsSettings(
        data=str(folder / "files" / "data.jsonl"), model=str(folder / "model"), output=str(folder / "fresh"),
        adapter=[f"caft={folder / 'caft-model'}"], heads=str(folder / "heads-model"), plots=False, resamples=10,
    )  # fmt: skip
    found = concepts(settings)
    return str(found.models) + str(found.heads)


def inspected(artifact: str, model: str | None = None) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        found = inspect(str(folder / artifact), None if model is None else str(folder / model))
        found.text().encode()  # as a terminal does
        return found.to_json()

    return run


def loaded_heads(folder: Path) -> Any:
    return digest(AuxiliaryHeads.from_pretrained(folder / "heads-model", base(folder)))


def loaded_adapter(folder: Path) -> Any:
    model = load_adapter(base(folder), folder / "caft-model")
    return digest(dict(model.named_parameters()))


def second_adapter(folder: Path) -> Any:
    model = base(folder)
    config = CAFTConfig(heads=str(folder / "heads-model"), num_auxiliary_heads=2, r=2, target_modules=["q_proj"])
    tuned = get_peft_model(model, config)
    load_adapter(tuned, folder / "caft-model", "second")
    return digest({n: p for n, p in tuned.named_parameters() if "second" in n})


def merged(folder: Path) -> Any:
    merge(str(folder / "caft-model"), str(folder / "fresh"), str(folder / "model"))
    return digest(AutoModelForCausalLM.from_pretrained(folder / "fresh"))


def imported(kind: str) -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        source = folder / "authors" / f"heads_{kind}.pth"
        return digest(import_heads(str(source), str(folder / "authors" / "base"), str(folder / "fresh")))

    return run


def training_yaml(folder: Path) -> Any:
    return repr(trainer_arguments("x", STAGE_2, str(folder / "files" / "training.yaml")).to_dict())


HEADS, ADAPTER = ("heads-model/config.json", "heads-model/model.safetensors"), ("caft-model/*",)
MODEL = ("model/*.json", "model/*.jinja", "model/model.safetensors")
COMMANDS = (
    Command("inspect heads", HEADS, inspected("heads-model"), ("heads-model",)),
    Command("inspect heads --model", (*HEADS, *MODEL), inspected("heads-model", "model"), ("heads-model", "model")),
    Command("inspect adapter", ADAPTER, inspected("caft-model"), ("caft-model",)),
    Command("inspect adapter --model", ADAPTER, inspected("caft-model", "model"), ("caft-model",)),
    Command("inspect LoRA --model", ("lora-model/*",), inspected("lora-model", "model"), ("lora-model",)),
    Command("AuxiliaryHeads.from_pretrained", HEADS, loaded_heads, ("heads-model",)),
    Command(
        "CAFTConfig.from_pretrained",
        ("caft-model/*.json",),
        lambda folder: repr(CAFTConfig.from_pretrained(str(folder / "caft-model"))),
        ("caft-model",),
    ),
    Command("load_adapter", ADAPTER, loaded_adapter, ("caft-model",)),
    Command("load_adapter beside another", ADAPTER, second_adapter, ("caft-model",)),
    Command("merge", ADAPTER, merged, ("caft-model",)),
    Command("merge (model)", MODEL, merged, ("model",)),
    Command("import-heads", ("authors/heads_residual.pth",), imported("residual"), ("authors",)),
    Command("import-heads (decoder layers)", ("authors/heads_decoder.pth",), imported("decoder"), ("authors",)),
    Command("plan (config.json)", ("model/config.json",), lambda f: repr(load_config(str(f / "model"))), ("model",)),
    Command("compare (plan)", ("files/plan.yaml",), lambda f: repr(read_plan(f / "files" / "plan.yaml")), ("files",)),
    Command(
        "compare (plan, scale)",
        ("files/plan.yaml",),
        lambda f: repr(read_plan(f / "files" / "plan.yaml", "smoke")),
        ("files",),
    ),
    Command("--training-yaml", ("files/training.yaml",), training_yaml, ("files",)),
    Command("train --heads", HEADS, train_with_heads, ("heads-model",), slow=True),
    Command("train --heads (model)", MODEL, train_with_heads, ("model",), slow=True),
    Command("train --heads (data)", ("files/data.jsonl",), train_with_heads, ("files",), slow=True),
    Command("train, resumed", ("runs/train/run.json", "runs/train/checkpoints/*/*"), train, ("runs",), slow=True),
    Command(
        "train-heads, resumed",
        ("runs/heads/run.json", "runs/heads/checkpoints/*/*", "runs/cache/*", "files/data.provenance.json"),
        train_heads_of,
        ("runs", "files"),
        slow=True,
    ),
    Command("distill, resumed", ("runs/distill/.*/*",), distill_of, ("runs",), slow=True),
    Command("distill (prompts, model)", ("files/prompts.jsonl", *MODEL), distill_of, ("runs", "files", "model"), slow=True),
    Command("evaluate, resumed", ("runs/evaluate/.*/*",), evaluate_of, ("runs",), slow=True),
    Command("evaluate (data, adapter)", ("runs/data/*", *ADAPTER), evaluate_of, ("runs", "caft-model"), slow=True),
    Command(
        "compare, resumed",
        ("runs/compare/*.json", "runs/compare/data/*", "runs/compare/runs/*/*/*/*/*.json*"),
        compare_of,
        ("runs",),
        slow=True,
    ),
    Command("concepts", ("files/data.jsonl", *HEADS, *ADAPTER), concepts_of, ("files", "heads-model", "caft-model"), slow=True),
)  # fmt: skip


class Workshop:
    """The files of all commands, put back in their places after each try."""

    def __init__(self, folder: Path, runs: bool) -> None:
        self.folder, self.kept = folder / "files", folder / "kept"
        self.folder.mkdir()
        make_files(self.folder)
        if runs:
            make_runs(self.folder)
        shutil.copytree(self.folder, self.kept, symlinks=True)
        self.right: dict[str, Any] = {}

    def restore(self, command: Command) -> None:
        shutil.rmtree(self.folder / "fresh", ignore_errors=True)
        for name in command.folders:
            place = self.folder / name
            if place.is_symlink() or place.is_file():
                place.unlink()
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(self.kept / name, place)

    def undamaged(self, command: Command) -> Any:
        if command.name not in self.right:
            outcome = attempt(lambda: command.run(self.folder))
            assert outcome.kind == "done", f"{command.name} on whole files: {outcome.text}"
            self.right[command.name] = outcome.result
            self.restore(command)
        return self.right[command.name]

    def try_once(self, command: Command, seed: int) -> tuple[str, str, Outcome]:
        """Damage one file as the seed says, and run the command.

        Returns:
            kind of damage, what was done, and the outcome.
        """
        rng = random.Random(f"{command.name} {seed}")
        expected = self.undamaged(command)
        files = sorted(path for pattern in command.files for path in self.folder.glob(pattern) if path.is_file())
        path = rng.choice(files)
        others = [
            p for p in sorted(self.kept.rglob(f"*{path.suffix}")) if p.is_file() and p.parts[-2:] != path.parts[-2:]
        ]
        kind, done = damage(path, others, rng)
        if path.parent.name == "heads-model" and path.suffix == ".safetensors" and rng.random() < 0.7:
            forget_hash(path.with_name("config.json"))  # so that what comes after the hash is reached
            done += ", no hash recorded"
        place = path.relative_to(self.folder).parent
        before = inventory(self.folder)
        try:
            outcome = attempt(lambda: command.run(self.folder))
            # What an interrupted run leaves is no artifact.
            run = ("runs/", "fresh/.lock", "fresh/run.json", "fresh/checkpoints")
            left = sorted(name for name in inventory(self.folder) ^ before if not name.startswith(run))
            left = [] if left == ["fresh"] else left
            if outcome.kind == "refused" and left:
                outcome = Outcome("failed", f"left behind {left} after: {outcome.text}")
            if outcome.kind == "done" and outcome.result != expected:
                # A format without hashes cannot tell its values from others. What is resumed has them, but for PEFT's weights.
                exact = command.name.endswith("resumed") and path.suffix not in (".safetensors", ".bin")
                outcome = Outcome("failed" if exact else "other", "another result than without damage", outcome.result)
            return kind, f"{place}/{done}", outcome
        finally:
            self.restore(command)


def inventory(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def forget_hash(path: Path) -> None:
    if path.is_file() and not path.is_symlink():
        path.write_text(path.read_text().replace('"weights_sha256": "', '"weights_sha256": null, "license": "'))


def attempt(run: Callable[[], Any]) -> Outcome:
    """Run within time and room."""
    try:
        with _limited(), _quiet():
            return Outcome("done", "", run())
    except SHOWN as error:
        if _is_ours(error):
            return Outcome("refused", f"{type(error).__name__}: {error}")
        return Outcome("failed", _where(error))
    except (Exception, Hang) as error:
        return Outcome("failed", _where(error))


def _is_ours(error: BaseException) -> bool:
    """Whether a ``raise`` of the package raised it."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    lines = SOURCES.get(frame.f_code.co_filename, [])
    return bool(lines) and lines[line - 1].strip().startswith("raise")


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(PACKAGE)] or frames
    last, deepest = own[-1], frames[-1]
    text = f"{type(error).__name__}: {str(error)[:300]!r}"
    return (
        f"{text} by {Path(deepest.filename).name}:{deepest.lineno}, called in {Path(last.filename).name}:{last.lineno}"
    )


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def end(*_: object) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    previous = signal.signal(signal.SIGALRM, end)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
