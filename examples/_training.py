"""What the three training scripts share: schedule, averaged weights, checkpoints, the loss plot.

Weights are written as safetensors. The optimiser's state and the random generators' states go
through torch.save into the same folder and are read back with weights_only=True, so a checkpoint
folder from elsewhere can't run code.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import load_file, save_file
from tqdm import tqdm


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, out: str) -> None:
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for the trained model")
    parser.add_argument("--work", type=Path, default=None, help="folder for checkpoints and the loss plot")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps")
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="stop after this time instead; the schedule then follows the clock, which a slower or"
        " busier machine answers with fewer steps",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks (needs a compiler)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")


def join_workers() -> tuple[int, int]:
    """(rank, number of workers) under torchrun, (0, 1) without it.

    On a CPU that others use too, two workers of one thread each get through clearly more samples than
    one worker of two threads: they wait for each other once a step, not at every operation.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def make_optimizers(model: torch.nn.Module, blocks: str, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest.

    These runs are a few thousand steps long; orthogonalised updates reach the same loss in clearly
    fewer of them. Embeddings, norms and the ends of the network are no matrices in that sense.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = name.startswith(blocks) and parameter.ndim == 2 and "embed" not in name
        (matrices if inside else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr / 2, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    ]


def warmup_then_decay(step: int, progress: float, warmup: int = 100, decay_from: float = 0.55) -> float:
    """Factor on the learning rate: linear warm-up, constant, linear decay to zero."""
    rising = min(1.0, (step + 1) / warmup)
    falling = 1.0 if progress < decay_from else (1.0 - progress) / (1.0 - decay_from)
    return max(0.0, min(rising, falling))


@dataclass
class Trainer:
    """Runs `loss(progress) -> scalar` under a schedule, and keeps what a resumed run needs."""

    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss: Callable[[float], torch.Tensor]
    generator: torch.Generator
    args: argparse.Namespace
    export: Callable[[dict[str, torch.Tensor]], None]  # writes the averaged weights as a model
    ema_decay: float = 0.998
    step: int = 0
    elapsed: float = 0.0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rank, self.workers = join_workers()
        self.work = self.args.work or Path("work") / self.args.out.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.base_lrs = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        if self.args.resume:
            self._load()

    def progress(self) -> float:
        """How much of the run is done, 0 to 1: by the clock where --minutes is given, else by steps."""
        if self.args.minutes is not None:
            return min(1.0, self.elapsed / (60 * self.args.minutes))
        return min(1.0, self.step / self.args.steps)

    def run(self) -> None:
        began, before = time.monotonic(), self.elapsed
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        total = None if self.args.minutes is not None else self.args.steps
        with tqdm(total=total, initial=self.step, mininterval=5.0, dynamic_ncols=True, disable=self.rank > 0) as bar:
            while (progress := self.progress()) < 1.0:
                factor = warmup_then_decay(self.step, progress)
                for optimizer, base in zip(self.optimizers, self.base_lrs, strict=True):
                    for group, lr in zip(optimizer.param_groups, base, strict=True):
                        group["lr"] = lr * factor
                loss = self.loss(progress)
                loss.backward()
                loss = self._share(loss.detach(), parameters)
                if not torch.isfinite(loss):
                    raise RuntimeError(f"the loss became {loss.item()} at step {self.step}; lower --lr")
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                self._average()
                self.step += 1
                self.losses.append(loss.item())
                self.elapsed = self._agree(before + time.monotonic() - began)
                recent = self.losses[-50:]
                bar.set_postfix(
                    loss=f"{sum(recent) / len(recent):.4f}", done=f"{100 * self.progress():.1f}%", refresh=False
                )
                bar.update()
                if self.step % self.args.save_every == 0 and self.rank == 0:
                    self._save()
        if self.rank == 0:
            self._save()
            self.export(self.average)
        if self.workers > 1:
            dist.destroy_process_group()

    def _share(self, loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        """Average the gradients, and the loss that is returned, over the workers."""
        if self.workers == 1:
            return loss
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients] + [loss.view(1)])
        dist.all_reduce(flat)
        flat /= self.workers
        for gradient, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat[-1]

    def _agree(self, elapsed: float) -> float:
        """The first worker's clock: all must see the same schedule and the same end."""
        if self.workers == 1:
            return elapsed
        clock = torch.tensor(elapsed, dtype=torch.float64)
        dist.broadcast(clock, 0)
        return clock.item()

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        for key, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value.to(self.average[key].dtype), 1 - decay)

    def _save(self) -> None:
        def replace(name: str, write: Callable[[Path], None]) -> None:
            # A run that is stopped while it writes must leave the previous checkpoint whole.
            part = self.work / (name + ".part")
            write(part)
            os.replace(part, self.work / name)

        weights = {k: v.contiguous() for k, v in self.model.state_dict().items()}
        replace("weights.safetensors", lambda path: save_file(weights, path))
        replace("average.safetensors", lambda path: save_file(self.average, path))
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
            "losses": self.losses,
        }
        replace("optimizer.pt", lambda path: torch.save(state, path))
        self._plot()

    def _load(self) -> None:
        if not (self.work / "optimizer.pt").is_file():
            raise FileNotFoundError(f"--resume: no checkpoint in {self.work}")
        self.model.load_state_dict(load_file(self.work / "weights.safetensors"))
        self.average = load_file(self.work / "average.safetensors", device=str(self.args.device))
        state = torch.load(self.work / "optimizer.pt", weights_only=True)
        self.step, self.elapsed, self.losses = state["step"], state["elapsed"], state["losses"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.rank == 0:
            self.generator.set_state(state["generator"])
        else:  # only the first worker's generator is kept; the others need draws of their own
            self.generator.manual_seed(self.args.seed + 1000 * self.rank + self.step)

    def _plot(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        window = max(1, len(self.losses) // 200)
        smooth = torch.tensor(self.losses).unfold(0, window, window).mean(1)
        figure, axes = plt.subplots(figsize=(7, 4))
        axes.plot([window * (i + 0.5) for i in range(len(smooth))], smooth.tolist())
        axes.set(xlabel="step", ylabel=f"loss (mean of {window})", yscale="log", title=self.args.out.name)
        axes.grid(alpha=0.3, which="both")
        figure.tight_layout()
        figure.savefig(self.work / "loss.png", dpi=110)
        plt.close(figure)


def stratified(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` numbers in [0, 1), one in each of `count` equal strata, in random order.

    A batch then always holds easy and hard noise levels alike, which takes much of the noise out of
    the loss at these batch sizes.
    """
    order = torch.randperm(count, generator=generator)
    return (order + torch.rand(count, generator=generator)) / count


def publish(model: DiffusionPipeline | ModelMixin, folder: Path) -> None:
    """save_pretrained, with files that everybody may read: safetensors writes them for the owner alone."""
    model.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)
    print(f"wrote {folder}")
