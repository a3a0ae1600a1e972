"""`fl-study cost`: what a round of a study costs, before there is one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fl_server import costs
from models import contributions
from models.study import Study, read
from privacy import screen


def cost(  # noqa: PLR0913, PLR0917  each parameter is one option
    file: Annotated[Path, typer.Argument(help="The study, a YAML file.")],
    sites: Annotated[int, typer.Option(min=0, max=1000, help="Sites of a round; 0: as the study says.")] = 0,
    parameters: Annotated[float, typer.Option(min=0, max=1e9, help="Of the network; 0: as the study says.")] = 0,
    work_s: Annotated[
        float, typer.Option("--work", min=0, help="Seconds that a site trains in a round; `fl-study simulate` tells.")
    ] = 30.0,
    mbit: Annotated[
        float, typer.Option(min=0.01, help="Mbit/s of the coordinator's line, which all sites share.")
    ] = 100.0,
    latency_ms: Annotated[float, typer.Option("--latency-ms", min=0, help="There and back.")] = 50.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Say what a masked round will take: seconds, bytes, memory, and what breaks first."""
    study = read(Study, file)
    study.check()
    part = study.participation
    setting = costs.Setting(sites or part.sample or len(part.sites), round(parameters), work_s, mbit, latency_ms)
    setting = replace(setting, bits=study.encoding_bits, parameters=setting.parameters or _parameters(study))
    found = costs.predict(setting, part.round_timeout_s, contributions.count_of(study, "train"))
    if as_json:
        print(json.dumps({"setting": setting.__dict__, **found.to_json()}))
        return
    table = screen.table("of a round", "predicted")
    for name, seconds in found.parts_s.items():
        table.add_row(name, f"{seconds:,.1f} s")
    rows = {
        "a site sends and receives": found.site_bytes,
        "the coordinator sends and receives": found.coordinator_bytes,
    }
    rows |= {"memory of the coordinator": found.coordinator_memory, "memory of a site": found.site_memory}
    table.add_row("in all", f"{found.round_s:,.1f} s")
    for name, size in rows.items():
        table.add_row(name, f"{size / 2**20:,.0f} MiB")
    screen.show(table)
    for sentence in (
        f"{setting.sites} sites, {setting.parameters:,} parameters of {setting.bits} bits, {work_s:g} s of training, "
        f"{mbit:g} Mbit/s, {latency_ms:g} ms. Most of a round is the {found.dominated_by}.",
        *(f"Beware: {limit}." for limit in found.limits),
        "An estimate within a factor of two, from constants in docs/benchmarks.md.",
    ):
        screen.say(sentence)


def _parameters(study: Study) -> int:
    from models import networks

    return 1 if study.task.kind == "counting" else int(networks.to_vector(networks.build(study)).size)
