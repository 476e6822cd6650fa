"""A mixture of instructions for self-distillation, made only of the standard library, reasoning-gym and templates."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
from importlib.resources import files

from stdlib_functions import Function, in_test, split_name
from topics import COMPARE, COMPARED, MODULE_TEMPLATES, TEMPLATES, TOPICS

MAX_CHARACTERS = 900
MAX_SOURCE = 600  # of a function shown in a prompt
SHARES = {"write": 0.35, "discuss": 0.15, "coding": 0.15, "reasoning": 0.20, "general": 0.15}

WRITE = (
    "Write a Python function {signature} for this description: {summary}",
    "Write a Python function that does the following. {summary}",
    "Implement this function in Python:\n\n```python\ndef {signature_plain}:\n{docstring}\n```",
    "Please write Python code for `{name}`. {summary}",
    "I need a Python function called `{name}`. What it should do: {summary} Show the code and explain it briefly.",
)
DISCUSS = (
    "Explain what this Python function does.\n\n{code}",
    "Explain this Python code line by line.\n\n{code}",
    "Write a docstring for this Python function.\n\n{bare}",
    "Is there a bug in this Python function? If so, fix it.\n\n{code}",
    "Add type hints to this Python function.\n\n{code}",
    "Write unit tests for this Python function.\n\n{code}",
    "How could this Python function be made easier to read?\n\n{code}",
)
CODING = (
    "Write a Python function that solves this problem.\n\n{task}",
    "Solve this task in Python.\n\n{task}",
    "{task}\n\nWrite Python code for this, with a short explanation.",
)
# Generators of reasoning-gym 0.1.25 that ask in words, in under 900 characters, and take milliseconds a question. Left
# out: grids, boards and drawings (a small model has nothing to say about them); the slow knight_swap; isomorphic_strings,
# list_functions and ransom_note, whose questions change with the hash seed of the process; spell_backward, word_ladder
# and group_anagrams, whose dictionaries hold slurs.
GENERATORS = (
    "aiw", "base_conversion", "basic_arithmetic", "bitwise_arithmetic", "caesar_cipher", "calendar_arithmetic",
    "chain_sum", "coin_flip", "complex_arithmetic", "count_bits", "count_primes", "countdown", "course_schedule",
    "decimal_arithmetic", "dice", "family_relationships", "fraction_simplification", "gcd", "gsm_symbolic",
    "knights_knaves", "lcm", "leg_counting", "letter_counting", "letter_jumble", "number_filtering", "number_format",
    "number_sequence", "number_sorting", "palindrome_generation", "power_function", "prime_factorization",
    "products", "propositional_logic", "self_reference", "sentence_reordering", "simple_equations",
    "simple_geometry", "syllogism", "time_intervals", "tower_of_hanoi", "word_sequence_reversal", "word_sorting",
)  # fmt: skip
# Item i of a generator has the seed first + i, always below 1,000,000.
FIRST_SEED = {"train": 1_000, "test": 500_000}
SEEDS_PER_RUN = 400


def make_prompts(
    functions: list[Function], counts: dict[str, int], seed: int, shares: dict[str, float] = SHARES
) -> dict[str, list[dict[str, str]]]:
    """Rows ``{"prompt": str, "source": str}`` for each of ``train`` and ``test``, shuffled.

    Args:
        functions: of both splits.
        counts: rows wanted of each split. A kind gives fewer than its share when its sources are used up.
        seed: of the choice; what is held out does not depend on it.
        shares: of the kinds. ``coding`` and ``reasoning`` need reasoning-gym.
    """
    chosen: dict[str, list[dict[str, str]]] = {}
    taken: set[str] = set()
    for split in ("test", "train"):  # test first: a sentence that both could give is held out
        rows = []
        for kind, share in shares.items():
            rng = random.Random(f"{seed}/{split}/{kind}")
            wanted = round(share * counts[split])
            rows += _take(_candidates(kind, functions, split, seed, wanted, rng), wanted, taken)
        random.Random(f"{seed}/{split}").shuffle(rows)
        chosen[split] = rows
    return {"train": chosen["train"], "test": chosen["test"]}


def normalised(text: str) -> str:
    """Lower case, words and signs only: two prompts that differ in white space are one."""
    return " ".join(text.lower().split())


def _take(candidates: list[dict[str, str]], wanted: int, taken: set[str]) -> list[dict[str, str]]:
    rows = []
    for row in candidates:
        key = normalised(row["prompt"])
        if len(rows) < wanted and len(row["prompt"]) <= MAX_CHARACTERS and key not in taken:
            taken.add(key)
            rows.append(row)
    return rows


def _candidates(kind, functions, split, seed, wanted, rng) -> list[dict[str, str]]:
    if kind == "reasoning":
        return _reasoning(split, seed, wanted, rng)
    ours = [function for function in functions if function.test == (split == "test")]
    make = {"write": _write, "discuss": _discuss}.get(kind)
    if make:
        rows = [row for function in ours if (row := make(function, rng))]
    elif kind == "coding":
        rows = _coding(split, rng)
    else:
        rows = _general(ours, split, rng)
    rng.shuffle(rows)
    return rows


def _write(function: Function, rng: random.Random) -> dict[str, str] | None:
    paragraph = " ".join(function.docstring.split("\n\n")[0].split())
    name = function.name.split(".")[-1]
    if name.startswith("__") or len(paragraph.split()) < 5 or len(paragraph) > 400 or not paragraph.isascii():
        return None
    if paragraph.startswith(f"{name}("):  # a signature, as old modules write it
        return None
    summary = paragraph if paragraph.endswith((".", "?", "!", ":")) else paragraph + "."
    signature = f"{name}({function.arguments})"
    closing = '\n"""' if "\n" in function.docstring else '"""'
    docstring = "\n".join(f"    {line}".rstrip() for line in f'"""{function.docstring}{closing}'.split("\n"))
    prompt = rng.choice(WRITE).format(
        name=name, summary=summary, signature=f"`{signature}`", signature_plain=signature, docstring=docstring
    )
    return {"prompt": prompt, "source": f"write:{function.module}.{function.name}"}


