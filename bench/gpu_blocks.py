"""Whole transformer blocks with random weights, plain diffusers against each arm; needs diffusers on the path.

    Wan     blocks of Wan2.1-1.3B at 480p x 81 frames (32,760 tokens)
    FLUX    double and single blocks of FLUX.1's size at 1024 x 1024 (4,096 image and 512 text tokens)
    DiT     whole DiT-S/2, -B/2 and -XL/2 pipelines at 256 x 256, DDIM: plain, plain under CUDA graphs, and ParaTAA

The weights are random: times mean something, pictures do not, and ParaTAA's rounds are not those of a trained model. A
full model's time is its blocks' share and marked as extrapolated.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import gpu_arms
import torch
from case import FAILURES, error_line
from gpu_environment import commit_of
from gpu_supervise import LOST, LOST_ERROR, Progress, context_is_lost
from timing import alternate

import triskele as tk
from triskele import backend, machine

NOTHING_TO_DO = 77
B16 = torch.bfloat16


@dataclass(frozen=True)
class Stack:
    """A model of `blocks` blocks, of which the full one has `of`. make(device) -> (model, its forward's arguments)."""

    name: str
    blocks: int
    of: int
    make: Callable[[torch.device], tuple[torch.nn.Module, dict]]
    arms: dict[str, dict]


def on_device(build: Callable[[], torch.nn.Module], device: torch.device, dtype=B16) -> torch.nn.Module:
    """The model with random weights of order one over the root of their inputs, made where it runs."""
    torch.manual_seed(0)
    with torch.device(device):
        model = build().to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # diffusers starts some layers at zero
            parameter.normal_(0, parameter[0].numel()**-0.5)
    return model


def wan(device, blocks=3, grid=(21, 60, 104), **config):
    from diffusers import WanTransformer3DModel

    config = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=blocks) | config
    model = on_device(lambda: WanTransformer3DModel(**config), device)
    inputs = dict(hidden_states=torch.randn(1, model.config.in_channels, *grid, device=device).to(B16),
                  timestep=torch.full((1,), 700, device=device),
                  encoder_hidden_states=torch.randn(1, 512, model.config.text_dim, device=device).to(B16))
    return model, inputs


def flux(device, double=1, single=2, side=64, text=512, **config):
    from diffusers import FluxTransformer2DModel

    config = dict(num_layers=double, num_single_layers=single, guidance_embeds=True) | config
    model = on_device(lambda: FluxTransformer2DModel(**config), device)
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1], ids[..., 2] = torch.arange(side, device=device)[:, None], torch.arange(side, device=device)[None]
    sizes = model.config
    inputs = dict(hidden_states=torch.randn(1, side * side, sizes.in_channels, device=device).to(B16),
                  encoder_hidden_states=torch.randn(1, text, sizes.joint_attention_dim, device=device).to(B16),
                  pooled_projections=torch.randn(1, sizes.pooled_projection_dim, device=device).to(B16),
                  timestep=torch.full((1,), 0.7, device=device).to(B16), img_ids=ids.reshape(-1, 3).to(B16),
                  txt_ids=torch.zeros(text, 3, device=device).to(B16),
                  guidance=torch.full((1,), 3.5, device=device).to(B16))
    return model, inputs


