"""`peft-caft push` of damaged folders, and onto damaged repositories: a refusal in our words that changes nothing, or a whole artifact."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from ..support.damage import damage
from ..support.damaged_commands import make_files

TRIES = int(os.environ.get("DAMAGE_TRIES", "6"))
PUSH = """
from peft_caft.heads.repository import Destination
from peft_caft.hub.inspection import inspect
from peft_caft.hub.publishing import push as publish
from tests.support.damaged_commands import attempt
os.umask(0o22)
def tried(folder, repo_id, heads):
    to = Destination(repo_id, token="write-token")
    found = attempt(lambda: publish(folder, to, heads=heads, base_model="org/base").oid)
    return [found.kind, found.text]
def seen(repo_id):
    found = attempt(lambda: inspect(repo_id).to_json())
    return [found.kind, found.text]
"""
FILES = {
    "heads-model": ("config.json", "model.safetensors", "README.md"),
    "caft-model": ("adapter_config.json", "caft_config.json", "adapter_model.safetensors", "README.md", "run.json", "summary.json"),
}  # fmt: skip
RUN = {"data": "d.jsonl", "learning_rate": 1e-3, "num_train_epochs": 1, "lora": {"use_dora": True}, "seed": 1}
SUMMARY = {
    "data_sha256": "ab" * 32,
    "eval_loss_before": 2.0,
    "eval_loss_after": 1.0,
    "train_seconds": 3.5,
    "command": "c",
}


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_damaged_folder_is_not_pushed_or_pushed_whole(hub, client, tmp_path):
    files, kept = tmp_path / "files", tmp_path / "kept"
    files.mkdir()
    make_files(files)
    for name, value in (("run", RUN), ("summary", SUMMARY)):
        (files / "caft-model" / f"{name}.json").write_text(json.dumps(value))
    shutil.copytree(files, kept)
    client.run(PUSH)
    assert client.run("tried(folder, repo, None)", folder=str(files / "heads-model"), repo="org/whole")[0] == "done"
    counts: Counter[str] = Counter()
    failures = []
    for kind, names in FILES.items():
        heads = "org/whole" if kind == "caft-model" else None
        for seed in range(TRIES * 4):
            rng = random.Random(f"push {kind} {seed}")
            path = files / kind / rng.choice(names)
            others = [
                p for p in sorted(kept.rglob(f"*{path.suffix}")) if p.is_file() and p.parts[-2:] != path.parts[-2:]
            ]
            what, done = damage(path, others, rng)
            repo = f"org/{kind}-{seed}"
            outcome, text = client.run("tried(folder, repo, heads)", folder=str(files / kind), repo=repo, heads=heads)
            if outcome == "refused" and repo in hub.repositories and hub.files(repo):
                outcome, text = "failed", f"published {sorted(hub.files(repo))} and then: {text}"
            if outcome == "done":
                outcome, text = client.run("seen(repo)", repo=repo)
                outcome = "failed" if outcome == "refused" else outcome
            counts[f"{kind}: {outcome}"] += 1
            if outcome == "failed":
                failures.append(f"{kind}, seed {seed}, {what}: {done}: {text}")
            shutil.rmtree(files / kind)
            shutil.copytree(kept / kind, files / kind)
    print(f"\n{TRIES * 8} pushes: {dict(counts)}", *failures, sep="\n")
    assert not failures


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_push_onto_a_damaged_repository_is_refused(hub, client, tmp_path):
    files: Path = tmp_path / "files"
    files.mkdir()
    make_files(files)
    client.run(PUSH)
    failures = []
    for kind, name in (("heads-model", "config.json"), ("caft-model", "adapter_config.json")):
        heads = "org/whole-too" if kind == "caft-model" else None
        client.run("tried(folder, repo, None)", folder=str(files / "heads-model"), repo="org/whole-too")
        for seed in range(TRIES * 2):
            repo = f"org/onto-{kind}-{seed}"
            assert (
                client.run("tried(folder, repo, heads)", folder=str(files / kind), repo=repo, heads=heads)[0] == "done"
            )
            path = tmp_path / name
            path.write_bytes(hub.files(repo)[name])
            what, done = damage(path, [], random.Random(f"onto {kind} {seed}"))
            if not path.is_file():
                continue
            stored = {**hub.repositories[repo].commits[hub.head(repo)].files, name: path.read_bytes()}
            head = hub.repositories[repo].commit("main", stored, "damaged")
            outcome, text = client.run("tried(folder, repo, heads)", folder=str(files / kind), repo=repo, heads=heads)
            if outcome == "failed" or (outcome == "refused" and hub.head(repo) != head):
                failures.append(f"{kind}, seed {seed}, {what}: {done}: {text}")
    assert not failures, "\n".join(failures)
