"""A released model for others' programs: a MONAI bundle, a torch.export program, or ONNX.

All three map images float32 (B, 1, *grid) in 0..1 on the study's grid to scores float32 (B, T) in 0..1, or of a model that
outlines (B, T, *grid), for any B, and need nothing of Isocenter where they are used.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from models import networks, tasks
from models.registry import Package
from models.study import Study
from privacy.errors import DocumentError, PackageRefused

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
LICENCE = (
    "The weights are released by whoever signed the package, under the terms that docs/README.md and they name.\n"
    "The configuration in this bundle was written by Isocenter, Apache-2.0.\n"
)


def network(package: Package) -> nn.Module:
    """The study's network with the package's weights, ready to score.

    Raises PackageRefused if the weights are of another architecture, by the name or shape of any layer.
    """
    net = networks.build(package.study)
    wanted = {layer.name: layer.shape for layer in networks.layout(net)}
    if wanted != {name: tensor.shape for name, tensor in package.tensors.items()}:
        raise PackageRefused("the weights are of another network than the study's")
    parts = [package.tensors[name].reshape(-1) for name in wanted]
    networks.load_vector(net, np.concatenate(parts))
    return net.eval()


def named_weights(study: Study, vector: np.ndarray[Any, Any]) -> bytes:
    """A model of the coordinator, float32 (P,), as safetensors under the names of the network's layers.

    Raises MessageMalformed if it is of another network, or holds what is no finite number.
    """
    net = networks.build(study)
    networks.load_vector(net, vector)
    names = [layer.name for layer in networks.layout(net)]
    return save({name: net.state_dict()[name].numpy() for name in names})


def export(package: Package, kind: str, out: Path) -> None:
    """Write the model of `package` as `kind` (bundle, pt2 or onnx) to `out`. Raises DocumentError if `out` is there already."""
    if out.exists():
        raise DocumentError(f"{out} exists already", remedy="Choose another name; nothing was overwritten.")
    _KINDS[kind](package, out)


class _Scorer(nn.Module):
    """Network and activation, so that no user has to know the second."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return tasks.activation(self.net(images))


def _traced(package: Package) -> tuple[nn.Module, tuple[Tensor], Any]:
    # Two images, because torch takes a batch of one for a constant.
    return (
        _Scorer(network(package)).eval(),
        (torch.zeros(2, *package.study.images.shape),),
        ({0: torch.export.Dim("batch")},),
    )


def _pt2(package: Package, out: Path) -> None:
    scorer, example, dynamic = _traced(package)
    with torch.no_grad():
        program = torch.export.export(scorer, example, dynamic_shapes=dynamic)
    torch.export.save(program, out)


def _onnx(package: Package, out: Path) -> None:
    """Raises DocumentError, naming the extra, where onnx and onnxscript are not installed."""
    scorer, example, dynamic = _traced(package)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                scorer, example, dynamo=True, dynamic_shapes=dynamic, input_names=["images"], output_names=["scores"]
            )
    except ImportError as error:
        raise DocumentError(
            f"ONNX needs more than is installed here ({error.name})",
            remedy="Install it with: pip install isocenter[onnx]",
        ) from None
    if program is None:
        raise DocumentError("this network has no form in ONNX", remedy="Export it as pt2 or bundle instead.")
    program.save(str(out))


def _bundle(package: Package, out: Path) -> None:
    """A folder in the layout of MONAI's bundle specification; `python -m monai.bundle run` scores .npy files with it."""
    for folder in ("configs", "models", "docs"):
        (out / folder).mkdir(parents=True)
    (out / "configs" / "metadata.json").write_text(json.dumps(_metadata(package), indent=1), encoding="utf-8")
    (out / "configs" / "inference.json").write_text(json.dumps(_inference(package.study), indent=1), encoding="utf-8")
    torch.save(network(package).state_dict(), out / "models" / "model.pt")
    _pt2(package, out / "models" / "model.pt2")
    grid = " x ".join(str(side) for side in package.study.images.shape[1:])
    what = "`scores.json`, with one list per file"
    if package.study.segments:
        what = "`scores.npz`, with one array (structure, *grid) per file; a voxel belongs to a structure from 0.5 on"
    usage = (
        f"\n## Using this bundle\n\nPut images as .npy files, float32 {grid} in 0 to 1 with bright as dense, into `inputs/`.\n"
        "Then in this folder: `pip install monai fire`, `python -m monai.bundle run --config_file configs/inference.json`.\n"
        f"It writes {what}: {', '.join(package.study.task.targets)}.\n"
    )
    (out / "docs" / "README.md").write_text(package.files["card.md"].decode() + usage, encoding="utf-8")
    (out / "LICENSE").write_text(LICENCE, encoding="utf-8")


def _metadata(package: Package) -> dict[str, Any]:
    study, version = package.study, package.manifest["version"]
    tensor = {"dtype": "float32", "value_range": [0, 1]}
    image = {
        "type": "image",
        "format": "hounsfield" if study.images.volume is not None else "magnitude",
        "modality": "CT" if study.images.volume is not None else "CR",
        "num_channels": 1,
        "spatial_shape": list(study.images.shape[1:]),
        "is_patch_data": False,
        "channel_def": {"0": "image"},
    }
    scores = {
        "type": "probabilities",
        "format": "segmentation" if study.segments else "classification",
        "num_channels": len(study.task.targets),
        "spatial_shape": list(study.images.shape[1:]) if study.segments else [],
        "channel_def": {str(place): name for place, name in enumerate(study.task.targets)},
    }
    return {
        "schema": SCHEMA,
        "version": version,
        "changelog": {version: f"study {study.digest}, run {package.manifest['run_id']}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {},
        "name": study.title,
        "task": f"{'Segmentation' if study.segments else 'Classification'} of {', '.join(study.task.targets)}",
        "description": study.purpose,
        "authors": f"The consortium of {', '.join(study.all_sites)}",
        "copyright": "Of whoever signed the package",
        "intended_use": study.purpose,
        "network_data_format": {"inputs": {"image": image | tensor}, "outputs": {"pred": scores | tensor}},
    }


def _inference(study: Study) -> dict[str, Any]:
    named = "dict(zip(map(os.path.basename, @files), @scores))"
    written, ending, scored = f"pathlib.Path(@output_file).write_text(json.dumps({named}))", "json", "tolist()"
    if study.segments:
        written, ending, scored = f"numpy.savez_compressed(@output_file, **{named})", "npz", "detach().numpy()"
    return {
        "imports": [f"$import {name}" for name in ("glob", "os", "pathlib", "json", "numpy", "torch")],
        "bundle_root": ".",
        "input_dir": "$@bundle_root + '/inputs'",
        "output_file": f"$@bundle_root + '/scores.{ending}'",
        "files": "$sorted(glob.glob(@input_dir + '/*.npy'))",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImage", "reader": "NumpyReader", "image_only": True},
                {"_target_": "EnsureChannelFirst", "channel_dim": "no_channel"},
                {"_target_": "EnsureType", "dtype": "$torch.float32", "track_meta": False},
            ],
        },
        "network": "$torch.export.load(@bundle_root + '/models/model.pt2').module()",
        "batch": "$torch.stack(list(map(@preprocessing, @files)))",
        "scores": f"$@network(@batch).{scored}",
        "run": [f"${written}"],
    }


_KINDS: dict[str, Callable[[Package, Path], None]] = {"bundle": _bundle, "pt2": _pt2, "onnx": _onnx}
