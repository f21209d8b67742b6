"LoRA of peft on hybrids: trained, saved, merged, reloaded, exported."
import pytest
import torch
from tiny_models import randomised

from flashmorph.model.morph import morph
from flashmorph.model.teacher import load_model, load_teacher

peft = pytest.importorskip("peft")


def made(mixer):
    "A hybrid of the bundled teacher, the same at each call."
    torch.manual_seed(0)
    return randomised(morph(load_teacher()[0], mixer=mixer).commit([3, 4, 8]).eval(), 0.1)


def logits(model, ids): return model(input_ids=ids, use_cache=False).logits.detach()


def trained(mixer, targets, ids):
    "A hybrid after three steps of LoRA, with its logits."
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
    model = peft.get_peft_model(made(mixer), config)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    rates = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model.train()(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        rates.step()
        rates.zero_grad()
    assert losses[2] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters()
               if name in frozen)
    return model.eval(), logits(model, ids)


@pytest.mark.parametrize("mixer, targets", [
    ("lightning", None), ("gdn_native", ["q_proj", "o_proj"]), ("gdn", "all-linear")])
def test_lora_trains_reloads_and_merges(mixer, targets, tmp_path):
    ids = torch.randint(5, 400, (2, 40))
    before = logits(made(mixer), ids)
    model, after = trained(mixer, targets, ids)
    assert (after - before).abs().max() > 0.1
    adapted = {name.split("layers.")[1].split(".")[0] for name, p in model.named_parameters()
               if p.requires_grad}
    assert adapted == {str(layer) for layer in range(12)}           # full and linear layers
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(made(mixer), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, ids), after)
    # merged there is a plain hybrid; W + BA is rounded where Wx + BAx was not
    if mixer == "gdn_native":
        with pytest.raises(ValueError, match="merge them first"):
            model.get_base_model().export(tmp_path / "early", "qwen3_5")
    merged = model.merge_and_unload()
    assert (logits(merged, ids) - after).abs().max() < 1e-3
    for part in (merged, load_teacher()[1]): part.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_model(tmp_path / "merged")[0], ids), logits(merged, ids))
    if mixer == "gdn_native":
        assert merged.export(tmp_path / "native", "qwen3_5")["difference"] < 1e-3
