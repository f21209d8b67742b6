"Native checkpoints: loaded in a process without flashmorph, and what is refused."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import shake, teacher
from safetensors.torch import load_file
from small import PROGRAM
from transformers import AutoModelForCausalLM

from flashmorph.model.hybrid import HybridForCausalLM
from flashmorph.measure.pace import lay_out
from flashmorph.model.morph import commit, morph
from flashmorph.model.teacher import load_teacher
from flashmorph.serve import export as chapter
from flashmorph.serve.export import export, sala_logits

TEACHERS = ("qwen3", "qwen3_moe", "llama", "bundled")
FORMS = {"qwen3": "qwen3_5", "qwen3_moe": "qwen3_next", "llama": "minicpm_sala",
         "granite": "granitemoehybrid", "bundled": "qwen3_5"}

# Runs where flashmorph cannot be imported: loads, computes, writes, saves and loads again.
# transformers has no MiniCPM-SALA: there its Llama gets linear layers that go a token at a time.
ALONE = """
import json, shutil, sys
sys.modules["fla"] = sys.modules["flashmorph"] = None
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
torch.set_num_threads(1)

class Lightning(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.rope = c["lightning_nh"], c["lightning_use_rope"]
        for name in "qkvoz":
            setattr(self, name + "_proj", nn.Linear(*2 * [c["hidden_size"]], bias=False))
        self.o_norm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, hidden_states, position_embeddings, **more):
        x, n = hidden_states, self.heads
        q, k, v = (getattr(self, name + "_proj")(x).unflatten(-1, (n, -1)).transpose(1, 2)
                   for name in "qkv")
        if self.rope: q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        decay = torch.exp(-torch.exp2(-8 * torch.arange(1, n + 1) / n))[:, None, None].to(x.dtype)
        state, seen = 0, []
        for i in range(x.shape[1]):
            state = decay * state + k[:, :, i, :, None] * v[:, :, i, None]
            seen.append((q[:, :, i, None] @ state)[:, :, 0])
        o = self.o_norm(torch.stack(seen, 1).flatten(2) * q.shape[-1] ** -0.5)
        return self.o_proj(o * self.z_proj(x).sigmoid()), None

def sala(folder, dtype):
    c = json.load(open(folder + "/config.json"))
    assert c["scale_depth"] ** 2 == c["num_hidden_layers"]
    assert c["scale_emb"] == 1 and c["dim_model_base"] == c["hidden_size"]
    known = {name: c[name] for name in LlamaConfig().to_dict() if name in c}
    rope = {"rope_theta": c["rope_theta"], "rope_type": "default"}
    settings = {**known, "model_type": "llama", "rope_parameters": rope, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    for layer, kind in zip(model.model.layers, c["mixer_types"]):
        if kind == "lightning-attn": layer.self_attn = Lightning(c)
    lacking, left = model.load_state_dict(load_file(folder + "/model.safetensors"), strict=False)
    assert not left and set(lacking) <= {"lm_head.weight"}
    return model.to(dtype).eval()

def load(folder, dtype=torch.float32):
    kind = json.load(open(folder + "/config.json"))["model_type"]
    if kind == "minicpm_sala": return sala(folder, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

def save(model, folder, again):
    if not any(isinstance(m, Lightning) for m in model.modules()):
        return model.save_pretrained(again)
    shutil.copytree(folder, again)
    tensors = {name: x for name, x in model.state_dict().items()
               if name != "lm_head.weight" or not model.config.tie_word_embeddings}
    save_file(tensors, again + "/model.safetensors", {"format": "pt"})

found = {}
for folder in sys.argv[2:]:
    ids = torch.load(folder + "/ids.pt")
    model = load(folder)
    save(model, folder, folder + "/again")
    again = load(folder + "/again")
    half = load(folder, torch.bfloat16)
    greedy = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
    with torch.no_grad():
        found[folder] = {
            "kind": type(model).__name__, "logits": model(ids).logits,
            "again": again(ids).logits, "half": half(ids).logits.float(),
            "text": model.generate(ids[:, :50], **greedy)}
torch.save(found, sys.argv[1])
"""


