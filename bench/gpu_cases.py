"""What is measured on a GPU: the shapes with targets on each of our backends, and the same cases at tiny sizes."""

from __future__ import annotations

import functools
import math

import gpu_arms
import peers_attention
import peers_linear
import peers_taa
import torch
import torch.nn.functional as F
from calm import BEST_DENSE
from case import B16, F32, SETS, Calls, Case, drifting, dtype_name, set_up
from peers_attention import FLEX, backward_of
from timing import rotating

import triskele as tk
from triskele._native import cuda_sm90
from triskele.ops.svdq import cuda_backend
from triskele.quantize.formats import pack_nibbles

BLOCK_Q, BLOCK_K = 128, 64
CACHE = 160e6
"""Bytes that a rotation of inputs passes through: three times the L2 of an H100, so that none waits there."""
WAN = (21, 30, 52)        # 81 x 480 x 832: 32,760 tokens
WAN_LARGE = (24, 36, 64)  # 93 x 576 x 1024: 55,296 tokens


def sets_for(size: float, device: torch.device) -> int:
    """Sets of inputs of `size` bytes each."""
    return max(SETS, min(48, math.ceil(CACHE / size))) if device.type == "cuda" else SETS


def gpu_case(name, group, make, **kwargs) -> Case:
    return Case(name, group, make, devices=("cuda",), **kwargs)


# ------------------------------------------------------------------------------------------------ attention

def _routed(q, k, keep):
    return tk.ops.route_blocks(q, k, keep=keep, block_q=BLOCK_Q, block_k=BLOCK_K)


def _kept(keep, length) -> int:
    return max(1, int(keep * math.ceil(length / BLOCK_K))) * BLOCK_K


def sla_forward(heads, length, dim, keep, scope="all", *, projected=True, peers=True, target=None, label="", dtype=B16):
    """Routing, both branches and the projection, everything included; without a projection the sparse core alone."""

    def make(device) -> Calls:
        inputs = drifting(device, dtype, 1, heads, length, dim)
        weight = torch.randn(dim, dim, device=device, dtype=dtype) / dim**0.5
        bias = torch.randn(dim, device=device, dtype=dtype)
        kept = _kept(keep, length)
        if projected:
            def ours(q, k, v):
                return tk.ops.sparse_linear_attention(q, k, v, _routed(q, k, keep), block_q=BLOCK_Q, block_k=BLOCK_K,
                                                      scope=scope, proj_weight=weight, proj_bias=bias)
        else:
            maps = {id(q): _map(q, k, keep) for q, k, _ in inputs}

            def ours(q, k, v):
                return tk.ops.sparse_linear_attention(q, k, v, maps[id(q)], block_q=BLOCK_Q, block_k=BLOCK_K)

        found, absent = peers_attention.forward(inputs) if peers else ({}, {})
        if peers and projected:
            if device.type == "cuda":
                set_up(FLEX, lambda: peers_attention.flex(
                    inputs, [_map(q, k, keep) for q, k, _ in inputs], BLOCK_Q, BLOCK_K), found, absent)
            else:
                absent[FLEX] = "compiled on a GPU only"
            others, why = peers_attention.checkouts(inputs, keep)
            found, absent = found | others, absent | why
        tokens = heads * length
        flops = tokens * (4 * kept * dim + (6 * dim * dim if projected else 0))
        return gpu_arms.calls(rotating(ours, inputs), device, peers=found, absent=absent, flops=flops,
                              bytes=4 * tokens * dim * dtype.itemsize, unit=dtype_name(dtype),
                              uncaptured=(peers_attention.SLA,))

    kind = f"sla_forward {scope}" if projected else "sla_core"
    name = f"{kind} {dtype_name(dtype)} H{heads} L{length} D{dim} keep {keep:g}"
    return gpu_case(name, "sla_forward", make, targets={BEST_DENSE: target} if target else {}, label=label)


def _map(q, k, keep) -> torch.Tensor:
    """The map of these inputs, ready made: by the reference, whichever kernels run here."""
    return tk.ops.route_blocks(q, k, keep=keep, block_q=BLOCK_Q, block_k=BLOCK_K, backend="reference")


