"Int8 weights of torchao in hybrids. Runs where torchao is installed: see `tests/quantized.sh`."
import pytest
import torch
from tiny_models import randomised
from transformers import AutoModelForCausalLM, TorchAoConfig

from flashmorph.model.morph import morph
from flashmorph.model.teacher import load_model, load_teacher

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
