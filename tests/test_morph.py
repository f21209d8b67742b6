"The morphable model: the teacher at 1, all linear at 0, and what the stages need in between."
import copy
import importlib
import os

import pytest
import torch
from families import FAMILIES, VARIANTS, close, hybrid, morphed, shake, teacher, tokens
from safetensors.torch import load_file, save_file

from flashmorph.model.branches import MorphLayer, share
from flashmorph.model.hosts import attention_modules
from flashmorph.model.morph import commit, morph

morph_module = importlib.import_module("flashmorph.model.morph")
family = pytest.mark.parametrize("name", list(FAMILIES))
everyone = pytest.mark.parametrize("name", sorted({*FAMILIES, *VARIANTS}))


def logits(model, ids, mask=None):
    with torch.no_grad(): return model(ids, attention_mask=mask, use_cache=False).logits


def train_gates(model, on=True):
    for layer in model.layers: layer.alpha.requires_grad_(on)
    return [layer.alpha for layer in model.layers]


def linear_parameters(model):
    return [p for layer in model.layers for p in layer.linear.parameters()]


@everyone
def test_identity(name):
    t = teacher(name)
    model = morph(t)
    for layer in model.layers: shake(layer.linear, 0.1)
    for pad in (0, 5):
        ids, mask = tokens(pad=pad)
        expected = logits(t, ids, mask)
        assert torch.equal(logits(model, ids, mask), expected)
        # both branches computed
        train_gates(model)
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)
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
    """Each query head reads its own KV head.

    Change the second KV head, and only the last two of four query heads change."""
    model, (ids, _) = morph(teacher(name)), tokens()
    linear, seen = model.layers[0].linear, []

    def keep(module, args): seen.append(args[0].detach().unflatten(-1, (4, 8)))
    linear.attn.o_proj.register_forward_pre_hook(keep)
    # the norm would spread the change over heads
    linear.mixer.norm.forward = lambda o, hidden: o
    model.gates = 0
    logits(model, ids)
    with torch.no_grad():
        for proj in (linear.attn.k_proj, linear.attn.v_proj): proj.weight[8:] += 1
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
    for n, p in t.named_parameters():
        assert (p.data_ptr(), p.requires_grad) == before[n][:2] and torch.equal(p, before[n][2])
    shared = {p.data_ptr() for p in t.parameters()}
    frozen = [p for p in model.parameters() if p.data_ptr() in shared]
    assert len(frozen) == len(shared) and not any(p.requires_grad for p in frozen)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".linear." in n for n in trainable)
    embeddings = model.host.get_input_embeddings(), model.host.get_output_embeddings()
    assert embeddings[0].weight is embeddings[1].weight
    assert share(t).config is not t.config
    assert [b.data_ptr() for b in share(t).buffers()] == [b.data_ptr() for b in t.buffers()]


def test_skips_the_other_branch():
    model, (ids, _) = morphed("qwen3"), tokens()
    calls = []

    def count(key): return lambda *_: calls.append(key)
    for layer in model.layers:
        layer.full.register_forward_hook(count((layer.layer_idx, "full")))
        layer.linear.register_forward_hook(count((layer.layer_idx, "linear")))
    model.gates = [1, 0, 0.5, 1]
    logits(model, ids)
    expected = [(0, "full"), (1, "linear"), (2, "full"), (2, "linear"), (3, "full")]
    assert sorted(calls) == expected
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
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, -3:] = True
    for a in alphas: a.grad = None
    with model.record(where) as outs: model.hidden(ids, attention_mask=mask)
    assert [x.shape for x in outs] == [(6, model.config.hidden_size)] * 4
    sum(x.pow(2).sum() for x in outs).backward()
    assert all(a.grad != 0 for a in alphas)


def test_gate_gradient_in_bfloat16():
    model, (ids, _) = morphed("llama"), tokens()
    alphas = train_gates(model)
    model.gates = 0.6

    def grads(): return torch.stack(torch.autograd.grad(model(ids, labels=ids).loss, alphas))
    exact = grads()
    with torch.autocast("cpu", torch.bfloat16): half = grads()
    assert torch.nn.functional.cosine_similarity(exact, half, dim=0) > 0.98


