"""The one strict reader of Isocenter's YAML files, and what their sections are made of.

An unknown key, a wrong type or a value out of range is a `DocumentError` that names file, line and the nearest known key.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, StringConstraints, Tag, ValidationError

from privacy.errors import DocumentError

YAML_BYTES_MAX = 256 * 1024  # a study is a page; anything larger is a mistake or an attack on the parser

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
"""Names that may leave a site: lower case, short, without blanks, dots or slashes, so never a path or a person's name."""


class Document(BaseModel):
    """A section of a YAML file: immutable, and unknown keys are errors. Types are strict: "3" is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


D = TypeVar("D", bound=Document)


def read(kind: type[D], path: Path) -> D:
    """Read one YAML document strictly. Errors name the file, the line and, for an unknown key, the nearest known one."""
    return parse(kind, text_of(path), str(path))


def text_of(path: Path) -> str:
    """What stands in a document; raises DocumentError if there is none, or none of ours."""
    if not path.is_file():
        raise DocumentError(f"{path}: there is no such file", remedy="Check the path.")
    if path.stat().st_size > YAML_BYTES_MAX:
        raise DocumentError(f"{path}: larger than {YAML_BYTES_MAX // 1024} KiB; this is not one of our documents")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse(kind: type[D], text: str, name: str) -> D:
    """`read` for text already in memory; `name` stands where the file name would in messages."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader that also refuses aliases and repeated keys
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DocumentError(f"{name}, line {line}: {error.problem or 'not YAML'}") from None
    except (yaml.YAMLError, RecursionError):
        raise DocumentError(f"{name}: not YAML") from None
    except (ValueError, LookupError, TypeError, AttributeError):  # PyYAML's own, for tags and numbers it cannot convert
        raise DocumentError(f"{name}: a value does not fit its tag, or has too many digits") from None
    if not isinstance(data, dict):
        raise DocumentError(f"{name}, line 1: expected keys and values, found {type(data).__name__}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise DocumentError("\n".join(_explain(kind, root, name, dict(e)) for e in error.errors())) from None


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases (they make YAML bombs), with repeated keys refused (the last would win in silence).

    Only `true` and `false` are booleans: label words such as yes, no, on and off stay words.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # PyYAML's stubs leave it out
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed here", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))


def _explain(kind: type[BaseModel], root: yaml.Node | None, name: str, error: dict[str, Any]) -> str:
    """One sentence for one pydantic error: file, line, dotted key, what is wrong, nearest known key."""
    place = [part for part in error["loc"] if not _is_tag(part)]
    line = _line(root, place)
    dotted = ".".join(str(part) for part in place)
    if error["type"] == "extra_forbidden":
        known = sorted(_known_keys(kind, list(error["loc"][:-1])))
        near = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
        return f"{name}, line {line}: unknown key {dotted!r}{hint}"
    if error["type"] == "missing":
        return f"{name}, line {line}: the key {dotted!r} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = error.get("input")
    shown = f" (found {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{name}, line {line}: {dotted}: {message[:1].lower()}{message[1:]}{shown}"


def _line(node: yaml.Node | None, place: list[Any]) -> int:
    """1-based line of the key at `place`, or of the nearest section above it."""
    line = node.start_mark.line + 1 if node is not None else 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            hit = next(((k, v) for k, v in node.value if str(k.value) == str(part)), None)
            if hit is None:
                return line
            line, node = hit[0].start_mark.line + 1, hit[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _known_keys(kind: type[BaseModel], place: list[Any]) -> list[str]:
    """Field names of the section at `place` below `kind`, through optional and mapped sections.

    A tag in `place` says which of several kinds of section was meant.
    """
    section: Any = kind
    for number, part in enumerate(place):
        if _is_tag(part):
            continue
        fields = getattr(section, "model_fields", {})
        annotation = fields[part].annotation if part in fields else section
        tag = place[number + 1] if number + 1 < len(place) and _is_tag(place[number + 1]) else None
        section = _document_in(annotation, tag) or section
    return list(getattr(section, "model_fields", {}))


def _is_tag(part: Any) -> bool:
    return isinstance(part, str) and "[" in part


def _document_in(annotation: Any, tag: str | None = None) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        tags = [mark.tag for mark in getattr(argument, "__metadata__", ()) if isinstance(mark, Tag)]
        if tag is not None and tags and tag not in tags:
            continue
        if found := _document_in(argument):
            return found
    return None
