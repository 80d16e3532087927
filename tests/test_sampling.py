"""Triangular systems, and the solver against the published iteration and the exact trajectory."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import Vectors, vector_files
from oracle import Mixture, eps_denoiser, guided_denoiser

from triskele.sampling import NonFiniteError, Solver, TriangularSystem, solve

LINEAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
FROM_SCRATCH = [p for p in vector_files("sampling") if not p.stem.startswith("winit")]
RESTARTED = vector_files("sampling", "winit*")


# ---- the problems of the vectors

def system_of(v):
    return TriangularSystem(v["coeff_x"], v["coeff_d"], v["nl"], v["timesteps"])


def mixture_of(v, prefix="gmm_"):
    return Mixture(v[prefix + "mean"], v[prefix + "var"], v[prefix + "weight"])


def network_of(v):
    """The vectors' mlp or conv: eps = sqrt(1-ᾱ) x + 0.6 sqrt(ᾱ) f(x, t)."""
    silu = torch.nn.functional.silu

    def denoiser(x, t):
        bar = LINEAR[t.long()].reshape(-1, *[1] * (x.dim() - 1))
        s = (torch.pi / 2) * t.double()[:, None] / 1000 * v["net.freq"]
        g = torch.cat([s.sin(), s.cos()], dim=1)
        if "net.K1" in v:
            h = torch.nn.functional.conv2d(x.double(), v["net.K1"], v["net.b1"], padding=1)
            f = torch.nn.functional.conv2d(silu(h + (g @ v["net.U1"].T)[..., None, None]), v["net.K2"], v["net.b2"],
                                           padding=1)
        else:
            h = silu(x.double().flatten(1) @ v["net.W1"].T + g @ v["net.U1"].T + v["net.b1"])
            f = (silu(h @ v["net.W2"].T + v["net.b2"]) @ v["net.W3"].T + v["net.b3"]).reshape(x.shape)
        return ((1 - bar).sqrt() * x.double() + 0.6 * bar.sqrt() * f).to(x.dtype)
    return denoiser


def denoiser_of(v):
    return eps_denoiser(mixture_of(v), LINEAR) if "gmm_mean" in v else network_of(v)


def published(v, run):
    """The settings of a run as the published code has them, in our words."""
    tolerance = torch.maximum(torch.full_like(v["noise_thr"], run["tol1"]), run["tol2"] * v["noise_thr"])
    return dict(window=run["window_size"], order=run["order"], memory=run["memory_size"], tolerance=tolerance,
                criterion="rms", ridge=run["lmd"], ridge_mode="absolute", predictor="copy")


def iterates(denoiser, system, noise, **options):
    """The result, and the window's states after each round as {state: value}."""
    solver, rounds = Solver(system, noise, **options), []
    while not solver.done:
        solver.update(denoiser(*solver.rows()))
        rounds.append(solver.result().samples)
    return solver.result(), rounds


@pytest.mark.parametrize("path", FROM_SCRATCH, ids=lambda p: p.stem)
def test_denoiser_and_weights_of_the_vectors_give_the_sequential_trajectory(path):
    v = Vectors(path)
    got = system_of(v).sequential(denoiser_of(v), v["noise"])
    assert (got - v["seq_traj"]).abs().max() < 1e-10


@pytest.mark.parametrize("path", FROM_SCRATCH, ids=lambda p: p.stem)
def test_full_window_repeats_the_published_iterates(path):
    v, compared = Vectors(path), 0
    system, denoiser, runs = system_of(v), denoiser_of(v), json.loads(v.metadata["runs"])
    for name, run in runs.items():
        if run["window_size"] != system.num_steps:
            continue
        result, rounds = iterates(denoiser, system, v["noise"], **published(v, run))
        assert result.converged and result.finished.tolist() == v[f"{name}.finished"].tolist(), name
        want = v[f"{name}.rms"].double()[:, 1:]           # row 0 starts elsewhere: the published first update is lost
        seen = ~want.isnan()
        assert torch.equal(seen, ~result.residuals[:, 1:].isnan()), name
        assert ((result.residuals[:, 1:] - want)[seen].abs() <= 1e-6 * want[seen] + 1e-12).all(), name
        for got, expected in zip(rounds, v[f"{name}.traj"]):
            scale = max(1.0, float(expected.abs().max()))
            assert (got[1:] - expected[1:]).abs().max() <= 1e-8 * scale, name
        assert (result.samples - v[f"{name}.traj_final"]).abs().max() <= 1e-8, name
        compared += 1
    assert compared == sum(r["window_size"] == system.num_steps for r in runs.values())


