"""What the docs say is what the programs do: reference pages equal the code, the README's tree the files, links their targets.

Four pages are made from the code, not by hand: commands.md from the programs' own help, configuration.md from the pydantic
models, errors.md from the error tree, wire.md from the message classes. After a change of any of these:

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
from fl_server import cli as server_cli  # noqa: E402
from fl_server import research as research_cli  # noqa: E402
from fl_server.roster import ServerFile  # noqa: E402
from models.study import Document, Study  # noqa: E402
from privacy import errors, wire  # noqa: E402

PROGRAMS: dict[str, tuple[typer.Typer, str, str]] = {
    "fl-client": (client_cli.app, "fl_client.cli", "for the hospital"),
    "fl-server": (server_cli.app, "fl_server.cli", "for the coordinator"),
    "fl-study": (research_cli.app, "fl_server.research", "for the researcher"),
}
DOCUMENTS: dict[str, tuple[type[Document], str]] = {
    "study.yaml": (Study, "the researcher"),
    "site.yaml": (SiteFile, "the hospital; it never leaves it"),
    "server.yaml": (ServerFile, "the coordinator"),
}
GENERATED = "<!-- Made from the code by `python tests/test_docs.py --write`; change the code, not this page. -->"
SCREEN = {"COLUMNS": "96", "NO_COLOR": "1", "TERM": "dumb"}  # one width and no colours, so that the help is the same everywhere
FOLDERS = ("fl_server", "fl_client", "models", "privacy", "configs", "deploy", "docs")
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
    parts = [GENERATED, "# Commands", "What each program prints for `--help`. Options win over files, files over defaults."]
    for program, (app, _, whom) in PROGRAMS.items():
        parts += [f"## {program}: {whom}", fenced(help_of(program))]
        for name in command_names(app):
            parts += [f"### {program} {name}", fenced(help_of(program, name))]
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
        "Three YAML files, three owners. An unknown key, a wrong type or a value out of range is an error that names file, "
        "line and the nearest known key. There are no other settings and no environment variables.",
    ]
    for name, (kind, owner) in DOCUMENTS.items():
        schema = kind.model_json_schema()
        parts += [f"## {name}", f"Owned by {owner}. {prose(schema.get('description', ''))}"]
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
        child, suffix = section_in(field, defs)
        meaning = prose(field.get("description", ""))
        if child is not None:
            inner.append((child, f"{dotted}{suffix}."))
            meaning = meaning or f"see [below](#{anchor(dotted + suffix)})"
        required = key in schema.get("required", [])
        default = "required" if required else f"`{shown(field['default'])}`" if "default" in field else "as below"
        rows.append(f"| `{dotted}` | {cell(values(field, defs))} | {cell(default)} | {cell(meaning)} |")
    yield above.rstrip("."), prose(schema.get("description", "")), rows
    for child, prefix in inner:
        yield from sections(child, defs, prefix)


def section_in(field: dict[str, Any], defs: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The section that a field holds, and what stands between its key and the keys inside (".NAME" for a mapping)."""
    for option in (field, *field.get("anyOf", []), *field.get("allOf", [])):
        if "$ref" in option:
            return defs[option["$ref"].rsplit("/", maxsplit=1)[1]], ""
        if isinstance(option.get("additionalProperties"), dict) and "$ref" in option["additionalProperties"]:
            return defs[option["additionalProperties"]["$ref"].rsplit("/", maxsplit=1)[1]], ".NAME"
    return None, ""


def values(field: dict[str, Any], defs: dict[str, Any]) -> str:
    """What a field takes, in words: type, choices and bounds."""
    if "anyOf" in field:
        return " or ".join(values(option, defs) for option in field["anyOf"])
    if "const" in field or "enum" in field:
        return " or ".join(f"`{shown(value)}`" for value in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return "section"
    kind = field.get("type", "")
    if kind == "array":
        return "list of " + values(field["items"], defs) + span(field, "minItems", "maxItems", " entries")
    if kind == "object":
        inside = field.get("additionalProperties")
        return "NAME: section" if isinstance(inside, dict) and "$ref" in inside else f"word: {values(inside or {}, defs)}"
    if kind == "string":
        pattern = field.get("pattern")
        return f"text like `{pattern}`" if pattern else "text" + span(field, "minLength", "maxLength", " characters")
    words = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`", "null": "nothing"}
    return words.get(kind, kind) + span(field, "minimum", "maximum", "")


def span(field: dict[str, Any], low: str, high: str, unit: str) -> str:
    """", 1 to 100 entries" from the bounds of a field."""
    least = f"{field[low]:g}" if low in field else f"above {field['exclusiveMinimum']:g}" if "exclusiveMinimum" in field else ""
    most = f"{field[high]:.12g}" if high in field else f"below {field['exclusiveMaximum']:.12g}" if "exclusiveMaximum" in field else ""
    if least and most:
        return f", {least} to {most}{unit}"
    return f", at least {least}{unit}" if least else f", at most {most}{unit}" if most else ""


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return "as below"
    return str(value).lower() if isinstance(value, bool) or value is None else f"{value}".replace("'", "")


def anchor(dotted: str) -> str:
    """GitHub's anchor for the heading "### FILE: DOTTED"; resolved to the file in `configuration_page` by the caller."""
    return dotted


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def prose(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split())
