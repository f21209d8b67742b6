"The morphable model: the teacher at 1, all linear at 0, and what the stages need in between."
import copy
import importlib
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import FAMILIES, VARIANTS, close, hybrid, morphed, shake, teacher, tokens
from flashmorph.model.morph import commit
from flashmorph.model.morph import MorphLayer, morph, share

morph_module = importlib.import_module("flashmorph.model.morph")
family = pytest.mark.parametrize("name", list(FAMILIES))
everyone = pytest.mark.parametrize("name", sorted({*FAMILIES, *VARIANTS}))


def logits(model, ids, mask=None):
    with torch.no_grad(): return model(ids, attention_mask=mask, use_cache=False).logits


def train_gates(model, on=True):
    for layer in model.layers: layer.alpha.requires_grad_(on)
    return [layer.alpha for layer in model.layers]


@everyone
def test_identity(name):
    t = teacher(name)
    model = morph(t)
    for layer in model.layers: shake(layer.linear, 0.1)
    for pad in (0, 5):
        ids, mask = tokens(pad=pad)
        expected = logits(t, ids, mask)
        assert torch.equal(logits(model, ids, mask), expected)
        train_gates(model)
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)         # both branches computed
        train_gates(model, False)
        model.gates = 0.5
        with model.full_pass(): assert torch.equal(logits(model, ids, mask), expected)
        model.gates = 1
    assert torch.equal(logits(t, ids, mask), expected)


@everyone
def test_all_linear_and_mixed_corners(name):
    model, (ids, mask) = morphed(name), tokens(pad=5)
    for full in ([], [2], [0, 3]):
        model.gates = [float(i in full) for i in range(4)]
        assert torch.equal(logits(model, ids, mask), logits(commit(model, full), ids, mask))
    assert (logits(model, ids, mask) - logits(teacher(name), ids, mask)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_distinct_kv_heads(name):
    "Each query head reads its own KV head: change the second KV head, and only the last two of four query heads change."
    model, (ids, _) = morph(teacher(name)), tokens()
    attn, seen = model.layers[0].linear.attn, []
    attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().unflatten(-1, (4, 8))))
    plain_norm = lambda o, hidden: o                                                          # noqa: E731 - the norm would spread it over heads
    model.layers[0].linear.mixer.norm.forward = plain_norm
    model.gates = 0
    logits(model, ids)
    with torch.no_grad():
        for proj in (attn.k_proj, attn.v_proj): proj.weight[8:] += 1
    logits(model, ids)
    changed = (seen[0] != seen[1]).any(-1).any(0).any(0)
    assert changed.tolist() == [False, False, True, True]


def test_the_teacher_is_left_alone():
    t = teacher("qwen3").train()
    t.lm_head.weight.requires_grad_(False)
    before = {n: (p.data_ptr(), p.requires_grad, p.clone()) for n, p in t.named_parameters()}
    names = [n for n, _ in t.named_modules()]
    model = morph(t)
    for layer in model.layers: shake(layer.linear, 1.)
    model.gates = 0
    logits(model, tokens()[0])
    assert [n for n, _ in t.named_modules()] == names and t.training
    assert all((p.data_ptr(), p.requires_grad) == before[n][:2] and torch.equal(p, before[n][2]) for n, p in t.named_parameters())
    shared = {p.data_ptr() for p in t.parameters()}
    frozen = [p for p in model.parameters() if p.data_ptr() in shared]
    assert len(frozen) == len(shared) and not any(p.requires_grad for p in frozen)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".linear." in n for n in trainable)
    assert model.host.get_input_embeddings().weight is model.host.get_output_embeddings().weight
    assert share(t).config is not t.config
    assert [b.data_ptr() for b in share(t).buffers()] == [b.data_ptr() for b in t.buffers()]


