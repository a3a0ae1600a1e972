"""The work that each framework is given, the same for all: train a site's images for an epoch, score its validation split.

A site is SITE.pt in the folder of the run, its images as the network takes them, so that no framework pays for reading DICOM.
`mark` notes when a round ended, and what all processes of the run have used until then.
"""

import json
import os
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models import learning, networks
from models.study import Study, parse

SITES = ("alpine", "bayside", "central", "delta")
SPLITS = ("train", "validation")


class Split(NamedTuple):
    """What `learning` asks of a cohort."""

    images: Tensor
    targets: Tensor
    known: Tensor
    patients: Tensor


class Site:
    """One site's images and a network, in a process that keeps them if the framework keeps the process."""

    def __init__(self, folder: Path, name: str) -> None:
        torch.set_num_threads(1)
        self.study: Study = parse(Study, (folder / "study.json").read_text(), "the study")
        self.net: nn.Module = networks.build(self.study)
        held = torch.load(folder / f"{name}.pt", mmap=True, weights_only=True)
        self.train_split, self.validation_split = (Split(**held[split]) for split in SPLITS)

    def train(self, round_number: int) -> int:
        """One epoch on `net`, from the weights that it has; the number of images."""
        return learning.learn(self.net, self.train_split, self.study, round_number=round_number).cases

    def validate(self) -> tuple[float, int]:
        """Share of correct answers of `net` on the validation split, and its number of images."""
        scores = learning.predict(self.net, self.validation_split)
        right = (scores > 0.5) == (self.validation_split.targets.numpy() > 0.5)
        return float(right.mean()), len(scores)


@cache
def opened(folder: str, name: str) -> Site:
    """The site, opened once in a process."""
    return Site(Path(folder), name)


def save(folder: Path, name: str, cohorts: dict[str, Any]) -> None:
    """Write SITE.pt from the site's own cohorts."""
    fields = Split._fields
    held = {split: {field: getattr(cohort, field).clone() for field in fields} for split, cohort in cohorts.items()}
    torch.save(held, folder / f"{name}.pt")


def plain(folder: Path, rounds: int) -> NDArray[np.float32]:
    """All sites in this process, one after the other: train, average by images, validate; a mark after each round. The model."""
    sites = [Site(folder, name) for name in SITES]
    model: NDArray[np.float32] = networks.to_vector(sites[0].net)
    mark(folder)
    for number in range(1, rounds + 1):
        total, cases = np.zeros(model.shape, np.float64), 0
        for site in sites:
            networks.load_vector(site.net, model)
            trained = site.train(number)
            total, cases = total + networks.to_vector(site.net) * np.float64(trained), cases + trained
        model = (total / cases).astype(np.float32)
        for site in sites:
            networks.load_vector(site.net, model)
            site.validate()
        mark(folder)
    return model


def mark(folder: Path) -> None:
    """Add a line to marks.jsonl: the clock, and processor seconds of the process in `root` and everything below it."""
    used = processor_seconds(int((folder / "root").read_text()))
    with (folder / "marks.jsonl").open("a") as marks:
        marks.write(json.dumps({"at": time.monotonic(), "processor": used}) + "\n")


def processor_seconds(root: int) -> float:
    """Of `root` and all below it, those that have ended included: a parent has the time of children that it waited for."""
    parents, used = dict[int, int](), dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # ended meanwhile
        parents[int(path.parent.name)], used[int(path.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    family, more = {root}, True
    while more:
        found = {pid for pid, parent in parents.items() if parent in family} - family
        family, more = family | found, bool(found)
    return sum(used.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")
