"""CT geometry against hand-made scans: order, gaps, tilt, orientation, padding, and millimetres kept by the resampling."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from models import volumes
from models.study import Volume
from models.volumes import Plane, plane_of, require_air, stack, to_volume_grid
from privacy.errors import ImageLeftOut

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
GRID = Volume(spacing_mm=[5.0, 4.0, 4.0], size=[24, 40, 48])


def planes(places: list[float], orientation: tuple[float, ...] = AXIAL, pixel_mm: float = 2.0) -> list[Plane]:
    normal = np.cross(orientation[:3], orientation[3:])
    return [plane_of([*(normal * place)], orientation, (pixel_mm, pixel_mm)) for place in places]


def reason(places: list[float], **change: Any) -> str:
    with pytest.raises(ImageLeftOut) as caught:
        stack(planes(places, **change))
    return caught.value.reason


def test_slices_are_ordered_by_position_whatever_their_order() -> None:
    places = [float(n) * 2.5 for n in range(12)]
    mixed = [places[n] for n in (3, 0, 11, 5, 1, 2, 10, 4, 6, 9, 7, 8)]
    made = stack(planes(mixed))
    assert [mixed[n] for n in made.order] == places
    assert made.spacing_mm == pytest.approx((2.5, 2.0, 2.0)) and made.tilt_degrees == pytest.approx(0)
    np.testing.assert_allclose(made.affine @ [3, 0, 0, 1], [0, 0, 7.5])
    np.testing.assert_allclose(made.affine @ [0, 5, 7, 1], [14, 10, 0])  # row 5 lies to the back, column 7 to the left


@pytest.mark.parametrize(
    ("places", "why"),
    [
        ([0.0, 3.0, 6.0], "too_few_slices"),
        ([*(3.0 * n for n in range(12)), 6.0], "position_twice"),
        ([*(3.0 * n for n in range(12)), 6.004], "position_twice"),
        ([3.0 * n for n in range(15) if n != 7], "missing_slices"),
        ([3.0 * n for n in range(20) if n not in (7, 8, 12)], "missing_slices"),
        ([*(4.22 * n for n in range(10)), 4.22 * 9 + 1.14, 4.22 * 9 + 1.14 + 7.38], "irregular_gaps"),
        ([3.0 * n + 0.05 * (n % 2) for n in range(12)], "irregular_gaps"),
    ],
)
def test_a_series_that_is_no_volume_has_a_reason(places: list[float], why: str) -> None:
    for order in (places, places[::-1]):
        assert reason(order) == why


def test_rounded_positions_are_no_gap() -> None:
    places = [round(0.625 * n, 2) for n in range(40)]
    assert stack(planes(places)).spacing_mm[0] == pytest.approx(0.625, abs=1e-3)


def test_a_tilted_gantry_is_told_by_its_angle() -> None:
    cosine, sine = np.cos(np.radians(18.5)), np.sin(np.radians(18.5))
    orientation = (1.0, 0.0, 0.0, 0.0, float(cosine), float(-sine))
    table = [plane_of((0.0, 0.0, 4.22 * n), orientation, (0.5, 0.5)) for n in range(12)]
    made = stack(table)
    assert made.tilt_degrees == pytest.approx(18.5, abs=1e-6)
    assert made.spacing_mm[0] == pytest.approx(4.22 * cosine)


def test_a_table_that_moves_sideways_is_no_volume() -> None:
    moved = [plane_of((0.0 if n < 6 else 9.0, 0.0, 3.0 * n), AXIAL, (1, 1)) for n in range(12)]
    with pytest.raises(ImageLeftOut) as caught:
        stack(moved)
    assert caught.value.reason == "irregular_gaps"


@pytest.mark.parametrize(
    "change",
    [
        {"position": (0, 0)},
        {"position": (0, 0, float("nan"))},
        {"position": (0, 0, 1e9)},
        {"orientation": (1, 0, 0, 1, 0, 0)},
        {"orientation": (2, 0, 0, 0, 1, 0)},
        {"orientation": (0,) * 6},
        {"orientation": ()},
        {"spacing_mm": (0, 1)},
        {"spacing_mm": (1, 50)},
        {"spacing_mm": (1,)},
    ],
)
def test_what_is_no_plane_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ImageLeftOut) as caught:
        plane_of(**{"position": (0, 0, 0), "orientation": AXIAL, "spacing_mm": (1, 1)} | change)
    assert caught.value.reason == "no_geometry"


def density(x: Any, y: Any, z: Any) -> Any:
    """A smooth invented body in Hounsfield units at millimetres: different on every axis and side, air far outside."""
    ball = np.exp(-(((x - 12) / 30) ** 2) - ((y + 8) / 22) ** 2 - ((z - 20) / 26) ** 2)
    small = np.exp(-(((x + 20) / 10) ** 2) - ((y - 15) / 12) ** 2 - ((z - 5) / 9) ** 2)
    return -1000 + 900 * ball + 600 * small


def scanned(orientation: tuple[float, ...], shear: tuple[float, float, float], pixel_mm: float, count: int) -> Any:
    """The body as a scanner of this plane sees it: int16 (D, H, W) and the planes, in a mixed order."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    side = 120
    across = (np.arange(side) - (side - 1) / 2) * pixel_mm
    middle = np.array([5.0, -3.0, 12.0])
    found, made = [], []
    for n in range(count):
        centre = middle + np.array(shear) * (n - (count - 1) / 2)
        places = centre + across[:, None, None] * column + across[None, :, None] * row
        found.append(np.rint(density(places[..., 0], places[..., 1], places[..., 2])).astype(np.int16))
        made.append(plane_of(places[0, 0].tolist(), orientation, (pixel_mm, pixel_mm)))
    order = list(np.random.default_rng(1).permutation(count))
    return [found[n] for n in order], [made[n] for n in order]


