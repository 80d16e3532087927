"""A feed-forward's GELU inside its 4-bit linear: the same values, and the plain path for whatever is put around it."""

from __future__ import annotations

import copy

import pytest
import torch
from patching import assert_restored, snapshot
from tiny import FAMILIES, flux_model, wan_inputs, wan_model
from torch import nn

import triskele as tk
from triskele.diffusers import collect_activations
from triskele.diffusers.gelu import FusedGELU, linear_then_gelu
from triskele.nn import SVDQuantLinear

RANK4 = tk.SVDQuant(rank=4)


def fused(model) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) is FusedGELU]


def plain(module, x):
    """What diffusers' own forward makes of the same linear."""
    return torch.nn.functional.gelu(module.proj(x), approximate=module.approximate)


def epilogues(model) -> list:
    """Hooks every 4-bit linear; the list fills with the epilogues that they are called with."""
    seen = []
    for module in model.modules():
        if isinstance(module, SVDQuantLinear):
            module.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs.get("epilogue")),
                                             with_kwargs=True)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_is_unfused_within_rounding(family, dtype):
    from diffusers.models.activations import GELU

    model = FAMILIES[family][0]()
    before, classes = snapshot(model), [(name, type(m), id(m)) for name, m in model.named_modules()]
    sites = [m for m in model.modules() if type(m) is GELU]
    assert bool(sites) == (family != "unet")
    handle = tk.patch(model, linear=RANK4)
    if family == "pixart":  # its caption projection is no feed-forward and stays as it is
        assert {type(m) for m in model.modules() if isinstance(m, GELU)} == {FusedGELU}
    assert [id(m) for m in fused(model)] == [id(m) for m in sites]
    rows = [r for r in handle.replaced if r.now == "SVDQuantLinear with GELU"]
    assert len(rows) == len(sites) and all(r.was == "Linear and GELU" for r in rows)
    assert (f"{len(sites)} x Linear and GELU -> SVDQuantLinear with GELU on cpu" in handle.summary()) == bool(sites)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in fused(model):
            x = torch.randn(3, 5, module.proj.in_features, generator=generator)
            seen = epilogues(module)
            got, want = module(x.to(dtype)), plain(module, x.to(dtype))
            assert seen == ["gelu_tanh" if module.approximate == "tanh" else "gelu", None]
            assert got.dtype == want.dtype == dtype
            module.proj.backend = "reference"
            exact = plain(module, x.to(dtype).double())
            module.proj.backend = "auto"
            assert float((got.double() - exact).abs().max()) <= float((want.double() - exact).abs().max()) + 2e-6
    handle.restore()
    assert_restored(model, before)
    assert classes == [(name, type(m), id(m)) for name, m in model.named_modules()]


def test_linears_that_are_left_alone_keep_their_gelu():
    model = wan_model()
    handle = tk.patch(model, linear=tk.SVDQuant(rank=4, exclude=("blocks.1.ffn.net.0.proj",)))
    assert [type(block.ffn.net[0]) is FusedGELU for block in model.blocks] == [True, False]
    assert "1 x Linear and GELU" in handle.summary()


def test_saved_and_loaded(tmp_path):
    model = wan_model()
    names = list(model.state_dict())
    tk.patch(model, linear=RANK4)
    assert [n for n in model.state_dict() if n.endswith("ffn.net.0.proj.bias")] \
        == [n for n in names if n.endswith("ffn.net.0.proj.bias")]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert len(fused(again)) == 2
    inputs = wan_inputs()
    with torch.no_grad():
        assert torch.equal(again(**inputs, return_dict=False)[0], model(**inputs, return_dict=False)[0])
        assert torch.equal(copy.deepcopy(model)(**inputs)[0], model(**inputs)[0])