def sla_backward(heads, length, dim, keep, scope="all", *, target=None, label="", dtype=B16):
    """The backward pass alone, the projection's gradients included."""

    def make(device) -> Calls:
        inputs = drifting(device, dtype, 1, heads, length, dim, sets=2)
        weight = (torch.randn(dim, dim, device=device, dtype=dtype) / dim**0.5).requires_grad_()

        def attention(q, k, v):
            return tk.ops.sparse_linear_attention(q, k, v, _routed(q, k, keep), block_q=BLOCK_Q, block_k=BLOCK_K,
                                                  scope=scope, proj_weight=weight)

        tokens = heads * length
        found, absent = peers_attention.backward(inputs)
        return gpu_arms.calls(
            _backward_by_arm(attention, inputs, [weight]), device, peers=found, absent=absent,
            flops=tokens * (10 * _kept(keep, length) * dim + 14 * dim * dim), bytes=8 * tokens * dim * dtype.itemsize,
            unit=dtype_name(dtype), graphed=False)

    name = f"sla_backward {scope} {dtype_name(dtype)} H{heads} L{length} D{dim} keep {keep:g}"
    return gpu_case(name, "sla_backward", make, targets={BEST_DENSE: target} if target else {}, label=label)


def _backward_by_arm(attention, inputs, parameters):
    """`backward_of`, with forward graphs for the arm in force: each arm's backward gets its own forward's results."""
    from triskele import backend

    graphs = {}

    def call():
        arm = backend._measured
        if arm not in graphs:
            graphs[arm] = backward_of(attention, inputs, parameters)
        return graphs[arm]()

    return call


def routing(heads, length, dim, keep, dtype=B16):
    def make(device) -> Calls:
        inputs = [(q, k) for q, k, _ in drifting(device, dtype, 1, heads, length, dim)]
        tokens = heads * length
        blocks = heads * math.ceil(length / BLOCK_Q) * math.ceil(length / BLOCK_K)
        return gpu_arms.calls(
            rotating(lambda q, k: _routed(q, k, keep), inputs), device,
            peers=peers_attention.routing(inputs, keep, BLOCK_Q, BLOCK_K), absent={},
            flops=2 * tokens * dim + 2 * blocks * dim, bytes=2 * tokens * dim * dtype.itemsize + blocks, unit="float32")

    return gpu_case(f"sla_route {dtype_name(dtype)} H{heads} L{length} D{dim} keep {keep:g}", "sla_route", make)


def vmoba(grid, chunk, heads, dim, *, top_k=None, threshold=None, backward=False, target=None, label="", dtype=B16):
    """Selection and attention at a published setting; or the backward pass alone."""
    settings = ({"select": "topk", "pool": "query", "top_k": top_k} if threshold is None else
                {"select": "threshold", "pool": "head", "threshold": threshold})

    def make(device) -> Calls:
        length = math.prod(grid)
        inputs = drifting(device, dtype, 1, heads, length, dim, sets=2)
        partition = tk.ops.vmoba_partition(grid, chunk).to(device)

        def attention(q, k, v):
            return tk.ops.vmoba_attention(q, k, v, chunk=partition, **settings)

        sizes = partition.bounds.diff().tolist()
        seen = length * top_k / len(sizes) if threshold is None else _seen(inputs, partition, settings, sizes)
        tokens = heads * length
        if backward:
            found, absent = peers_attention.backward(inputs)
            return gpu_arms.calls(
                _backward_by_arm(attention, inputs, []), device, peers=found, absent=absent,
                flops=tokens * 10 * seen * dim, bytes=8 * tokens * dim * dtype.itemsize, unit=dtype_name(dtype),
                graphed=False)
        found, absent = peers_attention.forward(inputs)
        if len(set(sizes)) == 1 and threshold is None:
            chunked = [tuple(t[:, :, partition.order] for t in qkv) for qkv in inputs]  # outside the timing
            others, why = peers_attention.vmoba_checkout(chunked, sizes[0], top_k)
            found, absent = found | others, absent | why
        else:
            absent["vmoba"] = "compared at top-k over equal chunks"
        return gpu_arms.calls(rotating(attention, inputs), device, peers=found, absent=absent,
                              flops=tokens * 4 * seen * dim, bytes=4 * tokens * dim * dtype.itemsize,
                              unit=dtype_name(dtype), uncaptured=("vmoba",))

    how = f"top {top_k}" if threshold is None else f"threshold {threshold:g}"
    cut = "x".join(map(str, chunk)) if isinstance(chunk, tuple) else chunk
    name = (f"vmoba_{'backward' if backward else 'forward'} {dtype_name(dtype)} H{heads} "
            f"{'x'.join(map(str, grid))} D{dim} chunk {cut} {how}")
    return gpu_case(name, "vmoba", make, targets={BEST_DENSE: target} if target else {}, label=label)