def test_gates():
    model = morph(teacher("qwen3"))
    assert model.gates.tolist() == [1, 1, 1, 1] and model.gates.dtype == torch.float32
    model.gates = [0, 0.25, 1, 0.5]
    assert model.gates.tolist() == [0, 0.25, 1, 0.5] == [x.alpha.item() for x in model.layers]
    # what was read is a copy
    model.gates[0] = 7
    assert model.gates[0] == 0
    model.gates = torch.tensor(0.5)
    assert model.gates.tolist() == [0.5] * 4
    assert [layer.layer_idx for layer in model.layers] == [0, 1, 2, 3]
    assert model.num_layers == 4 and model.mixer == "lightning"


@pytest.mark.parametrize("wrong", [
    1.0001, -1e-6, float("nan"), [0.5], [0.5] * 5, [[0.5] * 4], [0, 0, 0, 2], [], "x", "0.5", None,
    [1, 1, 1, "a"], [1, 1, None, 1], {"a": 1}, {0.5}, object(), [[0.5], [0.5, 1]], 10 ** 400,
], ids=lambda wrong: type(wrong).__name__)
def test_gates_of_another_kind(wrong):
    model = morph(teacher("qwen3"))
    model.gates = 0.5
    with pytest.raises((TypeError, ValueError), match="gates should be one number in .0, 1. or 4"):
        model.gates = wrong
    assert model.gates.tolist() == [0.5] * 4


