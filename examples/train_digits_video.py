"""Train the video DiT on bouncing digits: flow matching on WanTransformer3DModel.

    python examples/train_digits_video.py                  # about two hours on 2 CPU cores
    python examples/train_digits_video.py --resume         # go on after an interruption

Most steps see short clips, the last ones the native 24 frames: what a digit looks like and how it
moves from one frame to the next is learnt at a fraction of the cost, and rotary positions carry it
over to more frames. Every step sees about the same number of tokens.

Writes a diffusers folder (default assets/digits-wan) that `DigitsVideoPipeline.from_pretrained`
loads; checkpoints and the loss plot go to work/digits-wan.
"""

from __future__ import annotations

import argparse

import torch
from _training import Trainer, add_arguments, join_workers, make_optimizers, publish, stratified
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import triskele as tk
from triskele.digits.data import FRAME_SIZE, VideoSampler
from triskele.digits.prompts import NULL_CLASS, TEXT_DIM, embed_labels

PATCH = 4
TOKENS_PER_FRAME = (FRAME_SIZE // PATCH) ** 2
PROMPT_DROPOUT = 0.1


def make_model(dim: int, layers: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=dim // 32,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=4 * dim,
        num_layers=layers,
        rope_max_seq_len=256,
    )


def initialise(model: WanTransformer3DModel) -> None:
    """Start every residual branch, and the output, at zero; diffusers leaves this to training code."""
    for block in model.blocks:
        for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            torch.nn.init.zeros_(last.weight)
        with torch.no_grad():
            block.scale_shift_table[:, [0, 1, 3, 4]] = 0.0  # shifts and scales
            block.scale_shift_table[:, [2, 5]] = 1.0  # gates: open, the branches are zero already
    torch.nn.init.zeros_(model.condition_embedder.time_proj.weight)
    torch.nn.init.zeros_(model.condition_embedder.time_proj.bias)
    torch.nn.init.zeros_(model.proj_out.weight)


def parse_phases(text: str) -> list[tuple[int, float]]:
    """Frames of a clip, and the progress up to which: "4:0.2,24:0.8" -> [(4, 0.2), (24, 1.0)]."""
    phases, upto = [], 0.0
    for part in text.split(","):
        frames, share = part.split(":")
        upto += float(share)
        phases.append((int(frames), upto))
    if abs(upto - 1.0) > 1e-6:
        raise argparse.ArgumentTypeError(f"the shares of --phases must add up to 1, got {upto:g} from {text!r}")
    return phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=8000, out="assets/digits-wan")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens in a step: fewer clips where they are longer")
    parser.add_argument("--phases", type=parse_phases, default="4:0.2,8:0.38,16:0.22,24:0.2")
    parser.add_argument("--shift", type=float, default=3.0, help="of the sampler's noise levels, towards noisy")
    parser.add_argument("--training-shift", type=float, default=2.0, help="the same, of the levels trained on")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument(
        "--attention",
        choices=("triskele", "torch"),
        default="triskele",
        help="whose kernels: triskele's at keep 100 %% compute the same attention, faster in training on a CPU",
    )
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rank, workers = join_workers()
    generator = torch.Generator().manual_seed(args.seed + 1000 * rank)
    model = make_model(args.dim, args.layers)
    initialise(model)
    model.to(args.device)
    # The rotary tables are float64; in float32 they say the same at a third of the time.
    model.rope.float()
    if args.attention == "triskele":
        tk.patch(model, attention=tk.SLA(keep=1.0, linear="none"))
    if args.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    sample = VideoSampler("train")

    def loss(progress: float) -> torch.Tensor:
        frames = next((f for f, upto in args.phases if progress < upto), args.phases[-1][0])
        count = max(1, round(args.tokens / (workers * frames * TOKENS_PER_FRAME)))
        videos, labels = sample(count, frames, generator)
        labels = torch.where(torch.rand(count, generator=generator) < PROMPT_DROPOUT, NULL_CLASS, labels)
        noise = torch.randn(videos.shape, generator=generator)
        uniform = stratified(count, generator)
        sigmas = args.training_shift * uniform / (1 + (args.training_shift - 1) * uniform)
        level = sigmas.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * videos + level * noise
        with torch.autocast(args.device, torch.bfloat16):
            predicted = model(
                noisy.to(args.device),
                (1000 * sigmas).to(args.device),
                embed_labels(labels).to(args.device),
                return_dict=False,
            )[0]
        return (predicted.float() - (noise - videos).to(args.device)).square().mean()

    def export(weights: dict[str, torch.Tensor]) -> None:
        from triskele.digits.pipelines import DigitsVideoPipeline, PixelAutoencoder

        averaged = make_model(args.dim, args.layers)
        averaged.load_state_dict(weights)
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=args.shift)
        pipe = DigitsVideoPipeline(None, None, PixelAutoencoder(), scheduler, averaged)
        publish(pipe, args.out)

    optimizers = make_optimizers(model, "blocks", args.lr)
    Trainer(model, optimizers, loss, generator, args, export).run()


if __name__ == "__main__":
    main()
