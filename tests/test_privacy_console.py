"""The common entry of the commands, as a shell sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shell(program: str, *words: str, cwd: Path = ROOT, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command line defined by `program` in a process of its own."""
    begin = "import os, typer; from privacy import console, errors; app = typer.Typer(pretty_exceptions_enable=False)\n"
    end = "\nconsole.run(app)"
    environment = {**os.environ, "PYTHONPATH": str(path), "COLUMNS": "80", "NO_COLOR": "1"}
    command = [sys.executable, "-c", begin + program + end, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=60)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("errors.DocumentError('[red]line 3[/red]: bad')", "[red]line 3[/red]: bad\nCorrect the line named above"),
        ("errors.TrustError('no', remedy='Do [this].')", "no\nDo [this]."),
        ("errors.ImageLeftOut('empty')", "empty\n"),
        ("PermissionError(13, 'Permission denied', '/x/y')", "/x/y: Permission denied\nCheck the path"),
    ],
)
def test_an_error_is_two_lines_and_exit_code_1(raised: str, told: str) -> None:
    done = shell(f"@app.command()\ndef go(): raise {raised}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(told)
    assert "Traceback" not in done.stderr


def test_a_mistake_of_ours_is_not_hidden() -> None:
    done = shell("@app.command()\ndef go(): raise RuntimeError('ours')")
    assert done.returncode == 1
    assert "RuntimeError: ours" in done.stderr


def test_usage_errors_exit_with_2_and_success_with_0() -> None:
    assert shell("@app.command()\ndef go(): pass", "--surprise").returncode == 2
    assert shell("@app.command()\ndef go(): pass").returncode == 0


def test_nothing_phones_home() -> None:
    names = "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"
    done = shell(f"@app.command()\ndef go(): print([os.environ[name] for name in {names}])")
    assert done.stdout == "['0', '1']\n"


def test_a_foreign_package_of_our_name_stops_every_command(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("print('foreign code ran')")
    program = "import sys; sys.path.insert(0, os.getcwd())\n@app.command()\ndef go(): print('ran')"
    done = shell(program, cwd=tmp_path)
    assert done.returncode == 1
    assert "'models'" in done.stderr
    assert "ran" not in done.stdout


def test_version_names_the_command() -> None:
    code = "from fl_server import cli; cli.main()"
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 0
    assert len(done.stdout.split()) >= 2
