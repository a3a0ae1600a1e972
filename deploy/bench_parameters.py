"""How a masked round's cost grows with the number of parameters: processor time and bytes of each step at both ends, and memory.

`python deploy/bench_parameters.py [MILLIONS ...]` prints the table and writes docs/benchmarks/parameters.json and .svg. One size
after the other, each half in a process of its own, so that its peak of memory is its own. No network and no training: the steps
that grow with the model, with the real classes, masks among SITES sites and parcels as they cross the wire; one site's work, and
the coordinator's for SITES sites. Training and TLS are beside it: AES-GCM takes 0.2 s a GB.
"""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SITES, COUNTS, MILLIONS = 4, 2006, (0.1, 1.0, 7.0, 30.0, 100.0)
OUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "parameters"


@dataclass
class Half:
    """One end: processor seconds of each step, bytes that leave it, and its peak of resident memory less that of its start.

    `system_s`: what the kernel took beside them, for memory that is touched for the first time and for the disk: the machine's.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    system_s: float = 0.0
    sent_bytes: int = 0
    peak_bytes: int = 0

    def timed(self, step: str, work: Callable[[], Any]) -> Any:
        before = resource.getrusage(resource.RUSAGE_SELF)
        made = work()
        after = resource.getrusage(resource.RUSAGE_SELF)
        self.seconds[step] = round(self.seconds.get(step, 0.0) + after.ru_utime - before.ru_utime, 6)
        self.system_s = round(self.system_s + after.ru_stime - before.ru_stime, 6)
        return made


def main(*millions: str) -> None:
    rows = []
    for number in [float(each) for each in millions] or MILLIONS:
        halves = {end: _apart(end, round(number * 1e6)) for end in ("site", "coordinator")}
        rows.append({"parameters": round(number * 1e6), "sites": SITES, **halves})
        print(json.dumps(rows[-1]), flush=True)
        if not millions:
            OUT.parent.mkdir(exist_ok=True)
            OUT.with_suffix(".json").write_text(json.dumps({"machine": _machine(), "rows": rows}, indent=1) + "\n")
    if not millions:
        draw(rows)


def _apart(end: str, parameters: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "half", end, str(parameters)]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def half(end: str, parameters: int) -> None:
    import numpy as np

    from privacy.sharing import Encoding

    encoding = Encoding(parameters, COUNTS, 32, 20, SITES)
    model = np.random.default_rng(1).normal(0, 0.05, parameters).astype(np.float32)
    _unpacked(_packed(_order(np.ones(1, np.float32)).to_records()))  # so that imports count for nothing
    before, made = _peak(), Half()
    (site if end == "site" else coordinator)(made, encoding, model)
    made.peak_bytes = _peak() - before
    print(json.dumps(asdict(made)))


def site(made: Half, encoding: Any, model: Any) -> None:
    """Take the order in, encode, mask and send. The model's own bytes, from before, are not in the peak."""
    import numpy as np

    from privacy import wire
    from privacy.sharing import add_masks

    body = _packed(_order(model).to_records())
    came = made.timed("receive", lambda: wire.TrainOrder.from_records(_unpacked(body)))
    made.timed("check", came.body)  # the hash that the coordinator's signature covers
    masks = [(bytes([number + 1] * 32), 1 if number % 2 else -1) for number in range(SITES)]  # its own and three peers'
    cover = encoding.zeros()
    made.timed("mask", lambda: add_masks(cover, masks))
    words = made.timed("encode", lambda: encoding.encode(model, 1, np.zeros(COUNTS, np.int64)))
    made.timed("mask", lambda: words.add(cover))
    packed = made.timed("pack", lambda: encoding.packed(words))
    report = wire.TrainReport(**_naming(), site="alpine", seconds=1.0, vector=packed, vouch=b"", keys=b"")
    sent = made.timed("send", lambda: _packed(report.to_records()))
    made.sent_bytes = len(sent)