def test_skips_the_other_branch():
    model, (ids, _) = morphed("qwen3"), tokens()
    calls = []
    for layer in model.layers:
        for kind in ("full", "linear"): getattr(layer, kind).register_forward_hook(lambda *_, key=(layer.layer_idx, kind): calls.append(key))
    model.gates = [1, 0, 0.5, 1]
    logits(model, ids)
    assert sorted(calls) == [(0, "full"), (1, "linear"), (2, "full"), (2, "linear"), (3, "full")]
    calls.clear()
    train_gates(model)
    with torch.no_grad(): model(ids)
    assert len(calls) == 5
    calls.clear()
    model(ids)
    assert len(calls) == 8


@family
def test_gate_gradients_and_checkpointing(name):
    model, (ids, mask) = morphed(name).train(), tokens(pad=4)
    alphas = train_gates(model)
    model.gates = 0.7
    def grads():
        for a in alphas: a.grad = None
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return torch.stack([a.grad for a in alphas])
    plain = grads()
    assert (plain != 0).all() and plain.dtype == torch.float32
    model.host.gradient_checkpointing_enable()
    close(grads(), plain, 1e-4)
    where = torch.zeros_like(ids, dtype=torch.bool); where[:, -3:] = True
    for a in alphas: a.grad = None
    with model.record(where) as outs: model.hidden(ids, attention_mask=mask)
    assert [x.shape for x in outs] == [(6, model.config.hidden_size)] * 4
    sum(x.pow(2).sum() for x in outs).backward()
    assert all(a.grad != 0 for a in alphas)


def test_gate_gradient_in_bfloat16():
    model, (ids, _) = morphed("llama"), tokens()
    alphas = train_gates(model)
    model.gates = 0.6
    exact = torch.stack(torch.autograd.grad(model(ids, labels=ids).loss, alphas))
    with torch.autocast("cpu", torch.bfloat16): half = torch.stack(torch.autograd.grad(model(ids, labels=ids).loss, alphas))
    assert torch.nn.functional.cosine_similarity(exact, half, dim=0) > 0.98


def test_gates():
    model = morph(teacher("qwen3"))
    assert model.gates.tolist() == [1, 1, 1, 1] and model.gates.dtype == torch.float32
    model.gates = [0, 0.25, 1, 0.5]
    assert model.gates.tolist() == [0, 0.25, 1, 0.5] == [layer.alpha.item() for layer in model.layers]
    model.gates[0] = 7                                                                       # a copy
    assert model.gates[0] == 0
    model.gates = torch.tensor(0.5)
    assert model.gates.tolist() == [0.5] * 4
    for wrong in (1.0001, -1e-6, float("nan"), [0.5], [0.5] * 5, [[0.5] * 4], [0, 0, 0, 2]):
        with pytest.raises(ValueError, match="gates should"): model.gates = wrong
    assert model.gates.tolist() == [0.5] * 4
    assert [layer.layer_idx for layer in model.layers] == [0, 1, 2, 3] and model.num_layers == 4 and model.mixer == "lightning"