def stacks(dry: bool) -> list[Stack]:
    sla, w4a8 = {"attention": tk.SLA(keep=0.05)}, {"linear": tk.SVDQuant(rank=32, iterations=1)}
    if dry:
        small = {"linear": tk.SVDQuant(rank=4, iterations=1)}
        half = {"attention": tk.SLA(keep=0.5, block_q=16, block_k=16)}
        tiny_wan = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, text_dim=16, freq_dim=32,
                        in_channels=4, out_channels=4, rope_max_seq_len=32)
        tiny_flux = dict(attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, in_channels=16,
                         pooled_projection_dim=8, axes_dims_rope=(4, 4, 8))
        return [Stack("Wan", 1, 30, lambda device: wan(device, 1, (3, 8, 12), **tiny_wan), {
                    "SLA": half, "VMoBA": {"attention": tk.VMoBA(top_k=2)}, "SLA + W4A8": half | small}),
                Stack("FLUX", 2, 57, lambda device: flux(device, 1, 1, 8, 7, **tiny_flux), {"W4A8": small})]
    return [
        Stack("Wan2.1-1.3B, 480p x 81 frames", 3, 30, wan, {
            "SLA, keep 5 %": sla, "VMoBA": {"attention": tk.VMoBA()}, "W4A8": w4a8,
            "SLA, keep 5 % + W4A8": sla | w4a8}),
        Stack("FLUX.1, 1024 x 1024", 3, 57, flux, {
            "W4A8": w4a8, "SLA, keep 20 %": {"attention": tk.SLA(keep=0.2)},
            "SLA, keep 20 % + W4A8": {"attention": tk.SLA(keep=0.2)} | w4a8}),
    ]


def measure_stack(stack: Stack, device: torch.device, seconds: float, add: Callable[[dict], None]) -> None:
    """A row for the plain model, and one for each arm."""
    model, inputs = stack.make(device)
    names = gpu_arms.ARMS["cuda"] if device.type == "cuda" else ()

    def forward():
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    plain_ms, truth = _median(forward, device, seconds), forward().float()
    full = {"extrapolated_full_ms": plain_ms * stack.of / stack.blocks}
    add({"model": stack.name, "blocks": stack.blocks, "arm": "plain", "ms": plain_ms, "ratio": 1.0, **full})
    for name, configs in stack.arms.items():
        row = {"model": stack.name, "blocks": stack.blocks, "arm": name}
        try:
            with backend.measuring(*names), tk.patch(model, **configs):
                with gpu_arms.recorded() as chosen:
                    out = forward().float()
                ms = _median(forward, device, seconds)
            row |= {"ms": ms, "ratio": plain_ms / ms, "backends": chosen,
                    "extrapolated_full_ms": ms * stack.of / stack.blocks,
                    "distance_to_plain": float((out - truth).norm() / truth.norm())}
        except FAILURES as error:
            row["error"] = error_line(error)
        add(row)


def _median(call, device, seconds) -> float:
    return alternate({"call": call}, device, seconds=seconds, least=3).popitem()[1].median_ms


# ------------------------------------------------------------------------------------------------ DiT, whole pipelines

DIT = {"DiT-S/2": (12, 6, 64), "DiT-B/2": (12, 12, 64), "DiT-XL/2": (28, 16, 72)}  # layers, heads, head dim


class GraphedForward:
    """A transformer's forward as a CUDA graph for each shape of its inputs."""

    def __init__(self, model: torch.nn.Module):
        self.forward, self.graphs = model.forward, {}

    def __call__(self, hidden_states, timestep=None, class_labels=None, **_):
        inputs = (hidden_states, timestep, class_labels)
        key = tuple((t.shape, t.dtype) for t in inputs)
        if key not in self.graphs:
            self.graphs[key] = self._capture([t.clone() for t in inputs])
        static, graph, out = self.graphs[key]
        for to, value in zip(static, inputs):
            to.copy_(value)
        graph.replay()
        return SimpleNamespace(sample=out.clone())

    def _capture(self, static):
        def run():
            return self.forward(static[0], timestep=static[1], class_labels=static[2]).sample

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        return static, graph, out


