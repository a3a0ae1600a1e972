"""The events of a run on a terminal: bars for rounds and sites, and lines for what nobody should miss; elsewhere lines alone."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from privacy.errors import RunError, RunStopped
from privacy.screen import Screen

console = Screen()


@contextmanager
def progress() -> Iterator[Any]:
    """A function that takes run events and shows them: a bar on a terminal, a line per round elsewhere."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[news]}"),
        console=console,
        disable=not console.is_terminal,
    )
    with bars:
        yield _Teller(bars)


_STAGES = {"keys": "agreeing on keys", "train": "training", "evaluate": "evaluating", "unmask": "opening the sum"}


class _Teller:
    """Turns one run's events into a bar for the rounds and one for each site's part of what is done now.

    A terminal shows the bars, and lines only for what a person should not miss; elsewhere everything is a line.
    """

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.rounds: TaskID | None = None
        self.prepared: TaskID | None = None
        self.sites: dict[str, TaskID] = {}
        self.trained = self.scored = ""

    def __call__(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _preparing(self, event: dict[str, Any]) -> None:
        self.prepared = self.bars.add_task("preparing the sites", total=None, news="")

    def _started(self, event: dict[str, Any]) -> None:
        if self.prepared is not None:
            self.bars.update(self.prepared, visible=False)
        if self.rounds is None:
            self.rounds = self.bars.add_task("rounds", total=event["rounds"], news="")
        self.bars.update(self.rounds, completed=event["round"])
        if event["attempt"] > 1:
            _line(f"continuing after round {event['round']}")

    def _waiting(self, event: dict[str, Any]) -> None:
        _line(f"waiting for {', '.join(event['sites'])}")

    def _asked(self, event: dict[str, Any]) -> None:
        for name in event["sites"]:
            if name not in self.sites:
                self.sites[name] = self.bars.add_task(f"  {name}", total=1, news="")
            self.bars.reset(self.sites[name], total=1, news=_STAGES.get(event["stage"], event["stage"]))

    def _site(self, event: dict[str, Any]) -> None:
        if event["site"] in self.sites:
            stage = _STAGES.get(event["stage"].removesuffix("-report"), event["stage"])
            self.bars.update(self.sites[event["site"]], completed=1, news=f"{stage}: {event['seconds']:.1f} s")

    def _site_missing(self, event: dict[str, Any]) -> None:
        if event["site"] in self.sites:
            self.bars.update(self.sites[event["site"]], news=event["reason"])

    def _left_out(self, event: dict[str, Any]) -> None:
        _line(f"round {event['round']}: the strategy left out {', '.join(event['sites'])}")

    def _flagged(self, event: dict[str, Any]) -> None:
        _line(f"round {event['round']}: the update of {event['site']} is {event['why']} (norm {event['norm']:g})")

    def _restarted(self, event: dict[str, Any]) -> None:
        _line(f"restarted from round {event['first']} after round {event['after']}")

    def _joined(self, event: dict[str, Any]) -> None:
        _line(
            f"round {event['round']}: {', '.join(event['sites'])} approved since the launch, and takes part from here on"
        )

    def _late(self, event: dict[str, Any]) -> None:
        seconds = f" {event['seconds']:.0f} s" if "seconds" in event else ""
        _line(f"round {event['round']}: {event['site']} came{seconds} too late; its report is not used")

    def _checkpoint_damaged(self, event: dict[str, Any]) -> None:
        _line(f"the checkpoint of round {event['round']} was damaged; going on after round {event['goes_on_after']}")

    def _void(self, event: dict[str, Any]) -> None:
        when = f"round {event['round']}, attempt {event['attempt']}"
        _line(f"{when}: the sum was not opened ({event['reason']}); trying again")

    def _scored(self, event: dict[str, Any]) -> None:
        auroc = f"  AUROC {event['auroc']:.3f}" if event["auroc"] is not None else ""
        auroc = auroc if event.get("dice") is None else f"  Dice {event['dice']:.3f}"
        loss = f"{event['loss']:.3f}" if event["loss"] is not None else "unknown"
        self.scored = f"validation loss {loss}{auroc}"
        self._news()
        if not console.is_terminal:
            _line(f"after round {event['round']}: {self.scored}" if event["round"] else f"initial model: {self.scored}")

    def _round_done(self, event: dict[str, Any]) -> None:
        loss = event["train_loss"]
        self.trained = f"training loss {loss:.3f}  " if loss is not None else ""
        if self.rounds is not None:
            self.bars.update(self.rounds, completed=event["round"])
        self._news()
        odd = [f"[{name} missing: {why}]" for name, why in event["missing"].items()]
        odd += [f"[{event['clipped']} values clipped]"] if event["clipped"] > 0 else []
        if not console.is_terminal or odd:
            _line(f"round {event['round']}  {event['seconds']:.1f} s  {self.trained}{'  '.join(odd)}".rstrip())

    def _counted(self, event: dict[str, Any]) -> None:
        if self.rounds is not None:
            self.bars.update(self.rounds, completed=1)
        odd = [f"[{name} missing: {why}]" for name, why in event["missing"].items()]
        _line("  ".join([f"counted in {event['seconds']:.1f} s", *odd]))

    def _news(self) -> None:
        if self.rounds is not None:
            self.bars.update(self.rounds, news=f"{self.trained}{self.scored}".rstrip())

    def _wrong_share(self, event: dict[str, Any]) -> None:
        console.print(f"{event['site']} gave a wrong share of a secret ({event['reason']})", highlight=False)

    def _finished(self, event: dict[str, Any]) -> None:
        style = "green" if event["label"] == "complete" else "yellow"
        auroc = f", test AUROC {event['auroc']:.3f}" if event["auroc"] is not None else ""
        auroc = auroc if event.get("dice") is None else f", test Dice {event['dice']:.3f}"
        console.print(f"Run finished: {event['label']}{auroc}", style=style, highlight=False, markup=False)

    def _stopped(self, event: dict[str, Any]) -> None:
        raise RunStopped(f"the run was stopped by the coordinator after round {event['round']}")

    def _failed(self, event: dict[str, Any]) -> None:
        raise RunError(
            f"the run failed: {event['message']}", remedy="Mend the cause, then `fl-study run` continues it."
        )


def _line(sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def follow(lines: Iterator[str]) -> bool:
    """Show a run's events until its end, and say whether it counted; raises RunError if it failed."""
    counted = False
    with progress() as tell:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # a line in which the coordinator's process ended
            counted |= event["event"] == "counted"
            tell(event)
    return counted
