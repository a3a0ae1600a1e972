"""What a study that counts has found: numbers with their bounds, who is in them, and how they compare to a census.

The document comes from the coordinator and is checked as strictly as what sites send: numbers have to be sums of tens that agree
with each other, and the study in it has to be the one that its digest names.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from pydantic import ValidationError

from fl_server.census import Census, Comparison, compare
from fl_server.run import counted_label
from models import questions
from models.questions import CELLS, TEN, Answer, Counting
from models.study import Study
from privacy import screen
from privacy.errors import DocumentError, MessageMalformed
from privacy.screen import Screen

FILE_BYTES_MAX = 16 * 1024 * 1024
console = Screen()


@dataclass(frozen=True)
class Found:
    """The checked results of one run that counted."""

    results: dict[str, Any]
    study: Study
    task: Counting
    contributors: list[str]
    answers: dict[str, Answer]

    @classmethod
    def of(cls, results: dict[str, Any]) -> "Found":
        """Raises DocumentError for the results of a study that trains, MessageMalformed for what contradicts itself."""
        try:
            if results.get("kind") != "counting":
                raise DocumentError(
                    "these are the results of a study that trains", remedy="Read them with `fl-study report`."
                )
            study = Study.model_validate(results["study"])
            if not isinstance(study.task, Counting) or results["version"] != 1 or study.digest != results["digest"]:
                raise ValueError("another study")
            contributors, missing = list(results["contributors"]), dict(results["missing"])
            if sorted([*contributors, *missing]) != sorted(study.all_sites) or not contributors:
                raise ValueError("other sites")
            if results["label"] != counted_label(study, contributors, missing):
                raise ValueError("another label")
            answers = _answers(study.task, results["answers"])
            if {name: answer.to_json(len(contributors)) for name, answer in answers.items()} != results["answers"]:
                raise ValueError("other bounds")
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
            raise MessageMalformed(f"the results of this run contradict themselves ({error})") from None
        return cls(results, study, study.task, contributors, answers)

    @classmethod
    def open(cls, path: Path) -> "Found":
        """From a file cohort.json or results.json."""
        try:
            if path.stat().st_size > FILE_BYTES_MAX:
                raise ValueError
            document = json.loads(path.read_bytes())
            document.pop("census", None)
        except (OSError, ValueError, AttributeError, RecursionError):
            raise DocumentError(
                f"{path}: no results can be read there", remedy="Give a run, a digest, or cohort.json."
            ) from None
        return cls.of(document)

    def compared(self, census: Census) -> dict[str, dict[questions.Attribute, Comparison]]:
        """Question -> attribute -> comparison."""
        return {name: compare(answer, census, len(self.contributors)) for name, answer in self.answers.items()}

    def to_json(self, census: Census | None) -> dict[str, Any]:
        if census is None:
            return self.results
        found = {
            name: {attribute: comparison.to_json() for attribute, comparison in rows.items()}
            for name, rows in self.compared(census).items()
        }
        return self.results | {"census": found}


def _answers(task: Counting, told: dict[str, Any]) -> dict[str, Answer]:
    numbers: list[int] = []
    for name in task.names:
        answer = told[name]
        numbers += [answer[key]["least"] for key in ("patients", "images", "undetermined")]
        numbers += [answer["breakdown"][a][cell]["least"] for a in task.breakdown for cell in CELLS[a]]
    if not all(type(number) is int for number in numbers):
        raise ValueError("numbers that are none")
    return questions.read(task, np.array(numbers, np.int64))


def write(found: Found, census: Census | None, out: Path) -> Path:
    """cohort.json, and cohort.csv with a line for each number, in the folder `out`; the first of them."""
    out.mkdir(parents=True, exist_ok=True)
    page = out / "cohort.json"
    page.write_text(json.dumps(found.to_json(census), indent=1), encoding="utf-8")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("question", "attribute", "category", "least", "most"))
    for name, answer in found.results["answers"].items():
        writer.writerow((name, "patients", "all", answer["patients"]["least"], answer["patients"]["most"]))
        writer.writerow((name, "images", "all", answer["images"]["least"], ""))
        writer.writerow((name, "patients", "undetermined", *answer["undetermined"].values()))
        for attribute, cells in answer["breakdown"].items():
            writer.writerows((name, attribute, cell, *number.values()) for cell, number in cells.items())
    (out / "cohort.csv").write_text(table.getvalue(), encoding="utf-8")
    return page


def say(found: Found, census: Census | None, as_json: bool) -> None:
    """Print the answers as tables, or the whole document."""
    if as_json:
        typer.echo(json.dumps(found.to_json(census)))
        return
    for sentence in sentences(found):
        _line(sentence)
    table = screen.table("question", "who", "patients", "images", "undetermined")
    for name, answer in found.answers.items():
        words = found.task.questions[name].words
        table.add_row(name, words, *map(shown, (answer.patients, answer.images, answer.undetermined)))
    screen.show(table, console)
    if found.task.breakdown:
        broken = screen.table("patients by", "", *found.answers)
        for attribute in found.task.breakdown:
            rows = [(cell, [a.breakdown[attribute][cell] for a in found.answers.values()]) for cell in CELLS[attribute]]
            for number, (cell, values) in enumerate(row for row in rows if any(row[1])):
                broken.add_row("" if number else attribute, cell, *map(shown, values))
        screen.show(broken, console)
    if census is not None:
        _say_census(found, census)


def sentences(found: Found) -> Iterator[str]:
    """Who is in the numbers, and what they mean."""
    here, label = len(found.contributors), found.results["label"]
    yield f"{found.study.title}: {label}, {found.results['finished'][:10]}, over {', '.join(found.contributors)}"
    yield (
        f"Each site rounded its numbers down to tens, so each is a lower bound; a true number of patients is at most "
        f"{(TEN - 1) * here} higher ({TEN - 1} for each of {here} sites). Images of fewer than ten patients are not in it. "
        "`< 10 a site`: no site has ten, and all of them together may. Groups with nothing else are not listed."
    )
    if here < len(found.study.all_sites):
        yield "This is not the answer of all sites: nothing is known of the missing ones."
    yield "undetermined: patients who would fit if what is not known of them were so; they are in no other number."


def shown(number: int) -> str:
    """A sum for people. 0 says that every site has fewer than ten, not that there is nobody."""
    return f">= {number}" if number else "< 10 a site"


def _say_census(found: Found, census: Census) -> None:
    _line(
        "Jensen-Shannon distance to the census (0: the same shares, 1: nothing in common); in brackets, for any true numbers "
        "behind the rounded ones:"
    )
    for name, rows in found.compared(census).items():
        for attribute, comparison in rows.items():
            told = "no group has ten at any site" if comparison.distance is None else f"{comparison.distance:.3f}"
            left = ", ".join(f"{number} {cell}" for cell, number in comparison.left_out.items() if number)
            note = f"; left out: {left}" if left else ""
            _line(f"{name}, {attribute}: {told} ({comparison.low:.3f} to {comparison.high:.3f}){note}")
            table = screen.table("", "here", "census", "patients")
            shares = zip(comparison.groups, comparison.shares, comparison.least, comparison.most, strict=True)
            for group, share, least, most in shares:
                own = "-" if share is None else f"{100 * share:.1f} %"
                table.add_row(group.name, own, f"{100 * group.share:.1f} %", f"{least} to {most}")
            screen.show(table, console)
    if other := [name for name in census if name not in found.task.breakdown]:
        _line(f"Not compared, because the study is not broken down by it: {', '.join(other)}")


def _line(sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
