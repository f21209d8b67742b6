"Every mixer, plain and with options, through all stages; and a mixer of one's own."

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from families import close, shake, teacher, tokens
from flashmorph.data.text import text
from flashmorph.model.parts import lightning_log_decay
from flashmorph.model.teacher import load_teacher
from flashmorph.train.align import align
from flashmorph.measure.cost import cost
from flashmorph.choose.gates import train_gates
from flashmorph.model.hybrid import HybridConfig
from flashmorph.model.mixers import (
    MIXERS,
    Mixer,
    MixerDims,
    make_mixer,
    mixer_spec,
    register_mixer,
    repeat_heads,
)
from flashmorph.model.morph import commit, morph

SPECS = (
    "lightning", "gla", "gdn", "lightning(conv=2)", "lightning(own_decays=True)",
    "gdn(conv=3, rope=False)", "gdn_native",
)
every = pytest.mark.parametrize("spec", SPECS)
new = pytest.mark.parametrize("spec", SPECS[1:])
GREEDY = dict(do_sample=False, eos_token_id=None)


def morphed(spec, name="qwen3"):
    model = morph(teacher(name), spec)
    for layer in model.layers:
        shake(layer.linear, 0.1)
    return model


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


@every
def test_corners_and_padding(spec):
    model, (ids, mask) = morphed(spec), tokens(pad=5)
    assert torch.equal(logits(model, ids, mask), logits(teacher("qwen3"), ids, mask))
    model.gates = [1, 0, 0, 1]
    h = commit(model, [0, 3])
    assert (
        torch.equal(logits(h, ids, mask), logits(model, ids, mask))
        and h.config.mixer == model.mixer == spec
    )
    positions = (mask.cumsum(-1) - 1).clamp(
        min=0
    )  # decays per channel and convolutions do not commute with rotations
    with torch.no_grad():
        padded = h(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    close(padded[:1, 5:], logits(h, ids[:1, 5:]), 1e-4)


@new
@pytest.mark.parametrize("name", ["qwen3", "gpt_neox", "gpt2", "gemma3_text", "phi3"])
def test_generate(spec, name):
    "With a cache as without; beams; a padded batch as alone; chunked prefill."
    if name == "gpt2" and ("rope=False" in spec or spec == "gdn_native"):
        with pytest.raises(ValueError, match="no rotary embedding to leave out"):
            morphed(spec, name)
        return
    h, (ids, mask) = commit(morphed(spec, name), [1]), tokens(T=11, pad=4)
    kw = dict(
        attention_mask=mask,
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_logits=True,
        **GREEDY,
    )
    a, b = h.generate(ids, use_cache=True, **kw), h.generate(ids, use_cache=False, **kw)
    assert torch.equal(a.sequences, b.sequences)
    close(torch.stack(a.logits), torch.stack(b.logits), 2e-4)
    alone = h.generate(
        ids[:1, 4:], max_new_tokens=12, return_dict_in_generate=True, output_logits=True, **GREEDY
    )
    close(torch.stack(a.logits)[:, :1], torch.stack(alone.logits), 5e-4)
    beams = dict(
        attention_mask=mask, max_new_tokens=6, num_beams=3, num_return_sequences=2, **GREEDY
    )
    assert torch.equal(
        h.generate(ids, use_cache=True, **beams), h.generate(ids, use_cache=False, **beams)
    )

    positions, cache, parts = (mask.cumsum(-1) - 1).clamp(min=0), DynamicCache(), []
    for i, j in ((0, 2), (2, 6), (6, 7), (7, 11)):  # cuts inside the padding too
        with torch.no_grad():
            parts.append(
                h(
                    ids[:, i:j],
                    attention_mask=mask[:, :j],
                    position_ids=positions[:, i:j],
                    past_key_values=cache,
                ).logits
            )
    with torch.no_grad():
        whole = h(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], 2e-4)