class Lora(nn.Module):
    """As peft wraps a linear."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = nn.Linear(base_layer.in_features, 2), nn.Linear(2, base_layer.out_features)

    def forward(self, x, *args, **kwargs):
        return self.base_layer(x, *args, **kwargs) + self.up(self.down(x))


def test_an_adapter_around_the_linear():
    """It adds to the linear's output, so GELU comes after both; taken off again, the linear is fused again."""
    model, inputs = wan_model(), wan_inputs()
    handle = tk.patch(model, linear=RANK4)
    gelu = model.blocks[0].ffn.net[0]
    base, x = gelu.proj, torch.randn(1, 6, 24)
    alone = gelu(x)
    gelu.proj = lora = Lora(base)
    want = torch.nn.functional.gelu(base(x) + lora.up(lora.down(x)), approximate="tanh")
    assert torch.equal(gelu(x), want)
    model(**inputs)[0].square().sum().backward()
    assert bool(lora.down.weight.grad.any())
    gelu.proj = base
    assert torch.equal(gelu(x), alone)
    handle.restore()


def test_whoever_looks_at_the_linear_sees_its_own_output():
    model = wan_model()
    tk.patch(model, linear=RANK4)
    gelu, seen = model.blocks[0].ffn.net[0], []
    x = torch.randn(1, 6, 24)
    with torch.no_grad():
        want = gelu.proj(x)
        hook = gelu.proj.register_forward_hook(lambda _m, _a, y: seen.append(y))
        assert torch.equal(gelu(x), torch.nn.functional.gelu(want, approximate="tanh"))
        hook.remove()
        assert torch.equal(seen[0], want)
        gelu(x)
        assert len(seen) == 1
        gelu.proj.forward = lambda input: torch.ones(1)  # as diffusers' hooks replace it
        assert gelu(x).shape == (1,)


def test_calibration_of_a_patched_model():
    model, inputs = wan_model(), wan_inputs()
    tk.patch(model, linear=RANK4)
    (sample,) = collect_activations(model, ["blocks.0.ffn.net.0.proj"], lambda: model(**inputs), tokens=16).values()
    assert sample.shape == (16, 24)


def test_gradients_and_checkpointing():
    model, inputs = wan_model(), wan_inputs()
    tk.patch(model, linear=RANK4)
    gelu = model.blocks[0].ffn.net[0]
    x = torch.randn(5, 24, requires_grad=True)
    got, = torch.autograd.grad(gelu(x).square().sum(), x)
    want, = torch.autograd.grad(plain(gelu, x).square().sum(), x)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        hidden = inputs["hidden_states"].clone().requires_grad_()
        model(**{**inputs, "hidden_states": hidden})[0].square().sum().backward()
        grads.append(hidden.grad)
    assert torch.equal(*grads)


def test_compiles_in_one_graph():
    model = wan_model(layers=1)
    tk.patch(model, linear=RANK4)
    ffn, x = model.blocks[0].ffn, torch.randn(1, 9, 24)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ffn, fullgraph=True, backend="aot_eager")(x), ffn(x))
        assert type(ffn.net[0]) is FusedGELU


def test_a_gelu_beside_its_linear():
    """Flux' single blocks, in the fused forward of the sampler arm."""
    block = flux_model().single_transformer_blocks[0]
    x = torch.randn(2, 7, block.proj_mlp.in_features)
    with torch.no_grad():
        assert torch.equal(linear_then_gelu(block.proj_mlp, block.act_mlp, x), block.act_mlp(block.proj_mlp(x)))
        block.proj_mlp = SVDQuantLinear.from_linear(block.proj_mlp, config=RANK4)
        want, seen = block.act_mlp(block.proj_mlp(x)), epilogues(block.proj_mlp)
        torch.testing.assert_close(linear_then_gelu(block.proj_mlp, block.act_mlp, x), want, atol=1e-5, rtol=1e-5)
        assert seen == ["gelu_tanh"]
        assert torch.equal(linear_then_gelu(block.proj_mlp, nn.SiLU(), x), nn.functional.silu(block.proj_mlp(x)))