def _seen(inputs, partition, settings, sizes) -> float:
    """Keys that a query attends to on average, by the selection itself on the first inputs."""
    q, k, _ = inputs[0]
    mask = tk.ops.vmoba_select(q, k, chunk=partition, backend="reference", **settings)  # [1, C, H, S]
    return float((mask.float().mean((0, 2, 3)) * torch.tensor(sizes, dtype=torch.float32, device=q.device)).sum())


# ------------------------------------------------------------------------------------------------ linear

@functools.lru_cache(maxsize=2)
def _weight(inner: int, outer: int, rank: int, activation: str, scales: str):
    """Random codes and factors: the speed does not depend on a calibration, which would take longer than the run. It
    depends on the scales where they are integer multiples of one a channel, as svd_quantize(scales="integer") makes."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (outer, inner), dtype=torch.int8, generator=generator)
    steps = torch.rand(outer, inner // 64, generator=generator) * 0.01 + 0.002
    if scales == "integer":
        steps = torch.randint(4, 19, (outer, inner // 64), generator=generator) * 2.0**-10
    weight = tk.quantize.SVDQWeight(
        pack_nibbles(codes), steps.to(B16),
        (torch.randn(rank, inner, generator=generator) / inner**0.5).to(B16),
        torch.randn(outer, rank, generator=generator).to(B16), torch.rand(inner, generator=generator).to(B16) + 0.5,
        inner, activation=activation)
    return weight, torch.randn(outer, inner, generator=generator) / inner**0.5, torch.randn(outer, generator=generator)


def _other_ways(layers, xs) -> dict:
    """The other ways of the CUDA kernels to the same product; none where they do not run."""
    if cuda_sm90():
        return {}
    ways = {"group scales after the product": {"in_operand": False}, "no clusters": {"clusters": False},
            "weights made int8": {"widen": True}}

    def run(layer, x, **options):
        return cuda_backend.w4a8(x, layer.qweight, layer.wscales, layer.wtscale, layer.lora_down, layer.lora_up,
                                 layer.smooth, layer.bias, layer.format, layer.activation, layer.shift, **options)

    inputs = list(zip(layers, xs))
    return {f"triskele cuda, {name}": rotating(torch.no_grad()(functools.partial(run, **options)), inputs)
            for name, options in ways.items()}


def linear(rows, inner, outer, rank=32, activation="int8", scales="amax", *, target=None, label="", dtype=B16):
    """Activation quantization, 4-bit product, low-rank branch and bias; weights rotate too, as layers of a model do.

    scales  of the weight's groups: "amax" are any numbers; "integer" is also timed in the kernel's other ways
    """

    def make(device) -> Calls:
        quantized, weight, bias = _weight(inner, outer, rank, activation, scales)
        bias = bias.to(device, dtype)
        plain = weight.to(device, dtype)
        count = sets_for(inner * outer / 2 + rows * inner * dtype.itemsize, device)
        layers = [tk.nn.SVDQuantLinear.from_quantized(quantized, bias).to(device) for _ in range(count)]
        generator = torch.Generator(device).manual_seed(1)
        xs = [torch.randn(rows, inner, generator=generator, device=device).to(dtype) for _ in range(count)]
        copies = [plain.clone() for _ in range(sets_for(plain.nbytes + xs[0].nbytes, device))]
        library = "cuBLAS" if device.type == "cuda" else "torch"
        found = {f"{library} {dtype_name(dtype)}": rotating(lambda x, w: F.linear(x, w, bias), [
            (xs[i % count], w) for i, w in enumerate(copies)])}
        absent: dict[str, str] = {}
        if scales == "integer":
            found |= _other_ways(layers, xs)
        peers_linear.packages([(x,) for x in xs[:SETS]], plain, bias, found, absent)
        flops = 2 * rows * inner * outer + 2 * rows * rank * (inner + outer)
        return gpu_arms.calls(
            rotating(torch.no_grad()(lambda layer, x: layer(x)), list(zip(layers, xs))), device, peers=found,
            absent=absent, flops=flops, bytes=inner * outer / 2 + rows * (inner + outer) * dtype.itemsize,
            unit="int8" if activation == "int8" else dtype_name(dtype))

    kind = {"int8": "w4a8", "none": "w4a16", "int4": "w4a4"}[activation]
    name = f"svdq_{kind} {dtype_name(dtype)} M{rows} K{inner} N{outer} r{rank}{' integer scales' * (scales != 'amax')}"
    return gpu_case(name, "svdq_linear", make, targets={"cuBLAS bfloat16": target} if target else {}, label=label)


# ------------------------------------------------------------------------------------------------ sampling

def taa_step(steps, latent, *, target=None, label=""):
    """One round over a window of all steps at memory 2: residual, solve and update; states float32, eps bfloat16."""

    def make(device) -> Calls:
        size = torch.Size(latent).numel()
        generator = torch.Generator(device).manual_seed(0)
        rows = torch.linspace(0.99, 0.999, steps, dtype=torch.float64, device=device)
        a, b, c = rows, (0.05 * rows)[:, None].contiguous(), torch.zeros_like(rows)
        limits = torch.full((steps,), 1e-3**2 * size, dtype=torch.float64, device=device)

        def states(count, dtype=F32):
            return torch.randn(count, size, generator=generator, device=device).to(dtype)

        inputs = [(states(steps + 1), states(steps, B16), states(steps), states(steps))
                  for _ in range(sets_for(14 * steps * size, device))]

        def step(x, eps, past_x, past_r):
            r, squares, gram, rhs = tk.ops.taa_residual(x, eps, a, b, c, past_r=[past_r])
            gamma, _ = tk.ops.taa_gamma(squares, gram, rhs, limits, [steps])
            return tk.ops.taa_update(x, r, gamma, eps, past_x=[past_x], past_r=[past_r])

        traffic = peers_taa.floor_bytes(steps, size, 2)
        found = {"published step in torch": rotating(peers_taa.published_step(a, b[:, 0], c), inputs)}
        return gpu_arms.calls(rotating(step, inputs), device, peers=found, absent={}, flops=40 * steps * size,
                              bytes=traffic, unit="float32", uncaptured=tuple(found))

    name = f"taa_step float32 T{steps} {'x'.join(map(str, latent))}"
    return gpu_case(name, "taa_step", make, targets={"published step in torch": target} if target else {}, label=label)


def modulation(kind, batch, tokens, channels, *, dtype=B16):
    """adaLN's norm with scale and shift by row, or the gated residual."""

    def make(device) -> Calls:
        generator = torch.Generator(device).manual_seed(0)

        def values(*shape):
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        scale, shift, index = values(batch, channels), values(batch, channels), torch.arange(batch, device=device)
        arrays = 2 if kind == "modulate" else 3
        size = batch * tokens * channels
        count = sets_for(arrays * size * dtype.itemsize, device)
        if kind == "modulate":
            inputs = [(values(batch, tokens, channels),) for _ in range(count)]

            def ours(x):
                return tk.ops.adaln_modulate(x, scale, shift, index)

            def plain(x):
                return F.layer_norm(x, (channels,), eps=1e-6) * (1 + scale[index][:, None]) + shift[index][:, None]
        else:
            inputs = [(values(batch, tokens, channels), values(batch, tokens, channels)) for _ in range(count)]

            def ours(residual, x):
                return tk.ops.gate_residual(residual, x, scale, index)

            def plain(residual, x):
                return residual + x * scale[index][:, None]

        found, absent = {"torch eager": rotating(plain, inputs)}, {}
        if device.type == "cuda":
            torch._dynamo.reset()
            set_up("torch.compile", lambda: rotating(torch.compile(plain), inputs), found, absent)
        else:
            absent["torch.compile"] = "a GPU's"
        return gpu_arms.calls(rotating(ours, inputs), device, peers=found, absent=absent, flops=8 * size,
                              bytes=arrays * size * dtype.itemsize, unit="float32")

    return gpu_case(f"adaln_{kind} {dtype_name(dtype)} B{batch} L{tokens} C{channels}", "adaln", make,
                    targets={"torch eager": 1.0})


