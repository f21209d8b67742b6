"""Names of transformers that hang on its version: those it renamed, and private ones of ours.

An override of a method that transformers no longer calls would do nothing, and say nothing. So each
such name must exist in the release that is installed. `tests/versions.sh` runs this file with the
oldest and the newest releases."""

import inspect

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from families import FAMILIES, close, hybrid, teacher, tokens
from flashmorph.model.cache import CACHE_NAMES, StateLayer, cache_name, find_cache, linear_slot
from flashmorph.model.hosts import attention_modules

RELEASE = Version(transformers.__version__)
every_name = pytest.mark.parametrize("name", CACHE_NAMES)


def source(thing) -> str:
    return inspect.getsource(inspect.unwrap(thing))


def test_5_24_calls_the_cache_of_a_model_cache():
    expected = "cache" if RELEASE >= Version("5.24") else "past_key_values"
    h = hybrid("qwen3")
    assert h.cache_name == cache_name(type(teacher("qwen3")).forward) == expected
    assert find_cache(h(tokens()[0], use_cache=True)).get_seq_length() == 23


@pytest.mark.parametrize("name", list(FAMILIES))
def test_attention_modules_take_a_cache_that_we_know(name):
    for _, attn in attention_modules(teacher(name)):
        taken = inspect.signature(type(attn).forward).parameters
        assert len([keyword for keyword in CACHE_NAMES if keyword in taken]) == 1


@every_name
def test_each_name_of_the_cache_is_found(name):
    slots = object()
    assert find_cache({"use_cache": True, name: slots}) is slots
    scope: dict = {}
    exec(f"def forward(self, hidden_states, {name}=None): pass", scope)
    assert cache_name(scope["forward"]) == name


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_hybrid_takes_the_cache_under_both_names(name):
    h, (ids, _) = hybrid("llama"), tokens()
    with torch.no_grad():
        first = h(ids[:, :9], use_cache=True)
        second = h(ids[:, 9:], **{name: find_cache(first)})
        close(second.logits, h(ids, use_cache=False).logits[:, 9:], 1e-4)


def test_5_17_and_5_24_size_the_mask_by_slot_0_of_a_static_cache():
    cache = StaticCache(teacher("llama").config, max_cache_len=12)
    linear_slot(cache, 0).store(torch.zeros(1, 2, 3, 3), 5)
    assert cache.get_mask_sizes(1, 0) == cache.get_mask_sizes(1, 1)
    assert cache.get_mask_sizes(1, 0)[0] == 12


def test_layer_types_come_first_in_5_17_and_5_23():
    types, *_ = cache_utils.get_layer_types_and_kwargs(teacher("mistral").config)
    assert types == ["sliding_attention"] * 4


def test_a_slot_for_states_has_the_parts_that_we_fill():
    ours, theirs = StateLayer(), LinearAttentionLayer()
    ours.store((torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 8)), 5)
    for name in (
        "recurrent_states",
        "conv_states",
        "is_recurrent_states_initialized",
        "is_conv_states_initialized",
        "has_previous_state",
    ):
        assert list(getattr(theirs, name)) == [0], name
    theirs.lazy_initialization(recurrent_states=torch.zeros(1, 2, 3, 3))
    assert theirs.recurrent_states[0] is not None and theirs.is_recurrent_states_initialized[0]


def test_methods_of_a_slot_exist():
    for name in ("get_seq_length", "get_mask_sizes", "reset", "update", "is_croppable"):
        assert hasattr(CacheLayerMixin, name), name
    for name in ("crop", "activate_past_recording", "reorder_cache"):
        assert hasattr(LinearAttentionLayer, name), name


def test_generate_records_before_it_guesses():
    for method in ("_assisted_decoding", "_prepare_cache_for_generation"):
        assert "activate_past_recording()" in source(getattr(GenerationMixin, method)), method
    slot = StateLayer()
    assert not slot.is_croppable and not slot.record_past
    slot.activate_past_recording()
    assert slot.is_croppable and slot.record_past


@pytest.mark.parametrize(
    "owner, name",
    [
        (GenerationMixin, "_prepare_cache_for_generation"),
        (PreTrainedModel, "set_attn_implementation"),
        (PreTrainedModel, "get_output_embeddings"),
        (PreTrainedModel, "resize_token_embeddings"),
        (PreTrainedConfig, "sub_configs"),
    ],
)
def test_methods_that_a_hybrid_overrides_exist(owner, name):
    assert hasattr(owner, name)


@pytest.mark.parametrize(
    "name",
    [
        "_keep_in_fp32_modules_strict",
        "_is_hf_initialized",
        "_supports_attention_backend",
    ],
)
def test_private_names_are_still_read(name):
    from transformers import initialization, modeling_utils as modeling
    from transformers.generation import utils

    assert any(name in inspect.getsource(where) for where in (modeling, utils, initialization))


def test_generate_calls_what_a_hybrid_overrides():
    assert "_prepare_cache_for_generation(" in source(GenerationMixin.generate)
    assert "create_masks_for_generate" in source(GenerationMixin.prepare_inputs_for_generation)
