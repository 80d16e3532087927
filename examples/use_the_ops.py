"""The layers below the patch: sparse-linear attention, a 4-bit linear, and parallel sampling, on random data."""

import torch

import triskele as tk

torch.manual_seed(0)

# Sparse-linear attention: route, then attend; both differentiate.
q, k, v = (torch.randn(1, 8, 4096, 64, requires_grad=True) for _ in range(3))
block_map = tk.ops.route_blocks(q.detach(), k.detach(), keep=0.1)
out = tk.ops.sparse_linear_attention(q, k, v, block_map, proj_weight=torch.randn(64, 64) / 8)
out.sum().backward()
print("attention", tuple(out.shape), f"{(block_map == 1).float().mean():.0%} of the blocks are critical")

# A 4-bit linear with a low-rank branch, calibrated on activations that have outlier channels.
x, weight = torch.randn(256, 512), torch.randn(768, 512) / 23
x[:, :4] *= 30
quantized = tk.quantize.svd_quantize(weight, activations=x, rank=32)
y = tk.ops.svdq_linear(x, quantized)
print("linear", f"relative error {(y - x @ weight.T).norm() / (x @ weight.T).norm():.2%}",
      f"{8 * quantized.memory_bytes() / weight.numel():.1f} bits a weight")

# Parallel sampling of any scheduler that is linear in its model outputs.
from diffusers import DDIMScheduler  # noqa: E402

scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
system = tk.sampling.TriangularSystem.from_scheduler(scheduler, 50)
abar = scheduler.alphas_cumprod.double()


def denoiser(x, t):
    """Exact noise prediction for data that is a unit Gaussian around 2."""
    a = abar[t.long()].view(-1, 1)
    return (1 - a).sqrt() * (x - a.sqrt() * 2)


noise = torch.randn(51, 16, dtype=torch.float64)
result = tk.sampling.solve(denoiser, system, noise, window=16)
print("sampling", f"{result.iterations} rounds in place of 50, {result.nfe} denoiser rows,",
      f"mean {result.samples[0].mean():.2f}")
