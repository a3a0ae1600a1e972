"""The doors and sizes of the house, read from the source with `ast`: who may import what, and how large a thing may grow.

A limit is raised by a decision record in docs/decisions.md and a change here, never by an exception inside the code.
"""

import ast
import graphlib
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fl_server", "fl_client", "models", "privacy")

LINES_MAX = 700  # of a file
BODY_MAX = 80  # lines of a function without its docstring
PARAMETERS_MAX = 6  # besides self and cls; a configuration is one argument

MAY_IMPORT_OURS = {
    "fl_server": {"fl_server", "models", "privacy"},
    "fl_client": {"fl_client", "models", "privacy"},
    "models": {"models", "privacy"},
    "privacy": {"privacy"},
}
# `fl-study simulate` carries both halves in one process: there the other half is looked up by its name at run time, as
# Flower does with an app, so that no import crosses the door.
MEETING_PLACES = {
    "fl_server/simulation.py",
    "fl_server/cluster.py",  # its crew on Ray
    "fl_server/comparison.py",  # trains on what the first left behind
    "fl_server/evidence.py",  # attacks what the first left behind
    "fl_server/saliency.py",  # looks at its phantoms
    "fl_server/release_cli.py",  # scores a folder of DICOM, which only the site's half can read
}
FLWR_DOORS = {
    "privacy/wire.py",
    "fl_server/app.py",
    "privacy/parcels.py",
    "fl_server/parcels.py",
    "fl_server/mailbox.py",  # Flower's grid, over parcels
    "fl_server/executor.py",  # takes the ServerApp task that link.py's SuperLink hands out
    "fl_server/link.py",
    "fl_server/control.py",  # its Control API, for all processes of the coordinator
    "fl_server/rounds.py",
    "fl_server/sums.py",  # hands rounds.py the Grid, and asks it who is online
    "fl_server/simulation.py",
    "fl_server/crew.py",  # its grids
    "fl_client/rehearsal.py",  # the ClientApp of a simulation, and its messages as bytes
    "fl_client/client_app.py",
    "fl_client/fleet.py",  # what a node says on each request
    "fl_client/node.py",
    "fl_client/orders.py",
}
PYDICOM_DOORS = {
    "fl_client/dimse.py",  # talks to archives, whose answers are data sets
    "fl_client/export.py",
    "fl_client/headers.py",
    "fl_client/mask_files.py",  # DICOM segmentations
    "fl_client/outlining.py",  # writes them
    "fl_client/landing.py",  # what an archive sent, before it is a file
    "fl_client/phantom.py",
    "fl_client/phantom_ct.py",
    "models/imaging.py",
    "privacy/annex_e.py",  # de-identification is a table over data elements
}
# These are loaded where no network is trained: on the way to a first sentence on the screen, or to check a signature.
TORCH_FREE = {
    "fl_client/cli.py",
    "fl_client/doctor.py",
    "fl_client/egress.py",
    "fl_client/enrol.py",
    "fl_client/first_look.py",
    "fl_client/fleet.py",
    "fl_client/masks.py",
    "fl_client/node.py",
    "fl_client/orders.py",
    "fl_client/protection.py",
    "fl_client/sandbox.py",
    "fl_client/site.py",
    "fl_client/worker.py",
    "fl_server/cli.py",
    "fl_server/consortium.py",
    "fl_server/executor.py",
    "fl_server/first.py",
    "fl_server/figures.py",
    "fl_server/matrix.py",
    "fl_server/published.py",
    "fl_server/published_cli.py",
    "fl_server/release_cli.py",
    "fl_server/outlines.py",
    "fl_server/report.py",
    "fl_server/results.py",
    "fl_server/progress.py",
    "fl_server/research.py",
    "fl_server/researcher.py",
    "fl_server/doctor.py",
    "fl_server/roster.py",
    "fl_server/rounds.py",
    "fl_server/run.py",
    "fl_server/strategies.py",
    "fl_server/sums.py",
    "fl_server/weights.py",
    "fl_server/weights_cli.py",
    "models/contributions.py",
    "models/attributes.py",
    "models/catalogue.py",
    "models/catalogue_cli.py",
    "models/connectors.py",
    "models/documents.py",
    "models/labels.py",
    "models/metrics.py",
    "models/questions.py",
    "models/segmentation.py",
    "models/registry.py",
    "models/tables.py",
    "models/sections.py",
    "models/conflicts.py",
    "models/study.py",
    "privacy/calls.py",
    "privacy/doctor.py",
    "privacy/doctor_cli.py",
    "privacy/reach.py",
    "privacy/console.py",
    "privacy/errors.py",
    "privacy/heap.py",
    "privacy/journal.py",
    "privacy/keys.py",
    "privacy/accounting.py",
    "privacy/ledger.py",
    "privacy/noise.py",
    "privacy/secagg.py",
    "privacy/sharing.py",
    "privacy/statements.py",
    "privacy/syslog.py",
    "privacy/wire.py",
}
# Ciphers, key derivation and sealing; what others import of `cryptography` are the types of keys and certificates.
CIPHER_DOORS = {"privacy/keys.py", "privacy/noise.py", "privacy/secagg.py", "privacy/sharing.py"}
CIPHERS = ("ciphers", "kdf", "hpke", "hmac", "padding", "poly1305", "keywrap", "cmac")
DRAWS_PICTURES = {
    "fl_client/phantom.py",
    "fl_client/phantom_ct.py",
}  # the only rooms where foreseeable randomness is what is wanted
RESAMPLES = {
    "models/intervals.py",
    "models/grades.py",
    "models/regression.py",
}  # bootstrap, which is the same for the same data; nothing secret hangs on it
NOT_BUILT_YET: set[str] = set()
SPEAKS_TO_PEOPLE = {
    "fl_client/archive_cli.py",
    "fl_client/cli.py",
    "fl_client/data_cli.py",
    "fl_client/export_cli.py",
    "fl_server/cli.py",
    "fl_server/counting.py",
    "fl_server/research.py",
    "fl_server/researcher.py",
    "fl_server/doctor.py",
    "fl_server/release_cli.py",
    "fl_server/rehearsal_cli.py",
    "fl_server/cost_cli.py",
    "fl_server/runs_cli.py",
    "models/catalogue_cli.py",
    "fl_server/summary.py",
    "privacy/console.py",
}


