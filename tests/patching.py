"""Checks that every family's patch must pass; the test_patch_<family>.py files call them."""

from __future__ import annotations

import copy

import torch
from tiny import FAMILIES

import triskele as tk

DENSE_SLA = tk.SLA(keep=1.0, linear="none", block_q=16, block_k=16)
SPARSE_SLA = tk.SLA(keep=0.25, block_q=16, block_k=16)
CONTAINERS = (dict, list, tuple, set)


def snapshot(target) -> dict:
    """Everything that restore() must put back: attributes by identity, their order, and the bytes of every tensor."""
    owners = [target]
    if not isinstance(target, torch.nn.Module):
        owners = [target, *(part for part in vars(target).values() if isinstance(part, torch.nn.Module))]
    seen = {}
    for owner in owners:
        for name, obj in owner.named_modules() if isinstance(owner, torch.nn.Module) else [("", owner)]:
            seen[type(owner).__name__, name] = _attributes(obj)
        if isinstance(owner, torch.nn.Module):
            state = owner.state_dict()
            seen[type(owner).__name__, "state"] = [(k, v.dtype, v.data_ptr(), v.clone()) for k, v in state.items()]
            seen[type(owner).__name__, "config"] = (id(owner.config), dict(owner.config))
    return seen


def _attributes(obj) -> list:
    found = []
    for key, value in vars(obj).items():
        inside = ()
        if isinstance(value, dict):
            inside = [(k, id(v)) for k, v in value.items()]
        elif isinstance(value, CONTAINERS):
            inside = [id(v) for v in value]
        found.append((key, value if isinstance(value, (bool, int, float, str)) else id(value), inside))
    return found


def assert_restored(target, before: dict, volatile: tuple[str, ...] = ()) -> None:
    """The target is as it was: same objects in the same order, same bytes. `volatile` attributes may be renewed."""
    after = snapshot(target)
    assert list(after) == list(before)
    for key, value in before.items():
        if key[1] == "":
            assert [e if e[0] not in volatile else e[0] for e in after[key]] \
                == [e if e[0] not in volatile else e[0] for e in value], key
            continue
        if key[1] != "state":
            assert after[key] == value, key
            continue
        assert [entry[:3] for entry in after[key]] == [entry[:3] for entry in value]
        for (name, *_, old), (*_, new) in zip(value, after[key]):
            assert torch.equal(old, new), name


def check_keep_all_is_dense(family: str, config=DENSE_SLA, **call_kwargs) -> None:
    """keep = 1 through the family's own pipeline equals the unpatched one within rounding."""
    *_, pipeline, call = FAMILIES[family]
    pipe = pipeline()
    want = call(pipe, **call_kwargs)
    with tk.patch(pipe, attention=config):
        got = call(pipe, **call_kwargs)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4 * float(want.abs().max()))
    assert torch.equal(call(pipe, **call_kwargs), want)


def check_sparse_differs(family: str, config=SPARSE_SLA) -> None:
    """A small keep changes the output (so the sparse path is in use) and leaves it finite."""
    model, inputs = FAMILIES[family][0](), FAMILIES[family][1]()
    want = model(**inputs, return_dict=False)[0]
    with tk.patch(model, attention=config):
        got = model(**inputs, return_dict=False)[0]
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() > 1e-4


def check_restore(family: str, configs=(SPARSE_SLA,)) -> None:
    *_, pipeline, call = FAMILIES[family]
    pipe = pipeline()
    call(pipe)  # a pipeline's first call leaves things of its own on the model, patched or not
    before = snapshot(pipe)
    for config in configs:
        handle = tk.patch(pipe, attention=config)
        assert snapshot(pipe) != before
        call(pipe)
        handle.restore()
        handle.restore()
        assert_restored(pipe, before, volatile=CALL_TRACES)


CALL_TRACES = ("_guidance_scale", "_guidance_scale_2", "_attention_kwargs", "_current_timestep", "_num_timesteps",
               "_joint_attention_kwargs", "_guidance_rescale", "_clip_skip", "_cross_attention_kwargs", "_interrupt")
"""Attributes that a pipeline's own call renews."""


def check_fullgraph(family: str, config=SPARSE_SLA) -> None:
    """torch.compile(fullgraph=True) traces the patched model, and runs it to the same result."""
    model, inputs = FAMILIES[family][0](), FAMILIES[family][1]()
    with tk.patch(model, attention=config), torch.no_grad():
        want = model(**inputs, return_dict=False)[0]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(**inputs, return_dict=False)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def check_checkpointing(family: str, config=SPARSE_SLA) -> None:
    """A training step with gradient checkpointing gives the gradients of one without, the projection's included."""
    model, inputs = FAMILIES[family][0](), FAMILIES[family][1]()
    tk.patch(model, attention=config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "triskele_sla" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    twin = copy.deepcopy(model)
    twin.enable_gradient_checkpointing()
    grads = []
    for each in (model, twin):
        each.train()
        torch.manual_seed(0)  # DiT drops labels at random in training
        each(**inputs, return_dict=False)[0].square().mean().backward()
        grads.append({name: p.grad for name, p in each.named_parameters()})
    learned = [name for name in grads[0] if "triskele_sla" in name]
    assert learned and all(grads[0][name].abs().max() > 0 for name in learned if name.endswith("weight"))
    for name, grad in grads[0].items():
        if grad is None:
            assert grads[1][name] is None, name
        else:
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def check_round_trip(family: str, folder, config=SPARSE_SLA) -> None:
    """save_pretrained and from_pretrained bring a patched model back: same output, same projection."""
    model, inputs = FAMILIES[family][0](), FAMILIES[family][1]()
    handle = tk.patch(model, attention=config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "triskele_sla" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    want = model(**inputs, return_dict=False)[0]
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    assert set(again.state_dict()) == set(model.state_dict())
    assert not any(p.is_meta for p in again.parameters())
    torch.testing.assert_close(again(**inputs, return_dict=False)[0], want, rtol=0, atol=0)
    handle.restore()
    assert "quantization_config" not in model.config