def test_no_dropout():
    "Even in training mode: the teacher's pass is the teacher's, and losses are not random."
    t = teacher("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    model, (ids, mask) = morph(t).train(), tokens(pad=3)
    assert model.host.training and torch.equal(logits(model, ids, mask), logits(t, ids, mask))
    assert torch.equal(model.alignment_losses(ids, mask), model.alignment_losses(ids, mask))


def test_forced_pass_ends_with_an_error():
    model, (ids, _) = morphed("qwen3"), tokens()
    model.gates = 0
    with pytest.raises(KeyError):
        with model.full_pass(): raise KeyError
    assert not torch.equal(logits(model, ids), logits(teacher("qwen3"), ids))
    assert all(layer.forced is None for layer in model.layers)
    with pytest.raises(KeyError):
        with model.record(ids > 0): raise KeyError
    assert not any(layer._forward_hooks for layer in model.layers)


def test_record():
    model, (ids, mask) = morphed("llama"), tokens(pad=4)
    where = torch.rand(ids.shape) < 0.3
    every = {}

    def keep(layer, args, out): every[layer.layer_idx] = out[0]
    handles = [layer.register_forward_hook(keep) for layer in model.layers]
    model.gates = 0.4
    with torch.no_grad(), model.record(where) as outs: logits(model, ids, mask)
    for handle in handles: handle.remove()
    assert all(torch.equal(x, every[i][where]) for i, x in enumerate(outs))
    assert not outs[0].requires_grad

    with torch.no_grad(), model.full_pass(), model.record(where) as target: model.hidden(ids, mask)
    assert len(target) == 4 and not torch.equal(target[2], outs[2])
    # only the first pass counts
    with torch.no_grad(), model.record(where) as twice:
        logits(model, ids, mask)
        with model.full_pass(): logits(model, ids, mask)
    assert len(twice) == 4 and torch.equal(twice[2], outs[2])


def test_record_with_gradient_checkpointing():
    "Layers run again inside, and are not recorded twice."
    model, (ids, mask) = morphed("llama").train(), tokens(pad=4)
    where = torch.rand(ids.shape) < 0.3
    model.gates = 0.4
    alphas = train_gates(model)

    def grads():
        with model.record(where) as outs:
            model.hidden(ids, mask)
            found = torch.autograd.grad(sum(x.sum() for x in outs), alphas)
            assert len(outs) == 4
        return torch.stack(found)

    plain = grads()
    model.host.gradient_checkpointing_enable()
    close(grads(), plain, 1e-4)


def plain_alignment(model, t, ids, mask):
    "Losses and energies found the plain way, on the teacher's own inputs."
    seen = []

    def keep(module, args, kwargs, out): seen.append((args, kwargs, out[0].detach()))
    for _, attn in attention_modules(t): attn.register_forward_hook(keep, with_kwargs=True)
    logits(t, ids, mask)
    valid = mask.bool()
    losses, energy = [], []
    for layer, (args, kwargs, out) in zip(model.layers, seen, strict=True):
        linear = layer.linear(*args, **kwargs, linear_mask=mask)[0]
        losses.append((linear - out)[valid].pow(2).sum(-1).mean())
        energy.append(out[valid].pow(2).sum(-1).mean())
    return torch.stack(losses), torch.stack(energy)


@family
def test_alignment(name):
    "Against the losses and gradients found the plain way."
    t, (ids, mask) = teacher(name), tokens(pad=6)
    model = morph(t)
    for layer in model.layers: shake(layer.linear, 0.1)
    # gates play no part
    model.gates = 0.3
    plain, energy = plain_alignment(model, t, ids, mask)
    losses = model.alignment_losses(ids, mask)
    relative = model.alignment_losses(ids, mask, relative=True)
    torch.testing.assert_close(losses, plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(relative, plain / energy, rtol=1e-4, atol=1e-6)

    params = linear_parameters(model)
    expected = torch.autograd.grad(plain.mean(), params)
    # accumulated in two halves
    (losses.mean() / 2).backward()
    (model.alignment_losses(ids, mask).mean() / 2).backward()
    for p, g in zip(params, expected):
        atol = 1e-5 * (1 + g.abs().max().item())
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=atol)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    with torch.no_grad(): assert not model.alignment_losses(ids, mask).requires_grad


def test_alignment_ignores_padding():
    model, (ids, mask) = morphed("llama"), tokens(B=1, T=20, pad=7)
    other = ids.clone()
    other[0, :7] = 5
    with torch.no_grad():
        losses = [model.alignment_losses(rows, mask) for rows in (ids, other)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


class Box:
    "A tensor saved for the backward pass, which counts the bytes of all of its kind."
    live = peak = 0

    def __init__(self, x):
        self.x, self.size = x, x.numel() * x.element_size()
        Box.live += self.size
        Box.peak = max(Box.peak, Box.live)

    def __del__(self): Box.live -= self.size


def test_alignment_frees_memory():
    model, (ids, _) = morphed("llama"), tokens(B=4, T=100)
    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.x):
        kept = model.alignment_losses(ids)
        finished, Box.peak = Box.peak, 0
        del kept
        x, positions = torch.randn(4, 100, 32), torch.arange(100)[None]
        rotary = model.host.model.rotary_emb(x, positions)
        losses = [layer.linear(x, position_embeddings=rotary, linear_mask=None)[0].pow(2).sum()
                  for layer in model.layers]
    assert losses and finished < 0.5 * Box.peak, (finished, Box.peak)


def test_alignment_under_autocast():
    model, (ids, mask) = morphed("qwen3"), tokens(pad=3)
    plain = model.alignment_losses(ids, mask, relative=True)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.alignment_losses(ids, mask, relative=True)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0.1, atol=0)
    half.sum().backward()
    for p in linear_parameters(model): assert p.grad.dtype == torch.float32


def test_alignment_with_gradient_checkpointing():
    model, (ids, mask) = morphed("llama").train(), tokens(pad=3)
    params = linear_parameters(model)
    def grads(): return torch.autograd.grad(model.alignment_losses(ids, mask).sum(), params)
    plain = grads()
    model.host.gradient_checkpointing_enable()
    for a, b in zip(grads(), plain): close(a, b, 1e-4)