@dataclass(frozen=True)
class Module:
    """One source file. `always`: modules imported when it is loaded; `late`: inside functions, or for types only."""

    path: str
    tree: ast.Module
    lines: int
    always: frozenset[str]
    late: frozenset[str]

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def imports(self) -> frozenset[str]:
        return self.always | self.late


def generated(path: Path) -> bool:
    return "_pb2" in path.name


def read_module(path: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, str(path))
    functions: list[ast.AST] = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    inside = {id(child) for part in [*functions, *typing_only] for child in ast.walk(part)}
    always = {name for node in ast.walk(tree) if id(node) not in inside for name in imported(node)}
    late = {name for node in ast.walk(tree) if id(node) in inside for name in imported(node)}
    name = path.relative_to(ROOT).as_posix()
    return Module(name, tree, text.count("\n") + 1, frozenset(always), frozenset(late))


def imported(node: ast.AST) -> Iterator[str]:
    """Dotted names that an import statement may load: for `from a import b` both `a` and `a.b`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        if node.level:
            yield "relative"
        else:
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def in_packages() -> list[Module]:
    return [read_module(p) for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py")) if not generated(p)]


def everywhere() -> list[Module]:
    folders = [ROOT / name for name in ("deploy", "tests")]
    return in_packages() + [read_module(path) for folder in folders for path in sorted(folder.rglob("*.py"))]


MODULES = in_packages()
ALL = everywhere()
BY_NAME = {module.name: module for module in MODULES}


def imports_of(module: Module, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in module.imports)


def ours(names: frozenset[str]) -> set[str]:
    """Those of `names` that are modules of this repository."""
    return {name for name in names if name in BY_NAME}


def functions_of(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_the_reader_of_imports_sees_every_form() -> None:
    source = "import a.b as c\nfrom d import e\ndef f():\n    import g\n    from h.i import j\nif True:\n    import k\n"
    tree = ast.parse(source)
    assert {name for node in ast.walk(tree) for name in imported(node)} == {"a.b", "d", "d.e", "g", "h.i", "h.i.j", "k"}
    assert BY_NAME.keys() >= {"fl_server.report", "models.study", "privacy.errors", "privacy"}
    assert not {name.removesuffix(".py").replace("/", ".") for name in NOT_BUILT_YET} & BY_NAME.keys()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.path)
def test_doors_between_our_packages(module: Module) -> None:
    package = module.path.split("/", maxsplit=1)[0]
    through = {other for other in (*PACKAGES, "tests", "deploy") if imports_of(module, other)} - MAY_IMPORT_OURS[
        package
    ]
    assert not through, f"{module.path} may not import {sorted(through)}"
    assert "relative" not in module.imports, f"{module.path}: imports are written in full"
    words = {
        node.value for node in ast.walk(module.tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    by_name = {word for word in words for other in PACKAGES if re.fullmatch(rf"{other}\.\w+:\w+", word)}
    hidden = {word for word in by_name if word.split(".")[0] not in MAY_IMPORT_OURS[package]}
    assert not hidden or module.path in MEETING_PLACES, f"{module.path} looks up {sorted(hidden)}"


@pytest.mark.parametrize(("library", "doors"), [("flwr", FLWR_DOORS), ("pydicom", PYDICOM_DOORS)])
def test_doors_to_libraries(library: str, doors: set[str]) -> None:
    found = {module.path for module in MODULES if imports_of(module, library)}
    assert found <= doors
    assert doors - found <= NOT_BUILT_YET, "a door that nobody uses is closed"


def test_ciphers_have_three_rooms_and_no_other_library() -> None:
    """Whoever needs a secret kept goes through privacy.keys or privacy.secagg, where the derivations and labels stand."""
    ciphers = tuple(f"cryptography.hazmat.primitives.{name}" for name in CIPHERS)
    found = {module.path for module in MODULES if any(imports_of(module, name) for name in ciphers)}
    assert found == CIPHER_DOORS
    for module in MODULES:
        for library in ("Crypto", "Cryptodome", "nacl", "ssl.RAND_bytes", "hmac"):
            assert not imports_of(module, library), f"{module.path} imports {library}"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.path)
def test_no_randomness_that_can_be_foreseen(module: Module) -> None:
    """Keys, shares, tokens and masks come from the operating system; numpy's generators and `random` only look random."""
    if module.path in DRAWS_PICTURES | RESAMPLES:
        return
    bare = {"random.random", "random.Random", "numpy.random"} | {f"random.{name}" for name in ("choice", "sample")}
    assert not module.imports & bare, f"{module.path} imports {sorted(module.imports & bare)}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            allowed = text in ("random.SystemRandom", "torch.random") or text.startswith("torch.random.")
            assert allowed or not re.match(r"(np|numpy)\.random\b|random\.\w+$", text), f"{module.path}: {text}"


