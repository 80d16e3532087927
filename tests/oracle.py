"""Denoisers with a known truth: a Gaussian-mixture density has a closed-form ε, guided and as a flow too.

For x = α x0 + σ noise with x0 ~ Σ_i w_i N(μ_i, diag v_i): V_i = α² v_i + σ², d_i = x - α μ_i,
r = softmax_i(log w_i - ½ Σ (log V_i + d_i²/V_i)), ε = σ Σ_i r_i d_i / V_i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Mixture:
    """means, variances [M, D], weights [M]; the latent has D elements."""

    means: torch.Tensor
    variances: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def random(cls, components=5, size=16, spread=1.0, seed=0):
        g = torch.Generator().manual_seed(seed)
        means = torch.randn(components, size, generator=g, dtype=torch.float64) * spread
        variances = 0.01 + 0.2 * torch.rand(components, size, generator=g, dtype=torch.float64)
        weights = torch.rand(components, generator=g, dtype=torch.float64) + 0.2
        return cls(means, variances, weights / weights.sum())

    def subset(self, components):
        """The mixture of some components alone: the "conditional" density of guidance."""
        return Mixture(self.means[components], self.variances[components],
                       self.weights[components] / self.weights[components].sum())

    def eps(self, x, alpha, sigma):
        """x [W, *latent], alpha and sigma [W] -> ε like x."""
        flat = x.reshape(len(x), 1, -1).double()                              # [W, 1, D]
        alpha, sigma = alpha.double()[:, None, None], sigma.double()[:, None, None]
        v = alpha**2 * self.variances + sigma**2                              # [W, M, D]
        d = flat - alpha * self.means
        r = torch.softmax(self.weights.log() - 0.5 * (v.log() + d * d / v).sum(-1), dim=-1)
        return (sigma[:, 0] * (r[..., None] * d / v).sum(1)).reshape(x.shape).to(x.dtype)


def eps_denoiser(mixture, alphas_cumprod, calls=None):
    """ε(x, t) for a diffusion schedule: α = sqrt(ᾱ_t). `calls` collects the batch sizes."""
    def denoiser(x, t):
        if calls is not None:
            calls.append(len(x))
        bar = alphas_cumprod.double()[t.long()]
        return mixture.eps(x, bar.sqrt(), (1 - bar).sqrt())
    return denoiser


def guided_denoiser(mixture, alphas_cumprod, components=(0, 1), scale=4.0):
    """Classifier-free guidance: ε_u + scale (ε_c - ε_u), the condition being "one of `components`"."""
    conditional = mixture.subset(list(components))

    def denoiser(x, t):
        bar = alphas_cumprod.double()[t.long()]
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        plain = mixture.eps(x, alpha, sigma)
        return plain + scale * (conditional.eps(x, alpha, sigma) - plain)
    return denoiser


def flow_denoiser(mixture, num_train_timesteps=1000):
    """Velocity noise - x0 of x = (1-s) x0 + s noise at s = t / num_train_timesteps."""
    def denoiser(x, t):
        s = (t.double() / num_train_timesteps).clamp(1e-6, 1 - 1e-9)
        eps = mixture.eps(x, 1 - s, s)
        shape = (-1, *[1] * (x.dim() - 1))
        s = s.reshape(shape)
        x0 = (x.double() - s * eps.double()) / (1 - s)
        return (eps.double() - x0).to(x.dtype)
    return denoiser
