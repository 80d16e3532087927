"""Train the class-conditional image DiT on handwritten digits: noise prediction, DDPM schedule.

    python examples/train_digits_image.py                  # an hour or two on 2 CPU cores
    python examples/train_digits_image.py --resume         # go on after an interruption

Writes a diffusers folder (default assets/digits-dit) that `DigitsDiTPipeline.from_pretrained`
loads; checkpoints and the loss plot go to work/digits-dit.
"""

from __future__ import annotations

import argparse

import torch
from _training import Trainer, add_arguments, join_workers, make_optimizers, publish, stratified
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel

from triskele.digits.data import IMAGE_SIZE, ImageSampler

NULL_CLASS = 1000  # diffusers' DiTPipeline has this number written into it
CLASS_DROPOUT = 0.1


def make_model(dim: int, layers: int) -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        num_attention_heads=dim // 32,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,  # DiTPipeline reads it and does not expect the default, None
        num_layers=layers,
        sample_size=IMAGE_SIZE,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    # adaLN-zero as in the DiT paper: every block starts as the identity. diffusers leaves this to
    # the training code.
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for head in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    # In training mode each block would drop the class by a coin of its own; the dropout below drops
    # it for the whole network, which is what guidance needs. Nothing else differs between modes.
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=6000, out="assets/digits-dit")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rank, workers = join_workers()
    generator = torch.Generator().manual_seed(args.seed + 1000 * rank)
    model = make_model(args.dim, args.layers).to(args.device)
    if args.compile:
        for block in model.transformer_blocks:
            block.compile(dynamic=False)
    sample = ImageSampler("train")
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)

    batch = max(1, args.batch // workers)

    def loss(progress: float) -> torch.Tensor:
        images, labels = sample(batch, generator)
        noise = torch.randn(images.shape, generator=generator)
        timesteps = (stratified(batch, generator) * 1000).long()
        dropped = torch.rand(batch, generator=generator) < CLASS_DROPOUT
        labels = torch.where(dropped, NULL_CLASS, labels)
        noisy = schedule.add_noise(images, noise, timesteps)
        with torch.autocast(args.device, torch.bfloat16):
            predicted = model(
                noisy.to(args.device), timesteps.to(args.device), labels.to(args.device), return_dict=False
            )[0]
        return (predicted.float() - noise.to(args.device)).square().mean()

    def export(weights: dict[str, torch.Tensor]) -> None:
        from triskele.digits.pipelines import DIGIT_NAMES, DigitsDiTPipeline, PixelAutoencoder

        averaged = make_model(args.dim, args.layers)
        averaged.load_state_dict(weights)
        # No clipping: a step is then a linear map of sample and noise, which parallel sampling relies
        # on. "trailing" begins at the last noise level, where the pipeline's pure noise belongs.
        scheduler = DDIMScheduler.from_config(schedule.config, clip_sample=False, timestep_spacing="trailing")
        pipe = DigitsDiTPipeline(averaged.half(), PixelAutoencoder(), scheduler, id2label=DIGIT_NAMES)
        publish(pipe, args.out)

    optimizers = make_optimizers(model, "transformer_blocks", args.lr)
    Trainer(model, optimizers, loss, generator, args, export).run()


if __name__ == "__main__":
    main()