def _discuss(function: Function, rng: random.Random) -> dict[str, str] | None:
    if not 80 <= len(function.source) <= MAX_SOURCE or not function.body:
        return None
    name = function.name.split(".")[-1]
    indented = "\n".join(f"    {line}".rstrip() for line in function.body.split("\n"))
    prompt = rng.choice(DISCUSS).format(
        code=f"```python\n{function.source}\n```",
        bare=f"```python\ndef {name}({function.arguments}):\n{indented}\n```",
    )
    return {"prompt": prompt, "source": f"discuss:{function.module}.{function.name}"}


def _coding(split: str, rng: random.Random) -> list[dict[str, str]]:
    packed = files("reasoning_gym").joinpath("data/codeio.jsonl.gz").read_bytes()
    rows = []
    for number, line in enumerate(gzip.decompress(packed).decode("utf-8").splitlines()):
        row = json.loads(line)
        task = row["task_description"].strip()
        if in_test("codeio", normalised(task)) != (split == "test"):
            continue
        task = _whole_sentences(task, 600)
        with_interface = f"{task}\n\n{row['input_output_spec'].strip()}"
        if len(with_interface) <= 800 and rng.random() < 0.5:
            task = with_interface
        rows.append({"prompt": rng.choice(CODING).format(task=task), "source": f"codeio:{number}"})
    return rows


def _whole_sentences(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    ends = [match.end() for match in re.finditer(r"[.?!](?=\s)", text[:limit])]
    return text[: ends[-1]] if ends else text[:limit].rsplit(" ", 1)[0]


def _reasoning(split: str, seed: int, wanted: int, rng: random.Random) -> list[dict[str, str]]:
    import reasoning_gym

    each = min(SEEDS_PER_RUN, -(-wanted * 3 // (2 * len(GENERATORS))) + 2)  # more than needed: some repeat themselves
    first = FIRST_SEED[split] + seed % 1000 * SEEDS_PER_RUN
    columns = []
    for name in GENERATORS:
        data = reasoning_gym.create_dataset(name, seed=first, size=each)
        columns.append([{"prompt": data[i]["question"].strip(), "source": f"{name}:{first + i}"} for i in range(each)])
    rng.shuffle(columns)
    return [row for item in zip(*columns, strict=True) for row in item]  # in turn, so that every generator is in


def _general(functions: list[Function], split: str, rng: random.Random) -> list[dict[str, str]]:
    rows = []
    for group, topics in TOPICS.items():
        ours = [topic for topic in topics if in_test("topic", topic) == (split == "test")]
        for topic, template in itertools.product(ours, TEMPLATES[group]):
            rows.append({"prompt": template.format(topic=topic), "source": f"{group}:{topic}"})
        if group in COMPARED:
            for topic, other in itertools.pairwise(ours):
                prompt = rng.choice(COMPARE).format(topic=topic, other=other)
                rows.append({"prompt": prompt, "source": f"{group}:{topic}/{other}"})
    modules = sorted({name for function in functions if not (name := function.module.split(".")[0]).startswith("_")})
    for module, template in itertools.product(modules, MODULE_TEMPLATES):
        rows.append({"prompt": template.format(module=module), "source": f"module:{split_name(module)}"})
    return rows
