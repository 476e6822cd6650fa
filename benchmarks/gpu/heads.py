"""Job `heads`: SmolLM2 answers prompts, then heads are trained on these answers and on functions of Python packages.

Functions come from the standard library and every package of this machine, so no training text travels. The held-out files are those
of the published heads. What is trained comes back as pieces of at most 15 MiB.
"""

from __future__ import annotations

import json
import shlex
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import packages_distributions
from pathlib import Path

from peft_caft.basics.files import write_jsonl
from peft_caft.basics.tables import markdown_table
from peft_caft.cli.app import main as main_of_command_line
from peft_caft.training.data import read_jsonl

from .measuring import Job

ROOT = Path(__file__).resolve().parents[2]
PIECE = 15 * 2**20
CHARACTERS = 80_000_000  # about 20 million tokens
HELD_OUT = ("functions_test.jsonl", "answers_test.jsonl")


def main() -> None:
    job = Job.begin(
        "heads",
        __doc__,
        samples={"type": int, "default": 2, "help": "answers to each prompt"},
        steps={"type": int, "default": 2500, "help": "steps of 64 rows, for each type"},
        types={"nargs": "*", "default": ["decoder_layer"], "help": "head types, in this order"},
    )
    work = Path(tempfile.mkdtemp(prefix="heads-"))
    model, data = tiny(work) if job.smoke else (embedded(), ROOT / ".gpu" / "heads-data")
    functions(work, data, limit=40 if job.smoke else None)
    options = job.options
    short = ["--max-prompts", "12", "--max-new-tokens", "8"] if job.smoke else ["--max-new-tokens", "128"]
    command(
        job, "distill", "--model", model, "--prompts", str(data / "prompts_train.jsonl"), "--output", str(work / "answers_train.jsonl"),
        "--samples-per-prompt", str(1 if job.smoke else options.samples), "--batch-size", "8" if job.smoke else "768", *short,
    )  # fmt: skip
    for head_type in options.types[: 1 if job.smoke else None]:
        output = work / head_type
        command(
            job, "train-heads", "--model", model, "--base-model-id", "HuggingFaceTB/SmolLM2-135M-Instruct", "--license", "apache-2.0",
            "--data", str(work / "answers_train.jsonl"), "--data", str(work / "functions_train.jsonl"),
            *(word for name in HELD_OUT for word in ("--eval-data", str(data / name))), "--eval-rows", "4" if job.smoke else "96",
            "--head-type", head_type, "--output", str(output), "--eval_strategy", "no", "--save_strategy", "no",
            "--per_device_train_batch_size", "4" if job.smoke else "64", "--warmup_steps", "2" if job.smoke else "50",
            "--max_steps", "3" if job.smoke else str(options.steps), "--logging_steps", "50", "--max-length", "128" if job.smoke else "512",
        )  # fmt: skip
        for evaluation in json.loads((output / "config.json").read_text())["training"]["evaluations"]:
            job.write(kind="evaluation", head_type=head_type, **evaluation)
        pieces(output, job.out / head_type)
        job.report(table(job.records()))


def embedded() -> str:
    from peft_caft.hub.embedded_model import embedded_model

    return str(embedded_model())


def tiny(folder: Path) -> tuple[str, Path]:
    """A random model and a few rows, for the smoke run."""
    sys.path.insert(0, str(ROOT))
    from tests.support.tiny_checkpoint import save_checkpoint

    write_jsonl(folder / "prompts_train.jsonl", ({"prompt": f"Name number {index}"} for index in range(12)))
    for name in HELD_OUT:
        write_jsonl(folder / name, ({"text": f"def f{index}(): return {index}"} for index in range(8)))
    return save_checkpoint(folder / "model"), folder


def functions(work: Path, data: Path, limit: int | None) -> None:
    """Write ``functions_train.jsonl``: functions of this machine's Python, without those that are held out."""
    sys.path.insert(0, str(ROOT / "examples" / "smollm2_heads"))
    from stdlib_functions import stdlib_functions

    held_out = {row["text"] for row in read_jsonl(data / "functions_test.jsonl")}
    of_stdlib = stdlib_functions(max_files=limit)
    found = [function for function in of_stdlib if not function.test]
    texts = dict.fromkeys(function.source for function in found)
    if not limit:
        with ProcessPoolExecutor() as pool:  # reading torch alone takes one core most of a minute
            for of_package in pool.map(texts_of, sorted(packages_distributions())):
                texts |= dict.fromkeys(of_package)
                if sum(map(len, texts)) > CHARACTERS:
                    pool.shutdown(cancel_futures=True)
                    break
    write_jsonl(work / "functions_train.jsonl", ({"text": text} for text in texts if text not in held_out))


def texts_of(package: str) -> list[str]:
    """Functions of an installed package; none if it is a single file or cannot be read."""
    from stdlib_functions import package_functions

    try:
        return [function.source for function in package_functions([package], [])]
    except (ImportError, RecursionError, ValueError):
        return []


def command(job: Job, *words: str) -> None:
    """Run a command of ``peft-caft``; its time goes into the results, and its output into the log."""
    started = time.perf_counter()
    sys.argv = ["peft-caft", *words]
    with open(job.out / "heads.log", "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        print("$", shlex.join(sys.argv), flush=True)
        try:
            main_of_command_line()
        except SystemExit as end:
            if end.code:
                raise
    job.write(kind="command", command=words[0], seconds=time.perf_counter() - started)


def pieces(folder: Path, target: Path) -> None:
    """The folder as ``TARGET.tar.0``, ``.1`` ...; ``cat TARGET.tar.* | tar x`` unpacks it."""
    whole = folder.with_suffix(".tar")
    with tarfile.open(whole, "w") as archive:
        for name in ("config.json", "model.safetensors", "README.md", "heads.png"):
            if (folder / name).is_file():
                archive.add(folder / name, name)
    content = whole.read_bytes()
    for index, start in enumerate(range(0, len(content), PIECE)):
        target.with_name(f"{target.name}.tar.{index}").write_bytes(content[start : start + PIECE])


def table(found: list[dict]) -> str:
    """Accuracy of every head on every held-out file, after training."""
    rows = []
    for record in found:
        if record["kind"] == "evaluation":
            for head in record["after"]["heads"]:
                values = (f"{head['cross_entropy']:.3f}", f"{head['top1']:.1%}", f"{head['top5']:.1%}")
                rows.append([record["head_type"], record["name"], str(head["tokens_ahead"]), *values])
    times = ", ".join(f"{r['command']} {r['seconds']:.0f} s" for r in found if r["kind"] == "command")
    return markdown_table(["heads", "held out", "tokens ahead", "nats", "top-1", "top-5"], rows) + f"\n\n{times}"


if __name__ == "__main__":
    main()
