"""The first model of a run, made in a process of its own where torch is not loaded already.

Only the first round of a run needs torch at the coordinator, and whoever has loaded it keeps it: 200 MiB for as long as the
process lives. `python -m fl_server.first HOME` takes the canonical study on standard input and answers with a line of JSON, and
the model behind it.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from fl_server import weights
from models.contributions import Float32
from models.study import Study
from privacy.errors import IsocenterError, RunError, named

ROOT = Path(__file__).resolve().parent.parent
log = logging.getLogger("isocenter.coordinator")


def first_model(root: Path, study: Study) -> Float32:
    """The weights to start from, float32 (P,): the study's seed, or the file that it names. Sites get them with the first order.

    Raises what `models.weights.start` raises, and StudyConflict if the file is not held here.
    """
    if "torch" in sys.modules:  # a simulation, which trains in this process
        model, sentence = _made(root, study)
    else:
        # This installation's code, whatever is called `models` where the coordinator was started.
        words, ours = [sys.executable, "-P", "-m", "fl_server.first", str(root)], os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, input=study.canonical(), capture_output=True, env=ours, check=False)
        head, _, values = done.stdout.partition(b"\n")
        if done.returncode != 0 or not head:
            raise RunError(f"the process that makes the first model ended with code {done.returncode}")
        told = json.loads(head)
        if told["code"]:
            error = named(told["code"])(told["text"])
            error.remedy = told["remedy"]
            raise error
        model, sentence = np.frombuffer(values, np.float32), told["text"]
    if sentence:
        log.info("the run starts from given weights: %s", sentence)
    return model


def _made(root: Path, study: Study) -> tuple[Float32, str]:
    from models import weights as files

    model, fit = files.start(study, weights.file_of(root, study))
    return model, "" if fit is None else fit.sentence


def main() -> None:
    study, model = Study.from_canonical(sys.stdin.buffer.read()), b""
    try:
        made, text = _made(Path(sys.argv[1]), study)
        model, told = made.tobytes(), {"code": "", "text": text, "remedy": ""}
    except IsocenterError as error:
        told = {"code": error.code, "text": str(error), "remedy": error.remedy}
    sys.stdout.buffer.write(json.dumps(told).encode() + b"\n" + model)


if __name__ == "__main__":
    main()