def hybrid_of(name: str, full=(1,), mixer: str | None = None) -> HybridForCausalLM:
    "A hybrid whose linear layers have been changed, as by training."
    mixer = mixer or ("lightning(expand_kv=True)" if name == "llama" else "gdn_native")
    plain = load_teacher()[0] if name == "bundled" else teacher(name, max_position_embeddings=512)
    model = morph(plain, mixer)
    for layer in model.layers: shake(layer.linear, 0.02 if name == "bundled" else 0.1)
    return commit(model, list(full)).eval()


def ids_of(hybrid) -> torch.Tensor:
    seed = torch.Generator().manual_seed(1)
    return torch.randint(3, hybrid.config.vocab_size, (1, 300), generator=seed)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "Hybrids, and what their checkpoints computed without flashmorph."
    root = tmp_path_factory.mktemp("exports")
    hybrids = {name: hybrid_of(name) for name in TEACHERS}
    hybrids |= {f"{name} full": hybrid_of(name, range(4)) for name in TEACHERS[:3]}
    hybrids["granite"] = hybrids["llama full"]
    for name, hybrid in hybrids.items():
        export(hybrid, root / name, FORMS[name.removesuffix(" full")])
        torch.save(ids_of(hybrid), root / name / "ids.pt")
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    folders = [str(root / name) for name in hybrids]
    subprocess.run([sys.executable, "-c", ALONE, root / "found.pt", *folders], check=True, cwd=root,
                   env=environment, capture_output=True)
    found = torch.load(root / "found.pt")
    return {name: (hybrid, found[str(root / name)]) for name, hybrid in hybrids.items()}


@pytest.mark.parametrize("name", [*TEACHERS, "granite"])
def test_alone(alone, name):
    "Logits within 1e-4 over 300 tokens, the same text, and the same bits after saving again."
    hybrid, found = alone[name]
    ids = ids_of(hybrid)
    with torch.no_grad(): ours = hybrid(ids, use_cache=False).logits
    difference = float((ours - found["logits"]).abs().max())
    half = float((ours - found["half"]).abs().max())
    print(f"{name} -> {found['kind']}: {difference:.2g} in float32, {half:.2g} in bfloat16, "
          f"largest logit {float(ours.abs().max()):.3g}")
    assert difference <= 1e-4
    greedy = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert torch.equal(found["text"], hybrid.generate(ids[:, :50], **greedy))
    assert torch.equal(found["logits"], found["again"])
    assert found["half"].isfinite().all()


@pytest.mark.parametrize("name", ["qwen3 full", "qwen3_moe full", "llama full"])
def test_full_layers_alone_are_exact(alone, name):
    hybrid, found = alone[name]
    with torch.no_grad(): ours = hybrid(ids_of(hybrid), use_cache=False).logits
    assert torch.equal(ours, found["logits"])


SALA = (("lightning(expand_kv=True)", (1,)), ("lightning(expand_kv=True, rope=False)", (0, 3)),
        ("lightning(expand_kv=True)", range(4)))


@pytest.mark.parametrize("mixer, full", SALA)
def test_sala(mixer, full, tmp_path):
    "MiniCPM-SALA by hand, with the epsilon of Llama's norms, which is not that of our mixers."
    model = morph(teacher("llama", max_position_embeddings=512, rms_norm_eps=1e-2), mixer)
    for layer in model.layers: shake(layer.linear, 0.1)
    hybrid = commit(model, list(full))
    found = export(hybrid, tmp_path / "sala", "minicpm_sala")
    ids = ids_of(hybrid)
    with torch.no_grad(): ours = hybrid(ids, use_cache=False).logits
    theirs = sala_logits(tmp_path / "sala", ids)
    assert float((ours - theirs).abs().max()) <= 1e-4
    assert found["difference"] <= 1e-4
    # the names that SGLang loads
    names = {name.split(".", 3)[-1] for name in load_file(tmp_path / "sala/model.safetensors")}
    linear = {"self_attn.z_proj.weight", "self_attn.o_norm.weight"}
    assert linear <= names if len(full) < 4 else not linear & names
    assert {f"self_attn.{x}_proj.weight" for x in "qkvo"} <= names
    assert not {name for name in names if "mixer" in name or "attn.attn" in name}


def test_granite(tmp_path):
    hybrid = commit(morph(teacher("llama")), range(4))
    found = export(hybrid, tmp_path / "granite", "granitemoehybrid", tokens=100)
    assert found["architecture"] == "GraniteMoeHybridForCausalLM"
    assert found["difference"] <= 1e-4