@new
def test_files(spec, tmp_path):
    "Options and weights come back; in bfloat16 the rates stay float32, cast, saved and loaded."
    h, (ids, mask) = commit(morphed(spec), [1]), tokens(pad=3)
    h.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert again.config.mixer == spec and torch.equal(
        logits(again, ids, mask), logits(h, ids, mask)
    )
    rates = {
        n: p.clone() for n, p in h.named_parameters() if n.split(".")[-1] in ("A_log", "dt_bias")
    }
    own = ["A_log"] * ("own_decays" in spec) + ["A_log", "dt_bias"] * spec.startswith("gdn")
    assert sorted(n.split(".")[-1] for n in rates) == sorted(own * 3)
    low = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    low.save_pretrained(tmp_path / "b")
    for model in (
        low,
        h.bfloat16(),
        AutoModelForCausalLM.from_pretrained(tmp_path / "b"),
        morph(teacher("qwen3").bfloat16(), spec),
    ):
        names = {
            n
            for n, p in model.named_parameters()
            if p.dtype == torch.float32 and not n.endswith("alpha")
        }
        assert {n.split(".")[-1] for n in names} == set(own)
        assert logits(model, ids, mask).isfinite().all()
    assert all(
        torch.equal(p, low.get_parameter(n)) and torch.equal(p, h.get_parameter(n))
        for n, p in rates.items()
    )
    assert low.dtype == torch.bfloat16


@new
def test_gradients(spec):
    "Every parameter learns from the start; checkpointing and compiling change no gradient."
    model, (ids, mask) = morph(teacher("qwen3"), spec), tokens(pad=3)
    model.alignment_losses(ids, mask).sum().backward()
    asleep = {
        n.split("mixer.")[-1]
        for layer in model.layers
        for n, p in layer.linear.named_parameters()
        if p.grad is None or not p.grad.any()
    }
    constants = {"A_log"} if "own_decays" in spec else set()
    assert asleep <= {"decay_in.weight"} | constants  # behind a zero matrix for one step
    h = commit(morphed(spec), [1]).train()
    batch = dict(attention_mask=mask, labels=ids, use_cache=False)
    trained = [p for n, p in h.named_parameters() if n.split(".")[-1] not in constants]
    plain = torch.autograd.grad(h(ids, **batch).loss, trained)
    h.gradient_checkpointing_enable()
    for a, b in zip(plain, torch.autograd.grad(h(ids, **batch).loss, trained)):
        close(a, b)
    h.gradient_checkpointing_disable()
    compiled = torch.compile(h, backend="aot_eager", fullgraph=True)(ids, **batch).loss
    for a, b in zip(plain, torch.autograd.grad(compiled, trained)):
        close(a, b, 1e-4)
    torch._dynamo.reset()


@new
def test_cost(spec):
    c = teacher("qwen3").config
    few, many = (cost(c, layers, context=1000, mixer=spec) for layers in ([0], [0, 1, 2]))
    assert few != many and few == cost(c, [0], context=1000, mixer=mixer_spec(spec))


GROUPED = (
    "qwen3",
    "qwen3-bias",
    "phi3",
    "qwen3-wide-heads",
    "llama",
    "llama-one-kv-head",
    "qwen2",
    "mistral",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "olmo2",
)


@pytest.mark.parametrize("name", GROUPED)
def test_heads_of_ones_own(name, tmp_path):
    "`expand_kv`: at first the same function, then free to part; counted, saved, decoding."
    ids, mask = tokens(pad=3)
    narrow, wide = (morph(teacher(name), spec) for spec in ("gla", "gla(expand_kv=True)"))
    narrow.gates = wide.gates = 0
    close(logits(wide, ids, mask), logits(narrow, ids, mask), 1e-4)
    wide.alignment_losses(ids, mask).sum().backward()
    attn, dims = wide.layers[0].linear.attn, wide.layers[0].linear.mixer.dims
    grads = (
        attn.qkv_proj.weight.grad[4 * dims.head_dim :].chunk(2)[0]
        if name == "phi3"
        else attn.k_proj.weight.grad
    ).unflatten(0, (4, -1))
    assert not any(torch.allclose(grads[i], grads[j]) for i in range(4) for j in range(i))
    for layer in wide.layers:
        shake(layer.linear, 0.1)
    h = commit(wide, [1])
    assert (
        h.num_parameters()
        == cost(h.config, [1], context=9).parameters
        > commit(narrow, [1]).num_parameters()
    )
    h.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids, mask), logits(h, ids, mask))
    kw = dict(attention_mask=mask, max_new_tokens=8, **GREEDY)
    assert torch.equal(again.generate(ids, **kw), again.generate(ids, use_cache=False, **kw))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama-no-groups"])
