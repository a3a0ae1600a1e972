"""How findings of `doctor` are shown, the same for all three commands; exit code 1 if one is trouble."""

from collections.abc import Sequence

import typer

from privacy import screen
from privacy.doctor import Check, Examination, to_json

COLOURS = {"ok": "green", "advice": "yellow", "trouble": "red"}


def report(checks: Sequence[Check], as_json: bool) -> None:
    """Look, and show what was found. Raises typer.Exit with code 1 if something is trouble."""
    if show(checks, as_json):
        raise typer.Exit(1)


def show(checks: Sequence[Check], as_json: bool) -> int:
    """Look, and show what was found; how much of it is trouble."""
    with screen.busy("looking") as now:

        def tell(done: int, left: list[str]) -> None:
            now(f"{done} of {len(checks)} looked at; still: {', '.join(left[:5])}")

        findings = Examination(checks).run(tell)
    trouble = sum(each.state == "trouble" for each in findings)
    if as_json:
        typer.echo(to_json(findings))
    else:
        for each in findings:
            remedy = f"\n→ {each.remedy}" if each.remedy else ""
            screen.finding(each.state, COLOURS[each.state], each.subject, f"{each.sentence}{remedy}")
        advice = sum(each.state == "advice" for each in findings)
        said = f"{trouble} in trouble, {advice} to look at." if trouble or advice else "Nothing is in the way."
        screen.say(said, COLOURS["trouble" if trouble else "advice" if advice else "ok"])
    return trouble
