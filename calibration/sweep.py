"""Layer after layer: reference, initialisation, fit, measurement, and on to the next.

Only one layer's hidden states are alive at a time, those of all samples, on the CPU (beside layer
0's, which `carry` starts from). They are those of the dense model: every layer is fitted on what
it sees when nothing before it selects.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alvts_cli.engine import Selector, resolve_keep
from alvts_cli.engine.probe import Projected, attention_importance, attention_mean, project
from alvts_cli.engine.scoring import TextRows, asking
from alvts_cli.errors import AlvtsError
from alvts_cli.families import QueryKey, family_of
from alvts_cli.families.layer import parts_of
from alvts_cli.header import LayerFit
from alvts_cli.spread import Group

from .align import Target, align, collate
from .capture import Captured, advance, alike, on_device
from .checkpoint import Checkpoint, LayerResult
from .initialise import Factors, initialise
from .paper import PaperFactors, initialise_paper
from .settings import Settings


def sweep(
    model: Any,
    fitted: Sequence[Captured],
    held_out: Sequence[Captured],
    settings: Settings,
    rank: int,
    checkpoint: Checkpoint | None,
    on_layer: Callable[[int, LayerFit], None],
    group: Group | None = None,
) -> list[LayerResult]:
    """Fit every layer. The samples' hidden states are those of layer 0, and are consumed.

    Processes of a group fit different layers. Each runs all samples through all layers: sending the
    hidden states would take longer, and so every fit is the very one that a single process makes.

    Args:
        model: of a known family, in eval mode.
        fitted: samples to fit on.
        held_out: samples to measure on.
        settings: of the run.
        rank: `R`.
        checkpoint: takes finished layers, and may hold some.
        on_layer: called after each layer of this process, which is on disk by then.
        group: of processes that share the layers; all of them get all results.

    Raises:
        AlvtsError: hidden states that are not finite.
    """
    family = family_of(model)
    config: Any = family.text_model(model).config
    samples = [*fitted, *held_out]
    group = group or Group()
    results: list[tuple[int, LayerResult]] = []
    layers: Any = family.layers(model)
    for i, layer in enumerate(layers):
        if group.mine(i):
            result = checkpoint.load(i) if checkpoint else None
            if result is None:
                result = _fit_layer(
                    family.query_key(layer),
                    # Passed on and not kept: they hold this layer's hidden states.
                    _targets(layer, fitted, i, settings.form),
                    _targets(layer, held_out, i, settings.form),
                    settings,
                    rank,
                    seed=settings.seed * len(layers) + i,
                )
                if checkpoint:
                    checkpoint.save(i, result)
            results.append((i, result))
            on_layer(i, result.fit)
        if i + 1 < len(layers):
            advance(layer, i, config._attn_implementation, samples)
    every = sorted(group.gather(results), key=lambda one: one[0])
    return [result for _, result in every]


# Samples whose hidden states the start is scaled to.
_SEEN = 32


def _targets(layer: Any, samples: Sequence[Captured], index: int, form: str) -> list[Target]:
    """Of every sample, in their order."""
    found: dict[int, Target] = {}
    for numbers in alike(samples):
        batch = [samples[number] for number in numbers]
        hidden, positions = on_device(layer, batch)
        projected = project(layer, hidden, positions)
        reference = _reference(projected, torch.cat([one.visual for one in batch]), form)
        if not bool(reference.isfinite().all()):
            raise AlvtsError(
                f"the hidden states of layer {index} overflow in {hidden.dtype}; "
                "use --dtype bfloat16 or float32"
            )
        rotary = parts_of(layer).rotary
        for place, (number, sample) in enumerate(zip(numbers, batch, strict=True)):
            at = asking(sample.visual, ~sample.visual).nonzero()[:, 1]
            query = projected.query[place : place + 1, :, at.to(hidden.device)].cpu()
            found[number] = Target(
                sample.hidden,
                sample.positions,
                sample.visual,
                ~sample.visual,
                TextRows(query, projected.scaling, rotary),
                at[None],
                torch.ones(1, len(at), dtype=torch.bool),
                reference[place : place + 1],
            )
    return [found[number] for number in range(len(samples))]


def _reference(projected: Projected, visual: Tensor, form: str) -> Tensor:
    """`S*` `[B, T]` of the selectors' form, on the CPU."""
    visual = visual.to(projected.query.device)
    text = attention_importance(projected, visual, ~visual)
    if form == "paper":
        text = text * attention_mean(projected, visual, torch.ones_like(visual))
    return text.cpu()


def _fit_layer(
    projections: QueryKey,
    fitted: Sequence[Target],
    held_out: Sequence[Target],
    settings: Settings,
    rank: int,
    seed: int,
) -> LayerResult:
    if settings.form == "paper":
        paper = initialise_paper(projections, rank)
        before = _measure(_stored(paper, projections), held_out, settings.keep)
        selector = _stored(align(paper, projections, fitted, settings, seed), projections)
    else:
        seen = torch.cat([target.hidden[target.visual] for target in fitted[:_SEEN]])
        start = initialise(projections, seen, rank)
        before = _measure(_stored(start, projections), held_out, settings.keep)
        selector = _stored(align(start, projections, fitted, settings, seed), projections)
    after = _measure(selector, held_out, settings.keep)
    fit = LayerFit(before[0], after[0], before[1], after[1])
    return LayerResult(selector.to(torch.device("cpu"), projections.norm_weight.dtype), fit)


@torch.no_grad()
def _stored(factors: Factors | PaperFactors, projections: QueryKey) -> Selector:
    """The selector in the dtype it will run in, so that what is measured is what runs."""
    norm = projections.norm_weight
    return factors.selector(projections).to(norm.device, norm.dtype)


@torch.no_grad()
def _measure(selector: Selector, targets: Sequence[Target], keep: float) -> tuple[float, float]:
    """Mean loss and mean recall of the `k` best tokens, over samples."""
    device = next(iter(selector.tensors().values())).device
    losses, recalls = [], []
    for one in targets:
        target = collate([one], device)
        found, loss = target.measure(selector)
        visual = target.visual
        losses.append(loss.mean())
        recalls.append(_recall(found[visual], target.reference[visual], keep))
    return torch.stack(losses).mean().item(), torch.stack(recalls).mean().item()


def _recall(found: Tensor, reference: Tensor, keep: float) -> Tensor:
    """Share of the `k` largest of `reference` `[N]` that are among the `k` largest of `found`."""
    k = resolve_keep(keep, 1).count(0, found.shape[0])
    wanted = torch.zeros_like(reference, dtype=torch.bool)
    wanted[_largest(reference, k)] = True
    return wanted[_largest(found, k)].float().mean()


def _largest(values: Tensor, k: int) -> Tensor:
    """As `engine.select`: on a tie the earlier one."""
    return values.argsort(descending=True, stable=True)[:k]