def dit_pipeline(device, layers, heads, dim, side=32):
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    model = on_device(lambda: DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=dim, num_layers=layers, sample_size=side, out_channels=8), device)
    vae = on_device(lambda: AutoencoderKL(  # two small levels: the decoder is not what is measured
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2), device)
    pipe = DiTPipeline(model, vae, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure_dit(name: str, device, add, *, sizes, steps=100, window=8, side=32) -> None:
    pipe = dit_pipeline(device, *sizes, side)
    names = gpu_arms.ARMS["cuda"] if device.type == "cuda" else ()

    def sample():
        with torch.no_grad():
            pipe(class_labels=[207], guidance_scale=4.0, num_inference_steps=steps, output_type="pt",
                 generator=torch.Generator(device).manual_seed(0))

    def timed() -> float:
        sample()
        return min(_wall(sample, device) for _ in range(2)) * 1e3

    plain = timed()
    add({"model": name, "arm": "plain", "steps": steps, "ms": plain, "ratio": 1.0})
    if device.type == "cuda":
        row = {"model": name, "arm": "plain, CUDA graphs", "steps": steps}
        pipe.transformer.forward = GraphedForward(pipe.transformer)
        try:
            row["ms"] = timed()
            row["ratio"] = plain / row["ms"]
        except FAILURES as error:
            row["error"] = error_line(error)
        del pipe.transformer.forward
        add(row)
    row = {"model": name, "arm": f"ParaTAA, window {window}", "steps": steps}
    try:
        config = tk.ParaTAA(window=window, max_iterations=steps)
        with backend.measuring(*names), tk.patch(pipe, sampler=config) as handle:
            with gpu_arms.recorded() as chosen:
                sample()
            ms = timed()
            row |= {"ms": ms, "ratio": plain / ms, "backends": chosen,
                    "rounds": max((run.iterations for run in handle.sampler.last), default=steps)}
    except FAILURES as error:
        row["error"] = error_line(error)
    add(row)


def _wall(call, device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------ the run

def plan(dry: bool) -> list[tuple[str, Callable]]:
    """(name, measure(device, seconds a model, add))."""
    found = [(stack.name, lambda device, seconds, add, stack=stack: measure_stack(stack, device, seconds, add))
             for stack in stacks(dry)]
    if dry:
        dit = {"DiT": dict(sizes=(1, 2, 12), steps=4, window=2, side=8)}
    else:
        dit = {name: dict(sizes=sizes) for name, sizes in DIT.items()}
    found += [(name, lambda device, seconds, add, name=name, how=how: measure_dit(name, device, add, **how))
              for name, how in dit.items()]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=90.0, help="in all: what is left then is not measured")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--resume", action="store_true", help="go on where the last process, which was lost, stood")
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("diffusers") is None:
        print("diffusers is not importable: no blocks")
        return NOTHING_TO_DO
    device = torch.device("cpu" if args.dry else "cuda")
    progress = Progress(args.out.with_suffix(".partial"), lambda: _fresh(args.dry), args.resume)
    record = progress.record

    def add(row: dict) -> None:
        record["rows"].append(row)
        progress.write()
        print(line_of(row), flush=True)

    if progress.interrupted is not None:
        add({"model": progress.interrupted, "arm": "the next one", "error": LOST_ERROR})
    start, done = time.monotonic(), {row["model"] for row in record["rows"]}
    for name, measure in plan(args.dry):
        if name in done:
            continue
        if time.monotonic() - start > args.seconds:
            record["left_out"].append(name)
            continue
        progress.begin(name)
        try:
            measure(device, 0.0 if args.dry else 0.7, add)
        except FAILURES as error:
            add({"model": name, "arm": "plain", "error": error_line(error)})
        progress.done()
        if context_is_lost(device):
            return LOST
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    progress.finish(args.out)
    return 1 if any("error" in row for row in record["rows"]) else 0


def _fresh(dry: bool) -> dict:
    described = machine.describe()
    described["commit"] = commit_of(described)
    return {"kind": "gpu_blocks", "dry": dry, "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": described, "rows": [], "left_out": []}


def line_of(row: dict) -> str:
    if "error" in row:
        return f"{row['model']}, {row['arm']}: FAILED, {row['error']}"
    return f"{row['model']}, {row['arm']}: {row['ms']:.2f} ms, {row['ratio']:.2f}x"


if __name__ == "__main__":
    sys.exit(main())
