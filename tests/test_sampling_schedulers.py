"""Weights taken from diffusers' schedulers: they reproduce `step()`, and a step that is not linear is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from conftest import Vectors, vector_files
from oracle import Mixture, eps_denoiser, flow_denoiser

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers

from triskele.sampling import TriangularSystem, solve

PLAIN = dict(clip_sample=False)
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
SCHEDULERS = {
    "ddim": ("DDIMScheduler", PLAIN),
    "ddim last alpha": ("DDIMScheduler", dict(PLAIN, set_alpha_to_one=False, timestep_spacing="trailing")),
    "ddim v": ("DDIMScheduler", dict(PLAIN, prediction_type="v_prediction", rescale_betas_zero_snr=True)),
    "ddim sample": ("DDIMScheduler", dict(PLAIN, prediction_type="sample")),
    "ddpm": ("DDPMScheduler", PLAIN),
    "ddpm large": ("DDPMScheduler", dict(PLAIN, variance_type="fixed_large")),
    "ddpm log": ("DDPMScheduler", dict(PLAIN, variance_type="fixed_small_log")),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow shifted": ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0)),
    "flow noisy": ("FlowMatchEulerDiscreteScheduler", dict(stochastic_sampling=True)),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True)),
    "dpm++ 3m": ("DPMSolverMultistepScheduler", dict(solver_order=3)),
    "dpm++ 2m flow": ("DPMSolverMultistepScheduler", FLOW),
    "dpm++ sde 1": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++", solver_order=1)),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc 3": ("UniPCMultistepScheduler", dict(solver_order=3)),
    "unipc flow": ("UniPCMultistepScheduler", dict(FLOW, flow_shift=3.0)),
    "pndm": ("PNDMScheduler", {}),
    "plms": ("PNDMScheduler", dict(skip_prk_steps=True)),
    "deis": ("DEISMultistepScheduler", {}),
}


def scheduler_of(name):
    kind, options = SCHEDULERS[name]
    return getattr(diffusers, kind)(**options)


def replay(scheduler, timesteps, outputs, noises, first, **options):
    """The states that `step()` itself gives, its noise drawn from `noises`."""
    states, draws = [first], list(noises)
    original = torch.randn

    def draw(*args, **kwargs):
        drawn = original(*args, **kwargs)
        return draws[len(states) - 1].to(drawn.dtype) if drawn.shape == first.shape else drawn
    torch.randn = draw
    try:
        for timestep, output in zip(timesteps, outputs):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(states[-1], timestep)
            states.append(scheduler.step(output, timestep, states[-1], return_dict=False, **options)[0])
    finally:
        torch.randn = original
    return states


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_weights_reproduce_step(name, steps):
    if steps < 8 and name in ("pndm", "plms"):
        steps = 8                                       # its own set_timesteps needs more than the warm-up
    scheduler = scheduler_of(name)
    before = copy.deepcopy(dict(scheduler.__dict__))
    system = TriangularSystem.from_scheduler(scheduler, steps)
    assert scheduler.__dict__.keys() == before.keys() and \
        getattr(scheduler, "num_inference_steps", None) == before.get("num_inference_steps")
    real = copy.deepcopy(scheduler)
    real.set_timesteps(steps)
    count = system.num_steps
    assert torch.equal(system.timesteps, real.timesteps.flip(0))
    assert system.init_scale == float(getattr(real, "init_noise_sigma", 1.0))
    outputs, noises = torch.randn(2, count, 1, 4, 3, 3, dtype=torch.float64)
    first = torch.randn(1, 4, 3, 3, dtype=torch.float64) * system.init_scale
    states = torch.stack(replay(real, real.timesteps, outputs, noises, first)).double()
    mine, band = first.clone(), system.band
    for k in range(count):
        i = count - 1 - k
        mine = system.a[i] * mine + system.c[i] * noises[k]
        for d in range(min(band.shape[1], k + 1)):
            mine = mine + band[i, d] * outputs[k - d]
        assert (mine - states[k + 1]).abs().max() <= 1e-6 * max(1.0, float(states.abs().max())), k


def test_ddim_weights_are_the_published_ones():
    for path in vector_files("sampling", "gmm_T25_eta*"):
        v = Vectors(path)
        eta = float("eta1" in path.stem)
        scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace", **PLAIN)
        system = TriangularSystem.from_scheduler(scheduler, 25, eta=eta)
        assert system.b.dim() == 1 and torch.equal(system.timesteps, v["timesteps"])
        if eta == 0:      # diffusers takes the previous timestep as t - 1000 // T, the vectors the next one in the list
            near = (v["timesteps"][1:] - v["timesteps"][:-1]) == 40
            assert ((system.a[1:] - v["coeff_x"][1:])[near].abs() <= 1e-6 * v["coeff_x"][1:][near] * 3).all()
        assert (system.c[1:] > 0).all() == bool(eta)


def test_input_scale_is_that_of_scale_model_input():
    scheduler = diffusers.EulerDiscreteScheduler()
    system = TriangularSystem.from_scheduler(scheduler, 10)
    scheduler.set_timesteps(10)
    want = 1 / (scheduler.sigmas[:-1].double() ** 2 + 1).sqrt()
    assert torch.allclose(system.input_scale.flip(0), want, rtol=1e-6)
    seen = []
    noise = torch.randn(11, 4, dtype=torch.float64)
    noise[-1] *= system.init_scale
    solve(lambda x, t: (seen.append(x.clone()), 0.1 * x)[1], system, noise, max_iterations=1)
    assert torch.allclose(seen[0][-1], noise[-1] * want[0], rtol=1e-6)


def test_timesteps_already_set_and_their_arguments():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = torch.linspace(1, 0.1, 7).tolist()
    direct = TriangularSystem.from_scheduler(scheduler, None, sigmas=sigmas, mu=0.8)
    scheduler.set_timesteps(sigmas=sigmas, mu=0.8)
    taken = TriangularSystem.from_scheduler(scheduler, None)
    assert torch.equal(direct.b, taken.b) and torch.equal(direct.timesteps, taken.timesteps) and direct.num_steps == 7
    assert torch.allclose(taken.b.flip(0), (scheduler.sigmas[1:] - scheduler.sigmas[:-1]).double(), atol=1e-7)
    assert (taken.a == 1).all() and not taken.c.any()
    scheduler.step(torch.ones(1, 4), scheduler.timesteps[0], torch.ones(1, 4))
    with pytest.raises(ValueError, match="scheduler: expected one that has not stepped since set_timesteps"):
        TriangularSystem.from_scheduler(scheduler, None)
    scheduler.set_timesteps(sigmas=sigmas, mu=0.8)
    scheduler.set_begin_index(3)                        # image to image: the pipeline starts in the middle
    assert torch.equal(TriangularSystem.from_scheduler(scheduler, None).b, taken.b[:4])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_mixture_is_solved_exactly(name):
    scheduler = scheduler_of(name)
    system = TriangularSystem.from_scheduler(scheduler, 16)
    mixture = Mixture.random(size=8, seed=1)
    if "flow" in name:
        denoiser = flow_denoiser(mixture)
    else:
        bars = scheduler.alphas_cumprod.double()

        def denoiser(x, t):                             # Euler's timesteps are fractions
            low, part = t.long(), (t.double() - t.long()).clamp(0, 1)
            bar = torch.lerp(bars[low], bars[(low + 1).clamp(max=999)], part)
            return mixture.eps(x, bar.sqrt(), (1 - bar).sqrt())
    noise = torch.randn(system.num_steps + 1, 2, 4, dtype=torch.float64)
    noise[-1] *= system.init_scale
    exact = system.sequential(denoiser, noise)
    for window, memory in ((None, 2), (5, 3)):
        result = solve(denoiser, system, noise, window=window, memory=memory, tolerance=1e-13)
        assert result.converged and result.iterations <= system.num_steps
        assert (result.samples - exact).abs().max() <= 1e-12 * max(1.0, float(exact.abs().max()))


def test_the_oracle_is_right():
    """ε against the score of the density by autograd."""
    mixture = Mixture.random(size=6, seed=2)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    bar = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    v = bar[:, None, None] * mixture.variances + (1 - bar)[:, None, None]
    d = x[:, None] - bar.sqrt()[:, None, None] * mixture.means
    log_density = torch.logsumexp(mixture.weights.log() - 0.5 * (v.log() + d * d / v).sum(-1), dim=-1)
    score = torch.autograd.grad(log_density.sum(), x)[0]
    want = -(1 - bar).sqrt()[:, None] * score
    got = eps_denoiser(mixture, bar)(x.detach(), torch.arange(3))
    assert torch.allclose(got, want, atol=1e-12)


class Squares(diffusers.DDIMScheduler):
    """A step with a nonlinearity that no option names."""

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        out = super().step(model_output, timestep, sample, return_dict=False, **kwargs)
        return (out[0] + 1e-3 * sample**2 * (sample.abs() > 1.5), *out[1:])


@pytest.mark.parametrize("make,match", [
    (lambda: diffusers.DDIMScheduler(), "DDIMScheduler cannot be made triangular: clip_sample=True"),
    (lambda: diffusers.DDPMScheduler(**PLAIN, thresholding=True), "thresholding=True"),
    (lambda: diffusers.DDPMScheduler(**PLAIN, variance_type="learned_range"), "variance_type='learned_range'"),
    (lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "noise of an earlier step"),
    (lambda: Squares(**PLAIN), r"Squares cannot be made triangular: a linear replay of its step deviates by \d"),
    (lambda: diffusers.CogVideoXDPMScheduler(**PLAIN), r"its step\(\) takes"),
    (lambda: "ddim", "scheduler: expected a diffusers scheduler .*, got str"),
])
def test_refusals(make, match):
    with pytest.raises(ValueError, match=match):
        TriangularSystem.from_scheduler(make(), 10)


@pytest.mark.parametrize("steps,eta,match", [
    (0, 0.0, "num_steps: expected an integer >= 1, got 0"),
    (None, 0.0, "num_steps: expected a number of steps, or a scheduler after set_timesteps"),
    (10, -0.5, r"eta: expected a number in \[0, 1\]"),
    (10, "one", r"eta: expected a number in \[0, 1\]"),
])
def test_bad_arguments(steps, eta, match):
    with pytest.raises(ValueError, match=match):
        TriangularSystem.from_scheduler(diffusers.DDIMScheduler(**PLAIN), steps, eta)


def test_eta_where_step_takes_none():
    ddpm = diffusers.DDPMScheduler(**PLAIN)
    assert torch.equal(TriangularSystem.from_scheduler(ddpm, 5, eta=1.0).c, TriangularSystem.from_scheduler(ddpm, 5).c)
    for scheduler, eta in ((ddpm, 0.5), (diffusers.FlowMatchEulerDiscreteScheduler(), 1.0)):
        with pytest.raises(ValueError, match=r"eta: expected 0 .*step\(\) takes no eta"):
            TriangularSystem.from_scheduler(scheduler, 5, eta=eta)


def test_probing_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    assert TriangularSystem.from_scheduler(diffusers.DDPMScheduler(**PLAIN), 5).c.any()
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="linear replay"):
        TriangularSystem.from_scheduler(Squares(**PLAIN), 5)
    assert torch.equal(torch.get_rng_state(), before)