def test_nothing_to_expand(name):
    narrow, wide = (
        morph(teacher(name), spec) for spec in ("lightning", "lightning(expand_kv=True)")
    )
    assert {n: p.shape for n, p in narrow.named_parameters()} == {
        n: p.shape for n, p in wide.named_parameters()
    }


def test_unknown_projections_cannot_be_expanded():
    model = teacher("phi3")
    attn = model.model.layers[0].self_attn
    attn.qkv_proj = torch.nn.Sequential(attn.qkv_proj)
    with pytest.raises(
        ValueError, match="a linear layer qkv_proj with .* outputs, but Phi3Attention has none"
    ):
        morph(model, "lightning(expand_kv=True)")


def test_options():
    config = teacher("qwen3").config
    h = HybridConfig(teacher=config, mixer="gdn( rope=False,conv=4)", full_layers=[0])
    assert h.mixer == "gdn(conv=4, rope=False)"
    assert morph(teacher("qwen3"), "gdn(conv=4)", conv=2).mixer == "gdn(conv=2)"
    assert mixer_spec("gdn", conv=torch.tensor(4)) == "gdn(conv=4)"


WRONG = {
    "gdn(cnv=4)": "no option 'cnv'; did you mean 'conv'",
    "gdm": "did you mean 'gdn'",
    "gdn(conv": "unknown",
    "gdn(4)": "options are written like",
    "gdn(conv=4, conv=5)": "each at most once",
    "gdn(conv=1)": "2 or more",
    "gdn(conv=-3)": "2 or more",
    "gdn(conv=True)": "option conv of mixer 'gdn': expected an integer",
    "gdn(rope=1)": "option rope of mixer 'gdn': expected true or false, got 1",
    "gdn(rope='no')": "expected true or false, got 'no'",
    "gdn(expand_kv='x')": "option expand_kv of mixer 'gdn': expected true or false",
}


@pytest.mark.parametrize("spec", list(WRONG))
def test_wrong_options_are_refused_when_they_are_read(spec):
    "By `morph`, and in the `config.json` of a hybrid (S7, S21)."
    config = HybridConfig(teacher=teacher("qwen3").config, full_layers=[0]).to_dict()
    for read in (
        lambda: morph(teacher("qwen3"), spec),
        lambda: HybridConfig.from_dict(config | {"mixer": spec}),
    ):
        with pytest.raises(ValueError, match=re.escape(WRONG[spec])):
            read()


@pytest.mark.parametrize("spec", ["lightning", "gla", "lightning(conv=2)"])
def test_float16_does_not_overflow(spec):
    "A constant part of the keys adds up over tokens, beyond the largest float16 (report 43)."
    t = teacher("qwen2", num_hidden_layers=2, max_position_embeddings=1024)
    with torch.no_grad():
        for layer in t.model.layers:
            attn = layer.self_attn
            attn.k_proj.bias[4:] = 40.0
            attn.q_proj.bias[4:] = 4.0
            attn.v_proj.bias.normal_(0, 2)
    h, (ids, _) = commit(morph(t, spec), []), tokens(T=700)
    wide, half = logits(h, ids), logits(h.half(), ids).float()
    assert half.isfinite().all()
    assert (half - wide).abs().max() < 0.1 * wide.std()


@pytest.fixture
def mean():
    "A mixer of ten lines, as a user would write it."

    @register_mixer("mean")
    class RunningMean(Mixer):
        def __init__(self, dims):
            super().__init__(dims)
            self.weight = torch.nn.Parameter(torch.zeros(dims.num_heads, dims.head_dim))

        def forward(self, q, k, v, hidden, *, scale, mask=None, state=None):
            k, v = repeat_heads(k, q.shape[2]).float(), repeat_heads(v, q.shape[2]).float()
            w = (k * self.weight).sum(-1, keepdim=True).exp()
            if mask is not None:
                w = w * mask[..., None, None]
            total = torch.cat([w * v, w], -1).cumsum(1) + (
                0 if state is None else state.transpose(1, 2)
            )
            return (total[..., :-1] / total[..., -1:].clamp(min=1e-6)).to(v.dtype), total[
                :, -1:
            ].transpose(1, 2)

    yield "mean"
    del MIXERS["mean"]


