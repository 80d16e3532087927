"""Patch a pipeline, look at what was replaced, generate, and put it back.

    python examples/patch_pipeline.py                                       # the shipped digit videos
    python examples/patch_pipeline.py path/to/wan-folder "a red panda"      # your own Wan pipeline
"""

import sys

import torch
from diffusers.utils import export_to_gif

import triskele as tk

if len(sys.argv) > 1:
    from diffusers import WanPipeline

    pipe, prompt, options = WanPipeline.from_pretrained(sys.argv[1]), sys.argv[2], {}
else:
    pipe, prompt, options = tk.digits.load_video_pipeline(), "a moving 7", {"num_inference_steps": 20}

with tk.patch(pipe, attention=tk.SLA(keep=0.3, block_q=32, block_k=32, linear="none"), linear=tk.SVDQuant()) as handle:
    print(handle.summary())
    frames = pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="pil", **options).frames[0]
export_to_gif(frames, "patched.gif")
print("patched.gif; the pipeline is as it was")
