"""What the docs say is what the programs do: reference pages equal the code, the tree of docs/house.md the files, links
their targets.

Four pages are made from the code, not by hand: commands.md from the programs' own help, configuration.md from the pydantic
models, errors.md from the error tree, wire.md from the message classes and consortium.proto. After a change of any of these:

    python tests/test_docs.py --write
"""

import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # as a script, Python puts tests/ there instead

from fl_client import cli as client_cli  # noqa: E402  the lines above make these importable for the script
from fl_client.site import SiteFile  # noqa: E402
from fl_client.sources import Reason  # noqa: E402
from fl_server import cli as server_cli  # noqa: E402
from fl_server import consortium  # noqa: E402
from fl_server import research as research_cli  # noqa: E402
from fl_server.researcher import ResearcherFile  # noqa: E402
from fl_server.settings import ServerFile  # noqa: E402
from models.study import Document, Study  # noqa: E402
from privacy import consortium_pb2, errors, wire  # noqa: E402

PROGRAMS: dict[str, tuple[typer.Typer, str, str]] = {
    "fl-client": (client_cli.app, "fl_client.cli", "for the hospital"),
    "fl-server": (server_cli.app, "fl_server.cli", "for the coordinator"),
    "fl-study": (research_cli.app, "fl_server.research", "for the researcher"),
}
DOCUMENTS: dict[str, tuple[type[Document], str]] = {
    "study.yaml": (Study, "the researcher"),
    "site.yaml": (SiteFile, "the hospital; it never leaves it"),
    "server.yaml": (ServerFile, "the coordinator"),
    "researcher.yaml": (ResearcherFile, "the researcher; there only where a proxy leads out"),
}
GENERATED = "<!-- Made from the code by `python tests/test_docs.py --write`; change the code, not this page. -->"
SCREEN = {
    "COLUMNS": "96",
    "NO_COLOR": "1",
    "TERM": "dumb",
}  # one width and no colours, so that the help is the same everywhere
FOLDERS = ("fl_server", "fl_client", "models", "privacy", "configs", "deploy", "docs")
NAME_PATTERN = Study.model_json_schema()["properties"]["name"]["pattern"]
UNLISTED = re.compile(r"__init__\.py$|_pb2|\.pyc$")


def pages() -> dict[str, Callable[[], str]]:
    return {
        "commands.md": commands_page,
        "configuration.md": configuration_page,
        "errors.md": errors_page,
        "wire.md": wire_page,
    }


# --- commands.md


def command_names(app: typer.Typer) -> list[str]:
    """The commands of a program, in the order of its help."""
    group = typer.main.get_command(app)
    return list(getattr(group, "commands", {}))


def help_of(program: str, *command: str) -> str:
    """What `program command --help` prints on a screen of SCREEN."""
    app = PROGRAMS[program][0]
    shown = CliRunner().invoke(app, [*command, "--help"], prog_name=program, env=SCREEN)
    if shown.exit_code != 0:
        raise RuntimeError(f"{program} {' '.join(command)} --help fails: {shown.output}")
    return "\n".join(line.rstrip() for line in shown.output.strip("\n").splitlines()).strip()


def commands_page() -> str:
    parts = [
        GENERATED,
        "# Commands",
        "What each program prints for `--help`. Options win over files, files over defaults.",
    ]
    for program, (app, _, whom) in PROGRAMS.items():
        parts += [f"## {program}: {whom}", fenced(help_of(program))]
        for name in command_names(app):
            parts += [f"### {program} {name}", fenced(help_of(program, name))]
            for inner in getattr(command_of(app, name), "commands", {}):
                parts += [f"#### {program} {name} {inner}", fenced(help_of(program, name, inner))]
    return joined(parts)


def fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def joined(parts: list[str]) -> str:
    return "\n\n".join(parts) + "\n"


# --- configuration.md