def test_alignment_learns():
    torch.manual_seed(0)
    model, ids = morph(teacher("qwen3")), tokens(B=4, T=32)[0]
    with torch.no_grad(): start = model.alignment_losses(ids, relative=True)
    optimizer = torch.optim.AdamW(linear_parameters(model), lr=1e-2)
    for _ in range(40):
        model.alignment_losses(ids, relative=True).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(): end = model.alignment_losses(ids, relative=True)
    assert (end < 0.5 * start).all()


ROWS = torch.ones(2, 5, dtype=torch.long)
WRONG_ROWS = {
    "words": (["a", "b"], None, TypeError, "token ids"),
    "lists": ([[1, 2]], None, TypeError, "token ids"),
    "floats": (torch.rand(2, 5), None, TypeError, "token ids"),
    "nothing": (None, None, TypeError, "token ids"),
    "one row": (ROWS[0], None, ValueError, r"expected shape \(B, T\), got \(5,\)"),
    "rows of rows": (ROWS[None], None, ValueError, "expected shape"),
    "empty rows": (ROWS[:, :0], None, ValueError, "expected shape"),
    "no rows": (ROWS[:0], None, ValueError, "expected shape"),
    "ids above": (ROWS + 10 ** 6, None, ValueError, "ids from 0 to .* got ids from 1000001"),
    "ids below": (ROWS - 2, None, ValueError, "got ids from -1 to -1"),
    "another mask": (ROWS, torch.ones(2, 4), ValueError, r"the shape of input_ids, \(2, 5\)"),
}


@pytest.mark.parametrize("ids, mask, kind, word", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_alignment_of_rows_of_another_kind(ids, mask, kind, word):
    with pytest.raises(kind, match=word): morphed("qwen3").alignment_losses(ids, mask)


# files

def test_branches_to_a_file(tmp_path):
    model, other = morphed("qwen3"), morph(teacher("qwen3"))
    file = tmp_path / "branches.safetensors"
    model.gates = [0.25, 0, 1, 0.5]
    model.save_branches(file)
    other.load_branches(str(file))
    ids, _ = tokens()
    assert torch.equal(other.gates, model.gates)
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert os.listdir(tmp_path) == [file.name]
    assert not any("full" in name for name in load_file(file))


def test_branches_without_a_checksum_and_in_another_precision(tmp_path):
    "As the first edition wrote them; and a bfloat16 file fits a float32 model."
    model, other = morphed("qwen3"), morph(teacher("qwen3"))
    file = tmp_path / "branches.safetensors"
    model.save_branches(file)
    halves = {name: x.bfloat16() for name, x in load_file(file).items()}
    save_file(halves, file, {"flashmorph_branches": "lightning"})
    other.load_branches(file)
    for name, x in morph_module.branch_tensors(other).items():
        assert torch.equal(x, halves[name].float()), name


FIRST = "layers.0.attn.q_proj.weight"
OURS = {"flashmorph_branches": "lightning"}


def changed(**tensors):
    def change(found): return {name: x for name, x in (found | tensors).items() if x is not None}
    return change


WRONG_BRANCHES = {
    "missing": (changed(**{FIRST: None}), OURS, f"missing {FIRST}"),
    "unexpected": (changed(more=torch.ones(1)), OURS, "unexpected more"),
    "of another shape": (changed(**{FIRST: torch.ones(3)}), OURS, rf"{FIRST}: shape \(3,\)"),
    "of another mixer": (changed(), {"flashmorph_branches": "other"}, "'other' branches"),
    "no branches": (changed(), {"format": "pt"}, "no linear branches"),
    "another checksum": (changed(), OURS | {"sha256": "0"}, "is damaged: its checksum"),
}


@pytest.mark.parametrize("change, meta, word", WRONG_BRANCHES.values(), ids=WRONG_BRANCHES)
def test_wrong_branches(tmp_path, change, meta, word):
    "Refused, naming the file, with nothing changed."
    model, other = morphed("qwen3"), morph(teacher("qwen3"))
    file = tmp_path / "branches.safetensors"
    model.save_branches(file)
    save_file(change(load_file(file)), file, meta)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=word) as error: other.load_branches(file)
    assert str(file) in str(error.value)
    for name, x in other.state_dict().items(): assert torch.equal(x, before[name])


