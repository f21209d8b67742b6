"Folders that cannot be a teacher: each is refused in one line that names the cause."
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import save_teacher
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from flashmorph.model.morph import morph
from flashmorph.model.teacher import check_length, find_model, load_model, load_teacher

KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "A Qwen3 of four layers with untied embeddings and the bundled tokenizer."
    return save_teacher(tmp_path_factory.mktemp("good"), tie_word_embeddings=False)


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "teacher")


@pytest.fixture(scope="module")
def good_hybrid(good, tmp_path_factory):
    teacher, tokenizer = load_teacher(good)
    place = tmp_path_factory.mktemp("hybrid")
    morph(teacher).commit([1]).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def hybrid(good_hybrid, tmp_path):
    return shutil.copytree(good_hybrid, tmp_path / "hybrid")


def refusal(place, load=load_teacher, **kwargs) -> str:
    "The message of the error that loading raises: one line that begins with the model."
    with pytest.raises(ValueError) as caught: load(place, **kwargs)
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert message.startswith(f"model {str(place)!r}") and "\n" not in message, message
    assert len(message) < len(str(place)) + 500, message
    return message


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_the_good_folder_loads(folder):
    model, tokenizer = load_teacher(folder)
    assert torch.equal(model.get_parameter(KEY), load_file(folder / "model.safetensors")[KEY])
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert tokenizer.decode(tokenizer("Anna was here.")["input_ids"]) == "Anna was here."


# config.json

WRONG_CONFIGS = {
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "fewer than none": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "a layer too few": ({"num_hidden_layers": 3}, "num_hidden_layers` \\(3\\)"),
    "a number as a word": ({"num_hidden_layers": "four"}, "num_hidden_layers"),
    "no key heads": ({"num_key_value_heads": 0}, "ZeroDivisionError"),
    "odd heads": ({"head_dim": 7}, "head_dim|validate_rope|shape"),
    "other heads": ({"num_attention_heads": 3}, "of another shape: .*q_proj|o_proj"),
    "other width": ({"hidden_size": 31}, "of another shape"),
    "a smaller vocabulary": ({"vocab_size": 10}, "of another shape: .*embed_tokens"),
    "no positions": ({"max_position_embeddings": None}, "max_position_embeddings"),
    "unknown dtype": ({"dtype": "float99"}, "float99"),
    "layer types too short": ({"layer_types": ["full_attention"]}, "layer_types"),
    "unknown layer types": ({"layer_types": ["nope"] * 4}, "layer_type"),
    "padding outside": ({"pad_token_id": 1_000_000}, "(?i)pad"),
    "a negative range": ({"initializer_range": -1}, "initializer_range"),
    "a flag as a word": ({"use_cache": "x"}, "use_cache"),
    "unknown activation": ({"hidden_act": "nope"}, "KeyError: 'nope'"),
    "unknown family": ({"model_type": "no_such_family"}, "no_such_family"),
    "no family": ({"model_type": None}, "model type `None`"),
    "no causal language model": ({"model_type": "vit"}, "(?i)vit"),
    "a kernel": ({"attn_implementation": "owner/kernel"}, "attention code of 'owner/kernel'"),
    "a hidden kernel": ({"_attn_implementation_internal": "owner/kernel"}, "attention code of"),
    "a kernel of a part": ({"attn_implementation": {"": "owner/kernel"}}, "attention code of"),
    "unknown quantization": ({"quantization_config": {"quant_method": "nope"}}, "quant.*nope"),
    "quantization by nobody": ({"quantization_config": {"bits": 4}}, "quantization of the weights"),
    "quantization as a word": ({"quantization_config": "4bit"}, "AttributeError: 'str'"),
}


