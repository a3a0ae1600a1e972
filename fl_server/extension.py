"""More rounds than a study says: a study of its own that starts where a finished run ended.

A signed study says how many rounds it has, and sites approved that number and its ε. So more of them is a new decision: another
digest, approved anew, charged anew against everything that the patients' caps permit.
"""

from pathlib import Path

import yaml

from fl_server import weights
from fl_server.roster import Home
from fl_server.run import read_facts
from models.study import Study
from privacy.errors import RunError, StudyConflict

TITLE_MOST = 150  # characters of the old title, so that the new one is none too long


def extended(home: Home, folder: Path, rounds: int) -> tuple[str, weights.Held]:
    """(a study as YAML, the weights that it starts from): `rounds` more of the finished run in `folder`.

    The weights are the run's released model, kept from now on. Keys of the sites and noise are left to `fl-study submit`.
    Raises RunError unless the run has finished and trained a model; StudyConflict if the new study contradicts itself.
    """
    facts, model = read_facts(folder), folder / "model.safetensors"
    before = Study.from_canonical((folder / "study.json").read_bytes())
    if facts["state"] not in ("complete", "partial") or not model.is_file() or not before.training.rounds:
        raise RunError(
            f"run {folder.name} is {facts['label']}, and there is no model that it trained and released",
            remedy="Let it finish first (`fl-server resume RUN`, `fl-server watch RUN`); only a run that trained is extended.",
        )
    if before.strategy.local_norms:
        raise StudyConflict(
            "with strategy: fedbn each site keeps norm layers of its own, and a run has no whole model to go on from",
            remedy="Submit a study with more rounds from the start.",
        )
    kept = weights.add(home.root, model)
    told = before.model_dump(mode="json", exclude_defaults=True, exclude={"roster", "aggregator"})
    told["title"] = f"{before.title[:TITLE_MOST]} ({rounds} more rounds)"
    told["training"] = told["training"] | {"rounds": rounds}
    told["network"] = told.get("network", {}) | {"initial": {"sha256": kept.sha256, "study": before.digest}}
    if before.privacy != "none":
        told["privacy"].pop("noise_multiplier", None)
    Study.model_validate(told).check()
    head = f"# {rounds} more rounds of run {folder.name}. Read it, then: fl-study submit FILE\n"
    return head + yaml.safe_dump(told, sort_keys=False, allow_unicode=True), kept