def test_no_dropout():
    "Even in training mode: the teacher's pass is the teacher's, and losses do not depend on a random state."
    t = teacher("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    model, (ids, mask) = morph(t).train(), tokens(pad=3)
    assert model.host.training and torch.equal(logits(model, ids, mask), logits(t, ids, mask))
    assert torch.equal(model.alignment_losses(ids, mask), model.alignment_losses(ids, mask))


def test_forced_pass_ends_with_an_error():
    model, (ids, _) = morphed("qwen3"), tokens()
    model.gates = 0
    with pytest.raises(KeyError):
        with model.full_pass(): raise KeyError
    assert not torch.equal(logits(model, ids), logits(teacher("qwen3"), ids)) and all(layer.forced is None for layer in model.layers)
    with pytest.raises(KeyError):
        with model.record(ids > 0): raise KeyError
    assert not any(layer._forward_hooks for layer in model.layers)


def test_record():
    model, (ids, mask) = morphed("llama"), tokens(pad=4)
    where = torch.rand(ids.shape) < 0.3
    every = {}
    handles = [layer.register_forward_hook(lambda m, a, out: every.update({m.layer_idx: out[0]})) for layer in model.layers]
    model.gates = 0.4
    with torch.no_grad(), model.record(where) as outs: logits(model, ids, mask)
    for handle in handles: handle.remove()
    assert all(torch.equal(x, every[i][where]) for i, x in enumerate(outs)) and not outs[0].requires_grad
    with torch.no_grad(), model.full_pass(), model.record(where) as target: model.hidden(ids, mask)
    assert len(target) == 4 and not torch.equal(target[2], outs[2])
    with torch.no_grad(), model.record(where) as twice:                                      # only the first pass counts
        logits(model, ids, mask)
        with model.full_pass(): logits(model, ids, mask)
    assert len(twice) == 4 and torch.equal(twice[2], outs[2])
    alphas = train_gates(model.train())
    with model.record(where) as outs:
        model.hidden(ids, mask)
        plain = torch.autograd.grad(sum(x.sum() for x in outs), alphas)
    model.host.gradient_checkpointing_enable()
    with model.record(where) as outs:                                                        # layers run again inside
        model.hidden(ids, mask)
        again = torch.autograd.grad(sum(x.sum() for x in outs), alphas)
        assert len(outs) == 4
    close(torch.stack(again), torch.stack(plain), 1e-4)


@family
def test_alignment(name):
    "Against the losses and gradients found the plain way, on the teacher's own inputs."
    t, (ids, mask) = teacher(name), tokens(pad=6)
    model, seen = morph(t), []
    for layer in model.layers: shake(layer.linear, 0.1)
    model.gates = 0.3                                                                        # plays no part
    twins = [m for _, m in morph_module.attention_modules(t)]
    for attn in twins: attn.register_forward_hook(lambda m, a, kw, out: seen.append((a, kw, out[0].detach())), with_kwargs=True)
    logits(t, ids, mask)
    valid = mask.bool()
    plain, energy = [], []
    for layer, (args, kwargs, out) in zip(model.layers, seen, strict=True):
        plain.append((layer.linear(*args, **kwargs, linear_mask=mask)[0] - out)[valid].pow(2).sum(-1).mean())
        energy.append(out[valid].pow(2).sum(-1).mean())
    plain, energy = torch.stack(plain), torch.stack(energy)
    losses, relative = model.alignment_losses(ids, mask), model.alignment_losses(ids, mask, relative=True)
    torch.testing.assert_close(losses, plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(relative, plain / energy, rtol=1e-4, atol=1e-6)

    params = [p for layer in model.layers for p in layer.linear.parameters()]
    expected = torch.autograd.grad(plain.mean(), params)
    (losses.mean() / 2).backward()                                                           # accumulated in two halves
    (model.alignment_losses(ids, mask).mean() / 2).backward()
    for p, g in zip(params, expected): torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-5 * (1 + g.abs().max().item()))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    with torch.no_grad(): assert not model.alignment_losses(ids, mask).requires_grad


def test_alignment_ignores_padding_and_frees_memory():
    model, (ids, mask) = morphed("llama"), tokens(B=1, T=20, pad=7)
    with torch.no_grad():
        positions = dict(rtol=1e-4, atol=1e-5)
        other = ids.clone(); other[0, :7] = 5
        torch.testing.assert_close(model.alignment_losses(ids, mask), model.alignment_losses(other, mask), **positions)
    live, peak = [0], [0]
    class Box:
        def __init__(self, x):
            self.x, self.n = x, x.numel() * x.element_size()
            live[0] += self.n; peak[0] = max(peak[0], live[0])
        def __del__(self): live[0] -= self.n
    ids = tokens(B=4, T=100)[0]
    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.x):
        kept = model.alignment_losses(ids)
        finished, peak[0] = peak[0], 0
        del kept
        losses = [layer.linear(torch.randn(4, 100, 32), position_embeddings=model.host.model.rotary_emb(torch.randn(4, 100, 32), torch.arange(100)[None]),
                               linear_mask=None)[0].pow(2).sum() for layer in model.layers]
        together = peak[0]
    assert losses and finished < 0.5 * together, (finished, together)


def test_alignment_under_autocast():
    model, (ids, mask) = morphed("qwen3"), tokens(pad=3)
    plain = model.alignment_losses(ids, mask, relative=True)
    with torch.autocast("cpu", torch.bfloat16): half = model.alignment_losses(ids, mask, relative=True)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0.1, atol=0)
    half.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for layer in model.layers for p in layer.linear.parameters())


