"""A step of Opacus beside ours and beside the step without privacy, for the networks of bench_dp.py: docs/benchmarks/peers.json.

In the environment of bench_peers.py: `build/peers/bin/python deploy/bench_opacus.py [CASE ...]`. Opacus is tried in each of its
ways, on the network as it is and, where that fails, with every layer's `inplace` switched off. Times are processor time of one
thread, all ways in turn in one process; memory is that of a process which takes a single step, above what it had before.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_dp
from bench_round import on_core

OUT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "peers.json"
WAYS = ("hooks", "functorch", "ew", "ghost")
NOISE, CLIP = 1.1, 1.0
WORDS = 90  # of a failure's message


def main(cases: list[str]) -> None:
    with on_core(1):  # the other one may be busy with bench_peers.py
        for case in cases or bench_dp.CASES:
            entry = _child("times", case)
            for way, found in entry["ways"].items():
                if "failed" not in found:
                    found["memory_mib"] = _child("memory", case, way, str("as_it_is" in found))
            kept = json.loads(OUT.read_text()) if OUT.exists() else {}
            kept.setdefault("dp_step", {})[case] = entry | {
                "opacus": version("opacus"),
                "python": platform.python_version(),
            }
            OUT.write_text(json.dumps(kept, indent=1) + "\n")
            print(case, json.dumps(entry, indent=1))


def times(case: str) -> dict[str, Any]:
    """Ratio of each way that works to the step without privacy."""
    import torch

    torch.set_num_threads(1)
    steps, ways = dict[str, Callable[[], None]](), dict[str, dict[str, Any]]()
    for way in ("plain", *ours(case), *WAYS):
        found: dict[str, Any] = {}
        for inplace_off in (False, True):
            try:
                step = made(case, way, inplace_off)
                step()
                steps[way], found = step, {"as_it_is": found["failed"]} if inplace_off else {}
                break
            except Exception as error:  # what a framework raises is the result
                found.setdefault("failed", " ".join(str(error).split())[:WORDS])
        ways[way] = found
    taken: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(bench_dp.RUNS):
        for way, step in steps.items():
            began = time.process_time()
            step()
            taken[way].append(time.process_time() - began)
    seconds = {way: statistics.median(each) for way, each in taken.items()}
    for way, each in seconds.items():
        ways[way] |= {"step_s": round(each, 4), "ratio": round(each / seconds["plain"], 2)}
    name, batch, shape, _ = bench_dp.CASES[case]
    return {"network": name, "images": batch, "shape": list(shape), "runs": bench_dp.RUNS, "ways": ways}


def ours(case: str) -> tuple[str, ...]:
    """Names of our float32 engines that are tried."""
    return ("loop", "vmap") if case in bench_dp.CHUNKED else ("loop",)


def made(case: str, way: str, inplace_off: bool) -> Callable[[], None]:
    """A step of one way, on a network of its own; case "linear": a tiny one."""
    import torch

    from privacy import dpsgd

    torch.manual_seed(1)
    name, batch, shape, _ = bench_dp.CASES.get(case, ("linear", 2, (64, 64), 0.0))
    bench = bench_dp._Bench(name, batch, shape)
    bench.start.clear()  # nobody goes back to it, and seven networks are held at once
    if way == "plain":
        return bench.plain
    if way in ("loop", "vmap"):
        looped, chunk = way == "loop", bench_dp.CHUNK.get(case, batch)
        engine = (
            dpsgd.LoopEngine(bench.net, bench.losses) if looped else dpsgd.VmapEngine(bench.net, bench.losses, chunk)
        )
        return lambda: bench.private(engine)
    if inplace_off:
        for module in bench.net.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
    return opacus(bench, way)


def opacus(bench: Any, way: str) -> Callable[[], None]:
    """A private step as Opacus' documentation has it, of the same loss and torch's own AdamW, the one kind that Opacus takes."""
    import torch
    from opacus.grad_sample import (
        GradSampleModule,
        GradSampleModuleExpandedWeights,
        GradSampleModuleFastGradientClipping,
    )
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    ghost, batch = way == "ghost", len(bench.images)
    kinds = {"ew": GradSampleModuleExpandedWeights, "ghost": GradSampleModuleFastGradientClipping}
    more = {"functorch": {"force_functorch": True}, "ghost": {"max_grad_norm": CLIP}}.get(way, {})
    net = kinds.get(way, GradSampleModule)(bench.net, **more)
    private = DPOptimizerFastGradientClipping if ghost else DPOptimizer
    plain = torch.optim.AdamW(net.parameters(), lr=1e-4)
    optimizer = private(plain, noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=batch)

    def step() -> None:
        losses = bench.losses(net, (bench.images[:, None], bench.targets[:, None], bench.known[:, None]))
        (DPTensorFastGradientClipping(net, optimizer, losses) if ghost else losses.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory(case: str, way: str, inplace_off: bool) -> int:
    """MiB of this process at the peak of its first step, above what it had with network, batch and everything imported."""
    import torch

    torch.set_num_threads(1)
    made("linear", way, False)()  # what the first step of a process loads is there before the count begins
    step, before = made(case, way, inplace_off), bench_dp._rss_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return bench_dp._rss_mib("VmHWM") - before


def _child(*words: str) -> Any:
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["times"]:
        print(json.dumps(times(sys.argv[2])))
    elif sys.argv[1:2] == ["memory"]:
        print(memory(sys.argv[2], sys.argv[3], sys.argv[4] == "True"))
    else:
        main(sys.argv[1:])
