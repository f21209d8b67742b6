"flashmorph.measure.cost against real models: what is counted from a configuration has to be found in memory and by PyTorch's counter."
import random
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config, Qwen3MoeConfig

from flashmorph.measure.cost import CostModel, budget_costs, cost
from flashmorph.model.morph import commit
from flashmorph.model.morph import morph

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
         "vocab_size": 61, "attn_implementation": "eager"}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=20),
    "gemma2": Gemma2Config(**SIZES, sliding_window=20, query_pre_attn_scalar=16),
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=61, n_positions=600, attn_implementation="eager"),
}


def windows(config):
    return [getattr(slot, "sliding_window", None) for slot in DynamicCache(config=config).layers] or [None] * config.num_hidden_layers


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hybrid_needs_what_was_counted(name):
    config, batch, context = CONFIGS[name], random.randint(1, 3), 64 * random.randint(5, 8)  # beyond what a mixer is really run for
    kept = random.sample(range(3), random.randint(1, 2))
    model = CostModel(config)
    c = model(kept, context=context, batch=batch, dtype=torch.float32)
    hybrid = commit(morph(AutoModelForCausalLM.from_config(config).eval()), kept)
    with torch.no_grad(), FlopCounterMode(display=False) as prefill:
        cache = hybrid(torch.randint(61, (batch, context)), use_cache=True, logits_to_keep=1).past_key_values
    tensors = [getattr(slot, part, None) for slot in cache.layers for part in ("keys", "values", "state")]
    assert c.cache_bytes == sum(x.numel() * x.element_size() for x in tensors if x is not None)
    with torch.no_grad(), FlopCounterMode(display=False) as decode:
        hybrid(torch.randint(61, (batch, 1)), past_key_values=cache, use_cache=True)
    assert c.parameters == hybrid.num_parameters() and c.weight_bytes == sum(p.numel() * p.element_size() for p in hybrid.parameters())
    assert c.decode_flops == decode.get_total_flops()
    hidden = 0  # pairs that eager attention computes and masks
    for i in kept:
        visible = sum(min(t + 1, windows(config)[i] or context) for t in range(context))
        hidden += 2 * batch * 4 * (model.dims[i].head_dim + model.dims[i].value_dim) * (context ** 2 - visible)
    assert c.prefill_flops + hidden == prefill.get_total_flops()


def test_curve_over_the_budget():
    config, order = CONFIGS["llama"], random.sample(range(3), 3)
    curve = budget_costs(config, order, context=5000, batch=2)
    assert [c.full_layers for c in curve] == [tuple(sorted(order[:k])) for k in range(4)]
    assert curve[2] == cost(config, order[:2], context=5000, batch=2)
    assert [c.kv_bytes for c in curve] == [k * 2 * (2 * 2 * 5000 * 12 * 2) for k in range(4)]
    for what in ("cache_bytes", "prefill_flops", "decode_flops", "decode_bytes", "state_bytes", "parameters"):
        values = [getattr(c, what) for c in curve]
        assert values == sorted(values, reverse=what in ("state_bytes", "parameters")), what


def test_experts_are_read_as_far_as_they_are_used():
    config = Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, tie_word_embeddings=True)
    model, experts = CostModel(config), 3 * 8 * (3 * 32 * 24)
    full = {batch: model(range(3), context=1, batch=batch, dtype=torch.float32) for batch in (1, 3, 4, 100)}
    read = {batch: (c.decode_bytes - c.cache_bytes) // 4 for batch, c in full.items()}
    assert read == {batch: full[1].parameters - experts + experts * used // 8 for batch, used in ((1, 2), (3, 6), (4, 8), (100, 8))}


def test_large_models_are_counted_without_their_weights():
    big = Qwen3Config(num_hidden_layers=48, hidden_size=2048, intermediate_size=6144, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                      vocab_size=151936)
    model = CostModel(big)
    assert model([], context=1).parameters > 2e9
    model([], context=131072)
    start = time.process_time()
    curve = [model(range(k), context=131072) for k in range(49)]
    assert time.process_time() - start < 1.0 and curve[48].kv_bytes == 48 * 2 * 8 * 128 * 131072 * 2  # all budgets of a slider
