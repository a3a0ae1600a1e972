"""A site for a simulation: a home of its own, with phantoms or with what a real site home has ingested.

A rehearsal never touches the real home's approvals, journal or memory of orders; it only borrows its index and cache, so the
same patients fall into the same splits. Approving is automatic here, because nothing leaves the process.
"""

import time
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from fl_client.cohort import Cohort, Split
from fl_client.consent import Consent, Offer
from fl_client.ingest import Index, ingest
from fl_client.phantom import STRUCTURES, VENDORS, make_hospital
from fl_client.phantom_ct import SCANNERS, make_ct_hospital
from fl_client.policy import Policy
from fl_client.site import Site, Source
from models.labels import LabelTable
from models.study import Study
from privacy import keys
from privacy.calls import Statement

PERMISSIVE: dict[str, object] = {
    "least_protection": "plain",
    "permit_without_privacy": True,
    "tasks": ["classification", "regression", "segmentation", "counting"],
    "epsilon_per_study": 1000,
    "epsilon_per_year": 1000,
    "epsilon_total": 1000,
}
"""The only coordinator is in this process, and its results go no further than whoever holds the images."""


def prepare(
    home: Path,
    name: str,
    original: Path | None,
    phantoms: tuple[int, int],
    coordinator: ec.EllipticCurvePublicKey,
    *,
    made: Collection[Literal["volumes", "masks"]] = (),
) -> None:
    """Make `home` a site called `name` that trusts `coordinator`.

    With `original`, its data section and ingested images are used; otherwise `phantoms` = (patients, number of the site) says
    how many patients to make and, in turn, whose devices to imitate; `made`: of volumes, chest CT instead of
    radiographs; of masks, with outlines of lungs and opacities.
    """
    keys.make_key(home / "keys" / "site.key")
    keys.write_public(home / "keys" / "coordinator.pem", keys.public_pem(coordinator))
    if original is not None:
        settings = Site.settings_of(original)
        source = Site.source_of(settings, original)
        anchored = {"labels": source.labels.anchored(original), "folder": str((original / source.folder).resolve())}
        if source.masks is not None:
            anchored["masks"] = source.masks.model_copy(
                update={"folder": str((original / source.masks.folder).resolve())}
            )
        source = source.model_copy(update=anchored)
        threads, least = settings.resources.cpu_threads, settings.policy.minimum_patients
        (home / "state").symlink_to(Site.state_of(original).resolve(), target_is_directory=True)
    else:
        patients, number = phantoms
        hospital, seed = home / "hospital", number + 1
        if "volumes" in made:
            scanner = SCANNERS[number % len(SCANNERS)]
            mapping = make_ct_hospital(hospital, name, patients, seed, scanner, outlined="masks" in made)
        else:
            vendor = list(VENDORS.values())[number % len(VENDORS)]
            mapping = make_hospital(hospital, name, patients, seed, vendor, outlined="masks" in made)
        mapping["table"] = str((hospital / mapping["table"]).resolve())
        data = {"folder": str((hospital / "dicom").resolve()), "labels": mapping}
        if "masks" in made:
            data["masks"] = {"folder": str((hospital / "masks").resolve()), "structures": STRUCTURES}
        source = Source.model_validate(data)
        threads, least = 0, Policy().minimum_patients
        ingest(source, home, Site.state_of(home))
    text = {
        "version": 1,
        "site": name,
        "data": source.model_dump(mode="json", exclude_none=True),
        "policy": PERMISSIVE | {"minimum_patients": least},
        "resources": {"cpu_threads": threads},
    }
    keys.write_private(home / "site.yaml", yaml.safe_dump(text, sort_keys=False, allow_unicode=True).encode())


def approve(home: Path, study: Study, coordinator_signature: bytes) -> None:
    """Let the rehearsal's site approve `study`, as `fl-client approve` would."""
    site = Site.settings_of(home).site
    statement = Statement(study.digest, site, "approved", time.time_ns() // 1_000_000)
    signature = keys.sign(keys.load_key(home / "keys" / "site.key"), keys.STUDY_DECISION, statement.body())
    offer = Offer(study, "simulation", b"", b"", coordinator_signature, "", "approved")
    Consent(offer, statement, signature).store(home)


def cohort(home: Path, study: Study, split: Split) -> Cohort:
    """One split of `study` at the rehearsal's site, as its node saw it."""
    site = Site.open(home)
    labels = LabelTable.open(home, site.source.labels)
    return Cohort.open(Index.open(site.state), labels, study, split, site.pins(study))
