"""One look for the three commands: every table can be read on 80 columns, and no value is cut in two in a pipe.

A terminal gets tables as wide as it is, folded between words; where columns would become too narrow to read, each row becomes a
few lines, one for each column. A pipe gets tables as wide as they need (COLUMNS, where it is set, holds for both). Colours are
for terminals, and NO_COLOR switches them off, as rich does it. What was asked for goes to standard output; what tells how far it
is, to standard error, and only where that is a terminal.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 10_000
READABLE = 14  # columns: words that are longer, or text that is narrower, make no table
GAP = 2
NEVER_CUT = frozenset(("digest", "run", "report", "study", "name", "line", "time", "last", "version", "SHA-256"))
"""Columns of what people copy or compare."""

Bars = Callable[[str, int, int], None]


class Screen(Console):
    """rich's console, in which names and sentences are no markup, and which is as wide as a table needs in a pipe."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False)

    @property
    def size(self) -> ConsoleDimensions:
        found = super().size
        chosen = self._width is not None or self._environ.get("COLUMNS", "").isdigit()
        return found if self.is_terminal or chosen else ConsoleDimensions(PIPE_WIDTH, found.height)

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        self._width, self._height = new


def say(sentence: str, style: str | None = None) -> None:
    """One sentence, whole in a pipe, and broken between words on a terminal."""
    _print(Screen(), sentence, style)


def tell(sentence: str, style: str | None = None) -> None:
    """The same for a person, beside what a command prints for programs."""
    _print(Screen(stderr=True), sentence, style)


def _print(screen: Screen, sentence: str, style: str | None) -> None:
    screen.print(Text(clean(sentence), style or ""), soft_wrap=not screen.is_terminal)


def clean(text: str) -> str:
    """`text` without what could move a cursor, colour a screen or turn the direction of writing; line breaks stay."""
    return "".join(sign if sign.isprintable() or sign == "\n" else " " if sign == "\t" else "?" for sign in text)


class Rows(Table):
    """rich's table, whose cells are text as it is: no markup, and nothing for the terminal to obey."""

    def add_row(
        self,
        *cells: RenderableType | None,
        style: StyleType | None = None,
        end_section: bool = False,
    ) -> None:
        plain = (Text(clean(cell)) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*plain, style=style, end_section=end_section)


def table(*columns: str, title: str | None = None) -> Table:
    made = Rows(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="")
    for column in columns:
        made.add_column(column, overflow="fold", no_wrap=column in NEVER_CUT)
    return made


def show(made: Table, console: Console | None = None) -> None:
    """Print a table; as blocks of lines, one for each column, where the screen is too narrow for it."""
    screen = console or Screen()
    if _needed(made) <= screen.width:
        screen.print(made, markup=False, highlight=False)
        return
    if made.title:
        screen.print(made.title, markup=False, highlight=False)
    heads = [str(column.header) for column in made.columns]
    for number, row in enumerate(zip(*(column.cells for column in made.columns), strict=True)):
        if number:
            screen.print()
        facts([(head, str(cell)) for head, cell in zip(heads, row, strict=True) if str(cell)], screen)


def _needed(made: Table) -> int:
    """The least width at which each column can be read: its longest word, or READABLE of a text that is longer."""
    widths = []
    for column in made.columns:
        cells = [str(column.header), *(str(cell) for cell in column.cells)]
        longest = max(cell_len(line) for cell in cells for line in cell.splitlines() or [""])
        words = max((cell_len(word) for cell in cells for word in cell.split()), default=0)
        widths.append(longest if column.no_wrap else max(words, min(longest, READABLE)))
    return sum(widths) + GAP * (len(widths) - 1)


def facts(rows: Iterable[tuple[str, str]], console: Console | None = None) -> None:
    """Named sentences under each other; what is too long for a line goes on below itself, beside its name."""
    screen, listed = console or Screen(), list(rows)
    margin = max((cell_len(name) for name, _ in listed), default=0) + GAP
    for name, text in listed:
        _beside(screen, Text(clean(name).ljust(margin), "bold"), text)


def finding(mark: str, colour: str, subject: str, sentence: str) -> None:
    """One line of a check: a mark, what was looked at, and what was found."""
    _beside(Screen(), Text.assemble((mark.ljust(8), colour), subject.ljust(14)), sentence)


def _beside(screen: Console, head: Text, text: str) -> None:
    margin = head.cell_len
    for line in Text(clean(text)).wrap(screen, max(READABLE, screen.width - margin)):
        line.rstrip()
        screen.print(Text.assemble(head, line), soft_wrap=True)
        head = Text(" " * margin)


@contextmanager
def busy(what: str) -> Iterator[Callable[[str], None]]:
    """A mark that turns while something takes time; the function that is given says what it is now."""
    with Screen(stderr=True).status(f"{what} …") as status:
        yield lambda now: status.update(f"{now} …")


@contextmanager
def bars() -> Iterator[Bars]:
    """A bar for each stage: the function that is given takes (stage, done, total)."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = Screen(stderr=True)
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as shown:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=total)
            shown.update(tasks[stage], completed=done, total=total)

        yield update
