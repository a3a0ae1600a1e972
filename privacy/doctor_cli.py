"""How findings of `doctor` are shown, the same for all three commands; exit code 1 if one is trouble."""

from collections.abc import Sequence

import typer
from rich.console import Console

from privacy.doctor import Check, Examination, to_json

COLOURS = {"ok": "green", "advice": "yellow", "trouble": "red"}
SUBJECT_WIDTH = 14


def report(checks: Sequence[Check], as_json: bool) -> None:
    """Look, and show what was found. Raises typer.Exit with code 1 if something is trouble."""
    screen = Console(stderr=True)
    with screen.status("looking ...") as status:

        def tell(done: int, left: list[str]) -> None:
            status.update(f"{done} of {len(checks)} looked at; still: {', '.join(left[:5])}")

        findings = Examination(checks).run(tell)
    trouble = sum(each.state == "trouble" for each in findings)
    if as_json:
        typer.echo(to_json(findings))
    else:
        console = Console(highlight=False)
        for each in findings:
            console.print(f"[{COLOURS[each.state]}]{each.state:<7}[/] {each.subject:<{SUBJECT_WIDTH}} ", end="")
            console.print(each.sentence, markup=False, soft_wrap=True)
            if each.remedy:
                console.print(f"{'':<8}{'':<{SUBJECT_WIDTH}} → {each.remedy}", markup=False, soft_wrap=True)
        advice = sum(each.state == "advice" for each in findings)
        said = f"{trouble} in trouble, {advice} to look at." if trouble or advice else "Nothing is in the way."
        console.print(said, style=COLOURS["trouble" if trouble else "advice" if advice else "ok"])
    if trouble:
        raise typer.Exit(1)
