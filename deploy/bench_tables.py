"""The tables of docs/benchmarks.md that `make bench` writes: each figure of bench.json beside its goal, and whether it is met.

`python deploy/bench_tables.py` writes them anew from bench.json and the files in docs/benchmarks.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
KEPT = PAGE.parent / "benchmarks"
Entry = dict[str, Any]


class Figure(NamedTuple):
    """One line of the table: the part of an entry that has a goal, which is met up to `goal`."""

    key: str
    what: str
    goal: float
    of: Callable[[Entry], float | None] = lambda entry: entry["ratio"]
    unit: str = ""


def _network(name: str, field: str) -> Callable[[Entry], float | None]:
    return lambda entry: entry["networks"][name][field]  # type: ignore[no-any-return]


VOLUMES = {"unet": "U-Net", "resnet18": "ResNet18", "densenet121": "DenseNet121"}
FIGURES = (
    Figure("round_small", "a masked round of four sites, beside the same work in one plain process", 1.8),
    Figure("round_small_masked", "the same, beside the same study without masks", 1.3),
    Figure("round_densenet", "the first with DenseNet121 and about 8 images a site", 4.0),
    Figure("round_densenet_16_bits", "the same with `encoding_bits: 16`", 2.5),
    Figure("round_alone", "what a site waits beside its own work", 0.4, lambda entry: entry["waits_s"], " s"),
    Figure("round_alone_long", "a round with long local work, beside that work", 1.03),
    Figure(
        "idle_node", "a connected node while nothing happens", 0.5, lambda entry: 100 * entry["share"], " % of a core"
    ),
    Figure("memory", "all processes of four sites and the coordinator", 1350, lambda entry: entry["all_mib"], " MiB"),
    Figure(
        "memory_densenet",
        "a node above plain training, in sizes of the model",
        6.0,
        lambda entry: max(entry["models_above_plain"]),
        " models",
    ),
    Figure("dp_step_small", "a private step of `small_cnn`, 64 of 64 x 64, beside one without privacy", 1.25),
    Figure("dp_step_densenet", "the same of DenseNet121, 16 of 224 x 224", 1.3),
    Figure("dp_step_densenet", "its bfloat16 engine", 0.9, lambda entry: entry["ratio_bf16"]),
    Figure(
        "dp_step_densenet",
        "its memory above the weights, at 4 to 64 units",
        410,
        lambda entry: max(entry["memory_mib_above"].values()),
        " MiB",
    ),
    *(
        figure
        for name, title in VOLUMES.items()
        for figure in (
            Figure("dp_step_3d", f"the same of {title}, 4 of 32 x 64 x 64", 1.2, _network(name, "ratio")),
            Figure("dp_step_3d", f"bfloat16 engine of {title}", 0.9, _network(name, "ratio_bf16")),
        )
    ),
    Figure("mask_keystream", "8 masks over 7 million values, beside AES-CTR of as many bytes", 1.3),
    Figure("after_training_ms", "masks after the last step of training", 10, lambda entry: entry["mask"], " ms"),
    Figure("dp_noise", "discrete Gaussian noise, a value", 20, lambda entry: entry["ns_per_value"], " ns"),
    Figure("bytes", "bytes a site and round, beside model down and masked vector up", 1.02),
    Figure("simulation", "`fl-study simulate` in one process, beside a plain loop", 1.05),
    Figure("simulation_1s", "the same with a round of about 1.15 s, as when the goal was set", 1.05),
    Figure("indexing", "a first look at 2,400 CT slices, beside header and SHA-256 alone", 1.3),
)


def figures(report: dict[str, Any]) -> str:
    """The table of all goals. A key that `report` lacks is a line that says so."""
    lines = ["| key of bench.json | what | ours | beside it | result | goal |", "|---|---|---|---|---|---|"]
    for key, what, goal, of, unit in FIGURES:
        if key not in report:
            lines.append(f"| `{key}` | {what} | | | not measured | {goal:g}{unit} |")
            continue
        entry = report[key]
        found = of(entry)
        if found is None:
            result = "none: gradients not finite"
        else:
            result = f"{_short(found)}{unit}" + ("" if found <= goal else ", **missed**")
        ours, limit = _sides(entry) if of is Figure._field_defaults["of"] else ("", "")
        lines.append(f"| `{key}` | {what} | {ours} | {limit} | {result} | {goal:g}{unit} |")
    return "\n".join(lines)


def _sides(entry: Entry) -> tuple[str, str]:
    if "ours_bytes" in entry:
        return f"{entry['ours_bytes']:,} bytes", f"{entry['limit_bytes']:,} bytes"
    return f"{_short(entry['ours_s'])} s", f"{_short(entry['limit_s'])} s"


def _short(value: float) -> str:
    """Three digits that count, or all before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 0.1 else f"{value:.2f}"


