"""Measures what integer scales cost or gain: the output error of 4-bit linears with scales="amax" and "integer".

    python bench/scales_quality.py          # bench/results/cpu/scales.json, about two minutes

Random weights of several shapes of tails, and the linears of the shipped digit models on their own activations. Every
error is |y - y'| / |y| in float64 on tokens that calibration has not seen.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

import triskele as tk
from triskele import digits, machine
from triskele.diffusers import collect_activations, linear
from triskele.diffusers.adapters import adapter_for

SCALES = ("amax", "integer")
MODELS = ("image model", "video model")
OUTLIERS, FACTOR = 0.01, 30.0  # share of the channels of x, and how much larger they are


def weights(rows: int, columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    uniform = torch.rand(rows, columns, generator=generator, dtype=torch.float64) - 0.5
    chi = sum(normal(rows, columns).square() for _ in range(4)) / 4
    return {"Gaussian": normal(rows, columns),
            "Laplace": (-uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.4999999))).float(),
            "Student t, 4 degrees": normal(rows, columns) / chi.sqrt(),
            "log-normal columns": normal(rows, columns) * normal(columns).exp()}


def tokens(count: int, columns: int, seed: int) -> torch.Tensor:
    channels = torch.randperm(columns, generator=torch.Generator().manual_seed(2))[:int(OUTLIERS * columns)]
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))
    x[:, channels] *= FACTOR
    return x


def errors(weight: torch.Tensor, calibration, fresh: torch.Tensor, rank: int, iterations: int) -> dict:
    """scales -> {"int8", "exact"}: errors on `fresh` with int8 activations, and with activations as they are."""
    x = fresh.double()
    y = x @ weight.double().T
    found = {}
    for scales in SCALES:
        w = tk.quantize.svd_quantize(weight, calibration, rank=rank, iterations=iterations, dtype=torch.bfloat16,
                                     scales=scales)
        if scales == "integer" and not w.has_integer_scales():
            raise RuntimeError("scales='integer' left a channel whose scales are not multiples of one")
        got = {"int8": tk.ops.svdq_linear(x, w, backend="reference"), "exact": x @ w.effective_weight().T}
        found[scales] = {name: float((z - y).norm() / y.norm()) for name, z in got.items()}
    return found


def random_layers(args) -> list[dict]:
    calibration, fresh = (tokens(args.tokens, args.columns, seed) for seed in (5, 6))
    rows = []
    for name, weight in tqdm(weights(args.rows, args.columns).items(), desc="random"):
        rows += [{"weight": name, "calibrated": x is not None, **errors(weight, x, fresh, 32, args.iterations)}
                 for x in (None, calibration)]
    return rows


def sampled(name: str, seed: int, steps: int):
    """(transformer, its calls while a few pictures or a clip are drawn)."""
    pipe = digits.load_image_pipeline() if name == "image model" else digits.load_video_pipeline()
    pipe.set_progress_bar_config(disable=True)
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _m, args, kwargs: calls.append((args, kwargs)),
                                                      with_kwargs=True)
    pipe([0, 3, 7, 9] if name == "image model" else "a moving 3", num_inference_steps=steps,
         generator=torch.Generator().manual_seed(seed))
    hook.remove()
    return pipe.transformer, calls


@torch.no_grad()
def whole_models(args) -> list[dict]:
    """The error of the transformers' outputs with all linears in 4 bits, as `patch` makes them."""
    rows = []
    for name in MODELS:
        model, calls = sampled(name, 7, args.steps)

        def outputs(model=model, calls=calls):
            return torch.cat([model(*a, **{**k, "return_dict": False})[0].flatten() for a, k in calls]).double()

        want = outputs()
        for rank in tqdm((8, 16, 24, 32), desc=f"{name}, whole"):
            row = {"model": name, "rank": rank}
            for scales in SCALES:
                with tk.patch(model, linear=tk.SVDQuant(rank=rank, scales=scales, iterations=args.iterations)):
                    row[scales] = float((outputs() - want).norm() / want.norm())
            rows.append(row)
    return rows


def model_layers(args) -> list[dict]:
    """Each linear of the image and the video model that `SVDQuant` takes, at rank 16 (the models are 128 wide)."""
    rows = []
    for name in MODELS:
        samples = []
        for seed in (5, 6):
            model, calls = sampled(name, seed, args.steps)
            names = linear.sites(model, adapter_for(model), tk.SVDQuant(rank=16))
            samples.append(collect_activations(
                model, names, lambda m=model, c=calls: [m(*a, **k) for a, k in c], tokens=args.tokens))
        calibration, fresh = samples
        for site in tqdm(names, desc=name):
            weight = model.get_submodule(site).weight.detach()
            rows += [{"model": name, "site": site, "calibrated": x is not None,
                      **errors(weight, x, fresh[site], 16, args.iterations)} for x in (None, calibration[site])]
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=5, help="rounds of the low-rank alternation")
    parser.add_argument("--steps", type=int, default=8, help="of the digit models' sampling, for activations")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "scales.json")
    args = parser.parse_args(arguments)
    record = {"kind": "scales", "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
              "machine": machine.describe(), "rows": args.rows, "columns": args.columns, "tokens": args.tokens,
              "whole": whole_models(args), "random": random_layers(args), "models": model_layers(args)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
