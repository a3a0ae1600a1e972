"""Containers, units and chart say what the programs say: versions, ports, commands, and no more rights than they need."""

import configparser
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from test_docs import PROGRAMS, command_names, command_of

from fl_server.settings import ServerFile

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
GATEWAY, SERVICE = (ServerFile.model_fields[name].default for name in ("gateway_port", "service_port"))
UNITS = {"fl-client": DEPLOY / "systemd" / "fl-client.service", "fl-server": DEPLOY / "systemd" / "fl-server.service"}


def compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return read


def text(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def is_a_command(words: list[str]) -> bool:
    """Whether the words are a command of ours with options that it has."""
    app = PROGRAMS[Path(words[0]).name][0]
    if words[1] not in command_names(app):
        return False
    command: typer.core.TyperCommand = command_of(app, words[1])
    options = {option for parameter in command.params for option in parameter.opts}
    return {word for word in words if word.startswith("--")} <= options


def test_the_version_is_one() -> None:
    chart = yaml.safe_load(text("helm/isocenter/Chart.yaml"))
    values = yaml.safe_load(text("helm/isocenter/values.yaml"))
    assert chart["version"] == chart["appVersion"] == values["image"]["tag"] == VERSION
    assert {service["image"].split(":")[1] for service in compose()["services"].values()} == {VERSION}
    assert f"ARG RELEASE=dist/isocenter-{VERSION}\n" in text("Dockerfile")
    assert set(re.findall(r"isocenter-(?:node|coordinator):([\d.]+)", text("Dockerfile"))) == {VERSION}


def test_the_ports_are_those_of_the_settings() -> None:
    values = yaml.safe_load(text("helm/isocenter/values.yaml"))["service"]
    assert (values["gatewayPort"], values["servicePort"]) == (GATEWAY, SERVICE)
    assert f"EXPOSE {GATEWAY} {SERVICE}\n" in text("Dockerfile")
    assert compose()["services"]["coordinator"]["ports"] == [f"{GATEWAY}:{GATEWAY}", f"{SERVICE}:{SERVICE}"]
    assert not any("ports" in compose()["services"][name] for name in ("node", "dashboard")), (
        "nobody connects to a hospital"
    )


@pytest.mark.parametrize("name", ["coordinator", "dashboard", "node"])
def test_a_container_has_no_right_and_a_root_that_cannot_be_written(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]  # and so no seccomp=unconfined
    assert not {"privileged", "cap_add", "devices", "pid", "user"} & set(service)
    assert "USER 10001:10001" in text("Dockerfile")
    images = [volume for volume in service["volumes"] if not volume.startswith("/srv/isocenter:")]
    assert all(volume.endswith(":ro") for volume in images)


def test_what_containers_and_units_start_is_a_command() -> None:
    started = [
        [word.strip('" ') for word in line.split(",")]
        for line in re.findall(r"^CMD \[(.*)\]$", text("Dockerfile"), re.MULTILINE)
    ]
    started += [service["command"] for service in compose()["services"].values() if "command" in service]
    started += [re.findall(r"^ExecStart=(.+)$", path.read_text(), re.MULTILINE)[0].split() for path in UNITS.values()]
    started += [
        line.split(", ")
        for line in re.findall(
            r"command: \[(fl-.*)\]$", text("helm/isocenter/templates/coordinator.yaml"), re.MULTILINE
        )
    ]
    assert len(started) == 7
    for words in started:
        assert is_a_command(words), words
    assert not is_a_command(["fl-server", "start", "--no-such-option"]) and not is_a_command(["fl-client", "obey"])


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_holds_no_privilege_and_writes_in_one_folder(name: str) -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS[name])
    unit = parser["Service"]
    assert unit["User"] == "isocenter" and unit["NoNewPrivileges"] == "true"
    assert unit["CapabilityBoundingSet"] == unit["AmbientCapabilities"] == ""
    assert unit["ProtectSystem"] == "strict" and unit["ReadWritePaths"] == "/srv/isocenter"
    assert unit["UMask"] == "0077" and unit["ProtectHome"] == "true"
    # What trains confines itself, and hides the keys in a mount namespace of its own user; nothing else is left open.
    assert unit["RestrictNamespaces"] == ("user mnt" if name == "fl-client" else "true")
    calls = re.findall(r"^SystemCallFilter=(.*)$", UNITS[name].read_text(), re.MULTILINE)
    assert calls == ["@system-service", "~@privileged", *(["@mount seccomp"] if name == "fl-client" else [])]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_reads_a_unit_without_a_complaint(name: str, tmp_path: Path) -> None:
    program = tmp_path / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / f"{name}.service"
    copy.write_text(UNITS[name].read_text().replace(f"/opt/isocenter/bin/{name}", str(program)))
    ran = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("helm") is None, reason="needs helm")
def test_the_chart_wants_a_name_and_renders() -> None:
    words = ["helm", "template", "fl", str(DEPLOY / "helm" / "isocenter")]
    for host, good in (("fl.example.org", True), ("", False), ("192.0.2.10", False)):
        ran = subprocess.run([*words, "--set", f"host={host}"], capture_output=True, text=True, timeout=60, check=False)
        assert (ran.returncode == 0) is good, ran.stderr
        if good:
            kinds = {document["kind"] for document in yaml.safe_load_all(ran.stdout)}
            assert kinds == {"StatefulSet", "Service", "NetworkPolicy"}