def sites(found: dict[str, Any]) -> str:
    """What rounds cost as sites are added."""
    lines = [
        "| sites | asked in a round | a round | processor time of the whole run | memory of all processes (PSS)"
        " | down, a site and sum | up |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rounds"]:
        warm = statistics.median(row["round_s"][1:])
        lines.append(
            f"| {row['sites']:,} | {row['asked']} | {warm:.1f} s | {row['cpu_s']:.0f} s, {row['made']:,} sites made"
            f" | {row['peak_mib']:,} MiB | {row['down_bytes'] / 1e6:.2f} MB | {row['up_bytes'] / 1e6:.2f} MB |"
        )
    return "\n".join(lines)


def opening(found: dict[str, Any]) -> str:
    """What one masked sum costs both sides as sites are added."""
    lines = [
        "| sites in one masked sum | coordinator, all of it | each site | shares that each site gets |",
        "|---|---|---|---|",
    ]
    for row in found["opening"]:
        own, each = sum(row["coordinator_s"].values()), sum(row["site_s"].values())
        lines.append(f"| {row['sites']:,} | {own:.2f} s | {1000 * each:.0f} ms | {row['shares_bytes'] / 1e6:.2f} MB |")
    return "\n".join(lines)


def images(rows: list[dict[str, Any]]) -> str:
    """What a round costs a site as images are added."""
    lines = [
        "| images (training and validation) | open the cohort, once | train, an epoch | score the validation split"
        " | own memory above the start | mapped files |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['images']:,} | {row['open_s']:.2f} s | {row['train_s']:.2f} s | {row['score_s']:.2f} s"
        f" | {row['memory_mib']} MiB | {row['mapped_mib']} MiB |"
        for row in rows
    ]
    return "\n".join(lines)


STEPS = {
    "site": ("receive", "check", "encode", "mask", "pack", "send"),
    "coordinator": ("sign", "send", "receive", "add", "open", "decode", "next", "checkpoint"),
}