@pytest.mark.parametrize("path", FROM_SCRATCH, ids=lambda p: p.stem)
def test_a_float32_state_follows_the_published_runs(path):
    v = Vectors(path)
    system, denoiser = system_of(v), denoiser_of(v)
    for name, run in json.loads(v.metadata["runs"]).items():
        if run["window_size"] != system.num_steps:
            continue
        result = solve(denoiser, system, v["noise"].float(), **published(v, run))
        assert result.samples.dtype == torch.float32
        assert abs(result.iterations - run["n_iter"]) <= 1, name
        assert (result.samples[0] - v[f"{name}.x0"][-1]).abs().max() <= 1e-4, name
        tight = solve(denoiser, system, v["noise"].float(), **{**published(v, run), "tolerance": 1e-6})
        assert (tight.samples[0] - v["seq_traj"][0]).abs().max() <= 1e-5, name


def test_small_windows_take_fewer_rounds_than_published():
    ours, theirs, count = 0, 0, 0
    for path in FROM_SCRATCH:
        v = Vectors(path)
        system, denoiser = system_of(v), denoiser_of(v)
        for name, run in json.loads(v.metadata["runs"]).items():
            if run["window_size"] == system.num_steps:
                continue
            rounds = solve(denoiser, system, v["noise"], **published(v, run)).iterations
            assert rounds <= run["n_iter"] + 2, (path.stem, name)
            if (path.stem, name) == ("gmm_T100_eta0_w25", "w25_k25_m3"):
                assert rounds <= 12
            ours, theirs, count = ours + rounds, theirs + run["n_iter"], count + 1
    assert count > 50 and ours < theirs


@pytest.mark.parametrize("path", FROM_SCRATCH, ids=lambda p: p.stem)
def test_tight_tolerance_gives_the_sequential_trajectory(path):
    v = Vectors(path)
    system, denoiser = system_of(v), denoiser_of(v)
    for name, run in json.loads(v.metadata["runs"]).items():
        result = solve(denoiser, system, v["noise"], **{**published(v, run), "tolerance": 1e-9})
        assert result.iterations <= system.num_steps and result.converged
        assert (result.samples - v["seq_traj"]).abs().max() <= 1e-8, name


@pytest.mark.parametrize("path", RESTARTED, ids=lambda p: p.stem)
def test_restart_from_an_old_trajectory(path):
    v = Vectors(path)
    system, settings = system_of(v), {k: json.loads(x) for k, x in v.metadata.items() if k in (
        "window_size", "order", "memory_size", "lmd", "tol1", "tol2", "variation_steps", "n_iter_run2", "T")}
    start, full = settings["variation_steps"], settings["window_size"] == settings["T"]
    table = v["alphas_cumprod_table"]
    second = eps_denoiser(mixture_of(v, "gmm2_"), table)
    options = published(v, settings)
    result, rounds = iterates(second, system, v["noise"], init=v["run1.traj_final"], start=start, **options)
    assert torch.equal(result.samples[start:], v["run1.traj_final"][start:])
    if full:
        assert result.finished.tolist() == v["run2.finished"].tolist()
        for got, expected in zip(rounds, v["run2.traj"]):
            assert (got - expected).abs().max() <= 1e-8
    else:
        assert result.iterations <= settings["n_iter_run2"] + 2
    tight = solve(second, system, v["noise"], init=v["run1.traj_final"], start=start, **{**options, "tolerance": 1e-9})
    assert (tight.samples[:start] - v["seq2_traj"][:start]).abs().max() <= 1e-8
    cold = solve(second, system, v["noise"], **options)
    assert result.iterations < cold.iterations


# ---- the solver's promises

def ddim(steps, eta=0.0, table=LINEAR):
    """First-order weights of DDIM, written out, so that these tests need no diffusers."""
    t = torch.linspace(0, 999, steps, dtype=torch.float64).round().long()
    a, p = table[t], torch.cat([torch.ones(1, dtype=torch.float64), table[t[:-1]]])
    c = eta * ((1 - p) / (1 - a)).sqrt() * (1 - a / p).clamp(min=0).sqrt()
    scale = (p / a).sqrt()
    return TriangularSystem(scale, (1 - p - c**2).clamp(min=0).sqrt() - (1 - a).sqrt() * scale, c, t)


