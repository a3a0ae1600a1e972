"""Networks for radiographs and CT: one study builds the same parameters at the server and at every site, without BatchNorm.

A network takes float32 (B, 1, S, S) radiographs or (B, 1, D, H, W) volumes in [0, 1] and returns logits float32 (B, T), T the
targets of the study, and one that outlines structures (B, T, *grid); where the study names covariates, it takes these as well
(`models.fusion`). Statistics of a batch are statistics of patients: they would leave the site with the weights, couple the
gradients of different patients (which differential privacy forbids) and differ by hospital. So every norm is a GroupNorm (or the
LayerNorm of a transformer), and `build` looks at what it built, because some networks ignore the norm they are asked for. Nothing
else of a network may couple patients either: no layer drops whole images or branches at random.

A study may train a part of the network: `PARTS` says which, `build` freezes the rest, and the vector keeps its length.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import relations
from models.conflicts import VIT_PATCH
from models.fusion import Fused
from models.sections import NetworkName
from models.study import Network, Study
from privacy.errors import MessageMalformed, StudyConflict

CHANNELS_PER_GROUP = 8  # between InstanceNorm (1) and LayerNorm (all) for the 16 to 128 channels of the small network
GROUPS = 8  # of MONAI's networks: every channel count of theirs is a multiple of 8
CELLS = 8  # of the linear network; with 12, real radiographs at ε = 6 lost 0.1 of the AUROC that 8 keep
CELLS_OF_VOLUME = 4  # as many weights as in a picture
UNET_CHANNELS = (16, 32, 64, 128)  # 0.4 million parameters in a picture, 1.2 in a volume; three halvings
SEGRESNET_FILTERS = 16  # of the first level, doubled with each of three halvings (Myronenko 2018)
SMALL_CHANNELS = (16, 16, 32, 64, 128)  # the stem, then one residual block each; 0.3 million parameters
VIT_WIDTH, VIT_HEADS, VIT_BLOCKS = 192, 3, 6  # half as deep as ViT-Tiny (Touvron et al. 2021): 2.8 million parameters


class Layer(NamedTuple):
    """One parameter or buffer, as it lies in the vector."""

    name: str
    shape: tuple[int, ...]


CONVOLUTIONS: dict[int, type[nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class _Standardised(nn.modules.conv._ConvNd):
    """A convolution of side 3 whose kernels have zero mean and unit gain (weight standardisation, Qiao et al. 2019).

    A batch of ten radiographs moves such kernels less, and models of different sites stay close enough to be averaged.
    It depends on weights alone, so no patient meets another in it.
    """

    def forward(self, images: Tensor) -> Tensor:
        kernels = self.weight.flatten(1)  # (after, before * 9) or (after, before * 27)
        inputs = kernels.shape[1]
        # Half of what arrives was cut off by a ReLU, so a gain of sqrt(2) keeps the variance from layer to layer. As the norm of
        # a layer this is one pass each way: a private step takes it for every patient, and made of sums it was half of that.
        gain = kernels.new_full((inputs,), math.sqrt(2 / inputs))
        standard = functional.layer_norm(kernels, (inputs,), gain, eps=1e-5)
        filtered: Tensor = self._conv_forward(images, standard.view_as(self.weight), None)
        return filtered


class StandardisedConv2d(_Standardised, nn.Conv2d):
    """Of pictures."""


class StandardisedConv3d(_Standardised, nn.Conv3d):
    """Of volumes."""


def _standardised(dims: int, before: int, after: int, stride: int = 1) -> nn.Module:
    kind = StandardisedConv2d if dims == 2 else StandardisedConv3d
    return kind(before, after, kernel_size=3, stride=stride, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """Halve the side and go from `before` to `after` channels, norm and ReLU before each convolution (He et al. 2016)."""

    def __init__(self, dims: int, before: int, after: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = _norm(before), _norm(after)
        self.first, self.second = _standardised(dims, before, after, stride=2), _standardised(dims, after, after)
        self.shortcut = CONVOLUTIONS[dims](before, after, kernel_size=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        ready = functional.relu(self.first_norm(images))
        added: Tensor = self.second(functional.relu(self.second_norm(self.first(ready))))
        # Pooled with ceil_mode, an odd side is halved upwards, as the strided convolution beside it does.
        # A volume of few slices is down to one of them sooner than to one row.
        pool = functional.avg_pool2d if ready.dim() == 4 else functional.avg_pool3d
        window = tuple(min(2, side) for side in ready.shape[2:])
        shortcut: Tensor = self.shortcut(pool(ready, window, ceil_mode=True))
        return added + shortcut


class SmallCNN(nn.Module):
    """A residual network that one CPU core trains on some hundred radiographs in a second per epoch."""

    def __init__(self, network: Network, targets: int, dims: int) -> None:
        super().__init__()
        stem = CONVOLUTIONS[dims]
        self.stem = stem(1, SMALL_CHANNELS[0], kernel_size=5, stride=2, padding=2, bias=False)
        self.body = nn.Sequential(*(ResidualBlock(dims, before, after) for before, after in pairwise(SMALL_CHANNELS)))
        self.norm = _norm(SMALL_CHANNELS[-1])
        self.dropout = nn.Dropout(network.dropout)
        self.head = nn.Linear(2 * SMALL_CHANNELS[-1], targets)

    def forward(self, images: Tensor) -> Tensor:
        found = functional.relu(self.norm(self.body(self.stem(_centred(images)))))  # (B, C, h, w) or (B, C, d, h, w)
        within = tuple(range(2, found.dim()))
        # The mean tells how widespread a finding is, the maximum whether a small one is anywhere.
        pooled = torch.cat([found.mean(dim=within), found.amax(dim=within)], dim=1)  # (B, 2C)
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


class Transformer(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) that scores the mean of its words (Beyer et al. 2022).

    Of torch's own layers: MONAI's needs a library that nothing else here does. Images have the size of the study.
    """

    def __init__(self, network: Network, targets: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.patches = CONVOLUTIONS[len(shape)](1, VIT_WIDTH, kernel_size=VIT_PATCH, stride=VIT_PATCH)
        words = math.prod(side // VIT_PATCH for side in shape)
        self.places = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, words, VIT_WIDTH), std=0.02))
        self.blocks = nn.ModuleList(self._block(network.dropout) for _ in range(VIT_BLOCKS))
        self.norm = nn.LayerNorm(VIT_WIDTH)
        self.head = nn.Linear(VIT_WIDTH, targets)

    @staticmethod
    def _block(dropout: float) -> nn.Module:
        block = nn.TransformerEncoderLayer(
            VIT_WIDTH, VIT_HEADS, 4 * VIT_WIDTH, dropout, "gelu", batch_first=True, norm_first=True
        )
        # That of attention is no module: the check whether patients are isolated could not switch it off.
        block.self_attn.dropout = 0.0
        return block

    def forward(self, images: Tensor) -> Tensor:
        words = self.patches(_centred(images)).flatten(2).transpose(1, 2) + self.places  # (B, words, W)
        with sdpa_kernel(SDPBackend.MATH):  # faster ones do not know of several patients at once
            for block in self.blocks:
                words = block(words)
        logits: Tensor = self.head(self.norm(words).mean(dim=1))
        return logits