def configuration_page() -> str:
    parts = [
        GENERATED,
        "# Configuration",
        "Four YAML files, three owners. An unknown key, a wrong type or a value out of range is an error that names file, "
        "line and the nearest known key. There are no other settings and no environment variables. A *name* is lower case "
        f"and short (`{NAME_PATTERN}`), so it is never a path or a person.",
    ]
    for name, (kind, owner) in DOCUMENTS.items():
        schema = kind.model_json_schema()
        parts += [f"## {name}", f"Owned by {owner}. {without_file_name(name, schema)}".strip()]
        for title, said, rows in sections(schema, schema.get("$defs", {}), ""):
            parts += [f"### {name}: {title}"] if title else []
            parts += [said] if said and title else []
            parts.append("| key | value | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows))
    return joined(parts)


def sections(schema: dict[str, Any], defs: dict[str, Any], above: str) -> Iterator[tuple[str, str, list[str]]]:
    """(dotted name, sentence, table rows) of a section and then of those inside it."""
    rows, inner = [], []
    for key, field in schema["properties"].items():
        dotted = f"{above}{key}"
        found = list(sections_in(field, defs))
        child = found[0][0] if found else None
        meaning = prose(field.get("description", ""))
        inner += [(one, f"{dotted}{suffix}.") for one, suffix in found]
        if child is not None:
            meaning = meaning or re.split(r"(?<=[.]) |; ", prose(child.get("description", "")))[0]
        required = key in schema.get("required", [])
        default = "required" if required else "as below" if child is not None else f"`{shown(field.get('default'))}`"
        rows.append(f"| `{dotted}` | {cell(values(field, defs))} | {cell(default)} | {cell(meaning)} |")
    kinds = schema["properties"].get("kind", {})
    which = f" (kind: {kinds['const']})" if "const" in kinds else ""
    yield above.rstrip(".") + which, prose(schema.get("description", "")), rows
    for child, prefix in inner:
        yield from sections(child, defs, prefix)


def sections_in(field: dict[str, Any], defs: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Sections that a field may hold, and what stands between its key and the keys inside (".NAME" for a mapping)."""
    for option in (field, *options(field)):
        for inside, suffix in ((option, ""), (entries(option), ".NAME"), (option.get("items", {}), "[]")):
            if "$ref" in inside:
                yield defs[inside["$ref"].rsplit("/", maxsplit=1)[1]], suffix


def options(field: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a field that has some."""
    found: list[dict[str, Any]] = field.get("anyOf", field.get("oneOf", []))
    return found


def entries(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of the values of a mapping; empty for anything else."""
    by_pattern = list(field.get("patternProperties", {}).values())
    inside = by_pattern[0] if by_pattern else field.get("additionalProperties")
    return inside if isinstance(inside, dict) else {}


def values(field: dict[str, Any], defs: dict[str, Any]) -> str:
    """What a field takes, in words: type, choices and bounds."""
    if options(field):
        return " or ".join(values(option, defs) for option in options(field))
    if "const" in field or "enum" in field:
        return " or ".join(f"`{shown(value)}`" for value in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", "section"))
    if kind == "array":
        return "list of " + values(field["items"], defs) + span(field, "minItems", "maxItems", " entries")
    if kind == "object":
        inside = entries(field)
        return "NAME: section" if "$ref" in inside else f"word: {values(inside, defs)}"
    words = {"integer": "whole number", "boolean": "`true` or `false`", "null": "nothing", "string": text_like(field)}
    return words.get(kind, kind) + span(field, "minimum", "maximum", "")


def text_like(field: dict[str, Any]) -> str:
    pattern = field.get("pattern")
    if pattern == NAME_PATTERN:
        return "name"
    return f"text like `{pattern}`" if pattern else "text" + span(field, "minLength", "maxLength", " characters")


def span(field: dict[str, Any], low: str, high: str, unit: str) -> str:
    """ ", 1 to 100 entries" from the bounds of a field."""
    least = (
        f"{field[low]:g}"
        if low in field
        else f"above {field['exclusiveMinimum']:g}"
        if "exclusiveMinimum" in field
        else ""
    )
    most = (
        f"{field[high]:.12g}"
        if high in field
        else f"below {field['exclusiveMaximum']:.12g}"
        if "exclusiveMaximum" in field
        else ""
    )
    if least and most:
        return f", {least} to {most}{unit}"
    return f", at least {least}{unit}" if least else f", at most {most}{unit}" if most else ""


def shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else f"{value}".replace("'", "")


def without_file_name(name: str, schema: dict[str, Any]) -> str:
    """The description of a document less a first sentence such as "site.yaml: owned by the hospital."."""
    said = prose(schema.get("description", ""))
    return said.partition(". ")[2] if said.startswith(f"{name}:") else said


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def prose(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split())


# --- errors.md


def error_kinds() -> list[type[errors.IsocenterError]]:
    """Every class of the error tree, parents before children."""
    found: list[type[errors.IsocenterError]] = []
    todo: list[type[errors.IsocenterError]] = [errors.IsocenterError]
    while todo:
        kind = todo.pop(0)
        found.append(kind)
        todo = [*kind.__subclasses__(), *todo]
    return [kind for kind in found if kind.__module__ == errors.__name__]


def drawn_causes() -> dict[str, str]:
    """Class name -> what the tree in the module's docstring says about it."""
    rows = re.findall(r"^[\s│]*[├└]── (\w+)[ ]*(.*)$", errors.__doc__ or "", re.MULTILINE)
    return {"IsocenterError": "anything that was not expected; the log of the command has the details", **dict(rows)}


def errors_page() -> str:
    causes = drawn_causes()
    parts = [
        GENERATED,
        "# Errors",
        "Every expected failure has a cause (the sentence that the command prints; it stays where it happened), a code and a "
        "remedy. Commands print cause and remedy and exit with 1. Only the code ever leaves a site.",
    ]
    rows = ["| code | cause | what to do |", "|---|---|---|"]
    for kind in error_kinds():
        cause = causes[kind.__name__] or prose(kind.__doc__ or "") or "the family of the errors that follow"
        rows.append(f"| `{kind.code}` | {cell(cause)} | {cell(kind.remedy)} |")
    reasons = ["| reason | what it means |", "|---|---|"]
    reasons += [f"| `{reason.value}` | {cell(reason.explanation)} |" for reason in Reason]
    said = "`fl-client ingest` takes every image it can use and counts the others by one of these reasons."
    return joined([*parts, "\n".join(rows), "## Why a file is left out", said, "\n".join(reasons)])


# --- wire.md


def wire_page() -> str:
    module = prose((wire.__doc__ or "").split("\n\n", maxsplit=1)[0])
    limits = (
        f"Wire version {wire.VERSION}. A model has at most {wire.VECTOR_MAX:,} numbers, a list at most {wire.SITES_MAX:,} sites, "
        f"bytes at most {wire.BYTES_MAX:,}. A code is one of those in [errors.md](errors.md)."
    )
    parts = [GENERATED, "# What crosses a hospital's boundary", module, limits]
    for kind in wire.MESSAGES:
        way = "to a site" if issubclass(kind, wire.Order) else "from a site"
        said = (
            prose(kind.__doc__ or "")
            if "__doc__" in vars(kind) and not (kind.__doc__ or "").startswith(kind.__name__)
            else ""
        )
        rows = [f"| `{name}` | {wire_type(name, of)} |" for name, of in kind.fields().items()]
        parts += [
            f"## {kind.kind} ({way})",
            *([said] if said else []),
            "| field | type |\n|---|---|\n" + "\n".join(rows),
        ]
    return joined([*parts, *service_parts()])


def service_parts() -> list[str]:
    """The calls of the consortium service, from consortium.proto and the table of who may make them."""
    proto = (ROOT / "privacy" / "consortium.proto").read_text(encoding="utf-8")
    said = dict(re.findall(r"// ([^\n]+)\n  rpc (\w+)\(", proto))
    meant = {call: text for text, call in said.items()}
    rows = ["| call | who | what for | sent | answered |", "|---|---|---|---|---|"]
    for call in consortium_pb2.DESCRIPTOR.services_by_name["Consortium"].methods:
        who = ", ".join(consortium.CALLERS.get(call.name, ("whoever is invited",)))
        fields = [", ".join(f"`{field.name}`" for field in kind.fields) for kind in (call.input_type, call.output_type)]
        what = cell(re.sub("^(Site|Researcher|Site, researcher): ", "", meant[call.name]))
        rows.append(f"| `{call.name}` | {who} | {what} | {fields[0] or 'nothing'} | {fields[1] or 'nothing'} |")
    about = (
        "Beside the training, sites and researchers make these calls to the coordinator, each signed over TLS 1.3 "
        "(privacy/consortium.proto). A site sends its signed decisions, heads of its journal, and the hash of a model it pulls."
    )
    return ["## Calls to the consortium service", about, "\n".join(rows)]


def wire_type(name: str, kind: type) -> str:
    plain = {int: "whole number", float: "number", str: "word or digest of a fixed pattern", bool: "yes or no"}
    special = {
        "model": "float32 numbers (parameters)",
        "figures": "float32 numbers (targets, 7)",
        "signature": "signature",
        "vouch": "signature",
        "vouches": "signatures",
        "keys": "signed public keys",
        "shares": "encrypted shares",
        "sealed": "encrypted shares",
        "revealed": "secret shares of the sum that is opened",
        "vector": "packed words, protected as the study says",
    } | dict.fromkeys(wire.NAMES, "names of the study's sites")
    return special[name] if name in special else plain[kind]


# --- the tree of docs/house.md, and the rooms in the README


def tree_of_the_house() -> dict[str, str]:
    """Path -> annotation of every file in the annotated tree."""
    found, folder = {}, ""
    for line in fence(ROOT / "docs" / "house.md", "tree").splitlines():
        name, _, said = line.strip().partition("  ")
        if not line.startswith(" "):
            folder = name
        else:
            found[folder + name] = said.strip()
    return found


def fence(page: Path, kind: str) -> str:
    """What stands in a page's fence of that kind."""
    return page.read_text(encoding="utf-8").split(f"```text {kind}\n", maxsplit=1)[1].split("```", maxsplit=1)[0]


def files_of_the_house() -> set[str]:
    paths = {p.relative_to(ROOT) for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file()}
    named = {path.as_posix() for path in paths if not any(part.startswith((".", "__pycache__")) for part in path.parts)}
    return {name for name in named if not UNLISTED.search(name)}


# --- tests


@pytest.mark.parametrize("name", pages())
def test_reference_pages_equal_the_code(name: str) -> None:
    path = ROOT / "docs" / name
    assert path.is_file(), f"docs/{name} is missing: python tests/test_docs.py --write"
    assert path.read_text(encoding="utf-8") == pages()[name](), (
        f"docs/{name} is stale: python tests/test_docs.py --write"
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_console_scripts_print_the_documented_help(program: str) -> None:
    """In a process of its own, through the entry that pyproject.toml names: nothing is imported that a user lacks."""
    module = PROGRAMS[program][1]
    begin = program.replace("-", "_")
    entry = f"import sys; from isocenter import {begin}; sys.argv = [{program!r}, '--help']; {begin}()"
    environment = {**os.environ, **SCREEN}
    ran = subprocess.run(
        [sys.executable, "-c", entry],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    printed = "\n".join(line.rstrip() for line in ran.stdout.strip("\n").splitlines()).strip()
    assert fenced(printed) in (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    scripts = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'{program} = "isocenter:{begin}"' in scripts
    assert f'_begin("{module}")' in (ROOT / "isocenter.py").read_text(encoding="utf-8")


def test_every_command_and_argument_has_a_help_text() -> None:
    for program, (app, _, _) in PROGRAMS.items():
        group = typer.main.get_command(app)
        for name, command in getattr(group, "commands", {}).items():
            assert (command.help or "").strip(), f"{program} {name} has no help"
            for each in (command, *getattr(command, "commands", {}).values()):
                for parameter in each.params:
                    said = getattr(parameter, "help", None)
                    assert said, f"{program} {name}: {parameter.name} has no help"


def test_the_tree_equals_the_files() -> None:
    listed, there = tree_of_the_house(), files_of_the_house()
    assert sorted(set(listed) - there) == [], "docs/house.md lists files that are not there"
    assert sorted(there - set(listed)) == [], "files that docs/house.md does not list"
    assert all(listed.values()), "each file is annotated"


def test_the_readme_names_each_room_and_is_two_screens() -> None:
    rooms = dict(line.split(maxsplit=1) for line in fence(ROOT / "README.md", "rooms").splitlines())
    assert set(rooms) == {f"{folder}/" for folder in (*FOLDERS, "tests")}
    heads = [line for line in fence(ROOT / "docs" / "house.md", "tree").splitlines() if not line.startswith(" ")]
    assert {name: said for name, said in rooms.items() if name != "tests/"} == dict(
        line.split(maxsplit=1) for line in heads
    ), "the README says of a room what docs/house.md says"
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_the_error_tree_is_drawn_completely() -> None:
    assert {kind.__name__ for kind in error_kinds()} == set(drawn_causes())
    codes = [kind.code for kind in error_kinds()]
    assert len(set(codes) - {"order-refused"}) >= len(codes) - 1, "two errors share a code"


def markdown() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", markdown(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", markdown(), ids=lambda page: page.name)
def test_commands_in_the_docs_exist_with_their_options(page: Path) -> None:
    for line in page.read_text(encoding="utf-8").splitlines():
        for program, name, rest in re.findall(r"\b(fl-(?:client|server|study)) ([a-z]+)([^`|#]*)", line):
            assert unknown_in(program, name, rest) is None, f"{page.name}: {program} {name} {rest}"


def unknown_in(program: str, name: str, rest: str) -> str | None:
    """The command or option that there is not, in words that stand for a command line; None if all are there."""
    app = PROGRAMS[program][0]
    if name not in command_names(app):
        return name
    inner = getattr(command_of(app, name), "commands", {})
    words = rest.split()
    if inner and (not words or not words[0].isalpha()):
        return None  # the group as such
    command = inner.get(words[0]) if inner else command_of(app, name)
    if command is None:
        return words[0]
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    return next((option for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", rest) if option not in options), None)


def test_commands_that_messages_name_exist_with_their_options() -> None:
    """What a remedy, a help text, a template or a comment quotes in backticks."""
    for folder in FOLDERS[:-1]:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".html"):
                text = path.read_text(encoding="utf-8")
                for program, name, rest in re.findall(r"`(fl-(?:client|server|study)) ([a-z]+)([^`{]*)", text):
                    assert unknown_in(program, name, rest) is None, f"{path.name}: {program} {name} {rest}"
    assert unknown_in("fl-study", "run", "--watch") == "--watch" and unknown_in("fl-study", "obey", "") == "obey"


def command_of(app: typer.Typer, name: str) -> Any:
    group: Any = typer.main.get_command(app)
    return group.commands[name]


def test_make_targets_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for page in markdown():
        for target in re.findall(r"`make ([a-z]+)`|^make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert "".join(target) in targets, f"{page.name}: make {''.join(target)}"


def test_documentation_does_not_name_this_machine() -> None:
    for page in markdown():
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(?:home|root|work)/", text), page.name


def write_pages() -> None:
    for name, make in pages().items():
        (ROOT / "docs" / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(textwrap.dedent(__doc__))
    write_pages()
