"Which decoders can be converted, and what a linear layer inside each of them does."

import copy
import re

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
)

from families import FAMILIES, close, shake, teacher, tokens
from flashmorph.model import branches, hosts, layers, parts
from flashmorph.model.cache import StateLayer
from flashmorph.model.mixers import Lightning, MixerDims, make_mixer
from flashmorph.model.morph import morph
from flashmorph.model.teacher import load_teacher
from flashmorph.ops import reference
from flashmorph.train.align import AlignObjective
from flashmorph.train.distill import DistillObjective
from probe_families import padded
from tiny_models import randomised, tiny_config, tiny_model

family = pytest.mark.parametrize("name", list(FAMILIES))
SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
UNSUPPORTED = {
    "bloom": dict(n_layer=2, n_head=4, hidden_size=32),
    "falcon": dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32),
    "gpt_neo": dict(
        num_layers=2, num_heads=4, hidden_size=32, attention_types=[[["global", "local"], 1]]
    ),
    "stablelm": dict(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        hidden_size=32,
        intermediate_size=48,
    ),
    "nemotron": dict(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        hidden_size=32,
        intermediate_size=48,
    ),
    "opt": dict(
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_size=32,
        ffn_dim=48,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "falcon_h1": dict(SMALL, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16),
    "zaya": SMALL,
    "deepseek_v32": SMALL,
    "bert": dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48),
}
INTERFACE = "none of its layers uses transformers' attention interface"
KEYWORDS = "keywords given to the model do not reach"
SLOT = "keeps a past in the same slot of the cache"
WHY = dict(
    bloom=INTERFACE,
    falcon=INTERFACE,
    gpt_neo=INTERFACE,
    stablelm=KEYWORDS,
    nemotron=KEYWORDS,
    opt=KEYWORDS,
    falcon_h1=SLOT,
    zaya=SLOT,
    deepseek_v32=SLOT,
    bert="looks ahead",
)


def linear(name, **kw):
    "A host with every layer linear, made by hand."
    model = teacher(name, **kw)
    for path, attn in hosts.attention_modules(model):
        model.set_submodule(
            path, shake(layers.linear_attention(attn, "lightning", model.config), 0.1)
        )
    layers.hand_mask_down(model)
    return model


def test_the_list_is_what_is_tested():
    assert sorted(FAMILIES) == list(hosts.supported_families())


@family
def test_supported(name):
    model = teacher(name).train()
    ids, mask = tokens(pad=4)
    before, configs = (
        copy.deepcopy(model.state_dict()),
        [m.config for _, m in hosts.attention_modules(model)],
    )
    random = torch.get_rng_state()
    hosts.check_host(model)
    assert torch.equal(random, torch.get_rng_state()) and all(m.training for m in model.modules())
    assert all(a is m.config for a, (_, m) in zip(configs, hosts.attention_modules(model)))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert [m.layer_idx for _, m in hosts.attention_modules(model)] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", list(UNSUPPORTED))
def test_unsupported(name):
    "With the reason, and before anything runs; deepseek_v32, falcon_h1, zaya: report 46."
    config = AutoConfig.for_model(name, vocab_size=97, **UNSUPPORTED[name])
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"family '{name}'.*cannot be converted") as error:
        morph(model)
    assert WHY[name] in str(error.value)
    assert re.search("Supported families: gemma2, .*qwen3_moe", str(error.value))


# Families that only show in a trial of linear layers, or in none of their modules.
UNLIKE = {
    "gemma3n_text": "a trial failed",  # layers share keys and values
    "blt": "names no number of layers",
    "bart": "more than one attention each",
    "qwen3_next": "only layers",
    "emu3": "AutoModelForCausalLM knows no model for a Emu3TextConfig",
}


@pytest.mark.parametrize("name", list(UNLIKE))
def test_unlike_a_decoder(name):
    with pytest.raises(ValueError, match="cannot be converted: ") as error:
        morph(tiny_model(name))
    assert UNLIKE[name] in str(error.value)


AHEAD = {
    "bert": {},
    "llama": dict(is_causal=False),
    "gemma3_text": dict(use_bidirectional_attention=True),
    "qwen3": dict(is_causal=False),
}


