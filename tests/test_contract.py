"""The public contract: the names, parameters and defaults that users and docs hold on to."""

import inspect

import pytest
import torch

import triskele as tk

OPS = {
    "route_blocks": "q, k, keep=0.05, drop=0.0, block_q=128, block_k=64, keep_keys=None, key_mask=None",
    "sparse_linear_attention": "q, k, v, m, block_q=128, block_k=64, feature_map='softmax', scope='all', "
                               "proj_weight=None, proj_bias=None, alpha=None, key_mask=None, scale=None, "
                               "backend='auto', return_parts=False",
    "vmoba_partition": "grid, chunk",
    "vmoba_select": "q, k, chunk, select, pool, top_k, threshold",
    "vmoba_attention": "q, k, v, chunk, select, pool, top_k, threshold, mask=None, backend='auto'",
    "svdq_linear": "x, weight, bias=None, backend='auto'",
}
SAMPLING = {
    "solve": "denoiser, system, noise, window=None, order=None, memory=2, tolerance=0.001, criterion='step', "
             "ridge=0.001, ridge_mode='relative', init=None, start=None, predictor='velocity', max_iterations=None, "
             "backend='auto'",
}
QUANTIZE = {"svd_quantize": "weight, activations=None, rank=32, group=64, format='int4', activation='int8'"}
NUNCHAKU = {
    "pack": "codes, scales, lora_down=None, lora_up=None, smooth=None, bias=None, format='int4', "
            "dtype=torch.bfloat16, tensor_scale=None",
    "unpack": "d, shape=None, rank=None, format=None",
}


def parameters(text):
    """ "a, b=1" -> [("a", empty), ("b", 1)]."""
    function = eval(f"lambda {text}: None", {"torch": torch})
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("owner, table", [("ops", OPS), ("sampling", SAMPLING), ("quantize", QUANTIZE),
                                          ("quantize.nunchaku", NUNCHAKU)])
def test_signatures(owner, table):
    module = tk
    for part in owner.split("."):
        module = getattr(module, part)
    for name, text in table.items():
        found = {p.name: p for p in inspect.signature(getattr(module, name)).parameters.values()}
        for wanted, default in parameters(text):
            positional_by_letter = wanted in ("m", "d") or (name == "solve" and wanted == "system")
            if not positional_by_letter:
                assert wanted in found, f"{name}: no parameter {wanted}"
                if default is not inspect.Parameter.empty:
                    assert found[wanted].default == default, f"{name}.{wanted}"


@pytest.mark.parametrize("name", ["SLA", "VMoBA", "SVDQuant", "ParaTAA"])
def test_configs_work_without_arguments(name):
    config = getattr(tk, name)()
    assert type(config).from_dict(config.to_dict()) == config


def test_subpackages_are_there_without_importing_them():
    for name in ("ops", "nn", "quantize", "sampling", "finetune", "digits", "diffusers"):
        assert tk.__getattr__(name).__name__ == f"triskele.{name}"
    assert "diffusers" not in tk.__all__  # a star import would hide diffusers itself


def test_patch_and_system_signatures():
    assert {"attention", "linear", "sampler"} <= set(inspect.signature(tk.patch).parameters)
    found = inspect.signature(tk.sampling.TriangularSystem.from_scheduler).parameters
    assert list(found)[:2] == ["scheduler", "num_steps"] and found["eta"].default == 0.0
    system = tk.sampling.TriangularSystem([1.0, 1.0], [0.5, 0.5], [0.0, 0.0], torch.tensor([10, 20]))
    assert system.a.dtype == torch.float64 and system.b.shape == (2,)


def test_solve_returns_the_named_fields():
    system = tk.sampling.TriangularSystem(torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.2]), torch.zeros(2),
                                          torch.tensor([1.0, 2.0]))
    noise = torch.randn(3, 4, dtype=torch.float64)
    r = tk.sampling.solve(lambda x, t: torch.tanh(x) * t.view(-1, 1), system, noise, tolerance=1e-12)
    x = noise[2]
    for i in (1, 0):
        x = system.a[i] * x + system.b[i] * torch.tanh(x) * system.timesteps[i]
    assert torch.allclose(r.samples[0], x, atol=1e-12, rtol=0)
    assert r.samples.shape == noise.shape and r.converged is True and 1 <= r.iterations <= 2 and r.nfe >= 2
    assert r.residuals is not None


def test_float64_goes_to_the_reference_by_name():
    q = torch.randn(1, 1, 16, 4, dtype=torch.float64)
    m = tk.ops.route_blocks(q, q, keep=1.0, block_q=4, block_k=4)
    o = tk.ops.sparse_linear_attention(q, q, q, m, block_q=4, block_k=4, backend="reference")
    dense = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert torch.allclose(o, dense, atol=1e-12)
    with pytest.raises(NotImplementedError, match=r"(?s)cpu:.*reference:"):
        tk.ops.sparse_linear_attention(q, q, q, m, block_q=4, block_k=4)
