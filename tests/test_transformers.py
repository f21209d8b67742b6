"What transformers does with hybrids beside `generate`: caches, pipelines, batches, loading."
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline
from transformers.cache_utils import CacheLayerMixin

from flashmorph.model.morph import morph
from flashmorph.model.sharing import LOADER_FILE
from flashmorph.model.teacher import load_teacher

CACHES = ("dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked")
LOAD = """
import sys
from transformers import AutoModelForCausalLM
for folder, *trust in (arg.split("+") for arg in sys.argv[1:]):
    try: said = type(AutoModelForCausalLM.from_pretrained(
        folder, **dict.fromkeys(trust, True))).__name__
    except Exception as error: said = f"{type(error).__name__}: {error}"
    print("SAID", " ".join(said.split()))
"""


def noisy(mixer, layers):
    "A hybrid of the bundled teacher whose every weight is a little off."
    torch.manual_seed(0)
    hybrid = morph(load_teacher()[0], mixer=mixer).commit(layers).eval()
    for p in hybrid.parameters(): p.data.add_(0.02 * torch.randn_like(p))
    return hybrid


@pytest.fixture(scope="module")
def hybrid(): return noisy("lightning", [3, 4, 8])


def inputs():
    ids = torch.randint(5, 400, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return ids, {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False,
                 "eos_token_id": None}


@pytest.mark.parametrize("mixer, layers", [("lightning", [3, 4, 8]), ("gdn", []), ("gla", [0, 11])])
def test_every_cache_gives_the_tokens_without_one(mixer, layers):
    model = noisy(mixer, layers)
    ids, settings = inputs()
    plain = model.generate(ids, use_cache=False, **settings)
    for name in CACHES:
        found = model.generate(ids, cache_implementation=name, **settings)
        assert torch.equal(found, plain), name


class NoStream:
    "In place of a stream of a GPU, without which transformers offloads nothing."
    def wait_stream(self, other): pass
    def __enter__(self): return self
    def __exit__(self, *error): pass


@pytest.mark.parametrize("mixer, layers", [("lightning", [3, 4, 8]), ("gla", [0, 11])])
@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_offloaded_caches_give_the_tokens_without_one(monkeypatch, name, mixer, layers):
    model, moved = noisy(mixer, layers), []
    ids, settings = inputs()
    plain = model.generate(ids, use_cache=False, **settings)
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    offload = CacheLayerMixin.offload
    monkeypatch.setattr(CacheLayerMixin, "offload", lambda self: moved.append(offload(self)))
    assert torch.equal(model.generate(ids, cache_implementation=name, **settings), plain)
    assert len(moved) == 12 * len(layers)               # each full layer at each token


def test_a_quantized_cache_is_refused(hybrid):
    ids, settings = inputs()
    with pytest.raises((ValueError, ImportError), match="full attention layers|quanto|hqq"):
        hybrid.generate(ids, cache_implementation="quantized", **settings)


def test_continuous_batching_is_refused(hybrid):
    ids, settings = inputs()
    calls = (lambda: hybrid.generate_batch(ids.tolist(), max_new_tokens=2),
             hybrid.init_continuous_batching,
             lambda: hybrid.continuous_batching_context_manager(),
             lambda: hybrid.generate(ids, cache_implementation="paged", **settings))
    for call in calls:
        with pytest.raises(ValueError, match="no place for the states of linear layers"): call()


def test_a_pipeline_writes_what_generate_writes(hybrid):
    tokenizer = load_teacher()[1]
    texts = ["Anna went home to the river", "The baker"]
    written = pipeline("text-generation", model=hybrid, tokenizer=tokenizer)
    for text in texts:
        settings = {"max_new_tokens": 10, "do_sample": False}
        ids = hybrid.generate(**tokenizer(text, return_tensors="pt"), **settings)
        (found,) = written(text, return_tensors=True, **settings)
        assert found["generated_token_ids"] == ids[0].tolist()


def load(folder, *names, **env):
    "What transformers says that loads models in a process that imports nothing else."
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], capture_output=True, text=True, cwd=folder,
        stdin=subprocess.DEVNULL, env=os.environ | {"HF_MODULES_CACHE": f"{folder}/cache"} | env)
    return [line.partition("SAID ")[2] for line in done.stdout.splitlines() if "SAID " in line]


def test_loading_without_the_import(hybrid, tmp_path):
    hybrid.save_pretrained(tmp_path / "plain")
    hybrid.save_pretrained(tmp_path / "asking", remote_code=True)
    assert not (tmp_path / "plain" / LOADER_FILE).exists()
    plain, asked, trusted = load(tmp_path, "plain", "asking", "asking+trust_remote_code")
    # without the loader: the type alone, and advice of transformers' own
    assert "model type `flashmorph_hybrid`" in plain and "trust" not in plain
    assert "pass the argument `trust_remote_code=True`" in asked
    assert trusted == "HybridForCausalLM"


def test_the_loader_names_a_missing_package(hybrid, tmp_path):
    hybrid.save_pretrained(tmp_path / "asking", remote_code=True)
    package = tmp_path / "missing" / "flashmorph"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError(\"No module named 'flashmorph'\")")
    (said,) = load(tmp_path, "asking+trust_remote_code", PYTHONPATH=str(package.parent))
    assert said.startswith("ImportError") and "Run `pip install flashmorph`" in said


def test_a_loader_stays_with_its_hybrid(hybrid, tmp_path):
    hybrid.save_pretrained(tmp_path / "a", remote_code=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")       # needs no trust here
    for remote_code, there in ((None, True), (False, False)):
        again.save_pretrained(tmp_path / "b", remote_code=remote_code)
        assert (tmp_path / "b" / LOADER_FILE).exists() == there