TILT = np.radians(15)
SCANS = {
    "axial": (AXIAL, (0.0, 0.0, 2.0)),
    "from above": (AXIAL, (0.0, 0.0, -2.0)),
    "feet first": ((-1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 2.0)),
    "prone": ((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0), (0.0, 0.0, 2.0)),
    "coronal": ((1.0, 0.0, 0.0, 0.0, 0.0, -1.0), (0.0, 2.0, 0.0)),
    "sagittal": ((0.0, 1.0, 0.0, 0.0, 0.0, -1.0), (2.0, 0.0, 0.0)),
    "tilted": ((1.0, 0.0, 0.0, 0.0, float(np.cos(TILT)), float(-np.sin(TILT))), (0.0, 0.0, 2.0)),
}


@pytest.mark.parametrize("scan", SCANS)
def test_every_plane_and_tilt_gives_the_same_body_in_the_same_place(scan: str) -> None:
    """The grid is compared with the body itself at the grid's own millimetres: an oracle that knows no affine."""
    orientation, step = SCANS[scan]
    slices, table = scanned(orientation, step, 1.5, 90)
    made = stack(table)
    volume = np.stack([slices[n] for n in made.order])
    found = to_volume_grid(volume, made.affine, GRID)
    centre = made.affine @ [*((np.array(volume.shape) - 1) / 2), 1.0]
    np.testing.assert_allclose(centre, [5, -3, 12], atol=1e-6)
    axes = [
        c + (np.arange(n) - (n - 1) / 2) * s for c, n, s in zip(centre[::-1], GRID.size, GRID.spacing_mm, strict=True)
    ]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    expected = np.clip((density(x, y, z) + 1000) / 1400, 0, 1)
    inner = (slice(None), slice(4, -4), slice(4, -4))
    assert found.shape == (1, *GRID.size) and found.dtype == np.float32
    # Averaging over a block of up to 4 mm smooths a body whose parts are 10 mm wide by a few per cent.
    assert np.abs(found[0] - expected)[inner].max() < 0.05
    assert np.corrcoef(found[0][inner].ravel(), expected[inner].ravel())[0, 1] > 0.999


def test_without_a_coarser_grid_the_look_up_is_that_of_another_library() -> None:
    rng = np.random.default_rng(3)
    volume = rng.integers(-1000, 400, (20, 30, 30)).astype(np.int16)
    affine = np.array([[0, 0, 2.0, -10], [0, 2.0, 0, 5], [3.0, 0, 0, 7]])
    grid = Volume(spacing_mm=[2.1, 1.7, 1.9], size=[16, 20, 24])
    middle = affine @ [*((np.array(volume.shape) - 1) / 2), 1]
    axes = [
        c + (np.arange(n) - (n - 1) / 2) * s for c, n, s in zip(middle[::-1], grid.size, grid.spacing_mm, strict=True)
    ]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    places = [(z - 7) / 3, (y - 5) / 2, (x + 10) / 2]
    looked = map_coordinates(volume.astype(float), places, order=1, mode="constant", cval=-1024.0)
    np.testing.assert_allclose(
        to_volume_grid(volume, affine, grid)[0], np.clip((looked + 1000) / 1400, 0, 1), atol=2e-4
    )


