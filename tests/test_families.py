"""The matrix of a hybrid's behaviours, for the families that are named as supported.

`FLASHMORPH_PROBE=1` probes every type that transformers has, which takes some minutes."""

import json
import os
from pathlib import Path

import pytest
import torch

from flashmorph.model.hosts import supported_families
from probe_families import MIXERS, causal_types, counts, problems, probe
from tiny_models import tiny_model

RESULTS = Path(__file__).parents[1] / "nbs" / "results" / "families.json"


@pytest.mark.parametrize("name", supported_families())
def test_a_named_family_is_right(name):
    "In every check of the matrix; families take turns with the mixers."
    mixer = MIXERS[supported_families().index(name) % len(MIXERS)]
    with torch.no_grad():
        assert probe(name, (mixer,)) == {"result": "right"}


@pytest.mark.skipif("FLASHMORPH_PROBE" not in os.environ, reason="takes some minutes")
@pytest.mark.parametrize("name", causal_types())
def test_no_type_is_accepted_and_wrong(name):
    with torch.no_grad():
        assert probe(name)["result"] != "wrong"


def test_the_probe_sees_a_lost_state(monkeypatch):
    "The matrix can fail: a slot that forgets the state is noticed with a cache, and only there."
    from flashmorph.model.cache import StateLayer

    store = StateLayer.store

    def forget(self, state, num_tokens, *more):
        store(self, torch.zeros_like(state), num_tokens, *more)

    monkeypatch.setattr(StateLayer, "store", forget)
    monkeypatch.setattr("flashmorph.model.morph.try_layers", lambda *args: None)
    with torch.no_grad():
        found = dict(problems(tiny_model("llama"), "lightning", set()))
    with_a_cache = {"pieces", "padded_pieces", "cached", "beams"}
    assert {name.split()[1] for name in found} == with_a_cache


def test_the_table_of_the_site_is_what_was_measured():
    found = json.loads(RESULTS.read_text())
    assert found["counts"] == counts(found["types"]) and found["counts"]["wrong"] == 0
    assert all(found["types"][name]["result"] == "right" for name in supported_families())
    assert all(one["why"] for one in found["types"].values() if one["result"] == "refused")