@pytest.mark.parametrize("changes, word", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_wrong_configurations(folder, changes, word):
    change_config(folder, **changes)
    message = refusal(folder)
    assert re.search(word, message), message


@pytest.mark.parametrize("text", ["[1, 2]", "{", "", "\0"])
def test_a_configuration_that_is_no_table(folder, text):
    (folder / "config.json").write_text(text)
    refusal(folder)


def test_own_attention_code_can_be_chosen(folder):
    change_config(folder, attn_implementation="owner/kernel")
    model, _ = load_model(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_a_head_of_its_own_in_a_tied_configuration_stays(folder):
    change_config(folder, tie_word_embeddings=True)
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(load_model(folder)[0].lm_head.weight, stored)


# weights

def rename(old, new):
    def change(weights):
        for name in [name for name in weights if re.search(old, name)]:
            weights[re.sub(old, new, name)] = weights.pop(name)
    return change


def spoil(number):
    def change(weights): weights[KEY][3, 5] = number
    return change


def put(name, shape, dtype=torch.float32):
    def change(weights): weights[name] = torch.ones(shape, dtype=dtype)
    return change


def to_integers(weights):
    for name in weights: weights[name] = weights[name].to(torch.int8)


BIAS = KEY.replace("weight", "bias")
OTHER = KEY.replace("k_proj", "key")
WRONG_WEIGHTS = {
    "one missing": (lambda w: w.pop(KEY), f"missing: {KEY}"),
    "one renamed": (rename(KEY, OTHER), f"missing: {KEY}; left over: {OTHER}"),
    "all renamed": (rename("^", "old."), "missing: .* and 44 more"),
    "no head": (lambda w: w.pop("lm_head.weight"), "missing: lm_head.weight"),
    "none": (lambda w: w.clear(), "missing: .* and 44 more"),
    "a wrong shape": (put(KEY, (3, 32)), rf"{KEY} is \(3, 32\), not \(16, 32\)"),
    "a bias": (put(BIAS, 16), f"left over: {BIAS}"),
    "a layer too many": (rename(r"layers\.3", "layers.4"), "missing: .*s.3.*left over: .*s.4"),
    "integers": (put(KEY, (16, 32), torch.int8), f"as integers.*{KEY}"),
    "all integers": (to_integers, "as integers"),
    "one NaN": (spoil(float("nan")), f"NaN or infinity in {KEY}"),
    "one infinity": (spoil(float("-inf")), f"NaN or infinity in {KEY}"),
}


@pytest.mark.parametrize("change, word", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_wrong_weights(folder, change, word, capfd):
    change_weights(folder, change)
    message = refusal(folder)
    assert re.search(word, message), message
    assert "LOAD REPORT" not in capfd.readouterr().err


class Dangerous:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (Path.touch, (self.path,))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 12345\n"

def cut_to(size):
    def damage(file): file.write_bytes(file.read_bytes()[:size])
    return damage


def write_pickle(file, protocol=2):
    file.write_bytes(pickle.dumps(Dangerous(file.parent / "ran"), protocol))


WRONG_FILES = {
    "empty": (cut_to(0), "SafetensorError"),
    "a pointer of git-lfs": (lambda file: file.write_text(POINTER), "SafetensorError"),
    "cut in the header": (cut_to(1000), "SafetensorError"),
    "cut in the weights": (cut_to(-1), "SafetensorError"),
    "a pickle": (write_pickle, "SafetensorError"),
    "gone": (Path.unlink, "model.safetensors"),
}


@pytest.mark.parametrize("damage, word", WRONG_FILES.values(), ids=WRONG_FILES)
def test_damaged_weight_files(folder, damage, word):
    damage(folder / "model.safetensors")
    assert word in refusal(folder)
    assert not (folder / "ran").exists()


def test_a_dangerous_pickle_is_not_run(folder):
    (folder / "model.safetensors").unlink()
    write_pickle(folder / "pytorch_model.bin")
    refusal(folder)
    assert not (folder / "ran").exists()


def test_shards(folder):
    model, _ = load_model(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    again, _ = load_model(folder)
    assert torch.equal(again.get_parameter(KEY), model.get_parameter(KEY))
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text[:len(text) // 2])
    refusal(folder)
    index.write_text(text)
    shards[0].unlink()
    assert shards[0].name in refusal(folder)


def test_a_prefix_too_many(folder):
    "transformers finds weights under `model.model.` too: then all of them, and none at random."
    whole = load_file(folder / "model.safetensors")
    change_weights(folder, rename("^model", "model.model"))
    model, _ = load_model(folder)
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in whole.items())


def test_a_value_head_is_no_part_of_a_language_model(folder):
    change_weights(folder, lambda w: w.update({"v_head.weight": torch.ones(1, 32)}))
    load_teacher(folder)


def test_quantized_teachers(folder, monkeypatch):
    "They can be loaded, but not converted: integers have no gradient."
    model, tokenizer = load_model(folder)
    weight = torch.nn.Parameter(torch.ones(16, 32, dtype=torch.int8), requires_grad=False)
    model.model.layers[1].self_attn.k_proj.weight = weight
    monkeypatch.setattr("flashmorph.model.teacher.load_model", lambda name: (model, tokenizer))
    assert f"quantized, and some are: {KEY}" in refusal(folder)


# tokenizers

def save_tokenizer(tokenizer):
    return lambda folder: tokenizer.save_pretrained(folder)


def with_tokens(count, special=False):
    def change(folder):
        _, tokenizer = load_model(folder)
        tokenizer.add_tokens([f"<new-{i}>" for i in range(count)], special_tokens=special)
        tokenizer.save_pretrained(folder)
    return change


def set_option(**options):
    def change(folder):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))
    return change


def remove(*names):
    def change(folder):
        for name in names: (folder / name).unlink()
    return change


def cut(name):
    def change(folder): (folder / name).write_text((folder / name).read_text()[:100])
    return change


def words_only():
    tokenizer = Tokenizer(models.WordLevel({"only": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def silent():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(".", "")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


WRONG_TOKENIZERS = {
    "no files": (remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "no tokenizer.json": (remove("tokenizer.json"), "tokenizer"),
    "tokenizer.json cut": (cut("tokenizer.json"), "tokenizer"),
    "tokenizer_config.json cut": (cut("tokenizer_config.json"), "tokenizer"),
    "an end that is not in the vocabulary": (set_option(eos_token="<none>"), "'<none>' is 511"),
    "a start that is not in the vocabulary": (set_option(bos_token="<none>"), "'<none>' is 511"),
    "two more tokens": (with_tokens(2), "has 513 tokens, the model only 511"),
    "many more tokens": (with_tokens(50), "and 47 more"),
    "no unknown word": (save_tokenizer(words_only()), "UNK"),
    "nothing": (save_tokenizer(silent()), "makes no tokens"),
}


@pytest.mark.parametrize("change, word", WRONG_TOKENIZERS.values(), ids=WRONG_TOKENIZERS)
def test_wrong_tokenizers(folder, change, word):
    change(folder)
    message = refusal(folder)
    assert word in message, message


def test_special_tokens_that_no_text_uses_may_lie_outside(folder):
    "The tokenizer of Gemma 3 has one: the place of an image."
    with_tokens(1, special=True)(folder)
    assert len(load_teacher(folder)[1]) == 512
    set_option(eos_token="<new-0>")(folder)
    assert "'<new-0>' is 511" in refusal(folder)


# hybrids

WRONG_HYBRIDS = {
    "no teacher": {"teacher": None},
    "a list": {"teacher": [1]},
    "a hybrid of hybrids": {"model_type": "flashmorph_hybrid"},
    "no layers": {"num_hidden_layers": 0},
    "fewer than none": {"num_hidden_layers": -1},
    "very many": {"num_hidden_layers": 10 ** 6},
    "no heads": {"num_key_value_heads": 0},
    "unknown family": {"model_type": "nope"},
    "a smaller vocabulary": {"vocab_size": 10},
}


@pytest.mark.parametrize("changes", WRONG_HYBRIDS.values(), ids=WRONG_HYBRIDS)
def test_wrong_teachers_inside_a_hybrid(hybrid, changes):
    "The hybrid's own configuration repeats the sizes, so they are changed in both places."
    own = json.loads((hybrid / "config.json").read_text())
    repeated = {name: x for name, x in changes.items() if name in own and name != "model_type"}
    inside = {} if "teacher" in changes else {"teacher": own["teacher"] | changes}
    change_config(hybrid, **repeated | inside)
    refusal(hybrid, load_model)


@pytest.mark.parametrize("changes", [
    {"dtype": "nope"}, {"full_layers": []}, {"full_layers": [0, 1, 2, 3]}, {"full_layers": [4]},
    {"mixer": "gla"}, {"mixer": "nobody"}, {"mixer": "gdn(conv=1000000000)"},
], ids=str)
def test_wrong_hybrids(hybrid, changes):
    change_config(hybrid, **changes)
    refusal(hybrid, load_model)


@pytest.mark.parametrize("name", ["mixer.norm.weight", "attn.k_proj.weight", "mlp.up_proj.weight"])
def test_a_hybrid_with_a_weight_missing(hybrid, name):
    whole = load_model(hybrid)[0].state_dict()
    gone = next(key for key in whole if key.endswith(name))
    change_weights(hybrid, lambda weights: weights.pop(gone))
    assert gone in refusal(hybrid, load_model)


# code of other people

CODE = """
from pathlib import Path
from transformers import Qwen3Config
Path({marker!r}).touch()
class TheirConfig(Qwen3Config): model_type = "theirs"
"""


def test_code_of_the_model_is_never_run_unasked(folder, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    change_config(folder, model_type="theirs", auto_map={"AutoConfig": "code.TheirConfig"})
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    assert "load_model(..., trust_remote_code=True)" in refusal(folder)
    assert not marker.exists() and not asked
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    # The code has a configuration, but no model.
    with pytest.raises(ValueError): load_model(folder, trust_remote_code=True)
    assert marker.exists() and not asked


def test_code_of_the_tokenizer_is_never_run_unasked(folder, tmp_path, monkeypatch):
    "transformers does without, if `tokenizer.json` is enough; otherwise loading fails."
    asked, marker = [], tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    set_option(tokenizer_class="Theirs", auto_map={"AutoTokenizer": ["code.Theirs", None]})(folder)
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    found, bundled = load_model(folder)[1], load_model("bundled")[1]
    assert found("Anna")["input_ids"] == bundled("Anna")["input_ids"]
    (folder / "tokenizer.json").unlink()
    refusal(folder)
    assert not marker.exists() and not asked


# where a model lies

def test_places(tmp_path, monkeypatch, good):
    assert find_model("owner/name") == "owner/name" and find_model("gpt2") == "gpt2"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(good, tmp_path / "owner" / "name")
    assert find_model("owner/name") == "owner/name"
    assert find_model("~/owner/name") == str(tmp_path / "owner" / "name")
    assert load_model("~/owner/name")[0].config.num_hidden_layers == 4
    assert load_model("owner", subfolder="name")[0].config.num_hidden_layers == 4
    for name in ("./none", "a/b/c", "not a name", "owner", Path("owner"), "", "nul\0"):
        with pytest.raises(ValueError, match="expected a folder with config.json"): find_model(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder with config.json"): find_model("./file")
    for name in (None, 3, ["gpt2"], b"gpt2", 1.5, True):
        with pytest.raises(TypeError, match="expected a folder or the id"): load_model(name)


def test_a_folder_that_may_not_be_read(folder):
    "Reported as that, not as a folder that is not there. Root may read all, so another user tries."
    folder.chmod(0)
    root = os.geteuid() == 0
    try:
        if root: os.seteuid(65534)
        with pytest.raises(ValueError, match="cannot be read: Permission"): find_model(folder)
    finally:
        if root: os.seteuid(0)
        folder.chmod(0o755)


def hub_cache(root: Path, *revisions: Path) -> dict:
    "The cache of a hub with the model `me/tiny`: a revision for each folder, the last is `main`."
    repo = root / "models--me--tiny"
    (repo / "refs").mkdir(parents=True)
    for i, folder in enumerate(revisions):
        shutil.copytree(folder, repo / "snapshots" / (str(i) * 40))
    (repo / "refs" / "main").write_text(f"{len(revisions) - 1}" * 40)
    (repo / "refs" / "old").write_text("0" * 40)
    return {"cache_dir": str(root), "local_files_only": True}


def test_what_finds_a_repository_reaches_the_tokenizer(folder, good, tmp_path):
    change_config(folder, tie_word_embeddings=True)
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    with_tokens(1, special=True)(folder)
    where = hub_cache(tmp_path / "cache", good, folder)
    model, tokenizer = load_teacher("me/tiny", **where)
    assert model.config.tie_word_embeddings and len(tokenizer) == 512
    model, tokenizer = load_teacher("me/tiny", revision="old", **where)
    assert not model.config.tie_word_embeddings and len(tokenizer) == 511


def test_the_hub_out_of_reach(tmp_path):
    "One line, though the library's message has several."
    message = refusal("nobody/no-such-model", cache_dir=str(tmp_path), local_files_only=True)
    assert "Is the name right" in message


# options

def test_options(folder):
    for dtype in ("float99", "int8", torch.int8, 3, "nn", "load"):
        with pytest.raises(ValueError, match="dtype: expected 'auto' or a float type"):
            load_model(folder, dtype=dtype)
    for trust in ("yes", 1, None):
        with pytest.raises(TypeError, match="trust_remote_code: expected True or False"):
            load_model(folder, trust_remote_code=trust)
    assert load_model(folder, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_model(folder, dtype=torch.float64)[0].dtype == torch.float64


def test_lengths(folder):
    config = load_model(folder)[0].config
    check_length(config, 512)
    with pytest.raises(ValueError, match="passkeys.length: expected at most 512 .* got 513"):
        check_length(config, 513, "passkeys.length")
    check_length(PreTrainedConfig(), 10 ** 9)


def test_a_lack_of_memory_is_not_the_fault_of_the_folder(folder, monkeypatch):
    def full(*args, **kwargs): raise torch.OutOfMemoryError("no memory")
    monkeypatch.setattr("flashmorph.model.teacher.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError): load_model(folder)
