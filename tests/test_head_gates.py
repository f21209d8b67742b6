"The experiment with gates of heads: shares of heads mean what gates of layers mean."
import pytest
import torch
from head_gates import all_heads, only_heads
from test_hybrid import shake, teacher

from flashmorph.model.morph import morph


@pytest.fixture
def model():
    made = morph(teacher("llama", num_hidden_layers=3)).requires_grad_(False)
    for layer in made.layers: shake(layer.linear, 0.1)
    return made.double().eval()


def test_heads_alike_are_a_layer(model):
    ids = torch.randint(0, 50, (2, 17))
    groups = model.config.num_key_value_heads
    gates = torch.rand(3)
    shares = gates[:, None].repeat(1, groups).double().requires_grad_()
    with all_heads(model, shares):
        ours = model.hidden(ids)
        ours.pow(2).sum().backward()
    assert groups > 1 and shares.grad.abs().min() > 0
    model.gates = gates
    torch.testing.assert_close(ours.detach(), model.hidden(ids).detach(), rtol=1e-5, atol=1e-5)


def test_the_teacher_is_as_it_was_inside(model):
    ids = torch.randint(0, 50, (2, 17))
    model.gates = 1.0
    theirs = model.hidden(ids)
    shares = torch.rand(3, model.config.num_key_value_heads).requires_grad_()
    with all_heads(model, shares), model.full_pass(): inside = model.hidden(ids)
    assert torch.equal(inside, theirs)
    with only_heads(model, [(0, 0)]): assert not torch.allclose(model.hidden(ids), theirs)
