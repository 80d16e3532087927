"""What a model family tells the three arms, and what an arm reports back. Plain data: no torch, no diffusers.

One file a family under `adapters/` fills an `Adapter`; `patch` hands it to the arms, each of which has the same face:

    attention.apply(model, adapter, config, undo) -> list[Replaced]
    linear.apply(model, adapter, config, undo) -> list[Replaced]
    sampler.apply(pipe, adapter, config, undo) -> list[Replaced]

An arm changes nothing except through `undo` (see undo.py), so that restore() and a failure half way put all of it back.
The sampler arm also leaves its object on the pipeline, `undo.setattr(pipe, SAMPLER, sampler)`, for `Handle.sampler`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

SAMPLER = "_triskele_sampler"


@dataclass(frozen=True)
class Replaced:
    """One thing that an arm replaced, or left alone on purpose: a line of `Handle.summary()`.

    arm      "attention", "linear" or "sampler"
    name     dotted name in the model ("blocks.3.attn1"), or of the pipeline's part ("scheduler")
    was, now class names, or a few words ("left dense (skip_layers)")
    backend  that will run it on the model's device ("cpu"), "" where no kernel is involved
    reasons  "cuda: ...": why each better backend will not
    ask      () -> (backend, reasons) for the model as it stands then; None: those two are final
    """

    arm: str
    name: str
    was: str
    now: str
    backend: str = ""
    reasons: tuple[str, ...] = ()
    ask: Callable[[], tuple[str, tuple[str, ...]]] | None = field(default=None, repr=False, compare=False)

    def answered(self) -> Replaced:
        """The row with the backend of this moment: a model may have moved, or been cast, since it was patched."""
        if self.ask is None:
            return self
        backend, reasons = self.ask()
        return replace(self, backend=backend, reasons=reasons, ask=None)


@dataclass(frozen=True)
class Site:
    """One self-attention that can be made sparse.

    name   dotted name of the attention module
    layer  its index in the order of the forward pass
    block  where text and image are joined before the attention sees them: dotted name of the block whose forward takes
           `encoder_hidden_states`, from which the number of text tokens is read
    """

    name: str
    layer: int
    block: str | None = None


def _nothing(_target) -> str | None:
    return None


@dataclass(frozen=True)
class AttentionSites:
    """Where a family's sparse-able self-attention is.

    find          model -> its sites, in the order of the forward pass
    processor     class (of processor.py) that takes the place of the attention module's own processor
    originals     class names of the processors that it reproduces; any other one on a site is refused
    grid          (model, arguments of its forward by name) -> (t, h, w) in tokens, as python ints
    refuse        model -> why this very model cannot be patched, or None
    joint         text and image tokens share the attention, text first; the processor tells `attend` how many
    """

    find: Callable
    processor: type
    originals: tuple[str, ...]
    grid: Callable
    refuse: Callable = _nothing
    joint: bool = False


@dataclass(frozen=True)
class Adapter:
    """A model family, as data.

    family           name in tables and messages ("Wan")
    model_classes    class names of the model (`type(model).__name__`, or of a base class)
    attention        its sites, or a string: why the attention arm refuses this family
    linear_names     endings of the dotted names of linears that are worth 4 bits ("attn1.to_q"); or a refusing string
    linear_within    top-level children in which they are looked for ("blocks"): embeddings and heads stay out
    latent_kwarg     forward argument that holds the latents, first axis batch
    batch_kwargs     other forward arguments with a batch axis first (tensors, or dicts of such tensors); those that are
                     None or absent are skipped. `ParaTAA` repeats them for every row of its window
    shared_kwargs    forward arguments that hold tensors without a batch axis; `ParaTAA` refuses a call with any other
    timestep_kwarg   forward argument that holds the timestep
    timestep_scale   the model is given the scheduler's timestep times this (Flux: 1/1000)
    guidance_in_step  the pipeline gives `scheduler.step` guidance's copy of the latents too (DiT)
    pipelines        class names of the pipelines whose loop the sampler arm has been tried on
    sampler_refusal  pipe -> why the sampler arm refuses this very pipeline, or None
    fused_blocks     class name of a block -> (its forward written with the fused norm, modulation and gate ops, of the
                     same arguments; block -> whether it is one that this forward reproduces)
    """

    family: str
    model_classes: tuple[str, ...]
    attention: AttentionSites | str
    linear_names: tuple[str, ...] | str
    linear_within: tuple[str, ...]
    latent_kwarg: str = "hidden_states"
    batch_kwargs: tuple[str, ...] = ()
    shared_kwargs: tuple[str, ...] = ()
    timestep_kwarg: str = "timestep"
    timestep_scale: float = 1.0
    guidance_in_step: bool = False
    pipelines: tuple[str, ...] = ()
    sampler_refusal: Callable = _nothing
    fused_blocks: dict[str, tuple[Callable, Callable]] = field(default_factory=dict)

    def is_linear_site(self, name: str, endings: tuple[str, ...] | None = None) -> bool:
        """Whether the linear called `name` is worth 4 bits; `endings` replaces the family's own table."""
        endings = self.linear_names if endings is None else endings
        if isinstance(endings, str) or name.split(".", 1)[0] not in self.linear_within:
            return False
        return any(name.endswith("." + ending) for ending in endings)