def test_damaged_branches(tmp_path):
    "Cut off, changed in one bit, gone: each names the file."
    model, file = morphed("qwen3"), tmp_path / "branches.safetensors"
    model.save_branches(file)
    whole = file.read_bytes()
    damages = {
        "may be truncated": whole[:500], "is damaged; it may": whole[:-1], "be trunc": b"",
        "checksum is another": whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:],
    }
    before = copy.deepcopy(model.state_dict())
    for word, damaged in damages.items():
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=word) as error: model.load_branches(file)
        assert str(file) in str(error.value)
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read: No such file"): model.load_branches(file)
    for name, x in model.state_dict().items(): assert torch.equal(x, before[name])


def test_disk_full_keeps_the_previous_file(tmp_path, monkeypatch):
    model, file = morphed("qwen3"), tmp_path / "branches.safetensors"
    model.save_branches(file)
    before, node = file.read_bytes(), file.stat().st_ino
    # an open file keeps the old inode from being used again
    with open(file, "rb") as held:
        model.save_branches(file)
        assert file.stat().st_ino != node and held.read() == before
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(morph_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"): model.save_branches(file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


def test_saving_makes_the_folder_and_knows_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = morphed("qwen3")
    model.save_branches("~/new/branches.safetensors")
    model.load_branches("~/new/branches.safetensors")
    assert (tmp_path / "new" / "branches.safetensors").is_file()


# errors

def test_refused():
    with pytest.raises(ValueError, match="did you mean 'lightning'"):
        morph(teacher("qwen3"), "lightening")
    with pytest.raises(ValueError, match="linear already"): morph(hybrid("qwen3"))
    for wrong in (torch.nn.Linear(2, 2), None, "qwen3", morphed("qwen3")):
        with pytest.raises(TypeError, match="transformers model"): morph(wrong)
    for wrong in (3, None, ["gdn"]):
        with pytest.raises(TypeError, match="name of a mixer"): morph(teacher("qwen3"), wrong)
    model, (ids, _) = morphed("qwen3"), tokens()
    model.gates = 0.5
    with pytest.raises(ValueError, match="cannot share a cache"): model(ids, use_cache=True)
    model.gates = [1, 0, 1, 0]
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 23


def test_adapters_are_merged_first():
    "LoRA layers as peft puts them into a model; merged there is nothing left to refuse."
    t = teacher("qwen3")
    plain = t.model.layers[2].self_attn.q_proj
    lora = type("Linear", (torch.nn.Module,), {"__module__": "peft.tuners.lora.layer"})()
    lora.base_layer = plain
    t.model.layers[2].self_attn.q_proj = lora
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.q_proj.*merge_and_unload"):
        morph(t)
    t.model.layers[2].self_attn.q_proj = plain
    morph(t)


WRONG_LAYERS = [None, 3, "0", [4], [-1], [0, 0], [0.5], [True], ["a"]]


@pytest.mark.parametrize("layers", WRONG_LAYERS, ids=repr)
def test_layers_that_cannot_be_kept(layers):
    with pytest.raises(ValueError, match="layers"): morphed("qwen3").commit(layers)


@pytest.mark.parametrize("options", [
    {"full_rope": 1}, {"full_rope": "no"}, {"logit_scale": 1}, {"logit_scale": float("nan")},
    {"logit_scale": "500"},
], ids=repr)
def test_options_that_cannot_be(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=name): morphed("qwen3").commit([1], **options)


def test_survives_deepcopy_and_state_dict():
    model, (ids, _) = morphed("llama"), tokens()
    model.gates = [0.2, 1, 0, 0.5]
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    assert isinstance(twin.layers[0], MorphLayer)
    fresh = morph(teacher("llama"))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, ids), logits(model, ids))