class LinearOnCells(nn.Module):
    """Logistic regression on the picture reduced to CELLS x CELLS mean values, or a volume to CELLS_OF_VOLUME each way.

    65 weights for each target. Noise of differential privacy grows with the square root of the number of weights, and at sites of
    a hundred patients it drowns a deep network that starts from nothing: there a few good features do better (Tramer and Boneh
    2021). An opacity of the lungs is coarse enough to be seen in such a picture.
    """

    def __init__(self, network: Network, targets: int, dims: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(network.dropout)
        self.side = CELLS if dims == 2 else CELLS_OF_VOLUME
        self.head = nn.Linear(self.side**dims, targets)

    def forward(self, images: Tensor) -> Tensor:
        reduce = functional.adaptive_avg_pool2d if images.dim() == 4 else functional.adaptive_avg_pool3d
        cells = reduce(_centred(images), self.side).flatten(1)  # (B, cells)
        # Divided so that a picture, and with it a patient's gradient, has a norm of about 1 whatever the number of cells.
        logits: Tensor = self.head(self.dropout(cells / math.sqrt(cells.shape[1])))
        return logits


class OfMonai(nn.Module):
    """A network of MONAI for one channel, with GroupNorm; all but the smallest pictures need a strong machine or patience."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(_centred(images))
        return logits


class Outlining(nn.Module):
    """MONAI's U-Net with residual units (Kerfoot et al. 2018): features of each voxel, and a head that scores them.

    The head is ours, because MONAI puts a norm on the last channels, and a GroupNorm of one structure is none.
    """

    def __init__(self, network: Network, targets: int, dims: int) -> None:
        from monai.networks.nets import UNet

        super().__init__()
        steps = (2,) * (len(UNET_CHANNELS) - 1)
        norm = ("group", {"num_groups": GROUPS})
        self.net = UNet(
            dims, 1, UNET_CHANNELS[0], UNET_CHANNELS, steps, num_res_units=2, norm=norm, dropout=network.dropout
        )
        self.head = CONVOLUTIONS[dims](UNET_CHANNELS[0], targets, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.net(_centred(images)))
        return logits


class DroppingLinear(nn.Linear):
    """A head that drops features while training, for networks that have no dropout; its weights have the usual names."""

    def __init__(self, before: int, after: int, dropout: float) -> None:
        super().__init__(before, after)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(self.dropout(features))


# Importing MONAI takes two seconds and 165 MiB; a site that trains a small network needs neither, so it is imported late.


def _densenet(network: Network, targets: int, shape: tuple[int, ...]) -> nn.Module:
    from monai.networks.nets import DenseNet121, DenseNet169

    kind = DenseNet121 if network.name == "densenet121" else DenseNet169
    norm = ("group", {"num_groups": GROUPS})
    return OfMonai(kind(len(shape), 1, targets, norm=norm, dropout_prob=network.dropout))


def _resnet(network: Network, targets: int, shape: tuple[int, ...]) -> nn.Module:
    """ResNet with the stride and the shortcuts of He et al. 2016, as published weights have them."""
    from monai.networks.nets import ResNet

    block, layers = ("basic", [2, 2, 2, 2]) if network.name == "resnet18" else ("bottleneck", [3, 4, 6, 3])
    net = ResNet(
        block,
        layers,
        [64, 128, 256, 512],
        spatial_dims=len(shape),
        n_input_channels=1,
        conv1_t_stride=2,
        bias_downsample=False,
    )
    net.fc = DroppingLinear(net.fc.in_features, targets, network.dropout)
    _group(net)  # MONAI hands a norm to the first layer alone
    return OfMonai(net)


def _efficientnet(network: Network, targets: int, shape: tuple[int, ...]) -> nn.Module:
    from monai.networks.nets import EfficientNetBN

    norm = ("group", {"num_groups": GROUPS})
    net = EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=len(shape), in_channels=1, norm=norm)
    # Its own head starts with weights of up to 1 for a single target, and with that far from a probability of one half.
    net._fc = nn.Linear(net._fc.in_features, targets)
    net._dropout.p = network.dropout
    net.set_swish(
        memory_efficient=False
    )  # the other kind writes over its input, which gradients of patients do not bear
    for module in net.modules():
        if hasattr(module, "drop_connect_rate"):
            module.drop_connect_rate = 0.0  # a draw for each image that is no nn.Dropout, so nobody could switch it off
    return OfMonai(net)


def _vit(network: Network, targets: int, shape: tuple[int, ...]) -> nn.Module:
    return Transformer(network, targets, shape)


def _unet(network: Network, targets: int, shape: tuple[int, ...]) -> nn.Module:
    return Outlining(network, targets, len(shape))


def _segresnet(network: Network, targets: int, shape: tuple[int, ...]) -> nn.Module:
    from monai.networks.nets import SegResNet

    norm = ("group", {"num_groups": GROUPS})
    dropped = network.dropout or None
    return OfMonai(SegResNet(len(shape), SEGRESNET_FILTERS, 1, targets, dropout_prob=dropped, norm=norm))


def _small(network: Network, targets: int, shape: tuple[int, ...]) -> nn.Module:
    return SmallCNN(network, targets, len(shape))


def _linear(network: Network, targets: int, shape: tuple[int, ...]) -> nn.Module:
    return LinearOnCells(network, targets, len(shape))


KINDS: dict[NetworkName, Callable[[Network, int, tuple[int, ...]], nn.Module]] = {
    "small_cnn": _small,
    "linear": _linear,
    "densenet121": _densenet,
    "densenet169": _densenet,
    "resnet18": _resnet,
    "resnet50": _resnet,
    "efficientnet_b0": _efficientnet,
    "vit": _vit,
    "unet": _unet,
    "segresnet": _segresnet,
}


class Parts(NamedTuple):
    """Beginnings of the names of parameters: the last layer, and what `last_block` trains besides it."""

    head: str
    last_block: tuple[str, ...]


# The last block is the last stage at the coarsest resolution (a transformer: its last layer), with the norm behind it.
PARTS: dict[NetworkName, Parts] = {
    "small_cnn": Parts("head.", (f"body.{len(SMALL_CHANNELS) - 2}.", "norm.")),
    "linear": Parts("head.", ()),
    "densenet121": Parts("net.class_layers.", ("net.features.denseblock4.", "net.features.norm5.")),
    "densenet169": Parts("net.class_layers.", ("net.features.denseblock4.", "net.features.norm5.")),
    "resnet18": Parts("net.fc.", ("net.layer4.",)),
    "resnet50": Parts("net.fc.", ("net.layer4.",)),
    "efficientnet_b0": Parts("net._fc.", ("net._blocks.6.", "net._conv_head.", "net._bn1.")),
    "vit": Parts("head.", (f"blocks.{VIT_BLOCKS - 1}.", "norm.")),
    "unet": Parts("head.", ("net.model.2.",)),  # the last step up
    "segresnet": Parts("net.conv_final.2.", ("net.up_samples.2.", "net.up_layers.2.", "net.conv_final.0.")),
}


LAST_LAYER: dict[NetworkName, str] = {
    "small_cnn": "head",
    "linear": "head",
    "densenet121": "net.class_layers.out",
    "densenet169": "net.class_layers.out",
    "resnet18": "net.fc",
    "resnet50": "net.fc",
    "efficientnet_b0": "net._fc",
    "vit": "head",
}
"""Where the linear layer is that turns features into answers."""


def build(study: Study) -> nn.Module:
    """The network of `study`, float32, on the CPU, its parameters a function of `study.training.seed` alone.

    What the study does not train requires no gradient; what puts the targets in relation is always trained. The caller's random
    state is left as it was. Raises StudyConflict if any layer keeps or uses statistics of a batch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.training.seed)
        targets = len(study.task.targets)
        answers = relations.outputs(study.relation, targets)
        inner = KINDS[study.network.name](study.network, answers, study.images.shape[1:])
        if study.covariates:
            inner = _fused(inner, study, answers)
        _freeze(inner, study)
        net = relations.related(inner, study.relation, targets)
    refuse_batch_statistics(net)
    return net