@pytest.mark.parametrize("path", sorted(TORCH_FREE))
def test_modules_that_train_nothing_do_not_load_torch(path: str) -> None:
    """Not even by way of another module of ours. Imports inside functions are late on purpose and do not count."""
    seen: set[str] = set()
    todo = [path.removesuffix(".py").replace("/", ".")]
    while todo:
        module = BY_NAME.get(todo.pop())
        if module is None or module.name in seen:
            assert module is not None or path in NOT_BUILT_YET, f"{path} is not there"
            continue
        seen.add(module.name)
        heavy = {name for name in module.always if name.split(".")[0] in ("torch", "monai")}
        assert not heavy, f"{path} loads {sorted(heavy)} by way of {module.path}"
        todo += ours(module.always)


def test_no_import_cycles() -> None:
    """Not even one that an import inside a function would hide."""
    graph = {module.name: ours(module.imports) - {module.name} - set(PACKAGES) for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", ALL, ids=lambda module: module.path)
def test_sizes(module: Module) -> None:
    assert module.lines <= LINES_MAX, f"{module.path} has {module.lines} lines"
    for function in functions_of(module):
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
        assert length <= BODY_MAX, f"{module.path}: {function.name} has {length} lines"
        # Each parameter of a command is one option that a person may give; these are not calls that somebody reads.
        if not any(is_command(decorator) for decorator in function.decorator_list) and not takes_options(function):
            count = len([a for a in parameters(function) if a.arg not in ("self", "cls")])
            assert count <= PARAMETERS_MAX, f"{module.path}: {function.name} has {count} parameters"


def takes_options(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A command that another file registers says of its parameters that they are options."""
    return any(a.annotation is not None and "typer.Option" in ast.unparse(a.annotation) for a in parameters(function))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    spec = function.args
    extra = [argument for argument in (spec.vararg, spec.kwarg) if argument is not None]
    return [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *extra]


def is_command(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Attribute) and called.attr in ("command", "callback", "parametrize")


@pytest.mark.parametrize("module", ALL, ids=lambda module: module.path)
def test_everything_is_annotated(module: Module) -> None:
    for function in functions_of(module):
        bare = [a.arg for a in parameters(function) if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{module.path}: {function.name}({', '.join(bare)}) without annotation"
        assert function.returns is not None, f"{module.path}: {function.name} without a return annotation"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.path)
def test_what_never_stands_in_a_package(module: Module) -> None:
    assert ast.get_docstring(module.tree), f"{module.path} does not say what it is"
    assert not imports_of(module, "pickle")
    assert not imports_of(module, "marshal")
    for node in ast.walk(module.tree):
        assert not isinstance(node, ast.Assert), (
            f"{module.path}:{node.lineno}: input is checked by raising, not by assert"
        )
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "os.system"), f"{module.path}:{node.lineno}: {called}"
            if called == "torch.load":
                safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
                assert safe and module.path == "models/weights.py", (
                    f"{module.path}:{node.lineno}: a pickle is a program"
                )
            if called == "print":
                assert module.path in SPEAKS_TO_PEOPLE, f"{module.path}:{node.lineno}: libraries do not print"
    if module.path.endswith("__init__.py"):
        outside = {name for name in module.imports if name.split(".")[0] not in sys.stdlib_module_names}
        assert not outside, f"{module.path}: names are imported from where they are defined"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.path)
def test_room_names_say_what_is_inside(module: Module) -> None:
    name = Path(module.path).stem
    assert name not in ("utils", "util", "common", "helpers", "base", "manager", "handler", "misc"), module.path


def test_what_is_imported_is_declared() -> None:
    """Every library that the packages import is a dependency of pyproject.toml, not a guest of another's; inside a function, it
    may be one of an extra.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[<>=!~;\[ ]", line)[0].lower() for line in project["dependencies"]}
    extras = {
        re.split(r"[<>=!~;\[ ]", line)[0] for lines in project["optional-dependencies"].values() for line in lines
    }
    owners = importlib.metadata.packages_distributions()
    missing = set()
    for module in MODULES:
        for name in {full.split(".")[0] for full in module.imports} - set(PACKAGES) - set(sys.stdlib_module_names):
            if name and name not in ("relative", "configs"):
                # Where an extra is not installed, nothing says which distribution a name belongs to but its beginning.
                absent = [extra for extra in extras if extra.startswith(f"{name}-")] or [name]
                distributions = {owner.lower().replace("_", "-") for owner in owners.get(name, absent)}
                always = any(full.split(".")[0] == name for full in module.always)
                if not distributions & (declared if always else declared | extras):
                    missing.add(f"{module.path}: {name}")
    assert not missing
