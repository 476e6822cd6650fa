"""The rows of ahead.py, but the words that follow are of a kind drawn by chance: looking ahead cannot help. See README.md."""

from __future__ import annotations

from ahead import Planted

from peft_caft.evaluation.task_building import build_main


class Blind(Planted):
    name = "planted-blind"
    ahead_says_kind = False


TASK = Blind()

if __name__ == "__main__":
    build_main(TASK)