# ------------------------------------------------------------------------------------------------ the lists

def short() -> list[Case]:
    """In the order of what matters: a run that is cut off keeps its beginning."""
    wan = (12, 32760, 128, 0.05)
    found = [sla_forward(*wan, target=13.0, label="SLA forward, Wan 480p × 81 frames, keep 5 %")]
    found += [linear(4608, inner, outer, target=1.4, label=f"W4A8 linear, {inner} → {outer}, M = 4,608")
              for inner in (3072, 12288) for outer in (3072, 12288)]
    found += [linear(rows, inner, outer, scales="integer", target=1.4,
                     label=f"W4A8 linear, integer scales, {inner} → {outer}, M = {rows:,}")
              for rows, inner, outer in ((4608, 3072, 12288), (4608, 12288, 3072), (4096, 3072, 3072))]
    found += [taa_step(100, (4, 64, 64), target=10.0, label="TAA step, T = 100, 4×64×64 latents"),
              sla_backward(*wan, target=8.0, label="SLA backward, Wan 480p × 81 frames, keep 5 %")]
    found += [sla_forward(*wan, scope, peers=False) for scope in ("complement", "marginal")]
    found += [sla_forward(*wan, projected=False, peers=False), routing(*wan)]
    found += [vmoba(WAN, chunk, 12, 128, top_k=top_k, target=1.0, label=f"VMoBA forward, 33 K tokens, {kind}")
              for chunk, top_k, kind in ((3, 2, "temporal"), ((5, 13), 6, "spatial"),
                                         ((7, 5, 13), 18, "spatio-temporal"))]
    found += [vmoba(WAN_LARGE, chunk, 12, 128, threshold=0.25, target=2.2, label=f"VMoBA forward, 55 K tokens, {kind}")
              for chunk, kind in ((3, "temporal"), ((6, 8), "spatial"), ((8, 12, 8), "spatio-temporal"))]
    found.append(vmoba(WAN, (7, 5, 13), 12, 128, top_k=18, backward=True))
    found += [linear(rows, 3072, outer, target=2.5) for rows in (1, 16, 64) for outer in (3072, 12288)]
    found += [linear(rows, 3072, 18432, activation="none", target=2.5) for rows in (1, 4, 16, 64)]
    found += [modulation(kind, *size) for size in ((8, 1024, 1152), (1, 4608, 3072)) for kind in ("modulate", "gate")]
    return found