def parameters(found: dict[str, Any]) -> str:
    """Processor milliseconds of each step at both ends as parameters are added, memory and bytes."""
    rows = found["rows"]

    def line(title: str, each: Callable[[Entry], str]) -> str:
        return f"| {title} | " + " | ".join(map(each, rows)) + " |"

    def milliseconds(seconds: float) -> str:
        return f"{1000 * seconds:,.0f}" if seconds >= 0.01 else f"{1000 * seconds:.1f}"

    lines = [line("million parameters", lambda row: f"{row['parameters'] / 1e6:g}"), "|---" * (len(rows) + 1) + "|"]
    for end, steps in STEPS.items():
        lines += [
            line(f"{end}: {step}", lambda row, end=end, step=step: milliseconds(row[end]["seconds"][step]))
            for step in steps
        ]
        lines.append(line(f"**{end}, in all**", lambda row, end=end: milliseconds(sum(row[end]["seconds"].values()))))

    def both(one: Callable[[Entry], str]) -> Callable[[Entry], str]:
        return lambda row: f"{one(row['site'])} / {one(row['coordinator'])}"

    lines.append(line("the kernel's, site / coordinator", both(lambda half: milliseconds(half["system_s"]))))
    lines.append(
        line("MiB above the start, site / coordinator", both(lambda half: f"{half['peak_bytes'] / 2**20:,.0f}"))
    )

    def down_and_up(row: Entry) -> int:
        return int(row["site"]["sent_bytes"] + row["coordinator"]["sent_bytes"] // row["sites"])

    lines.append(line("bytes down and up, a site", lambda row: f"{down_and_up(row):,}"))
    return "\n".join(lines)


PEERS = {
    "isocenter": "Isocenter: mutual TLS, masked, signed orders, journals",
    "flower_on_ray": "Flower's simulation on Ray",
    "nvflare": "NVFlare's simulator",
    "nvflare_poc": "NVFlare, proof-of-concept federation: mutual TLS",
    "flower": "Flower's deployment: TLS, authenticated nodes",
}


def peers(found: dict[str, Any]) -> str:
    """A round of each framework beside the same training in one plain process."""
    lines = [
        "| what | processor time of a round | beside the plain process | elapsed | beside the plain process"
        " | memory of all processes (PSS) |",
        "|---|---|---|---|---|---|",
    ]
    for key, title in PEERS.items():
        if key not in found["rounds"]:
            continue
        row = found["rounds"][key]
        memory = f"{row['memory_mib']:,} MiB" if "memory_mib" in row else ""
        lines.append(
            f"| {title} | {row['round_processor_s']:.2f} s | {row['ratio_processor']:.2f} | {row['round_s']:.2f} s"
            f" | {row['ratio']:.2f} | {memory} |"
        )
    loads = [row["load"] for row in found["rounds"].values()]
    lines += [
        "",
        f"Load of the machine as a row was written, its own processes included: {min(loads)} to {max(loads)}.",
    ]
    return "\n".join(lines)


def peer_commands(found: dict[str, Any]) -> str:
    """The commands of each row, with words for its folder and ports; of the four sites those of the first."""
    lines = ["```text"]
    for key, title in PEERS.items():
        ran = found["rounds"].get(key, {}).get("commands", [])
        lines += [f"# {title}"] if ran else []
        for line in ran:
            if not any(f"key-{other}" in line for other in (1, 2, 3)):
                named = line.replace("{folder}", "FOLDER").replace("{deploy}", "deploy")
                lines.append(named.replace("{port[0]}", "PORT").replace("{port[1]}", "PORT_OF_SITE"))
    return "\n".join([*lines, "```"])


def opacus(found: dict[str, Any]) -> str:
    """A private step of Opacus and of ours beside the step without privacy, and where Opacus fails."""
    ways = ("hooks", "functorch", "ew", "ghost")
    lines = [f"| network, batch | without privacy | ours | {' | '.join(f'Opacus, {way}' for way in ways)} |"]
    lines.append("|---" * (len(ways) + 3) + "|")
    failures: dict[str, list[str]] = {}
    for entry in found["dp_step"].values():
        tried, grid = entry["ways"], " x ".join(map(str, entry["shape"]))
        plain, best = tried["plain"], min(("loop", "vmap"), key=lambda way: tried.get(way, {}).get("ratio", 1e9))
        cells = [f"{_short(plain['step_s'])} s, {plain['memory_mib']:,} MiB", f"{_step(tried[best])} ({best})"]
        cells += [_step(tried[way]) for way in ways]
        lines.append(f"| `{entry['network']}`, {entry['images']} of {grid} | {' | '.join(cells)} |")
        for way in ways:
            if said := tried[way].get("failed") or tried[way].get("as_it_is"):
                failures.setdefault(said.split(". ")[0], []).append(f"`{entry['network']}` ({way})")
    return "\n".join([*lines, "", *(f"- `{said}`: {', '.join(where)}" for said, where in failures.items())])


def _step(way: Entry) -> str:
    if "failed" in way:
        return "fails"
    return f"{way['ratio']:.2f}, {way['memory_mib']:,} MiB" + (", `inplace` off" if "as_it_is" in way else "")


def written(text: str, name: str, table: str) -> str:
    """`text` with `table` between the two marks called `name`. Raises LookupError if they are not there once."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise LookupError(f"{PAGE.name} lacks a place for the table {name}")
    before, rest = text.split(begin)
    return before + begin + table + "\n" + end + rest.split(end)[1]


TABLES: dict[str, tuple[Path, Callable[[Any], str]]] = {
    "figures": (KEPT / "bench.json", figures),
    "sites": (KEPT / "sites.json", sites),
    "opening": (KEPT / "sites.json", opening),
    "images": (KEPT / "images.json", images),
    "parameters": (KEPT / "parameters.json", parameters),
    "peers": (KEPT / "peers.json", peers),
    "peer_commands": (KEPT / "peers.json", peer_commands),
    "opacus": (KEPT / "peers.json", opacus),
}


def main() -> None:
    text = PAGE.read_text()
    for name, (path, table) in TABLES.items():
        text = written(text, name, table(json.loads(path.read_text())))
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