def _fused(net: nn.Module, study: Study, answers: int) -> nn.Module:
    """`net` without its last layer, with a head over its features and the study's covariates in that place."""
    place, name = LAST_LAYER[study.network.name], study.network.name
    last = net.get_submodule(place)
    features = int(last.get_parameter("weight").shape[1])
    dropping = isinstance(last, DroppingLinear)
    net.set_submodule(place, nn.Dropout(study.network.dropout) if dropping else nn.Identity())
    return Fused(net, features, study.covariates, answers, hidden=name != "linear")


def parts_of(study: Study) -> Parts:
    """What of the study's network is its head, and what its last block, by the beginnings of their names."""
    parts = PARTS[study.network.name]
    return Parts("head.", tuple(f"net.{name}" for name in parts.last_block)) if study.covariates else parts


def _freeze(net: nn.Module, study: Study) -> None:
    """Leave a gradient to the parameters that `network.trained` names."""
    head, last_block = parts_of(study)
    trained = {"all": ("",), "head": (head,), "last_block": (head, *last_block)}[study.network.trained]
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(trained))


def _group(net: nn.Module) -> None:
    """Put a GroupNorm in the place of every BatchNorm of `net`."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, nn.GroupNorm(GROUPS, child.num_features))


def refuse_batch_statistics(net: nn.Module) -> None:
    """Raise StudyConflict, naming the layers, if a BatchNorm or a norm with running statistics is anywhere in `net`."""
    found = [
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "track_running_stats", False)
    ]
    if found:
        raise StudyConflict(f"the network keeps statistics of patients in {len(found)} layers: {', '.join(found[:3])}")


def layout(net: nn.Module) -> list[Layer]:
    """Names and shapes of everything `to_vector` holds, in its order, so that a vector can be stored under names."""
    return [Layer(name, tuple(tensor.shape)) for name, tensor in _tensors(net)]


def to_vector(net: nn.Module) -> NDArray[np.float32]:
    """Copy every parameter and floating-point buffer into one float32 (P,), in the order of `state_dict`.

    Raises MessageMalformed for a buffer of another type: a counter has no mean over sites.
    """
    return np.concatenate([tensor.detach().cpu().numpy().reshape(-1) for _, tensor in _tensors(net)])


def load_vector(net: nn.Module, vector: NDArray[np.float32]) -> None:
    """Copy `vector`, float32 (P,), into `net`; all or nothing.

    Raises MessageMalformed for another type or length, or a value that is not a finite number.
    """
    tensors = list(_tensors(net))
    length = sum(math.prod(tensor.shape) for _, tensor in tensors)
    if vector.dtype != np.float32 or vector.shape != (length,):
        raise MessageMalformed(f"the model is {vector.dtype} {vector.shape}, this network needs float32 ({length},)")
    if not np.isfinite(vector).all():
        raise MessageMalformed("the model holds values that are not finite numbers")
    start = 0
    with torch.no_grad():
        for _, tensor in tensors:
            size = math.prod(tensor.shape)
            # A copy, because torch takes no read-only array without a warning, and a model out of a message is read-only.
            tensor.copy_(torch.from_numpy(np.array(vector[start : start + size])).reshape(tensor.shape))
            start += size


def trained_places(net: nn.Module) -> NDArray[np.bool_]:
    """(P,): which values of `to_vector` a gradient moves.

    Raises MessageMalformed if a value is no parameter: nobody could say what moves it.
    """
    moved = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    if strangers := [layer.name for layer in layout(net) if layer.name not in moved]:
        raise MessageMalformed(
            f"{strangers[0]!r} is no weight of the network, so it cannot be trained or left as it is"
        )
    return np.repeat([moved[name] for name, _ in layout(net)], [math.prod(shape) for _, shape in layout(net)])


def norm_places(net: nn.Module) -> NDArray[np.bool_]:
    """(P,): which values of `to_vector` are gains and biases of norm layers."""
    norms = _norm_names(net)
    return np.repeat([name in norms for name, _ in layout(net)], [math.prod(shape) for _, shape in layout(net)])


def fresh_norms(net: nn.Module) -> NDArray[np.float32]:
    """The values at `norm_places` in a network that learned nothing: gain 1, bias 0."""
    norms = _norm_names(net)
    sizes = [(name, math.prod(shape)) for name, shape in layout(net) if name in norms]
    return np.concatenate(
        [np.full(size, name.rpartition(".")[2] == "weight", np.float32) for name, size in sizes]
        or [np.zeros(0, np.float32)]
    )


def shared(net: nn.Module, study: Study) -> NDArray[np.float32]:
    """What of the weights of `net` sites and coordinator send: all of them, or with local norms all others; float32."""
    whole = to_vector(net)
    return whole[~norm_places(net)] if study.strategy.local_norms else whole


def _norm_names(net: nn.Module) -> set[str]:
    kinds = (nn.GroupNorm, nn.LayerNorm)
    return {
        f"{name}.{own}"
        for name, module in net.named_modules()
        if isinstance(module, kinds)
        for own in ("weight", "bias")
    }


def placed(part: NDArray[Any], places: NDArray[np.bool_]) -> NDArray[Any]:
    """(P,) with the values of `part` at `places`, in their order, and exact zeros elsewhere; of the type of `part`."""
    whole = np.zeros(places.size, part.dtype)
    whole[places] = part
    return whole


def _tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in net.state_dict().items():
        if tensor.dtype != torch.float32:
            raise MessageMalformed(f"{name!r} is {tensor.dtype}; only float32 can be averaged over sites")
        yield name, tensor


def _centred(images: Tensor) -> Tensor:
    """Map [0, 1] to about zero mean and unit variance with fixed numbers: those of a cohort would be data."""
    return (images - 0.5) * 4


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)
