"""`triskele quantize`: a diffusers folder in, the same folder with 4-bit linears out."""

from __future__ import annotations

import json
from pathlib import Path

import triskele as tk
from triskele.checks import expected
from triskele.demo.run import denoiser, weight_megabytes


def quantize(args) -> int:
    """Runs what the arguments of cli.py ask for. Returns the exit code."""
    import diffusers

    source, out = Path(args.model), Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise expected("out", "a folder that is new or empty", f"{args.out!r}, which holds files")
    config = tk.SVDQuant(rank=args.rank, format=args.format, activation=args.activation, scales=args.scales)
    if (source / "model_index.json").is_file():
        loaded = diffusers.DiffusionPipeline.from_pretrained(source, use_safetensors=True)
        model = denoiser(loaded)
    elif (source / "config.json").is_file():
        name = json.loads((source / "config.json").read_text()).get("_class_name")
        if not isinstance(name, str) or not hasattr(diffusers, name):
            raise expected("config.json's _class_name", "a model class of diffusers", repr(name))
        loaded = model = getattr(diffusers, name).from_pretrained(source, use_safetensors=True)
    else:
        raise expected("model", "a folder with a model_index.json or a config.json", repr(args.model))
    before = weight_megabytes(model)
    handle = tk.patch(model, linear=config)
    after = weight_megabytes(model)
    loaded.save_pretrained(out)
    print(f"{len(handle.replaced)} linears, {before:.1f} MB -> {after:.1f} MB ({after / before:.2f}x): {out}")
    return 0
