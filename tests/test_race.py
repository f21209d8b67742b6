"Layers that leave after a race: right with noise, right without, and few books where few decide."

import itertools
from types import SimpleNamespace

import pytest
import torch

from flashmorph.choose.race import doubled, eliminate, race


class Drawn:
    "A divergence for every set of layers, and noise on each of its books."
    digest = "drawn"

    def __init__(self, layers, seed, noise, count=64):
        draws = torch.Generator().manual_seed(seed)
        self.model, self.count = SimpleNamespace(num_layers=layers), count
        worth = torch.rand(layers, generator=draws).double()
        pairs = torch.rand(layers, layers, generator=draws).double() / 4
        self.value = {}
        for size in range(layers + 1):
            for kept in itertools.combinations(range(layers), size):
                gone = [i for i in range(layers) if i not in kept]
                self.value[kept] = (worth[gone].sum() + pairs[gone][:, gone].sum()).item()
        self.noise = noise * torch.randn(len(self.value), count, generator=draws).double()
        self.place = {kept: n for n, kept in enumerate(self.value)}
        self.read = 0

    def books(self, sets, count):
        names = [tuple(sorted(kept)) for kept in sets]
        self.read += count * len(names)
        return torch.stack([self.value[name] + self.noise[self.place[name], :count]
                            for name in names])


def one_by_one(far):
    "The plain way: the layer leaves whose leaving costs least, by the values without noise."
    left, gone = [*range(far.model.num_layers)], []
    while left:
        rest = {i: far.value[tuple(j for j in left if j != i)] for i in left}
        gone.append(min(rest, key=lambda i: (rest[i], -i)))
        left.remove(gone[-1])
    return tuple(gone[::-1])


@pytest.mark.parametrize("seed", range(8))
def test_without_noise_the_order_is_that_of_the_plain_way(seed):
    far = Drawn(7, seed, noise=0.)
    assert eliminate(far, width=7, margin=0).order == one_by_one(far)
    # sets of layers that are missed more the fewer are left: those that are near suffice
    assert eliminate(Drawn(7, seed, noise=0.), width=1, margin=0).order == one_by_one(far)


def test_a_race_is_lost_by_little_and_seldom():
    sets, lost, read = [{*range(6)} - {i} for i in range(6)], [], 0
    for seed in range(200):
        far = Drawn(6, seed, noise=0.3)
        values = [far.value[tuple(sorted(kept))] for kept in sets]
        lost.append(values[race(far, sets, margin=0)] - min(values))
        read += far.read
    # 64 books leave a standard error of 0.05 between two sets
    assert sum(x > 0.1 for x in lost) <= 0.05 * len(lost)
    assert sum(lost) / len(lost) < 0.02
    assert read < 0.7 * 200 * 6 * 64


def test_a_margin_saves_books_and_costs_no_more_than_itself():
    sets = [{*range(6)} - {i} for i in range(6)]
    books = {margin: 0 for margin in (0, 0.3)}
    for seed, margin in itertools.product(range(100), books):
        far = Drawn(6, seed, noise=0.1)
        values = [far.value[tuple(sorted(kept))] for kept in sets]
        assert values[race(far, sets, margin=margin)] <= 1.3 * min(values) + 0.1
        books[margin] += far.read
    assert books[0.3] < 0.8 * books[0]


def test_few_books_and_equal_sets():
    assert [*doubled(8, 64)] == [8, 16, 32, 64]
    assert [*doubled(8, 5)] == [5]
    far = Drawn(3, 0, noise=1., count=1)
    assert race(far, [{0}, {0}, {1, 2}]) in (0, 2)
    assert sorted(eliminate(far).order) == [0, 1, 2]
