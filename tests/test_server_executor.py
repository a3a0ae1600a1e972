"""The executor takes every waiting run in its turn, whatever happens to the one before."""

from pathlib import Path
from typing import Any

import pytest
from test_server_run import study

from fl_server import executor
from fl_server.roster import Home
from fl_server.run import Run
from fl_server.settings import ServerFile
from privacy.errors import DocumentError


class Enough(BaseException):
    """Ends the endless loop of `execute`."""


@pytest.mark.parametrize("trouble", [DocumentError("damaged checkpoint"), ValueError("unforeseen")])
def test_a_run_that_cannot_be_carried_out_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    home = Home.found(tmp_path / "c", ServerFile(version=1, name="test", host="127.0.0.1"))
    names = [Run.create(home.runs, study(), "ada", ["north"]).run_id for _ in range(2)]
    first = sorted(names)[0]
    tried: list[str] = []
    pauses: list[float] = []

    def carry_out(root: Path, run_id: str, *_: Any) -> None:
        tried.append(run_id)
        if run_id == first:
            raise trouble

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise Enough

    monkeypatch.setattr(executor, "carry_out", carry_out)
    monkeypatch.setattr("fl_server.executor.time.sleep", sleep)
    with pytest.raises(Enough):
        executor.execute(tmp_path / "c", 1, b"")
    assert sorted(tried[:2]) == sorted(names) and len(tried) == 4
    assert pauses[1] > pauses[0]  # and it does not spin