def coordinator(made: Half, encoding: Any, model: Any) -> None:
    """Send the order, take each site's report in, open the sum, make the next model, and keep it."""
    import numpy as np

    from fl_server import checkpoint
    from privacy import wire
    from privacy.sharing import add_masks

    _give_out(made, model)
    total = encoding.zeros()
    for _ in range(SITES):
        words = encoding.encode(model, 1, np.zeros(COUNTS, np.int64))
        packed = encoding.packed(words)
        report = wire.TrainReport(**_naming(), site="alpine", seconds=1.0, vector=packed, vouch=b"", keys=b"")
        sent = _packed(report.to_records())
        del words, packed, report
        _take_in(made, encoding, total, sent)
        del sent
    masks = [(bytes([number + 1] * 32), -1) for number in range(SITES)]  # of each survivor its own
    made.timed("open", lambda: add_masks(total, masks))
    made.timed("open", lambda: add_masks(total, [(key, 1) for key, _ in masks]))  # so that the sum is one again
    made.seconds["open"] /= 2
    opened = made.timed("decode", lambda: encoding.decode(total))
    after = made.timed("next", lambda: (model + (opened.values / SITES).astype(np.float32)).astype(np.float32))
    with tempfile.TemporaryDirectory(prefix="isocenter-bench-") as folder:
        made.timed("checkpoint", lambda: checkpoint.write(Path(folder), 1, {"model": after, "best": model}, {}))


def _give_out(made: Half, model: Any) -> None:
    order = made.timed("sign", lambda: _order(model))
    made.timed("sign", order.body)
    made.sent_bytes = SITES * len(made.timed("send", lambda: _packed(order.to_records())))


def _take_in(made: Half, encoding: Any, total: Any, sent: bytes) -> None:
    from privacy import wire

    came = made.timed("receive", lambda: wire.TrainReport.from_records(_unpacked(sent)))
    vector = made.timed("add", lambda: encoding.vector_of(came.vector))
    made.timed("add", lambda: total.add(vector))


def _order(model: Any) -> Any:
    from privacy import wire

    beside = {"issued": 1, "signature": b"", "scale": 20, "participants": (), "shares": b"", "keys_next": False}
    return wire.TrainOrder(**_naming(), model=model, **beside)


def _naming() -> dict[str, Any]:
    return {"study": "0" * 64, "run": "bench", "round": 1, "attempt": 1, "sum": 1}


def _packed(records: Any) -> bytes:
    """The parcel of a message with these records, but for the call around it, some hundred bytes."""
    from flwr.app import Message
    from flwr.supercore.task_identity import TaskIdentity

    from privacy import parcels

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # Message() refuses to be made without
    (tree,), objects = parcels.flat([Message(records, dst_node_id=1, message_type="train")])
    return parcels.pack([tree.SerializeToString(), *map(b"".join, objects)])


def _unpacked(body: bytes) -> Any:
    from flwr.proto.message_pb2 import ObjectTree

    from privacy import parcels

    head, *objects = parcels.views(body)
    tree = ObjectTree.FromString(bytes(head))
    message: Any = parcels.inflate(tree.object_id, dict(zip(parcels.names([tree]), objects, strict=True)))
    return message.content


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _machine() -> str:
    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    return next(value.strip() for name, value in facts.items() if name.startswith("model name"))


def draw(rows: list[dict[str, Any]]) -> None:
    """Time and memory against parameters, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = [row["parameters"] / 1e6 for row in rows]
    for end, mark in (("site", "o"), ("coordinator", "s")):
        left.plot(sizes, [sum(row[end]["seconds"].values()) for row in rows], marker=mark, label=end)
        right.plot(sizes, [row[end]["peak_bytes"] / 2**30 for row in rows], marker=mark, label=end)
    left.set(xlabel="million parameters", ylabel="processor seconds a round", xscale="log", yscale="log")
    right.set(xlabel="million parameters", ylabel="GiB above the start", xscale="log", yscale="log")
    for side in (left, right):
        side.grid(alpha=0.3)
        side.legend()
    figure.savefig(OUT.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    if sys.argv[1:2] == ["half"]:
        half(sys.argv[2], int(sys.argv[3]))
    else:
        main(*sys.argv[1:])
