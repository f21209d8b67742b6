"Tiny random decoders of every supported family, for the tests."

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flashmorph.model.morph import commit, morph

VOCAB = 97
_common = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES = {
    "qwen3": dict(_common, head_dim=8, tie_word_embeddings=True),
    "llama": dict(_common),
    "qwen2": dict(_common),
    "mistral": dict(_common, sliding_window=6),
    "qwen3_moe": dict(
        _common,
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    ),
    "phi3": dict(_common, partial_rotary_factor=0.5),
    "gemma2": dict(_common, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3_text": dict(
        _common,
        head_dim=8,
        sliding_window=6,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "olmo2": dict(_common),
    "gpt_neox": {name: x for name, x in _common.items() if name != "num_key_value_heads"},
    "gpt2": dict(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
# the same families with other settings: biases, tied and untied heads, one KV head, wide heads
VARIANTS = {
    "qwen3": ("qwen3", {}),
    "qwen3-untied": ("qwen3", dict(tie_word_embeddings=False)),
    "qwen3-bias": ("qwen3", dict(attention_bias=True)),
    "qwen3-wide-heads": ("qwen3", dict(head_dim=16)),
    "llama": ("llama", {}),
    "llama-bias": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-one-kv-head": ("llama", dict(num_key_value_heads=1)),
    "llama-no-groups": ("llama", dict(num_key_value_heads=4)),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
}


def shake(model, by):
    "Noise on every parameter, so that a lost bias or norm shows, and no branch is neutral."
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn_like(p))
    return model


def teacher(name, **kw):
    torch.manual_seed(0)
    family, extra = VARIANTS.get(name, (name, {}))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**FAMILIES[family], **extra, **kw})
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
            if p.ndim == 2:
                p.mul_(4)
    return model


def morphed(name, **kw):
    "A morphable model whose linear branches have been changed, as by training."
    model = morph(teacher(name, **kw))
    for layer in model.layers:
        shake(layer.linear, 0.1)
    return model


def hybrid(name, full=(1, 3), **kw):
    return commit(morphed(name, **kw), list(full))


def tokens(B=2, T=23, pad=0, seed=1):
    "`(ids, mask)`: random rows, the first with `pad` tokens of padding on the left."
    ids = torch.randint(3, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, :pad], mask[0, :pad] = 0, 0
    return ids, mask


def close(a, b, tol=2e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)
