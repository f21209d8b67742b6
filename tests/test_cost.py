"Costs against real models: counts are to be found in memory and by PyTorch's counter."
import random
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM, DynamicCache, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig,
    Qwen3Config, Qwen3MoeConfig,
)

from flashmorph.measure.cost import CostModel, budget_costs, cost
from flashmorph.model.morph import commit, morph

SIZES = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 61, "attn_implementation": "eager",
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 61, "n_positions": 600}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=20),
    "gemma2": Gemma2Config(**SIZES, sliding_window=20, query_pre_attn_scalar=16),
    "gpt2": GPT2Config(**GPT2, attn_implementation="eager"),
}


def windows(config):
    "The window of each layer, or `None`."
    slots = DynamicCache(config=config).layers
    found = [getattr(slot, "sliding_window", None) for slot in slots]
    return found or [None] * config.num_hidden_layers


def cached_bytes(cache):
    tensors = [getattr(slot, part, None) for slot in cache.layers
               for part in ("keys", "values", "state")]
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def masked_pairs(model, kept, context, batch):
    "FLOPs of the pairs that eager attention computes and masks."
    total = 0
    for i in kept:
        window, dims = windows(model.config)[i], model.dims[i]
        visible = sum(min(t + 1, window or context) for t in range(context))
        pair = 2 * batch * 4 * (dims.head_dim + dims.value_dim)
        total += pair * (context ** 2 - visible)
    return total


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hybrid_needs_what_was_counted(name):
    config, batch = CONFIGS[name], random.randint(1, 3)
    # beyond what a mixer is really run for
    context = 64 * random.randint(5, 8)
    kept = random.sample(range(3), random.randint(1, 2))
    model = CostModel(config)
    c = model(kept, context=context, batch=batch, dtype=torch.float32)
    hybrid = commit(morph(AutoModelForCausalLM.from_config(config).eval()), kept)
    rows, one = torch.randint(61, (batch, context)), torch.randint(61, (batch, 1))
    with torch.no_grad(), FlopCounterMode(display=False) as prefill:
        cache = hybrid(rows, use_cache=True, logits_to_keep=1).past_key_values
    assert c.cache_bytes == cached_bytes(cache)
    with torch.no_grad(), FlopCounterMode(display=False) as decode:
        hybrid(one, past_key_values=cache, use_cache=True)

    assert c.parameters == hybrid.num_parameters()
    assert c.weight_bytes == sum(p.numel() * p.element_size() for p in hybrid.parameters())
    assert c.decode_flops == decode.get_total_flops()
    counted = c.prefill_flops + masked_pairs(model, kept, context, batch)
    assert counted == prefill.get_total_flops()


def test_curve_over_the_budget():
    config, order = CONFIGS["llama"], random.sample(range(3), 3)
    curve = budget_costs(config, order, context=5000, batch=2)
    assert [c.full_layers for c in curve] == [tuple(sorted(order[:k])) for k in range(4)]
    assert curve[2] == cost(config, order[:2], context=5000, batch=2)
    assert [c.kv_bytes for c in curve] == [k * 2 * (2 * 2 * 5000 * 12 * 2) for k in range(4)]
    for what in ("cache_bytes", "prefill_flops", "decode_flops", "decode_bytes"):
        values = [getattr(c, what) for c in curve]
        assert values == sorted(values), what
    for what in ("state_bytes", "parameters"):
        values = [getattr(c, what) for c in curve]
        assert values == sorted(values, reverse=True), what


def test_experts_are_read_as_far_as_they_are_used():
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen3MoeConfig(**SIZES, **sizes, tie_word_embeddings=True)
    model, experts = CostModel(config), 3 * 8 * (3 * 32 * 24)
    used = {1: 2, 3: 6, 4: 8, 100: 8}
    for batch, count in used.items():
        c = model(range(3), context=1, batch=batch, dtype=torch.float32)
        read = (c.decode_bytes - c.cache_bytes) // 4
        assert read == c.parameters - experts + experts * count // 8, batch


def test_large_models_are_counted_without_their_weights():
    "And all budgets of a slider in a second."
    big = Qwen3Config(
        num_hidden_layers=48, hidden_size=2048, intermediate_size=6144, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936,
    )
    model = CostModel(big)
    assert model([], context=1).parameters > 2e9
    model([], context=131072)
    start = time.process_time()
    curve = [model(range(k), context=131072) for k in range(49)]
    assert time.process_time() - start < 1.0
    assert curve[48].kv_bytes == 48 * 2 * 8 * 128 * 131072 * 2


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "x", None, True])
def test_counts_of_another_kind(wrong):
    model = CostModel(CONFIGS["llama"])
    with pytest.raises(ValueError, match="context: expected an integer of at least 1"):
        model([0], context=wrong)
    with pytest.raises(ValueError, match="batch: expected an integer of at least 1"):
        model([0], context=10, batch=wrong)
