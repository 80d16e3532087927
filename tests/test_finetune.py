"""Distillation to the dense teacher: what is trained, that it helps, and what is refused."""

import copy
from itertools import repeat

import pytest
import torch
from tiny import wan_inputs, wan_model

import triskele as tk
from triskele.finetune import Stage, distill_attention, teacher_of

SLA = tk.SLA(keep=0.25, block_q=8, block_k=8)


def batch(seed=0):
    kwargs = wan_inputs(batch=2, seed=seed) | dict(return_dict=False)
    return kwargs, torch.randn(kwargs["hidden_states"].shape, generator=torch.Generator().manual_seed(seed + 100))


@pytest.fixture
def models():
    model = wan_model()
    with torch.no_grad():  # a tiny random model hardly attends: sharpen it, so that sparsity shows
        for block in model.blocks:
            block.attn1.to_q.weight.mul_(4)
            block.attn1.to_v.weight.mul_(4)
    teacher = teacher_of(model)
    handle = tk.patch(model, attention=SLA)
    yield model, teacher
    handle.restore()


def test_projection_stage_trains_the_linear_branch_alone(models):
    model, teacher = models
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = distill_attention(model, teacher, repeat(batch()), (Stage("projection", 30, 1e-2),), progress=False)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(".triskele_sla." in n for n in changed)
    assert set(result.trained) == {n for n in before if ".triskele_sla." in n}
    assert len(result.distillation) == 30 and result.distillation[-1] < result.distillation[0]


def test_all_weights_get_closer_than_the_projection(models):
    model, teacher = models
    stages = (Stage("projection", 20, 1e-2), Stage("all", 40, 2e-3))
    result = distill_attention(model, teacher, repeat(batch()), stages, ema=None, progress=False)
    assert min(result.distillation[-5:]) < 0.7 * result.distillation[0]
    assert min(result.distillation[-5:]) < min(result.distillation[:20])


def test_data_loss_is_used(models):
    model, teacher = models
    stage = Stage("all", 15, 1e-3, teacher_weight=0.0, data_weight=1.0)
    result = distill_attention(model, teacher, repeat(batch()), (stage,), ema=None, progress=False)
    assert result.diffusion[-1] < result.diffusion[0] and result.distillation == [0.0] * 15


def test_models_keep_their_modes_and_the_teacher_its_weights(models):
    model, teacher = models
    model.eval()
    teacher.train()
    weights = copy.deepcopy(teacher.state_dict())
    next(model.parameters()).requires_grad_(False)
    distill_attention(model, teacher, repeat(batch()), (Stage("all", 2),), progress=False)
    assert not model.training and teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(torch.equal(v, weights[k]) for k, v in teacher.state_dict().items())


def test_refusals(models):
    model, teacher = models
    with pytest.raises(ValueError, match="student: expected a model patched"):
        distill_attention(teacher, teacher, repeat(batch()), (Stage(),))
    with pytest.raises(ValueError, match="teacher: expected the dense model"):
        distill_attention(model, model, repeat(batch()), (Stage(),))
    with pytest.raises(ValueError, match="teacher_of: expected an unpatched"):
        teacher_of(model)
    with pytest.raises(ValueError, match="stages: expected"):
        distill_attention(model, teacher, repeat(batch()), ())
    with pytest.raises(ValueError, match="batches: expected enough for all stages, got 3"):
        distill_attention(model, teacher, [batch()] * 3, (Stage("all", 5),), progress=False)
    with pytest.raises(ValueError, match="batches: expected a target"):
        distill_attention(model, teacher, [(batch()[0], None)], (Stage("all", 1, data_weight=1.0),), progress=False)
    other = wan_model(layers=1)
    with pytest.raises(ValueError, match="teacher: expected the student's weights"):
        distill_attention(model, other, repeat(batch()), (Stage(),))
    with pytest.raises(ValueError, match="steps: expected"):
        Stage(steps=0)
    with pytest.raises(ValueError, match="not both zero"):
        Stage(teacher_weight=0.0)


def test_a_loss_that_is_not_finite_names_the_step(models):
    model, teacher = models
    kwargs, target = batch()
    with pytest.raises(FloatingPointError, match="step 0"):
        distill_attention(model, teacher, repeat((kwargs, target * float("nan"))),
                          (Stage("all", 2, data_weight=1.0),), progress=False)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_model_without_a_linear_branch_has_no_projection_to_train():
    model = wan_model()
    teacher = teacher_of(model)
    with tk.patch(model, attention=tk.SLA(keep=0.5, block_q=8, block_k=8, linear="none")):
        with pytest.raises(ValueError, match="projection"):
            distill_attention(model, teacher, repeat(batch()), (Stage("projection", 1),), progress=False)