@pytest.mark.parametrize("name", list(AHEAD))
def test_models_that_look_ahead_are_refused(name):
    "Whatever says so (problem 5); and the same family as a decoder is not."
    with pytest.raises(ValueError, match="looks ahead"):
        morph(tiny_model(name, **AHEAD[name]))
    morph(tiny_model(name, **(dict(is_decoder=True) if name == "bert" else {})))


def test_a_configuration_that_cannot_be_read_again_is_refused(monkeypatch):
    model = tiny_model("llama")
    written = model.config.to_dict() | {"hidden_size": "wide"}
    monkeypatch.setattr(type(model.config), "to_dict", lambda self: written)
    with pytest.raises(ValueError, match="LlamaConfig cannot be read as it was written.*loaded"):
        morph(model)


def test_half_precision_is_no_reason_to_refuse():
    for name in ("llama", "qwen3_moe", "gemma2"):
        morph(tiny_model(name).bfloat16())


def test_a_teacher_with_hooks_of_accelerate():
    "As device_map has with several devices (problem 11): the same model with and without."
    from accelerate import dispatch_model

    plain, hooked = tiny_model("llama"), tiny_model("llama")
    dispatch_model(hooked, {"": "cpu"}, force_hooks=True)
    ids = torch.randint(6, 151, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for full in ([1, 3], []):
            outputs = [morph(model).commit(full)(ids).logits for model in (plain, hooked)]
            assert torch.equal(*outputs)
        assert torch.equal(morph(hooked)(ids).logits, plain(ids).logits)


WRAPPERS = {
    "gemma3": ("Gemma3ForCausalLM", dict(num_hidden_layers=4)),
    "mistral3": ("MistralForCausalLM", {}),
    "llava": ("LlamaForCausalLM", {}),
}


@pytest.mark.parametrize("name", list(WRAPPERS))
def test_the_language_model_inside(name, tmp_path):
    "Of a model that sees pictures (problem 12): found, converted, saved and loaded."
    model = wrapper(name)
    ids = torch.randint(6, 151, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        alone = branches.text_model(model)
        assert type(alone).__name__ == WRAPPERS[name][0]
        assert torch.equal(alone(ids).logits, before)
        assert alone.get_input_embeddings() is model.get_input_embeddings()
        morphed = morph(model)
        assert torch.equal(morphed(ids).logits, before)
        hybrid = morphed.commit([1, 3])
        hybrid.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(ids).logits, hybrid(ids).logits)
        assert torch.equal(model(ids).logits, before)


def test_a_teacher_that_sees_pictures_is_loaded_as_its_language_model(tmp_path):
    tokenizer = load_teacher()[1]
    config = tiny_config("gemma3", text_config=dict(vocab_size=len(tokenizer)))
    model = randomised(AutoModelForImageTextToText.from_config(config).eval())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_teacher(tmp_path)
    ids = torch.randint(6, 151, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert type(loaded).__name__ == "Gemma3ForCausalLM"


def test_no_language_model_inside():
    with pytest.raises(ValueError, match="no causal language model around its Qwen3VLTextModel"):
        morph(wrapper("qwen3_vl"))


def wrapper(name):
    "A tiny model that sees pictures."
    config = tiny_config(name)
    return randomised(AutoModelForImageTextToText.from_config(config).eval())


def test_a_model_that_hides_its_sizes_is_refused():
    model = teacher("llama")
    model.model.layers[2].self_attn.head_dim = 16
    with pytest.raises(ValueError, match="cannot be converted"):
        hosts.check_host(model)
    assert model.model.layers[0].self_attn.config._attn_implementation != "flashmorph_probe"
    model.model.layers[2].self_attn.num_key_value_groups = 8
    with pytest.raises(ValueError, match="cannot be converted: the sizes"):
        hosts.check_host(model)


def test_several_models_in_one_are_refused():
    model = teacher("llama")
    part = copy.copy(model.config)
    model.config.get_text_config = lambda *args, **kwargs: part
    with pytest.raises(ValueError, match="made of several models"):
        hosts.check_host(model)


def test_one_search_hands_on_everything():
    model = teacher("qwen3")
    sites = hosts.check_host(model)
    assert [(name, attn) for name, attn, _ in sites] == hosts.attention_modules(model)
    assert [dims for _, _, dims in sites] == [MixerDims(32, 4, 2, 8, 8, i, 4) for i in range(4)]


def test_dims():
    def dims(name, **kw):
        return hosts.mixer_dims(
            hosts.attention_modules(teacher(name, **kw))[2][1], teacher(name, **kw).config
        )

    assert dims("qwen3-wide-heads") == MixerDims(32, 4, 2, 16, 16, 2, 4)
    assert dims("llama-one-kv-head") == MixerDims(32, 4, 1, 8, 8, 2, 4)
    assert dims("gpt2") == dims("gpt_neox") == MixerDims(32, 4, 4, 8, 8, 2, 4)


@pytest.mark.parametrize(
    "name", ["llama-bias", "qwen2", "qwen3-bias", "llama-one-kv-head", "gpt2", "phi3", "olmo2"]
)
def test_only_the_softmax_is_replaced(name):
    """An independent way to the same layer: the *teacher's* module, whose softmax is replaced by a
    function of our own that uses the plain recurrence head by head. Everything else (biases, norms,
    rotary embedding, output projection) is the teacher's code."""
    model, (ids, _) = teacher(name), tokens()
    seen = {}

    def note(module, args, kwargs, output):
        seen[module.layer_idx] = (args, kwargs)

    for _, attn in hosts.attention_modules(model):
        attn.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)

    def by_hand(module, query, key, value, mask, scaling=None, **kwargs):
        n = query.shape[1]
        g = torch.tensor([-(2.0 ** (-8 * h / n)) for h in range(1, n + 1)])
        o = [
            reference.lightning(
                *(x[:, h // (n // x.shape[1]), :, None] for x in (query, key, value)),
                g[h : h + 1],
                scale=scaling,
            )[0]
            for h in range(n)
        ]
        o = torch.cat(o, 2).flatten(2)
        return (o / (o.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).view(
            *o.shape[:2], n, -1
        ), None  # gate neutral, norm weight 1

    layers.AttentionInterface.register("by_hand", by_hand)
    for _, attn in hosts.attention_modules(model):
        args, kwargs = seen[attn.layer_idx]
        twin = layers.linear_attention(copy.deepcopy(attn), "lightning", model.config)
        attn.config = copy.copy(attn.config)
        attn.config._attn_implementation = "by_hand"
        with torch.no_grad():
            close(twin(*args, **kwargs, linear_mask=None)[0], attn(*args, **kwargs)[0], 1e-4)


@family
def test_padding_and_chunked_prefill(name):
    model = linear(name)
    ids, mask = tokens(B=2, T=21, pad=8)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        one = model(ids, attention_mask=mask, position_ids=positions).logits
        close(one[:1, 8:], model(ids[:1, 8:]).logits, 2e-4)
        cache, parts = DynamicCache(), []
        for a, b in ((0, 5), (5, 14), (14, 15), (15, 21)):  # the padding crosses the first cut
            parts.append(
                model(
                    ids[:, a:b],
                    attention_mask=mask[:, :b],
                    position_ids=positions[:, a:b],
                    past_key_values=cache,
                    use_cache=True,
                ).logits
            )
    close(one[mask.bool()], torch.cat(parts, 1)[mask.bool()], 2e-4)
    assert [type(slot) for slot in cache.layers] == [
        StateLayer
    ] * 4 and cache.get_seq_length() == 21


@pytest.mark.parametrize(
    "name,kw,scale",
    [
        ("gemma2", dict(query_pre_attn_scalar=32), 32**-0.5),
        ("qwen3", {}, 8**-0.5),
        ("qwen3-wide-heads", {}, 16**-0.5),
    ],
)
def test_the_scale_is_the_teachers(name, kw, scale):
    "Seen at the mixer: its output norm hides a common factor from everything after it."
    model, scales = linear(name, **kw), []
    for module in model.modules():
        if isinstance(module, Lightning):
            module.register_forward_pre_hook(
                lambda m, args, kwargs: scales.append(kwargs["scale"]), with_kwargs=True
            )
    model(tokens()[0])
    assert scales == pytest.approx([scale] * 4)


def test_padding_after_real_tokens_leaves_no_trace():
    "Padding that comes when there is a state already: it must not decay."
    mixer = shake(make_mixer("lightning", MixerDims(20, 4, 2, 6, 8)), 0.3)
    x = [torch.randn(2, 90, *shape) for shape in ((4, 6), (2, 6), (2, 8), (20,))]
    mask = torch.ones(2, 90)
    mask[:, 30:50] = 0
    mask[:, 80:] = 0
    keep = mask[0].bool()
    with torch.no_grad():
        o, state = mixer(*x, scale=0.3, mask=mask)
        expected, end = mixer(*(t[:, keep] for t in x), scale=0.3)
        close(o[:, keep], expected, 1e-4)
        close(state, end, 1e-4)
        state = None
        for t in range(90):  # the same token by token
            o, state = mixer(
                *(y[:, t : t + 1] for y in x), scale=0.3, mask=mask[:, t : t + 1], state=state
            )
        close(state, end, 1e-4)


def test_mask_reaches_direct_calls_of_the_decoder():
    model, (ids, mask) = linear("qwen3"), tokens(pad=5)
    with torch.no_grad():
        through = model(ids, attention_mask=mask).logits
        close(model.lm_head(model.model(ids, mask).last_hidden_state), through)  # positional mask
        close(
            model(
                inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask.bool()
            ).logits,
            through,
        )
        assert (model(ids).logits - through).abs().max() > 1e-3


def test_hook_is_set_once():
    model = linear("llama")
    for _ in range(3):
        layers.hand_mask_down(model)
    assert len(model.base_model._forward_pre_hooks) == 1
    assert len(copy.deepcopy(model).base_model._forward_pre_hooks) == 1
    model(tokens()[0])


def test_refused_inputs():
    model, ids = linear("qwen3"), tokens(B=1)[0]
    with pytest.raises(ValueError, match=r"\(B, T\) tensor"):
        model(ids, attention_mask=torch.ones(1, 1, 23, 23))
    with pytest.raises(TypeError, match="linear_mask"):
        model.model.layers[0].self_attn(torch.randn(1, 3, 32), position_embeddings=None)
    cache = teacher("qwen3")(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds keys and values"):
        model(ids[:, :1], past_key_values=cache)


# Documents of a row: restart, jump ahead, and the two ways to say it in so many words. Where the
# positions separate them too, they are read apart (tests/test_hybrid.py).
PACKED = {
    "restart": dict(position_ids=torch.cat([torch.arange(10), torch.arange(13)])[None]),
    "jump": dict(position_ids=torch.cat([torch.arange(10), torch.arange(20, 33)])[None]),
    "lengths": dict(cu_seq_lens_q=torch.tensor([0, 10, 23])),
    "indices": dict(seq_idx=torch.tensor([10 * [0] + 13 * [1]])),
}


@pytest.mark.parametrize("how", ["lengths", "indices"])
def test_packed_rows_without_positions_are_refused(how):
    model, ids = linear("llama"), tokens(B=1)[0]
    with pytest.raises(ValueError, match="packed rows"):
        model(ids, **PACKED[how], use_cache=False)


@pytest.mark.parametrize("how", ["restart", "jump"])
def test_packed_rows_in_compiled_code(how):
    "Values cannot be looked at while compiling (problem 6): documents are read apart all the same."
    model, ids = linear("llama"), tokens(B=1)[0]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = dict(position_ids=torch.arange(23)[None])
    with torch.no_grad():
        close(compiled(ids, **plain, use_cache=False).logits, model(ids).logits)
        apart = model(ids, **PACKED[how], use_cache=False).logits
        close(compiled(ids, **PACKED[how], use_cache=False).logits, apart)
        assert (apart - model(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gpt_bigcode", "ctrl", "llama", "gpt2"])
@pytest.mark.parametrize("given", [True, False])
def test_padding_does_not_count_as_position(name, given):
    """Of logits that grow with the position (problem 7), whether the caller names positions or not.
    The weights of the first two families learn positions, so there they must be named."""
    model = tiny_model(name)
    for _, attn in hosts.attention_modules(model):
        parts.adapt_full(attn, logit_scale=3.0)
    layers.hand_mask_down(model)
    ids = torch.randint(6, 151, (1, 20), generator=torch.Generator().manual_seed(1))
    rows = padded(ids)
    if not given and name == "llama":
        del rows["position_ids"]
    with torch.no_grad():
        close(model(**rows).logits[:, 7:], model(ids).logits, 1e-4)
        assert (model(ids).logits - tiny_model(name)(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["deepseek_v2", "llama4_text"])
def test_complex_rotary_embeddings_can_be_left_out(name):
    "With the rotation left out, positions mean nothing; with it they do."
    for rope in (True, False):
        model = tiny_model(name)
        for _, attn in hosts.attention_modules(model):
            parts.adapt_full(attn, rope=rope)
        ids = torch.randint(6, 151, (1, 5), generator=torch.Generator().manual_seed(1))
        real = torch.ones_like(ids)
        with torch.no_grad():
            a, b = (
                model(ids, real, position_ids=step * torch.arange(5)[None], use_cache=False).logits
                for step in (1, 3)
            )
        assert torch.equal(a, b) != rope


def test_learned_positions_cannot_be_left_out():
    with pytest.raises(ValueError, match="GPT2Attention has no rotary embedding.*keep rope=True"):
        morph(teacher("gpt2"), rope=False)


def test_heads_are_expanded_beside_a_norm_without_weights():
    model = tiny_model("nanochat")
    narrow, wide = morph(model), morph(model, expand_kv=True)
    ids = torch.randint(6, 151, (1, 20), generator=torch.Generator().manual_seed(1))
    for one in (narrow, wide):
        one.gates = 0.0
    with torch.no_grad():
        close(wide(ids).logits, narrow(ids).logits, 1e-4)


def test_backward_through_a_cache():
    "Two cached passes, one backward: the states are part of the graph."
    model, (ids, _) = linear("llama"), tokens()
    whole = torch.autograd.grad(
        model(ids, use_cache=False).logits.square().mean(),
        model.model.layers[0].self_attn.attn.k_proj.weight,
    )[0]
    cache = DynamicCache()
    parts = torch.cat(
        [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 10), (10, 23))], 1
    )
    close(
        torch.autograd.grad(
            parts.square().mean(), model.model.layers[0].self_attn.attn.k_proj.weight
        )[0],
        whole,
        1e-4,
    )


def test_slot():
    slot = StateLayer()
    assert slot.state is None and slot.get_seq_length() == 0 and slot.get_mask_sizes(3) == (3, 0)
    slot.batch_repeat_interleave(2)
    state = torch.randn(2, 4, 8, 8)
    slot.store(state, 5)
    slot.batch_select_indices(torch.tensor([1]))
    assert (
        torch.equal(slot.state, state[1:])
        and slot.get_mask_sizes(3) == (8, 0)
        and not slot.is_croppable
    )
    slot.crop(0)
    with pytest.raises(NotImplementedError, match="rolled back"):
        slot.crop(-2)
    with pytest.raises(RuntimeError, match="no keys and values"):
        slot.update(state, state)
    slot.reset()
    assert slot.get_seq_length() == 0 and not slot.state.any()


def test_half_precision_branch_follows_the_teacher():
    model = teacher("qwen3").bfloat16()
    layer = layers.linear_attention(hosts.attention_modules(model)[0][1], "lightning", model.config)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16} and isinstance(
        layer.mixer, Lightning
    )


@pytest.mark.parametrize("name", ["doge", "gpt_oss", "granite_swa", "llama"])
def test_only_what_gets_a_gradient_trains(name):
    "In stages 1 and 3, whatever a family keeps for its softmax."
    teacher = tiny_model(name)
    ids = torch.randint(6, 151, (2, 20), generator=torch.Generator().manual_seed(1))
    for stage in (1, 3):
        model = morph(teacher)
        objective = (AlignObjective(model) if stage == 1
                     else DistillObjective(model.commit([1]).train(), teacher))
        objective({"input_ids": ids})[0].backward()
        trains = objective.trainable()
        without = [name for name, p in trains.items() if p.grad is None]
        every = {name for name, p in objective.named_parameters() if p.grad is not None}
        assert not without and set(trains) == every
