"""The load-balancing loss: by hand, by float64, in the model's loss, and with a gradient."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from pesc_models import adapted, config, layers_of, randomised, tokens

from moectl.errors import InputError
from moectl.families.tiny import tiny_model
from moectl.integrations.pesc.balance import switch_loss


def by_loops(logits, index, counted):
    """E sum_e f_e P_e, token by token in float64."""
    experts = logits.shape[1]
    share, mean = [0.0] * experts, [torch.zeros((), dtype=torch.float64)] * experts
    for token in counted:
        probability = logits[token].double().softmax(0)
        for expert in range(experts):
            mean[expert] = mean[expert] + probability[expert] / len(counted)
            share[expert] += (index[token] == expert).sum().item() / (len(counted) * index.shape[1])
    return experts * sum(f * p for f, p in zip(share, mean, strict=True))


def test_a_case_by_hand():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 0.0]]).log_softmax(-1)
    index = torch.tensor([[0], [0], [1]])
    high = torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + 1)  # 0.8808
    mean = (2 * high + 0.5) / 3
    assert switch_loss(logits, index) == pytest.approx(float(2 * (2 / 3 * mean + 1 / 3 * (1 - mean))), rel=1e-6)


def test_even_use_costs_one_and_uneven_use_more():
    even = torch.eye(4) * 20
    assert switch_loss(even, even.argmax(-1, keepdim=True)).item() == pytest.approx(1.0)
    one = torch.tensor([[20.0, 0, 0, 0]]).expand(4, 4)
    assert switch_loss(one, one.argmax(-1, keepdim=True)).item() == pytest.approx(4.0)


def test_value_and_gradient_match_float64_loops_with_padding_left_out():
    logits = torch.randn(12, 5, requires_grad=True, generator=torch.Generator().manual_seed(0))
    index = logits.topk(2).indices
    counted = [0, 1, 3, 4, 7, 11]
    mask = torch.zeros(12, dtype=torch.long)
    mask[counted] = 1
    reference = logits.detach().double().requires_grad_()
    for given, rows in ((None, range(12)), (mask, counted)):
        found, wanted = switch_loss(logits, index, given), by_loops(reference, index, list(rows))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(found, logits)
        (expected,) = torch.autograd.grad(wanted, reference)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-8)
        assert gradient[counted].abs().min() > 0


def test_the_form_of_the_released_code_has_no_gradient():
    logits = torch.randn(12, 5, requires_grad=True, generator=torch.Generator().manual_seed(0))
    values, index = logits.topk(2)
    share = torch.nn.functional.one_hot(index, 5).float().mean(0)
    released = (share * values.softmax(-1).mean(-1, keepdim=True).mean(0)).sum()
    (gradient,) = torch.autograd.grad(released, logits)
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_the_loss_in_training_is_the_models_own_and_every_layers(task_type):
    ids = tokens()
    model = adapted(aux_loss_coef=0.25, task_type=task_type).eval()
    own = model(input_ids=ids, labels=ids).loss
    assert torch.equal(own, adapted(aux_loss_coef=0.0).eval()(input_ids=ids, labels=ids).loss)
    model.train()
    found = model(input_ids=ids, labels=ids)
    losses = model.aux_losses()
    assert len(losses) == 3 and all(loss > 1 for loss in losses)
    torch.testing.assert_close(found.loss, own + 0.25 * sum(losses))
    torch.testing.assert_close(model.get_aux_loss(), sum(losses))
    assert torch.equal(model(input_ids=ids, labels=ids, return_dict=False)[0], found.loss)
    assert model(input_ids=ids).loss is None


def test_its_gradient_reaches_every_router():
    """W_up is zero, so that nothing but the balancing loss can move the routers."""
    model = adapted(trained=False).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(layer.pesc_router["default"].grad.abs().max() > 1e-6 for layer in layers_of(model))


def test_padding_does_not_count():
    model = adapted().train()
    short = tokens(1, 7)
    model(input_ids=short)
    alone = model.get_aux_loss()
    padded = torch.cat((short, torch.zeros(1, 6, dtype=torch.long)), 1)
    mask = torch.tensor([[1] * 7 + [0] * 6])
    model(input_ids=padded, attention_mask=mask)
    torch.testing.assert_close(model.get_aux_loss(), alone)
    model(input_ids=padded)
    assert not torch.isclose(model.get_aux_loss(), alone)


def test_of_two_adapters_at_once_each_has_its_own_weight():
    model = adapted(aux_loss_coef=0.25)
    model.add_adapter("other", config(num_experts=3, aux_loss_coef=0.5))
    randomised(model, 1, "other")
    model.base_model.set_adapter(["default", "other"])
    ids = tokens()
    own = model.eval()(input_ids=ids, labels=ids).loss
    found = model.train()(input_ids=ids, labels=ids).loss
    first, second = model.aux_losses()[::2], model.aux_losses()[1::2]
    torch.testing.assert_close(found, own + 0.25 * sum(first) + 0.5 * sum(second))


def test_without_a_pass_there_is_nothing_to_balance():
    model = get_peft_model(tiny_model("llama"), config())
    with pytest.raises(InputError, match="no routing"):
        model.get_aux_loss()
    with model.disable_adapter():
        model(input_ids=tokens())
    with pytest.raises(InputError, match="no routing"):
        model.aux_losses()


def test_an_exception_in_the_model_leaves_no_half_a_pass():
    model = adapted().train()
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 1000))
    model(input_ids=tokens(), labels=tokens())
    assert len(model.aux_losses()) == 3