def problem(steps=25, eta=0.0, seed=0, latent=(4, 2, 2)):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps + 1, *latent, generator=generator, dtype=torch.float64)
    size = noise[0].numel()
    return eps_denoiser(Mixture.random(size=size, seed=seed), LINEAR), ddim(steps, eta), noise


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("window,order,memory", [(None, None, 2), (8, None, 3), (5, 3, 5), (1, None, 2), (2, 1, 4)])
@pytest.mark.parametrize("predictor", ["velocity", "copy", None])
def test_tolerance_to_rounding_equals_sequential(eta, window, order, memory, predictor):
    denoiser, system, noise = problem(eta=eta)
    result = solve(denoiser, system, noise, window=window, order=order, memory=memory, tolerance=1e-13,
                   predictor=predictor)
    assert result.converged and result.iterations <= 25
    assert (result.samples - system.sequential(denoiser, noise)).abs().max() <= 1e-12


def test_memory_one_full_order_is_the_plain_fixed_point():
    denoiser, system, noise = problem()
    result = solve(denoiser, system, noise, memory=1, max_iterations=2, predictor="copy")
    x = noise[-1:].expand(26, -1, -1, -1).clone()
    for _ in range(2):
        e = denoiser(x[1:], system.timesteps)
        for i in reversed(range(25)):
            x[i] = system.a[i] * x[i + 1] + system.b[i] * e[i]
    finished = int(result.finished[-1])
    assert not result.converged and finished > 0
    assert (result.samples[:finished] - x[:finished]).abs().max() < 1e-10


def test_every_round_retires_a_row_and_rows_are_counted():
    denoiser, system, noise = problem(eta=1.0)
    rows = []
    result = solve(lambda x, t: (rows.append(len(x)), denoiser(x, t))[1], system, noise, window=6)
    assert (result.finished[:-1] > result.finished[1:]).all() and result.finished[-1] == 0
    assert result.iterations == len(rows) and result.nfe == sum(rows) and max(rows) <= 6
    assert result.residuals.shape == (len(rows), 25)
    assert (~result.residuals.isnan()).sum(1).tolist() == rows


def test_step_criterion_bounds_each_row_in_units_of_eps():
    denoiser, system, noise = problem()
    result = solve(denoiser, system, noise, tolerance=1e-2, max_iterations=1)
    last = solve(denoiser, system, noise, tolerance=result.residuals[0] / system.b.abs() * 1.001)   # all rows pass
    assert last.iterations == 1 and last.converged
    one_fails = result.residuals[0] / system.b.abs() * 1.001
    one_fails[7] *= 0.99
    assert solve(denoiser, system, noise, tolerance=one_fails, max_iterations=1).finished.tolist() == [25, 7]


def test_relative_ridge_does_not_change_with_the_latent_size():
    denoiser, system, noise = problem()
    big = noise.repeat(1, 16, 1, 1)

    def repeated(x, t):
        return denoiser(x[:, :4], t).repeat(1, 16, 1, 1)
    small, large = (solve(d, system, n, ridge_mode="relative") for d, n in ((denoiser, noise), (repeated, big)))
    assert small.iterations == large.iterations
    assert (small.samples - large.samples[:, :4]).abs().max() < 1e-10


def test_guided_mixture_with_the_predictor_needs_fewer_rounds():
    system = ddim(50)
    denoiser = guided_denoiser(Mixture.random(seed=3), LINEAR, scale=3.0)
    for window in (4, 8):
        totals = {}
        for predictor in ("velocity", "copy"):
            totals[predictor] = sum(
                solve(denoiser, system, torch.randn(51, 4, 2, 2, dtype=torch.float64), window=window, criterion="rms",
                      predictor=predictor).iterations for _ in range(3))
        assert totals["velocity"] < 0.9 * totals["copy"], (window, totals)


def test_max_iterations_returns_guesses():
    denoiser, system, noise = problem(50)
    result = solve(denoiser, system, noise, window=8, max_iterations=6)
    assert not result.converged and result.iterations == 6 and result.samples.isfinite().all()
    exact = system.sequential(denoiser, noise)
    finished = int(result.finished[-1])
    assert (result.samples[finished:] - exact[finished:]).abs().max() < 0.01
    assert (result.samples[0] - exact[0]).norm() < 0.9 * (noise[-1] - exact[0]).norm()