def test_a_mixer_of_ones_own(mean, tmp_path):
    "Through alignment, gates, selection, commit, a file, and generation."
    t = teacher("qwen3")
    model, rows = morph(t, mean), [dict(input_ids=torch.randint(3, 97, (24,))) for _ in range(64)]
    ids, mask = tokens(pad=4)
    with torch.no_grad():
        before = model.alignment_losses(
            seen := torch.stack([row["input_ids"] for row in rows]), relative=True
        )
    align(model, rows, steps=30, batch_size=4, lr=1e-2, warmup=2, progress=False)
    with torch.no_grad():
        assert model.alignment_losses(seen, relative=True).mean() < before.mean()
    books = [row | dict(answers=torch.arange(24) >= 20) for row in rows]
    run = train_gates(model, books, steps=6, batch_size=2, progress=False)
    assert (model.gates < 1).any()
    h = model.commit(run.select(budget=1))
    h.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    kw = dict(attention_mask=mask, max_new_tokens=8, **GREEDY)
    assert torch.equal(again.generate(ids, **kw), h.generate(ids, use_cache=False, **kw))
    with torch.no_grad():
        padded = again(
            ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).logits
    close(padded[:1, 4:], logits(again, ids[:1, 4:]), 1e-4)


def test_more_than_two_states_are_refused():
    from flashmorph.model.cache import StateLayer

    with pytest.raises(ValueError, match="one or two tensors"):
        StateLayer().store((torch.zeros(1),) * 3, 1)


def test_rates_follow_the_device_but_not_the_dtype():
    mixer = make_mixer("gdn", MixerDims(8, 2, 1, 4, 4))
    mixer.A_log.grad = torch.ones(2)
    mixer.to("meta").half()
    assert (
        mixer.A_log.dtype == mixer.A_log.grad.dtype == torch.float32
        and mixer.A_log.device.type == "meta"
        and mixer.a.weight.dtype == torch.float16
    )
    mixer.to_empty(device="cpu").double()
    assert mixer.A_log.dtype == torch.float64


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_decays_of_a_layer_are_chosen_kept_and_never_trained(tmp_path, optimizer):
    teacher, tokenizer = load_teacher()
    rows = [row for row, _ in zip(text(tokenizer, length=64), range(40))]
    settings = {"steps": 3, "batch_size": 4, "start_tokens": 1024, "optimizer": optimizer,
                "progress": False}
    model = morph(teacher, "lightning(own_decays=True)")
    result = align(model, rows, run=tmp_path / "run", **settings)
    chosen = result.events[0]["decays"]
    ladder = -lightning_log_decay(4)
    for layer, decays in zip(model.layers, chosen):
        wanted = ladder if decays is None else torch.tensor(decays).expand(4)
        torch.testing.assert_close(layer.linear.mixer.A_log.exp(), wanted)
    assert any(decays is not None for decays in chosen)

    # what was chosen survives half precision, a folder, and decoding step by step
    hybrid = model.commit([1, 4, 5]).eval()
    hybrid.save_pretrained(tmp_path / "hybrid", dtype=torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", dtype=torch.float32)
    for name, p in hybrid.named_parameters():
        if name.endswith("A_log"): assert torch.equal(p, again.get_parameter(name))
    ids = rows[0]["input_ids"][None]
    with torch.no_grad():
        whole = hybrid(ids).logits
        cache = hybrid(ids[:, :40], use_cache=True).past_key_values
        parts = [hybrid(ids[:, t:t + 1], past_key_values=cache).logits for t in range(40, 64)]
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, 40:], rtol=1e-3, atol=1e-3)


def test_decays_are_left_alone_when_told_so():
    teacher, tokenizer = load_teacher()
    model = morph(teacher, "gdn")
    before = [layer.linear.mixer.dt_bias.clone() for layer in model.layers]
    result = align(model, text(tokenizer, length=64), steps=0, start_tokens=512,
                   pick_decays=False, progress=False)
    assert "decays" not in result.events[0]
    after = [layer.linear.mixer.dt_bias for layer in model.layers]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