def curves() -> list[Case]:
    found = [sla_forward(12, length, 128, 0.05) for length in (8192, 16384, 65536)]
    found += [sla_forward(12, 32760, 128, keep) for keep in (0.02, 0.1, 0.2, 1.0)]
    found += [sla_forward(12, 32760, dim, 0.05) for dim in (64, 72, 96)]
    found += [linear(rows, 3072, 3072) for rows in (256, 1024, 16384)]
    found += [linear(4608, 3072, 3072, activation="int4"), taa_step(50, (16, 21, 60, 104))]
    return found


def dry() -> list[Case]:
    """Each kind once, at a size that a CPU does in milliseconds."""
    return [sla_forward(1, 256, 16, 0.5), sla_forward(1, 256, 16, 0.5, "marginal", peers=False),
            sla_forward(1, 256, 16, 0.5, projected=False, peers=False), sla_backward(1, 256, 16, 0.5),
            routing(1, 256, 16, 0.5), vmoba((2, 4, 6), (2, 3), 1, 16, top_k=2),
            vmoba((2, 4, 6), 1, 1, 16, threshold=0.25), vmoba((2, 4, 6), (2, 3), 1, 16, top_k=2, backward=True),
            linear(3, 128, 64, 16), linear(3, 128, 64, 16, scales="integer"), taa_step(6, (1, 4, 4)),
            modulation("modulate", 2, 8, 32), modulation("gate", 2, 8, 32)]
