"""Who masks with whom: the bounds of `sharing.degree`, counted again on actual rings, and the ring itself."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import sharing
from privacy.errors import MessageMalformed

VECTORS = json.loads((Path(__file__).parent / "vectors" / "sharing.json").read_text())


def gaps(ring: list[str], width: int) -> Iterator[set[str]]:
    """Every pair of disjoint runs of `width` places of `ring` with something left on both sides of each."""
    size = len(ring)
    for distance in range(width + 1, size - width):
        yield {ring[(start + i) % size] for start in (0, distance) for i in range(width)}


def test_on_the_ring_only_two_gaps_part_those_who_are_left() -> None:
    """All sets of absent places of a small ring, against a walk through the graph."""
    size, half = 11, 2
    for absent in range(2**size):
        left = [place for place in range(size) if not absent >> place & 1]
        reached, todo = set(left[:1]), left[:1]
        while todo:
            here = todo.pop()
            near = {(here + step) % size for step in range(-half, half + 1)} & set(left) - reached
            reached |= near
            todo += near
        gone = [bool(absent >> place & 1) for place in range(size)]
        runs = sum(not gone[start - 1] and all(gone[(start + i) % size] for i in range(half)) for start in range(size))
        assert (len(reached) < len(left)) == (runs >= 2)


def test_the_degree_is_the_agreed_one() -> None:
    assert {sites: sharing.degree(int(sites)) for sites in VECTORS["degree"]} == VECTORS["degree"]
    assert [sharing.degree(sites) for sites in range(51)] == [0, *range(50)]
    for sites in range(51, 1001):
        assert sharing.degree(sites) % 2 == 0 and 0.6 * sites < sharing.degree(sites) < 0.71 * sites


@pytest.mark.parametrize("sites", [51, 60, 64, 99, 100])
def test_counted_on_the_graph_itself_no_part_of_the_survivors_can_be_read(sites: int) -> None:
    """Recount of bounds 1 to 3 with the holders of an actual ring and a random coalition, for every pair of gaps."""
    draw = random.Random(sites)
    names = [f"site-{i:03d}" for i in range(sites)]
    graph = sharing.neighbours(names, draw.randbytes(32))
    holders = {name: {name, *graph[name]} for name in names}
    size = len(holders[names[0]])
    needed = sharing.threshold(size)
    ring = ring_of(graph)
    for _ in range(4):
        colluders = set(draw.sample(names, sites // 10))
        assert all(len(holders[name]) + len(holders[name] & colluders) < 2 * needed for name in names)
        for gap in gaps(ring, len(graph[names[0]]) // 2):
            demand = sum(needed - len(holders[name] & colluders) for name in gap - colluders)
            supply = sum(min(size - needed, len(holders[name] & gap)) for name in names if name not in colluders)
            assert demand > supply
        lost = set(draw.sample(names, 2 * (sites // 10)))
        assert all(len(holders[name] - lost) >= needed for name in names)


@pytest.mark.parametrize("sites", [51, 64, 100, 201, 500, 1000])
def test_the_degree_is_the_least_that_the_worst_case_allows(sites: int) -> None:
    def safe(k: int) -> bool:
        """The three bounds, for every number of absent sites and not only for its ends."""
        colluders, absent, spare = sites // 10, sites - sharing.threshold(sites), (k + 1) - sharing.threshold(k + 1)
        needed = sharing.threshold(k + 1)
        if 2 * needed <= k + 1 + colluders or 2 * colluders > spare:
            return False
        return all(
            (k - colluders - q) * (needed - colluders) > (sites - colluders - q) * spare - q * (k - colluders - q + 1)
            for q in range(absent + 1)
        )

    chosen = sharing.degree(sites)
    assert safe(chosen) and not any(safe(k) for k in range(2, chosen, 2))


def ring_of(graph: dict[str, list[str]]) -> list[str]:
    """The order in which the sites of a ring stand, found from who shares most neighbours with whom."""
    here = min(graph)
    ring, left = [here], set(graph) - {here}
    while left:
        common = {name: len(set(graph[name]) & set(graph[ring[-1]])) for name in graph[ring[-1]] if name in left}
        ring.append(max(sorted(common), key=lambda name: common[name]))
        left.discard(ring[-1])
    return ring


def test_neighbours_are_the_nearest_on_the_known_ring() -> None:
    order = VECTORS["ring"]["order"]
    graph = sharing.neighbours(sorted(order), bytes.fromhex(VECTORS["ring"]["seed"]))
    half = sharing.degree(60) // 2
    for place, name in enumerate(order):
        distance = {other: min((place - j) % 60, (j - place) % 60) for j, other in enumerate(order)}
        assert graph[name] == sorted(other for other in order if 0 < distance[other] <= half)


@settings(max_examples=40)
@given(st.integers(1, 130), st.binary(min_size=32, max_size=32), st.randoms())
def test_the_graph_is_regular_and_symmetric_whatever_the_order_of_names(sites: int, seed: bytes, random_: Any) -> None:
    names = [f"s{i}" for i in range(sites)]
    graph = sharing.neighbours(names, seed)
    assert list(graph) == sorted(names)
    for name, near in graph.items():
        assert len(near) == len(set(near)) == sharing.degree(sites) and near == sorted(near)
        assert name not in near and all(name in graph[other] for other in near)
    random_.shuffle(names)
    assert sharing.neighbours(names, seed) == graph


def test_the_graph_follows_from_the_seed() -> None:
    names = [f"s{i}" for i in range(51)]
    graphs = [sharing.neighbours(names, bytes([i]) * 32) for i in range(10)]
    assert all(first != second for first, second in itertools.combinations(graphs, 2))


def test_a_site_that_comes_twice_or_too_many_sites_make_no_graph() -> None:
    with pytest.raises(MessageMalformed):
        sharing.neighbours(["a", "b", "a"], bytes(32))
    with pytest.raises(MessageMalformed):
        sharing.neighbours([f"s{i}" for i in range(1001)], bytes(32))