def test_half_precision(tmp_path):
    "Weights in bfloat16: the same model when computed in float32, and rates stay exact."
    found = export(hybrid_of("qwen3").bfloat16(), tmp_path / "half", "qwen3_5")
    assert found["difference"] <= 1e-4 and found["difference_bfloat16"] < found["largest_logit"] / 2
    written = load_file(tmp_path / "half/model.safetensors")
    rates = {name: x.dtype for name, x in written.items() if name.endswith("A_log")}
    assert rates and set(rates.values()) == {torch.float32}
    assert written["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_columns(tmp_path):
    "Weights that are kept by columns for speed are written as any others."
    plain, laid = hybrid_of("qwen3"), lay_out(hybrid_of("qwen3"))
    for name, hybrid in (("plain", plain), ("laid", laid)):
        export(hybrid, tmp_path / name, "qwen3_5")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "laid"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


REFUSED = {
    ("qwen3", "gdn", "qwen3_5"): "mixer gdn. Convert with the mixer gdn_native",
    ("qwen3", "gdn_native", "qwen3_next"): "family 'qwen3', not of qwen3_moe.* export to qwen3_5",
    ("qwen3-bias", "gdn_native", "qwen3_5"): "its projections have biases",
    ("llama", "gdn_native", "qwen3_5"): "family 'llama', not of qwen3.* export to minicpm_sala",
    ("llama", "lightning", "minicpm_sala"): "Convert with the mixer lightning.expand_kv=True",
    ("llama", "lightning(expand_kv=True, own_decays=True)", "minicpm_sala"): "mixer lightning.*own",
    ("llama", "lightning", "granitemoehybrid"): "should be Mamba2",
    ("mistral", "lightning(expand_kv=True)", "minicpm_sala"): "see a sliding window",
    ("gpt2", "gdn", "qwen3_5"): "No form takes a teacher of family 'gpt2'",
    ("qwen3", "gdn_native", "qwen35"): "did you mean 'qwen3_5'",
}


@pytest.mark.parametrize("name, mixer, form", REFUSED)
def test_refused(name, mixer, form, tmp_path):
    with pytest.raises(ValueError, match=REFUSED[name, mixer, form]):
        export(commit(morph(teacher(name), mixer), [1]), tmp_path / "new", form)
    assert not any(tmp_path.iterdir())


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    "A disk that is full, or another model, leaves nothing behind; a full folder stays as it is."
    hybrid = hybrid_of("qwen3")
    write = chapter.write

    def full_disk(*args):
        write(*args)
        raise OSError(28, "No space left on device")

    def wrong(form, hybrid, folder):
        write(form, hybrid_of("qwen3", full=[1]), folder)
        file = folder / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"rms_norm_eps": 0.1}))

    for broken, error in ((full_disk, OSError), (wrong, ValueError)):
        monkeypatch.setattr(chapter, "write", broken)
        with pytest.raises(error): export(hybrid, tmp_path / "new", "qwen3_5")
        assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").touch()
    with pytest.raises(ValueError, match="not empty"):
        export(hybrid, tmp_path / "thesis", "qwen3_5")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


def test_command(tmp_path):
    "The command writes the tokenizer too, and an engine that knows intervals alone is named."
    plain, tokenizer = load_teacher()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    hybrid = commit(morph(plain, "gdn_native"), [3, 4, 8])
    hybrid.save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    command = [*PROGRAM, "export", tmp_path / "hybrid", tmp_path / "new", "--to", "qwen3_5"]
    refused = subprocess.run([*command, "--engine", "sglang"], capture_output=True, text=True)
    assert refused.returncode == 2 and "SGLang computes the layers" in refused.stderr
    assert "[3, 7, 11]" in refused.stderr and not Path(tmp_path / "new").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Qwen3_5ForCausalLM written to" in done.stdout and "largest difference" in done.stdout
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "export.json",
                     "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    written = json.loads((tmp_path / "new/export.json").read_text())
    assert written["full_layers"] == [3, 4, 8] and written["difference"] <= 1e-4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert loaded.generation_config.eos_token_id == hybrid.generation_config.eos_token_id
