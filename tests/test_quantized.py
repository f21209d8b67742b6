"Int8 weights and 8-bit moments of torchao. Runs where torchao is installed: `tests/quantized.sh`."
import pytest
import torch
from small import Stop
from tiny_models import randomised
from transformers import AutoModelForCausalLM, TorchAoConfig

import flashmorph as fm
from flashmorph.measure.memory import moment_bytes
from flashmorph.model.morph import morph
from flashmorph.model.teacher import load_model, load_teacher
from flashmorph.store import Checkpoints

quantization = pytest.importorskip("torchao.quantization")


def logits(model, ids): return model(input_ids=ids, use_cache=False).logits.detach()


@pytest.mark.parametrize("mixer", ["lightning", "gdn", "gdn_native"])
def test_int8_weights(mixer, tmp_path):
    torch.manual_seed(0)
    teacher, tokenizer = load_teacher()
    hybrid = randomised(morph(teacher, mixer=mixer).commit([3, 4, 8]).eval(), 0.1)
    for part in (hybrid, tokenizer): part.save_pretrained(tmp_path / "plain")
    how = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    int8 = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how).eval()
    # the same weights as plain numbers, each within a step of what it was
    plain = load_model(tmp_path / "plain")[0]
    weights = dict(plain.named_parameters())
    quantized = {name: p for name, p in int8.named_parameters() if type(p.data) is not torch.Tensor}
    assert len(quantized) >= 7 * 12
    for name, p in quantized.items():
        before = weights[name].data
        weights[name].data = p.dequantize()
        steps = before.abs().amax(1, keepdim=True) / 127
        assert ((weights[name].data - before).abs() <= 1.01 * steps).all()
    ids = torch.randint(5, 400, (2, 40))
    found = logits(int8, ids)
    assert (found - logits(plain, ids)).abs().max() < 1e-3
    assert (found - logits(hybrid, ids)).abs().max() > 1e-2
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(int8.generate(ids, **settings),
                       int8.generate(ids, use_cache=False, **settings))
    # saved and loaded, by transformers and by us
    for part in (int8, tokenizer): part.save_pretrained(tmp_path / "int8")
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "int8"),
                  load_model(tmp_path / "int8")[0]):
        assert torch.equal(logits(again, ids), found)
    with pytest.raises(ValueError, match="quantized .*: export it before"):
        int8.export(tmp_path / "native", "qwen3_5")


def distilled(name, folder=None, **known):
    "Losses and weights of a short repair of noise."
    torch.manual_seed(0)
    teacher, tokenizer = load_teacher()
    hybrid = morph(teacher).commit([3, 4, 8])
    settings = {"steps": 8, "batch_size": 2, "lr": 2e-3, "optimizer": name, "progress": False}
    rows = fm.text(tokenizer, length=64)
    losses = fm.distill(hybrid, teacher, rows, run=folder, **settings, **known).losses
    return losses, dict(hybrid.named_parameters())


def test_moments_in_8_bits(tmp_path):
    "Two bytes a weight and a scale; nearly the steps of 32 bits; stopped and resumed bit for bit."
    losses, weights = distilled("adamw-8bit")
    plain, _ = distilled("adamw")
    assert losses[0] == plain[0] and abs(losses[1] / plain[1] - 1) < 1e-5 and losses != plain
    assert losses[-1] < 0.8 * losses[0] and abs(losses[-1] / plain[-1] - 1) < 0.1
    with pytest.raises(KeyboardInterrupt):
        distilled("adamw-8bit", tmp_path, callbacks=[Stop("distill", 5)])
    path = fm.Run(tmp_path).checkpoints("distill").paths()[-1]
    kept, _ = Checkpoints.read(path)
    held = sum(x.nbytes for label, x in kept.items() if label.startswith("optimizer."))
    # small tensors, and those that are not cut into blocks of 256, keep their 8 bytes
    sizes = [p.numel() for p in weights.values()]
    names = ["adamw-8bit" if n >= 4096 and n % 256 == 0 else "adamw" for n in sizes]
    counted = sum(map(moment_bytes, names, sizes))
    assert counted < 0.5 * moment_bytes("adamw", sum(sizes)) and abs(held / counted - 1) < 0.02
    resumed, again = distilled("adamw-8bit", tmp_path, resume=True)
    assert resumed == losses and all(torch.equal(weights[k], again[k]) for k in weights)
