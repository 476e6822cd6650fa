"""What the rooms of the package promise beyond the arrows that import-linter checks (`make lint`; docs/architecture.md)."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import grimp
import pytest

import peft_caft

PACKAGE = Path(peft_caft.__file__).parent
HEAVY = ("torch", "transformers", "peft", "accelerate", "huggingface_hub", "numpy")
SEEN_BY_HELP = {  # what a command is asked for, and what that is made of
    *(
        "peft_caft.cli",
        *(f"peft_caft.cli.{name}" for name in ("app", "options", "planning", "training", "hub", "evaluation")),
    ),
    *("peft_caft.cli.concepts", "peft_caft.cli.demo", "peft_caft.training.defaults"),
    *(f"peft_caft.{room}" for room in ("basics", "heads", "method", "training", "planning", "evaluation", "concepts")),
    *(f"peft_caft.{room}.settings" for room in ("basics", "training", "planning", "evaluation", "concepts")),
    *(
        "peft_caft.basics.checks",
        "peft_caft.basics.reading",
        "peft_caft.heads.config",
        "peft_caft.method.objective_config",
        "peft_caft.method.schedule",
    ),
}
OPTIONAL = ("typer", "matplotlib", "datasets", "trl", "rdkit", "biotite", "gguf")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("peft_caft", include_external_packages=True, cache_dir=None)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def loaded_by(code: str) -> set[str]:
    """Names of the modules that a new process has loaded after ``code``."""
    script = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.rpartition("LOADED ")[2].split())


FORKS = """
import gc, os, sys
gc.disable()  # while modules are imported
import peft
for code in map(eval, sys.stdin):
    if not (child := os.fork()):
        exec(code)
        print("LOADED", *sys.modules, flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("FAILED", flush=True)
"""


@pytest.fixture(scope="module")
def loaded_after_peft() -> Iterator[Callable[[str], set[str]]]:
    """As `loaded_by`, in a process forked from one that has imported PEFT, which takes seconds, and nothing of this package."""
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def loaded(code: str) -> set[str]:
            print(repr(code), file=process.stdin, flush=True)
            answer, *names = process.stdout.readline().split()
            assert answer == "LOADED", "the traceback is on stderr"
            return set(names)

        yield loaded


def test_the_package_alone_loads_nothing():
    loaded = loaded_by("import peft_caft\nassert set(peft_caft.__all__) <= set(dir(peft_caft))")
    assert {name for name in loaded if name.startswith("peft_caft")} == {"peft_caft"}
    assert not loaded & {*HEAVY, *OPTIONAL}


def test_public_names_load_the_method_and_what_it_stands_on_alone(loaded_after_peft):
    loaded = loaded_after_peft("import peft_caft\nfor name in peft_caft.__all__: getattr(peft_caft, name)")
    assert {room_of(name) for name in loaded if name.startswith("peft_caft.")} == {"basics", "heads", "method"}
    assert not loaded & {*OPTIONAL, "transformers.trainer"}


def test_type_checkers_see_what_is_loaded():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert sorted(seen) == sorted(peft_caft.__all__)
    for name, module in seen.items():
        assert getattr(import_module(f"peft_caft.{module}"), name) is getattr(peft_caft, name)


def test_help_of_every_command_needs_no_torch():
    """Told by what is imported and not by the clock."""
    loaded = loaded_by(
        "import contextlib, io\n"
        "from peft_caft.cli.app import app, main\n"
        "shown = {}\n"
        "for command in ('', *(command.name for command in app.registered_commands)):\n"
        "    sys.argv = ['peft-caft', *([command] if command else []), '--help']\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as output:\n"
        "        main()\n"
        "    shown[command] = output.getvalue()\n"
        "assert len(shown) == 13 and all('--help' in text for text in shown.values()), shown"
    )
    assert not loaded & {*HEAVY, *OPTIONAL} - {"typer"}
    assert {name for name in loaded if name.startswith("peft_caft.")} <= SEEN_BY_HELP


def test_a_name_that_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'peft_caft' has no attribute 'CAFTConfiguration'"):
        _ = peft_caft.CAFTConfiguration


KNOWN = """
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
assert (config.r, PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].__name__) == (3, "CAFTModel")
"""


@pytest.mark.parametrize("module", ["peft_caft", "peft_caft.training.fine_tuning", "peft_caft.planning.plan"])
def test_a_configuration_is_known_to_peft_from_wherever_it_comes(module, loaded_after_peft):
    loaded_after_peft(f"from {module} import CAFTConfig\nconfig = CAFTConfig(r=3)\n{KNOWN}")


def test_a_pickled_configuration_is_known_to_peft_where_it_is_loaded(loaded_after_peft):
    """As in a process that multiprocessing spawns with one as argument."""
    pickled = pickle.dumps(peft_caft.CAFTConfig(r=3))
    loaded_after_peft(f"import pickle\nconfig = pickle.loads({pickled!r})\n{KNOWN}")


def test_there_are_no_circles(graph):
    own = {module for module in graph.modules if module.split(".")[0] == "peft_caft"}
    order = TopologicalSorter({module: graph.find_modules_directly_imported_by(module) & own for module in own})
    assert len(list(order.static_order())) == len(own)  # which raises CycleError, naming the circle


def test_what_stands_in_basics_is_used_by_two_rooms_or_more(graph):
    for module in graph.find_children("peft_caft.basics"):
        users = {room_of(user) for user in graph.find_modules_that_directly_import(module)} - {"basics"}
        assert len(users) > 1, f"{module} is used by {users} alone: it belongs there"


def test_optional_packages_are_named_where_the_layout_says(graph):
    for package in ("rdkit", "biotite", "gguf", "matplotlib"):
        for module in graph.find_modules_that_directly_import(package):
            allowed = room_of(module) == "demo" or module.split(".")[-1] in (
                "plots",
                "comparison_plots",
                "embedded_model",
            )
            assert allowed, f"{module} imports {package}"
    for module in graph.find_modules_that_directly_import("typer"):
        assert room_of(module) == "cli", f"{module} imports typer"


def test_rooms_and_files_stay_small():
    for folder in (PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")):
        files = list(folder.glob("*.py"))
        assert len(files) <= 20, f"{folder.name}: {len(files)} files"
        for path in files:
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 350, f"{path.relative_to(PACKAGE)}: {lines} lines"
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py"}