def test_the_denoiser_may_write_on_its_input_and_answer_in_bfloat16():
    denoiser, system, noise = problem()
    exact = system.sequential(denoiser, noise)

    def rude(x, t):
        out = denoiser(x, t)
        x.fill_(float("nan"))
        return out
    assert (solve(rude, system, noise, window=5, tolerance=1e-13).samples - exact).abs().max() < 1e-12
    rough = solve(lambda x, t: denoiser(x, t).bfloat16(), system, noise.float(), tolerance=1e-2)
    assert rough.samples.dtype == torch.float32 and (rough.samples - exact).abs().max() < 0.2


def test_gradients_are_not_tracked():
    denoiser, system, noise = problem()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert not solve(lambda x, t: denoiser(x, t) * weight, system, noise, window=4).samples.requires_grad


@pytest.mark.parametrize("latent", [(), (0,), (3,), (1, 1, 1, 1)])
def test_any_latent_shape(latent):
    system = ddim(10)
    noise = torch.randn(11, *latent, dtype=torch.float64)
    result = solve(lambda x, t: 0.1 * x, system, noise, window=4, tolerance=1e-13)
    assert result.samples.shape == noise.shape and result.converged
    exact = system.sequential(lambda x, t: 0.1 * x, noise)
    assert torch.allclose(result.samples, exact, atol=1e-12, rtol=0)


def test_results_do_not_depend_on_threads():
    denoiser, system, noise = problem(latent=(4, 32, 32))
    results, threads = [], torch.get_num_threads()
    fixed = {}                        # the denoiser's own sums may depend on threads: replay its answers

    def replayed(x, t):
        key = (x.numpy().tobytes(), t.numpy().tobytes())
        return fixed.setdefault(key, denoiser(x, t)).clone()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(solve(replayed, system, noise.float(), window=8, max_iterations=8))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0].samples, r.samples) for r in results[1:])


def test_solver_by_hand_equals_solve():
    denoiser, system, noise = problem()
    solver = Solver(system, noise, window=6)
    while not solver.done:
        x, timesteps = solver.rows()
        assert x.shape[1:] == noise.shape[1:] and timesteps.shape == (len(x),)
        solver.update(denoiser(x, timesteps))
    whole = solve(denoiser, system, noise, window=6)
    assert torch.equal(solver.result().samples, whole.samples)
    with pytest.raises(RuntimeError, match="done"):
        solver.rows()


# ---- multistep systems

def multistep(steps=20):
    """DDIM with Adams-Bashforth on ε: b_i ((1 + r) ε_{i+1} - r ε_{i+2})."""
    first = ddim(steps)
    share = torch.full((steps,), 0.5, dtype=torch.float64)
    share[-1] = 0
    band = torch.stack([first.b * (1 + share), -first.b * share], 1)
    return TriangularSystem(first.a, band, first.c, first.timesteps)


@pytest.mark.parametrize("window,order", [(None, None), (6, None), (6, 2), (1, None)])
def test_multistep_equals_sequential(window, order):
    system = multistep()
    denoiser, _, noise = problem(20)
    exact = system.sequential(denoiser, noise)
    result = solve(denoiser, system, noise, window=window, order=order, tolerance=1e-13)
    assert result.iterations <= 20 and (result.samples - exact).abs().max() <= 1e-12
    restart = solve(denoiser, system, noise, window=window, order=order, tolerance=1e-13, init=exact + 0.0, start=12)
    assert (restart.samples - exact).abs().max() <= 1e-12 and restart.iterations <= 12


# ---- bad input

ONES = torch.ones(5, dtype=torch.float64)


