"""`make bench`, the part about differential privacy and masks after training, and what more images cost a site.

dp_step_*: one private step beside the float32 step without privacy of the same network and batch, in turn, in processor time of
one thread. dp_noise: discrete Gaussian noise. images: a node's round against its number of images. `python deploy/bench_dp.py`
prints all of it, and with one of the words steps, noise, masks or images only that; images also writes docs/benchmarks/images.*.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUNS = 5
GIB = 2**30
VALUES = 7_000_000
NOISE_NS = 20.0  # that a value may cost
CASES: dict[str, tuple[str, int, tuple[int, ...], float]] = {
    "small": ("small_cnn", 64, (64, 64), 1.25),
    "densenet": ("densenet121", 16, (224, 224), 1.3),
    "3d_unet": ("unet", 4, (32, 64, 64), 1.2),
    "3d_resnet18": ("resnet18", 4, (32, 64, 64), 1.2),
    "3d_densenet121": ("densenet121", 4, (32, 64, 64), 1.2),
}
"""Network, images of a step, their grid, and what a private step in float32 may cost of the other."""
CHUNKED = ("small", "3d_unet", "3d_resnet18", "3d_densenet121")  # on DenseNet121's radiographs vmap takes 5 GiB
CHUNK = {"small": 16}  # as `choose` takes it
MEMORY_BATCHES = (4, 16, 64)
IMAGES = (250, 1000, 4000)
OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "images.json"


def main() -> None:
    wanted = sys.argv[1:2]
    if wanted == ["one"]:
        print(json.dumps(one_step(sys.argv[2])))
    elif wanted == ["memory"]:
        print(json.dumps(memory_of_step(int(sys.argv[2]))))
    elif wanted == ["choice"]:
        print(json.dumps(memory_of_choice()))
    elif wanted == ["round"]:
        print(json.dumps(round_of(Path(sys.argv[2]))))
    else:
        made = measured(*wanted)
        print(json.dumps(made, indent=1))
        if wanted == ["images"]:
            OUT.write_text(json.dumps(made["images"], indent=1) + "\n")
            draw(made["images"])


def measured(*wanted: str) -> dict[str, Any]:
    """All entries, or those of the parts that are named."""
    made: dict[str, Any] = {}
    for name, part in {"steps": steps, "noise": dp_noise, "masks": after_training, "images": images}.items():
        if not wanted or name in wanted:
            made |= part()
    return made


# A private step ------------------------------------------------------------------------------------------------------


def steps() -> dict[str, Any]:
    """Each network in a process of its own, so that none has the memory of another to take from."""
    found = {case: _child("one", case) for case in CASES}
    volumes = {case.removeprefix("3d_"): entry for case, entry in found.items() if case.startswith("3d_")}
    worst = max(volumes.values(), key=lambda entry: float(entry["ratio"]))
    memory = {str(batch): _child("memory", str(batch)) for batch in MEMORY_BATCHES}
    choosing = _child("choice")
    return {
        "dp_step_small": found["small"],
        "dp_step_densenet": found["densenet"] | {"memory_mib_above": memory, "memory_mib_choosing": choosing},
        "dp_step_3d": worst | {"networks": volumes},
    }


def one_step(case: str) -> dict[str, Any]:
    """Seconds of a step: without privacy, one image after the other without privacy, and by each engine."""
    import torch

    from privacy import dpsgd

    torch.set_num_threads(1)
    torch.manual_seed(1)
    name, batch, shape, _ = CASES[case]
    bench = _Bench(name, batch, shape)
    loops = [dpsgd.LoopEngine(bench.net, bench.losses), dpsgd.LoopEngine(bench.net, bench.losses, bfloat16=True)]
    engines: list[dpsgd.Engine] = list(loops)
    if case in CHUNKED:
        engines.append(dpsgd.VmapEngine(bench.net, bench.losses, CHUNK.get(case, batch)))
    ways: dict[str, Callable[[], object]] = {"plain": bench.plain, "one by one": bench.one_by_one}
    ways |= {engine.name: lambda engine=engine: bench.private(engine) for engine in engines}  # type: ignore[misc]
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(RUNS + 1):
        for way, step in ways.items():
            bench.begin()  # the same weights for each: a bfloat16 step that fails must not spoil the next
            began = time.process_time()
            step()
            if number:  # the first warms caches
                times[way].append(time.process_time() - began)
    seconds = {way: statistics.median(measured) for way, measured in times.items()}
    least, exact = seconds["plain"], {way: s for way, s in seconds.items() if way in ("loop", "vmap")}
    best = min(exact, key=lambda way: exact[way])
    broken = bench.seen["loop-bf16"].nonfinite
    return {
        "ratio": round(seconds[best] / least, 2),
        "limit_s": round(least, 4),
        "ours_s": round(seconds[best], 4),
        "ratio_bf16": None if broken else round(seconds["loop-bf16"] / least, 2),
        "engine": best,
        "ratio_of": {way: round(s / least, 2) for way, s in seconds.items()},
        "arithmetic_s": round(statistics.median(bench.arithmetic() for _ in range(RUNS)), 4),
        "bf16_nonfinite": broken,
        "note": f"{name}, {bench.parameters / 1e6:.2f} M parameters, {batch} images of {'x'.join(map(str, shape))}, one core,"
        f" processor time, median of {RUNS}",
    }


class _Bench:
    """One network, one batch and an optimizer, and the ways to take a step with them."""

    def __init__(self, name: Any, batch: int, shape: tuple[int, ...]) -> None:
        import torch

        from models import learning, networks, tasks
        from models.descent import Descent, Rule
        from models.study import Network
        from privacy import dpsgd, noise

        self.net = networks.KINDS[name](Network(name=name, dropout=0.0), 1, shape).train()
        self.losses, self.clip, self.stream = learning.patient_losses, dpsgd.Clip(1.0), noise.Keystream()
        self.parameters = sum(p.numel() for p in self.net.parameters())
        self.optimizer = Descent([(list(self.net.parameters()), 1e-2)], Rule("adamw", 1e-4))
        self.start = [p.detach().clone() for p in self.net.parameters()]
        grid = shape if name in ("unet", "segresnet") else ()
        self.images = torch.rand(batch, 1, *shape)
        self.targets = (torch.rand(batch, 1, *grid) > 0.5).float()
        self.known, self.each = torch.ones(batch, 1), tasks.cross_entropy
        self.seen: dict[str, dpsgd.ClippedSum] = {}
        self.noisy: Any = None
        self.gradient: Any = None

    def begin(self) -> None:
        import torch

        with torch.no_grad():
            for parameter, value in zip(self.net.parameters(), self.start, strict=True):
                parameter.copy_(value)

    def _truth(self, rows: slice) -> Any:
        import torch

        return self.targets[rows], self.known[rows], torch.ones(1, 2), self.each

    def plain(self) -> None:
        from models import learning

        learning._step(self.net, self.optimizer, (self.images,), self._truth(slice(None)))

    def one_by_one(self) -> None:
        """What a loop over images costs that gives no privacy: one forward and backward pass for each, one step."""
        self.optimizer.zero_grad()
        for place in range(len(self.images)):
            self.losses(self.net, self._unit(place)).sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def _unit(self, place: int) -> Any:
        rows = slice(place, place + 1)
        return self.images[rows, None], self.targets[rows, None], self.known[rows, None]

    def private(self, engine: Any) -> None:
        import numpy as np

        from models import learning
        from privacy import dpsgd

        units = (self._unit(place) for place in range(len(self.images)))
        found = dpsgd.private_gradient(engine, units, self.clip, 1.1, self.stream, self.noisy)
        self.noisy, self.seen[engine.name] = found
        # As `learning.learn_privately` does, into memory that every step uses again.
        self.gradient = np.empty(self.parameters, np.float32) if self.gradient is None else self.gradient
        factor = 2.0**-18 / len(self.images)
        np.multiply(self.noisy, factor, out=self.gradient, dtype=np.float64, casting="unsafe")
        learning.descend(self.net, self.optimizer, self.gradient)

    def arithmetic(self) -> float:
        """Seconds of a step that are clip, sum and noise: of gradients that cost nothing."""
        import torch

        from privacy import dpsgd

        gradient = torch.randn(self.parameters)
        held, near = gradient.clone(), gradient.clone()

        class Given:
            name = "given"

            def clipped_sum(self, units: Any, clip: dpsgd.Clip, out: Any = None) -> dpsgd.ClippedSum:
                found = dpsgd._Accumulator(len(gradient), clip, near, out)
                for _ in units:
                    found.add(held.copy_(gradient))
                return found.result()

        began = time.process_time()
        dpsgd.private_gradient(Given(), range(len(self.images)), self.clip, 1.1, self.stream, self.noisy)  # type: ignore[arg-type]
        return time.process_time() - began


def memory_of_step(batch: int) -> int:
    """MiB of this process above the weights and the optimizer at the peak of private steps of so many units."""
    import torch

    from models import learning
    from privacy import dpsgd

    torch.set_num_threads(1)
    bench = _Bench("densenet121", 1, (224, 224))
    bench.plain()  # the optimizer's own two vectors, and everything that is loaded late, are there before the count begins
    engine = dpsgd.LoopEngine(bench.net, learning.patient_losses)
    dpsgd.private_gradient(engine, [], bench.clip, 1.1, bench.stream)
    units = (bench._unit(0) for _ in range(batch))
    before = _rss_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    dpsgd.private_gradient(engine, units, bench.clip, 1.1, bench.stream)
    return _rss_mib("VmHWM") - before


def memory_of_choice() -> int:
    """As `memory_of_step`, of choosing the engine that takes the steps."""
    import torch

    from privacy import dpsgd

    torch.set_num_threads(1)
    bench = _Bench("densenet121", 2, (224, 224))
    bench.plain()
    before = _rss_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    dpsgd.choose(bench.net, bench.losses, [bench._unit(0), bench._unit(1)], bench.clip)
    return _rss_mib("VmHWM") - before


def _rss_mib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) // 1024
    raise LookupError(field)


# Noise and masks -----------------------------------------------------------------------------------------------------


def dp_noise() -> dict[str, Any]:
    import numpy as np

    from privacy import noise

    sampler, stream, total = noise.gaussian(1.7 * 2**18), noise.Keystream(), np.zeros(VALUES, np.int64)
    times = []
    for _ in range(RUNS + 1):
        began = time.process_time()
        sampler.add_to(total, stream)
        times.append(time.process_time() - began)
    took, limit = statistics.median(times[1:]), NOISE_NS * VALUES / 1e9
    note = f"discrete Gaussian noise on {VALUES:,} values, deviation 1.7 x 2^18, one core; the limit is {NOISE_NS:g} ns a value"
    ns = round(took / VALUES * 1e9, 1)
    return {"dp_noise": _entry(took, limit, note) | {"ns_per_value": ns}}


def after_training() -> dict[str, Any]:
    """From the end of training to the packed vector, when the masks of eight peers were added up meanwhile; and unmasking."""
    import os

    import numpy as np

    from privacy.sharing import Encoding, Vector, add_masks

    encoding = Encoding(VALUES, 0, 32, 20, 9)
    chosen = [(os.urandom(32), 1 if place % 2 else -1) for place in range(8)]
    cover = encoding.zeros()
    add_masks(cover, chosen)
    update, nothing = np.random.default_rng(1).normal(0, 0.01, VALUES).astype(np.float32), np.zeros(0, np.int64)
    parts: dict[str, list[float]] = {"encode": [], "mask": [], "pack": []}
    for _ in range(RUNS + 1):
        marks = [time.process_time()]
        vector: Vector = encoding.encode(update, 1, nothing)
        marks.append(time.process_time())
        vector.add(cover)
        marks.append(time.process_time())
        bytes(encoding.bytes_of(vector))
        marks.append(time.process_time())
        for name, begin, end in zip(parts, marks, marks[1:], strict=False):
            parts[name].append(end - begin)
    milliseconds = {name: round(1000 * statistics.median(times[1:]), 1) for name, times in parts.items()}
    return {"after_training_ms": milliseconds}


# A node's round against its images -----------------------------------------------------------------------------------


def images() -> dict[str, Any]:
    """Seconds and MiB of a round at a site with so many phantom images, each in a process of its own."""
    from fl_client.ingest import ingest
    from fl_client.phantom import VENDORS, make_hospital
    from fl_client.site import Source

    rows = []
    for count in IMAGES:
        with tempfile.TemporaryDirectory(prefix="isocenter-bench-") as name:
            folder = Path(name)
            patients = round(count / 1.35)  # phantoms have one or two images each
            mapping = make_hospital(folder / "hospital", "bench", patients, 1, VENDORS["aurora"])
            source = Source.model_validate({"folder": str(folder / "hospital" / "dicom"), "labels": mapping})
            ingest(source, folder, folder / "state", jobs=1)
            (folder / "source.json").write_text(source.model_dump_json())
            rows.append(_child("round", name))
    return {"images": rows}


def round_of(folder: Path) -> dict[str, Any]:
    """A round of one site: open the cohort, train an epoch, score the validation split."""
    import torch

    from fl_client.cohort import Cohort
    from fl_client.ingest import Index
    from fl_client.site import Source
    from models import learning, networks
    from models.labels import LabelTable
    from models.study import Study, parse

    torch.set_num_threads(1)
    source = Source.model_validate_json((folder / "source.json").read_text())
    text = {
        **{"name": "bench", "title": "Benchmark", "purpose": "Seconds.", "task": {"targets": ["opacity"]}},
        **{"training": {"rounds": RUNS, "batch_size": 32}, "privacy": "none", "images": {"size_px": 64}},
        "participation": {"sites": ["a", "b", "c"], "quorum": 3},
    }
    study = parse(Study, json.dumps(text), "bench")
    net = networks.build(study)
    labels = LabelTable.open(folder, source.labels)
    index, before = Index.open(folder / "state"), _rss_mib("RssAnon")
    began = time.process_time()
    splits = {
        split: Cohort.open(index, labels, study, split, folder / "pins.json") for split in ("train", "validation")
    }  # type: ignore[arg-type]
    opened = time.process_time() - began
    times: dict[str, list[float]] = {"train": [], "score": []}
    for number in range(1, RUNS + 2):
        began = time.process_time()
        learning.learn(net, splits["train"], study, round_number=number)
        middle = time.process_time()
        learning.predict(net, splits["validation"])
        times["train"].append(middle - began)
        times["score"].append(time.process_time() - middle)
    return {
        "images": sum(map(len, splits.values())),
        "open_s": round(opened, 3),
        "train_s": round(statistics.median(times["train"][1:]), 3),
        "score_s": round(statistics.median(times["score"][1:]), 3),
        "memory_mib": _rss_mib("RssAnon") - before,
        "mapped_mib": _rss_mib("RssFile"),
    }


def draw(rows: list[dict[str, Any]]) -> None:
    """Time and memory against images, both axes logarithmic for time."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    counts = [row["images"] for row in rows]
    for field, label in (
        ("open_s", "open the cohort, once"),
        ("train_s", "train, an epoch"),
        ("score_s", "score validation"),
    ):
        left.plot(counts, [row[field] for row in rows], marker="o", label=label)
    right.plot(counts, [row["memory_mib"] for row in rows], marker="o", label="own memory above the start")
    left.set(xlabel="images", ylabel="processor seconds", xscale="log", yscale="log")
    right.set(xlabel="images", ylabel="MiB", xscale="log", ylim=(0, 1.2 * max(row["memory_mib"] for row in rows)))
    for side in (left, right):
        side.grid(alpha=0.3)
        side.legend()
    figure.savefig(OUT.with_suffix(".svg"), metadata={"Date": None})


def _child(*words: str) -> Any:
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _entry(ours: float, limit: float, note: str) -> dict[str, Any]:
    return {"ratio": round(ours / limit, 2), "limit_s": round(limit, 4), "ours_s": round(ours, 4), "note": note}


if __name__ == "__main__":
    main()
