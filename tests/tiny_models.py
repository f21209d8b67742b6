"A tiny random model of any type of causal language model that transformers has."

import contextlib
import dataclasses
import inspect
import warnings
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, LAYERS = 151, 4          # and so many heads
# What a size is called, over all families, by its value.
SIZES_BY_VALUE = {
    VOCAB: "vocab_size text_vocab_size vocab_size_per_layer_input audio_vocab_size",
    64: """hidden_size d_model n_embd dim embed_dim model_dim word_embed_proj_dim embedding_size
        emb_dim dim_model lru_width attention_hidden_size""",
    96: """intermediate_size ffn_dim d_inner d_ff n_inner decoder_ffn_dim encoder_ffn_dim
        ffn_hidden_size intermediate_size_mlp dim_ff ffn_embed_dim feed_forward_size""",
    LAYERS: """num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers
        num_decoder_layers num_encoder_layers num_blocks
        num_attention_heads n_head num_heads n_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        num_experts num_local_experts n_routed_experts moe_num_experts
        linear_num_value_heads mamba_n_heads mamba_num_heads""",
    2: """num_key_value_heads num_kv_heads kv_n_heads num_experts_per_tok moe_topk moe_k
        num_experts_per_token top_k_experts index_n_heads linear_num_key_heads num_codebooks
        num_kv_shared_layers global_attn_every_n_layers eos_token_id""",
    1: """n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace
        num_dense_layers zero_expert_num mamba_n_groups n_mamba_heads mamba_ngroups n_groups
        num_mem_blocks bos_token_id decoder_start_token_id""",
    16: """head_dim d_kv dim_head kv_lora_rank v_head_dim qk_head_dim index_head_dim
        hidden_size_per_layer_input kv_channels attention_head_dim""",
    8: """qk_rope_head_dim qk_nope_head_dim index_topk linear_key_head_dim linear_value_head_dim
        mamba_d_state ssm_state_size state_size laurel_rank attention_window_size rotary_dim
        adapter_rank chunk_size block_size block_len""",
    32: """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
        shared_intermediate_size expert_ffn_size moe_shared_expert_intermediate_size
        mamba_d_head mamba_head_dim mamba_headdim""",
    256: """max_position_embeddings n_positions max_seq_len context_length max_sequence_length
        max_target_positions max_source_positions n_ctx max_context_len""",
    24: "q_lora_rank",
    128: "mamba_d_ssm",
    6: "sliding_window attention_chunk_size local_attention",
    0: "pad_token_id",
    3: "image_token_id image_token_index",
}
SIZES = {name: value for value, names in SIZES_BY_VALUE.items() for name in names.split()}
SIZES |= {"video_token_id": 4, "audio_token_id": 5, "attention_dropout": 0.0}
# A size that a family leaves out is not put in.
OPTIONAL = ("sliding_window", "attention_chunk_size", "q_lora_rank", "num_kv_shared_layers")
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
# Where the sizes above do not fit one another.
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "blt": {"encoder_hash_byte_group_vocab": VOCAB},
    "dots3_note": {"text_config": {"num_key_value_heads": LAYERS, "use_sliding_window": False}},
    "dots3_note_text": {"num_key_value_heads": 4, "use_sliding_window": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"head_dim": 32},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "attention_head_size": 16,
        "attn_layers": ["local"] * LAYERS, "feed_forward_size": 96, "local_attn_chunk_length": 8,
    },
}


def fields(cls: type) -> set[str]:
    "Names that a configuration takes."
    names = set(inspect.signature(cls.__init__).parameters)
    if dataclasses.is_dataclass(cls): names |= {field.name for field in dataclasses.fields(cls)}
    return names


def default_of(cls: type) -> Any:
    "A configuration with its own values, or None if it cannot be made without some."
    try: return cls()
    except Exception: return None


def part_class(cls: Any, default: Any, name: str) -> type | None:
    "The class of a part of a configuration."
    if cls.__name__ not in ("AutoConfig", "PreTrainedConfig"): return cls
    part = getattr(default, name, None)
    return None if part is None else type(part)


def sizes_of(cls: Any, depth: int = 0) -> dict[str, Any]:
    "Small sizes for what the configuration `cls` and its parts take."
    default = default_of(cls)
    sizes: dict[str, Any] = {}
    for name in fields(cls) & set(SIZES):
        before = None
        with contextlib.suppress(Exception): before = getattr(default, name)  # differs by layer
        if isinstance(before, list | tuple) or (name in OPTIONAL and not before): continue
        sizes[name] = SIZES[name]
    # its parts
    parts = getattr(cls, "sub_configs", {})
    for name, kind in (parts.items() if isinstance(parts, dict) and depth < 3 else ()):
        part = part_class(kind, default, name)
        if part is not None: sizes[name] = sizes_of(part, depth + 1)
    return sizes


def merged(first: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    "Both; a part that both have is merged too."
    both = dict(first)
    for name, value in more.items():
        is_part = isinstance(value, dict) and isinstance(both.get(name), dict)
        both[name] = merged(both[name], value) if is_part else value
    return both


def causal_types() -> list[str]:
    "Model types that `AutoModelForCausalLM` builds."
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **kwargs: Any) -> PreTrainedConfig:
    "A configuration of four layers of width 64; `kwargs` change it."
    cls = CONFIG_MAPPING[model_type]
    special = SPECIAL.get(model_type, {})
    # latent attention has as many key heads as query heads
    if "kv_lora_rank" in fields(cls): special = {"num_key_value_heads": LAYERS} | special
    return cls(**merged(merged(sizes_of(cls), special), kwargs))


def randomised(model: Any, std: float = 0.15) -> Any:
    "Weights large enough for attention to matter, and no norm or bias that is neutral."
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if not p.is_floating_point(): continue
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1: p.copy_(std * noise)
            else: p.add_(0.1 * noise)
    return model


def tiny_model(model_type: str, limit: float = 5e7, **kwargs: Any) -> Any:
    "A random model in evaluation mode; `ValueError` if it has more than `limit` parameters."
    warnings.filterwarnings("ignore")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config(model_type, **kwargs))
    size = sum(p.numel() for p in empty.parameters())
    if size > limit: raise ValueError(f"not tiny: {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **kwargs))
    return randomised(model.eval())
