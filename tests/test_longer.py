"HypeNet's options, from a recipe to logits, against a plain forward pass in float64."
import math

import pytest
import torch
from small import save_teacher, small_recipe
from transformers import AutoModelForCausalLM

from flashmorph.run.convert import convert
from flashmorph.run.recipe import load_recipe

SCALE = 7.0                          # small, so that it matters in texts of 40 tokens
VARIANTS = {                         # values of a recipe
    "no rotation": {"full_rope": False, "logit_scale": SCALE},
    "rotation, scaled": {"logit_scale": SCALE},
    "no rotation anywhere": {"full_rope": False, "logit_scale": SCALE,
                             "mixer": "lightning(rope=False)"},
}


def normed(x, weight, eps=1e-6): return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotated(x, positions, theta=10_000.0):
    "`(T, H, D)`, each pair of channels `(i, i + D / 2)` turned by its angle."
    half = x.shape[-1] // 2
    speeds = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = (positions[:, None].to(x.dtype) * speeds)[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(),
                      second * angles.cos() + first * angles.sin()], -1)


def softmax_by_hand(q, k, v, scale):
    "Query after query: softmax of `scale[t]` times its products with the keys so far."
    out = torch.empty_like(q)
    for t in range(len(q)):
        products = torch.einsum("hd,shd->hs", q[t], k[:t + 1]) / math.sqrt(q.shape[-1])
        out[t] = torch.einsum("hs,shd->hd", (products * scale[t]).softmax(-1), v[:t + 1])
    return out


def lightning_by_hand(q, k, v):
    "A state for each head, which forgets at its own rate."
    heads, width = q.shape[1:]
    steps = torch.arange(1, heads + 1, dtype=q.dtype)
    decay = torch.exp(-(2.0 ** (-8 * steps / heads)))
    state = torch.zeros(heads, width, width, dtype=q.dtype)
    out = torch.empty_like(q)
    for t in range(len(q)):
        state = decay[:, None, None] * state + torch.einsum("hd,he->hde", k[t], v[t])
        out[t] = torch.einsum("hd,hde->he", q[t], state) / math.sqrt(width)
    return out


def attention_by_hand(x, w, layer, config, scale):
    "The attention of one layer, `(T, hidden)`, from the weights of a hybrid."
    full = layer in config.full_layers
    at = f"host.model.layers.{layer}.self_attn." + ("" if full else "attn.")
    size = config.head_dim
    q, k, v = ((x @ w[f"{at}{name}_proj.weight"].T).view(len(x), -1, size) for name in "qkv")
    q = normed(q, w[f"{at}q_norm.weight"])
    k = normed(k, w[f"{at}k_norm.weight"])
    if config.full_rope if full else "rope=False" not in config.mixer:
        positions = torch.arange(len(x))
        q, k = rotated(q, positions), rotated(k, positions)
    # one key and value head for several query heads
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    if full: mixed = softmax_by_hand(q, k, v, scale).flatten(1)
    else:
        norm = f"host.model.layers.{layer}.self_attn.mixer.norm."
        mixed = normed(lightning_by_hand(q, k, v).flatten(1), w[f"{norm}weight"])
        mixed = mixed * 2 * torch.sigmoid(x @ w[f"{norm}gate.weight"].T)
    return mixed @ w[f"{at}o_proj.weight"].T


def logits_by_hand(hybrid, ids, training=False):
    "The logits `(T, vocabulary)` of one text in float64."
    config = hybrid.config
    w = {name: p.detach().double() for name, p in hybrid.named_parameters()}
    t = torch.arange(len(ids), dtype=torch.float64)
    a = None if training else config.full_logit_scale
    scale = torch.ones_like(t) if a is None else (t + a).log() / math.log(a)
    x = w["host.model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        at = f"host.model.layers.{layer}."
        inside = normed(x, w[f"{at}input_layernorm.weight"])
        x = x + attention_by_hand(inside, w, layer, config, scale)
        inside = normed(x, w[f"{at}post_attention_layernorm.weight"])
        gate, up = (inside @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"{at}mlp.down_proj.weight"].T
    return normed(x, w["host.model.norm.weight"]) @ w["host.model.embed_tokens.weight"].T


@pytest.fixture(scope="module", params=VARIANTS)
def run(request, tmp_path_factory):
    "The folder of a finished run, and the values of its recipe."
    folder = tmp_path_factory.mktemp("longer")
    teacher = save_teacher(folder / "teacher")
    values = VARIANTS[request.param]
    convert(small_recipe(teacher, **values), folder / "run", progress=False)
    return folder / "run", values


def test_a_hybrid_of_a_recipe_against_a_forward_pass_by_hand(run):
    "In one piece, token by token with a cache, behind padding, and in training mode."
    folder, values = run
    hybrid = AutoModelForCausalLM.from_pretrained(folder / "hybrid").double().eval()
    assert hybrid.config.full_rope == values.get("full_rope", True)
    assert hybrid.config.full_logit_scale == SCALE
    ids = torch.randint(4, 500, (40,), generator=torch.Generator().manual_seed(3))
    expected = logits_by_hand(hybrid, ids)
    # factors of logits are float32 in the model
    tolerance = dict(rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(hybrid(ids[None]).logits[0], expected, **tolerance)
        first = hybrid(ids[None, :30], use_cache=True)
        steps = [first.logits[0]]
        for t in range(30, 40):
            out = hybrid(ids[None, t:t + 1], past_key_values=first.past_key_values)
            steps.append(out.logits[0])
        torch.testing.assert_close(torch.cat(steps), expected, **tolerance)
        row = torch.cat([torch.zeros(9, dtype=ids.dtype), ids])[None]
        padded = hybrid(row, attention_mask=(torch.arange(49) >= 9).long()[None]).logits[0, 9:]
        torch.testing.assert_close(padded, expected, **tolerance)
        trained = hybrid.train()(ids[None]).logits[0]
        torch.testing.assert_close(trained, logits_by_hand(hybrid, ids, True), **tolerance)
    assert (trained - expected).abs().max() > 1e-3


def test_the_options_are_part_of_a_run(run):
    "Recipe and report name them, and a finished run does not go on with another scale."
    folder, values = run
    written = load_recipe(folder / "recipe.toml")
    report = (folder / "report.html").read_text()
    assert (written.full_rope, written.logit_scale) == (values.get("full_rope", True), SCALE)
    assert f"full_rope = {str(written.full_rope).lower()}\nlogit_scale = {SCALE}" in report
    changed = load_recipe(folder / "recipe.toml", ["logit_scale=9.0"])
    with pytest.raises(ValueError, match="logit_scale"):
        convert(changed, folder, resume=True, progress=False)