def test_alignment_with_gradient_checkpointing():
    model, (ids, mask) = morphed("llama").train(), tokens(pad=3)
    params = [p for layer in model.layers for p in layer.linear.parameters()]
    plain = torch.autograd.grad(model.alignment_losses(ids, mask).sum(), params)
    model.host.gradient_checkpointing_enable()
    for a, b in zip(torch.autograd.grad(model.alignment_losses(ids, mask).sum(), params), plain): close(a, b, 1e-4)


def test_alignment_learns():
    torch.manual_seed(0)
    model, ids = morph(teacher("qwen3")), tokens(B=4, T=32)[0]
    with torch.no_grad(): start = model.alignment_losses(ids, relative=True)
    optimizer = torch.optim.AdamW([p for layer in model.layers for p in layer.linear.parameters()], lr=1e-2)
    for _ in range(40):
        model.alignment_losses(ids, relative=True).mean().backward()
        optimizer.step(); optimizer.zero_grad()
    with torch.no_grad(): assert (model.alignment_losses(ids, relative=True) < 0.5 * start).all()


def test_branches_to_a_file(tmp_path):
    model, other, file = morphed("qwen3"), morph(teacher("qwen3")), tmp_path / "branches.safetensors"
    model.gates = [0.25, 0, 1, 0.5]
    model.save_branches(file)
    other.load_branches(str(file))
    ids, _ = tokens()
    assert torch.equal(other.gates, model.gates) and torch.equal(logits(other, ids), logits(model, ids)) and os.listdir(tmp_path) == [file.name]
    assert not any("full" in name for name in load_file(file))

    good, before = load_file(file), logits(other, ids)
    meta = {"flashmorph_branches": "lightning"}
    first = next(name for name in good if "q_proj" in name)
    for change, word, m in ((lambda d: d.pop(first), "missing", meta), (lambda d: d.update(more=torch.ones(1)), "unexpected.*more", meta),
                            (lambda d: d.update({first: torch.ones(3)}), r"is \(3,\), not", meta), (dict, "'other' branches", {"flashmorph_branches": "other"}),
                            (dict, "no linear branches", {"format": "pt"})):
        bad = dict(good); change(bad)
        if change is dict: bad = good
        save_file(bad, tmp_path / "bad", m)
        with pytest.raises(ValueError, match=word): other.load_branches(tmp_path / "bad")
    (tmp_path / "cut").write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="cut off"): other.load_branches(tmp_path / "cut")
    with pytest.raises(FileNotFoundError): other.load_branches(tmp_path / "none")
    assert torch.equal(logits(other, ids), before)


def test_disk_full_keeps_the_previous_file(tmp_path, monkeypatch):
    model, file = morphed("qwen3"), tmp_path / "branches.safetensors"
    model.save_branches(file)
    before, node = file.read_bytes(), file.stat().st_ino
    with open(file, "rb") as held:                                                           # keeps the old inode from being used again
        model.save_branches(file)
        assert file.stat().st_ino != node and held.read() == before == file.read_bytes()     # another file was moved in its place
    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(morph_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"): model.save_branches(file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


def test_refused():
    with pytest.raises(ValueError, match="did you mean 'lightning'"): morph(teacher("qwen3"), "lightening")
    with pytest.raises(TypeError, match="transformers model"): morph(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="linear already"): morph(hybrid("qwen3"))
    model, (ids, _) = morphed("qwen3"), tokens()
    model.gates = 0.5
    with pytest.raises(ValueError, match="cannot share a cache"): model(ids, use_cache=True)
    model.gates = [1, 0, 1, 0]
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 23


def test_survives_deepcopy_and_state_dict():
    model, (ids, _) = morphed("llama"), tokens()
    model.gates = [0.2, 1, 0, 0.5]
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), logits(model, ids)) and isinstance(twin.layers[0], MorphLayer)
    fresh = morph(teacher("llama"))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, ids), logits(model, ids))