def test_padding_becomes_air_before_anything_is_averaged() -> None:
    """A ring of -3024 around a block of 0: averaged as it stands, it would darken what lies beside it."""
    values = np.full((8, 8), -3024, np.float32)
    values[2:6, 2:6] = 0
    plain = volumes.hounsfield(values, None)
    assert plain.min() == volumes.AIR_HU and plain.dtype == np.int16
    odd = np.where(values == -3024, 5000, values).astype(np.float32)
    np.testing.assert_array_equal(volumes.hounsfield(odd, values == -3024), plain)
    assert volumes.hounsfield(np.full((2, 2), 1e9, np.float32), None).max() == volumes.HU_MAX


def test_what_was_not_rescaled_is_no_hounsfield() -> None:
    rng = np.random.default_rng(1)
    chest = rng.normal(40, 20, (12, 40, 40)).astype(np.int16)
    chest[:, 10:20, 10:20] = -850
    require_air(chest)
    for wrong in (chest + 1024, np.full((12, 40, 40), -1024, np.int16)):  # a forgotten intercept; padding alone
        with pytest.raises(ImageLeftOut) as caught:
            require_air(wrong.astype(np.int16))
        assert caught.value.reason == "not_hounsfield"


SHARED = Path(__file__).parents[2] / "shared" / "data" / "dicom"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real CT sets are not here")
def test_a_real_series_lies_where_the_segmentation_of_others_says() -> None:
    """siemens_j2k: instance numbers run against z and all UIDs are empty. Its segmentation was made with other software."""
    import nibabel
    import pydicom

    from fl_client.headers import look_at_dicom, read_slice

    files = sorted((SHARED / "siemens_j2k").iterdir())
    headers = [look_at_dicom(path.read_bytes()) for path in files]
    made = stack([plane_of(h.plane[:3], h.plane[3:9], h.plane[9:]) for h in headers])
    numbers = [int(pydicom.dcmread(files[n], stop_before_pixels=True).InstanceNumber) for n in made.order]
    assert numbers == sorted(numbers, reverse=True) and made.spacing_mm[0] == pytest.approx(2.0)
    volume = np.stack([read_slice(files[n].read_bytes()) for n in made.order])
    seg = nibabel.load(SHARED / "siemens_j2k_seg.nii.gz")
    labels = np.asarray(seg.dataobj)
    to_index = np.linalg.inv(np.vstack([made.affine, [0, 0, 0, 1]]))
    means = {}
    for label in np.unique(labels)[1:]:
        voxels = np.argwhere(labels == label)
        if len(voxels) < 2000:
            continue
        ras = voxels @ seg.affine[:3, :3].T + seg.affine[:3, 3]
        lps = np.c_[ras * [-1, -1, 1], np.ones(len(ras))]
        at = np.rint(lps @ to_index[:3].T).astype(int)
        means[int(label)] = float(volume[tuple(at.T)].mean()), float(volume[tuple(at.T)].std())
    # TotalSegmentator's liver is 5, spleen 1: even soft tissue, which a flipped or shifted axis would mix with air.
    assert 80 < means[5][0] < 140 and means[5][1] < 30
    assert 60 < means[1][0] < 160 and means[1][1] < 30
    bones = [mean for label, (mean, _) in means.items() if label in (32, 33) or label >= 98]  # vertebrae and ribs
    assert len(bones) > 8 and min(bones) > 130


def test_orders_of_slices_do_not_change_the_volume() -> None:
    places = [2.0 * n for n in range(10)]
    for order in itertools.islice(itertools.permutations(range(10)), 0, 3_000_000, 400_000):
        made = stack(planes([places[n] for n in order]))
        assert [order[n] for n in made.order] == list(range(10))


@pytest.mark.parametrize(("axes", "blocks"), [((2, 1, 0), (5, 3, 2)), ((1, 2, 0), (3, 5, 2)), ((0, 1, 2), (2, 3, 5))])
def test_each_axis_is_averaged_as_much_as_the_patients_axis_that_it_runs_along(
    axes: tuple[int, int, int], blocks: tuple[int, int, int]
) -> None:
    """`axes`: along which of the patient's x, y, z the volume's slices, rows and columns run, a millimetre each."""
    affine = np.zeros((3, 4))
    for place, axis in enumerate(axes):
        affine[axis, place] = 1.0
    volume = np.random.default_rng(1).integers(-1000, 400, (60, 60, 60)).astype(np.int16)
    pooled, moved = volumes._averaged(volume, affine, Volume(spacing_mm=[5, 3, 2], size=[12, 20, 30]))
    assert tuple(60 // size for size in pooled.shape) == blocks
    first = volume[: blocks[0], : blocks[1], : blocks[2]]
    assert pooled[0, 0, 0] == pytest.approx(float(first.mean()), abs=1e-3)
    np.testing.assert_allclose(moved @ [0, 0, 0, 1], affine @ [*((np.array(blocks) - 1) / 2), 1])