@pytest.mark.parametrize("arguments,match", [
    ((torch.ones(0), torch.ones(0), torch.ones(0), torch.ones(0)), "a: expected at least one step"),
    ((torch.ones(5, 1), ONES, ONES, ONES), r"a: expected shape \[T\], got \[5, 1\]"),
    ((ONES, ONES[:4], ONES, ONES), r"b: expected shape \[5\] or \[5, p\], got \[4\]"),
    ((ONES, torch.ones(5, 6), ONES, ONES), "b: expected 1 to 5 columns, got 6"),
    ((ONES, torch.ones(5, 0), ONES, ONES), "b: expected 1 to 5 columns, got 0"),
    ((ONES, torch.ones(5, 2), ONES, ONES), "b: expected zero weights for states above T"),
    ((ONES, ONES, ONES[:3], ONES), "c: expected shape"),
    ((ONES, ONES, ONES, ONES[:2]), r"timesteps: expected shape \[5\], got \[2\]"),
    ((ONES * float("nan"), ONES, ONES, ONES), "a: expected finite values"),
    ((ONES, ONES * float("inf"), ONES, ONES), "b: expected finite values"),
    ((ONES, ONES, ONES, ONES * float("nan")), "timesteps: expected finite values"),
    ((ONES * 1j, ONES, ONES, ONES), "a: expected a real dtype"),
])
def test_bad_systems(arguments, match):
    with pytest.raises(ValueError, match=match):
        TriangularSystem(*arguments)


@pytest.mark.parametrize("options,match", [
    (dict(window=0), "window: expected an integer >= 1, got 0"),
    (dict(window=2.5), "window: expected an integer"),
    (dict(order=0), "order: expected an integer >= 1"),
    (dict(memory=0), "memory: expected an integer >= 1"),
    (dict(max_iterations=0), "max_iterations: expected an integer >= 1"),
    (dict(tolerance=-1.0), "tolerance: expected finite numbers >= 0"),
    (dict(tolerance=float("nan")), "tolerance: expected finite numbers >= 0"),
    (dict(tolerance=torch.ones(3)), r"tolerance: expected a number or a tensor of shape \[25\], got \[3\]"),
    (dict(criterion="max"), "criterion: expected one of"),
    (dict(ridge=-1.0), "ridge: expected a number >= 0"),
    (dict(ridge_mode="both"), "ridge_mode: expected one of"),
    (dict(predictor="magic"), "predictor: expected one of"),
    (dict(start=3), "init: expected a trajectory that holds states 3"),
    (dict(start=26, init=torch.zeros(26, 4, 2, 2)), r"start: expected an integer in \[1, 25\], got 26"),
    (dict(init=torch.zeros(5, 4, 2, 2)), r"init: expected shape \[26, \*latent\]"),
    (dict(init=torch.zeros(26, 4, 2, 3)), "init: expected the shape and device of noise"),
    (dict(backend="fast"), "backend: expected 'auto' or one of"),
])
def test_bad_options(options, match):
    denoiser, system, noise = problem()
    with pytest.raises(ValueError, match=match):
        solve(denoiser, system, noise, **options)


@pytest.mark.parametrize("noise,match", [
    (torch.zeros(25, 4), r"noise: expected shape \[26, \*latent\], got \[25, 4\]"),
    (torch.zeros(26, 4).half(), "noise: expected float32 or float64, got torch.float16"),
    (torch.zeros(26, 4).long(), "noise: expected a floating-point dtype"),
    ([0.0] * 26, "noise: expected a tensor, got list"),
])
def test_bad_noise(noise, match):
    with pytest.raises(ValueError, match=match):
        solve(lambda x, t: x, ddim(25), noise)


def test_bad_system_and_bad_denoiser_outputs():
    denoiser, system, noise = problem()
    with pytest.raises(ValueError, match="system: expected a TriangularSystem, got str"):
        solve(denoiser, "ddim", noise)
    with pytest.raises(ValueError, match=r"denoiser output: expected shape \[4, 4, 2, 2\], got \[4, 4, 2\]"):
        solve(lambda x, t: x[..., 0], system, noise, window=4)
    with pytest.raises(ValueError, match=r"denoiser output: expected shape .*, got tuple"):
        solve(lambda x, t: (x,), system, noise, window=4)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"denoiser output: expected a floating dtype, got {dtype}"):
            solve(lambda x, t, dtype=dtype: x.to(dtype), system, noise, window=4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_non_finite_output_names_round_and_timestep(bad, backend):
    denoiser, system, noise = problem()
    calls = []

    def broken(x, t):
        calls.append(t)
        out = denoiser(x, t)
        if len(calls) == 3:
            out[1, 0, 0, 0] = bad
        return out
    with pytest.raises(NonFiniteError, match=r"at round 3, timestep \d+ \(state \d+\)") as caught:
        solve(broken, system, noise, window=4, backend=backend)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, FloatingPointError)
    assert f"timestep {calls[-1][1]} " in str(caught.value)
