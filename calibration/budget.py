"""Where visual tokens are worth their cost.

Layers differ: some need every visual token, most need hardly any. What a layer loses at a few values
of `k` is measured with that layer alone restricted, and a layer average is then spent where it
lowers the sum of the losses most.

Measured on pocket (dense 96.9 %, 225 calibration scenes of which 75 ask for counts, 105 questions of
easy-VQA's train split; percent right, KL of the answer in brackets; the same selectors throughout):

    layer average         33 %          22 %          11 %          5 %           easy-VQA at 5 %
    uniform, alvts        90.7 (.294)   84.9 (.403)   76.4 (.631)   71.1 (.876)   97.1
    budget, alvts         93.3 (.045)   92.0 (.093)   92.0 (.084)   89.3 (.139)   99.0
    uniform, S* itself    88.4 (.439)   87.6 (.529)   77.3 (.770)   67.1 (1.087)  97.1
    budget, S* itself     94.2 (.027)   92.9 (.065)   92.0 (.063)   88.9 (.128)   99.0
    uniform, random       73.8 (.696)   58.2 (1.18)   46.2 (1.79)   29.3 (2.51)   89.5
    budget, random        90.2 (.219)   88.4 (.340)   89.3 (.382)   74.7 (.860)   96.2

What did not pay:

- Measuring again around the schedule found, the other layers restricted, and solving again for all
  layers at once, three times (96 samples; KL over the answer on those samples): at 11 % .147, then
  .166, .316, .377; at 22 % .131, then .188, .415; only at 5 % it fell, .180, then .104, .094, .099.
  Moves of all layers at once overshoot, and the noise of a sample's worst answers is fitted.
- Ranking tokens by the answer's gradient to a gate on each (what the token's own update and its
  key and value are worth, to first order) instead of `S*`, as an oracle: under a uniform ratio 83.1 against
  77.3 % at 11 %, under the budget 91.1 against 90.7 %: the budget makes up for the score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alvts_cli.engine import Keep, LayerSelector, importance, select
from alvts_cli.engine.merging import gather_hidden, gather_positions, merge
from alvts_cli.families import family_of

from .capture import Captured, capture, on_device, run_layer

UNITS = 64
"""Of these a layer keeps some: schedules are in steps of so much of the visual tokens."""

STEPS = (0, 1, 2, 4, 8, 16, 32, 48)
"""Units at which a layer's loss is measured; at all `UNITS` of them it is nothing."""

RATIOS = tuple(step / UNITS for step in STEPS)

AVERAGES = (1 / 32, 1 / 18, 1 / 9, 1 / 6, 2 / 9, 1 / 3, 1 / 2)
"""Layer averages that are solved for; what lies between them is interpolated by the engine."""


@dataclass
class Answered:
    """A prompt with the dense model's own answer behind it.

    Attributes:
        sample: hidden states and positions of prompt and answer, without the answer's last token.
        answer: tokens of the answer; the last so many rows predict them.
    """

    sample: Captured
    answer: int


@torch.no_grad()
def answered(model: Any, inputs: Any, new_tokens: int) -> Answered:
    """Let the dense model answer greedily, and capture what reaches layer 0 of both.

    Args:
        model: of a known family.
        inputs: a batch of one, on the model's device and in its dtype.
        new_tokens: the longest answer.
    """
    prompt = inputs["input_ids"].shape[1]
    config = model.generation_config
    end = config.eos_token_id
    pad = config.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end or 0
    output = model.generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=new_tokens, pad_token_id=pad
    )
    answer = output.shape[1] - prompt
    whole = dict(inputs)
    whole["input_ids"] = output[:, :-1]
    # One number per token: text is 1 in the attention mask and 0 among the kinds of token.
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in whole:
            whole[name] = torch.nn.functional.pad(whole[name], (0, answer - 1), value=value)
    return Answered(capture(model, whole), answer)


@torch.no_grad()
def measure(
    model: Any, index: int, selector: LayerSelector, samples: Sequence[Answered], causal: bool
) -> tuple[float, ...]:
    """What is lost when layer `index` keeps each of `RATIOS`, the other layers dense.

    The selection is the one of prefill: the answer's tokens run through the layer, but neither
    score nor are scored.

    Args:
        model: of a known family.
        index: of the layer whose input the samples hold.
        selector: of that layer.
        samples: not written to.
        causal: as in `importance`.

    Returns:
        One loss for each of `RATIOS`: KL of the answer's tokens to the dense model's, in nats,
        mean over tokens, then over samples.
    """
    family = family_of(model)
    layers: Any = family.layers(model)
    implementation = family.text_model(model).config._attn_implementation  # type: ignore[union-attr]
    layer = layers[index]
    norm = layer.input_layernorm.weight
    selector = selector.to(norm.device, norm.dtype)
    total = torch.zeros(len(RATIOS), dtype=torch.float64)
    for one in samples:
        hidden, positions = on_device(layer, one.sample)
        visual = one.sample.visual.to(hidden.device)
        asked = ~visual
        asked[:, asked.shape[1] - one.answer + 1 :] = False
        scores = importance(hidden, selector, visual, asked, causal)
        outcomes = [run_layer(layer, implementation, hidden, positions)]
        for ratio in RATIOS:
            kept = Keep((ratio,)).count(0, int(visual.sum()))
            counts = torch.tensor([kept], device=hidden.device)
            rows, _ = select(scores, counts, ~visual, kept + int((~visual).sum()))
            out = run_layer(
                layer,
                implementation,
                gather_hidden(hidden, rows),
                gather_positions(positions, rows),
            )
            outcomes.append(merge(hidden, rows, out, None))
        # All outcomes go through the other layers as one batch.
        states = torch.cat(outcomes)
        for later in layers[index + 1 :]:
            states = run_layer(later, implementation, states, one.sample.positions)
        found = family.logits(model, states[:, -one.answer :]).float().log_softmax(dim=-1)
        dense = found[:1]
        divergence = (dense.exp() * (dense - found[1:])).sum(dim=-1).mean(dim=-1)
        total += divergence.clamp(min=0).double().cpu()
    return tuple((total / len(samples)).tolist())


def solve(losses: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """The schedules of least total loss for each of `AVERAGES`: one ratio per layer.

    Exact dynamic programming over `UNITS`, taking the loss of several layers for the sum of theirs
    alone. A loss that is smaller than one measured at more tokens is an accident of the samples,
    and raised to it.

    Args:
        losses: `[layer][ratio]`, as `measure` gives them.

    Returns:
        Sorted by mean, no two alike, the mean at most the average solved for.
    """
    count = len(losses)
    limit = int(max(AVERAGES) * UNITS * count)
    best = [0.0] * (limit + 1)
    choices: list[list[int]] = []
    for layer in losses:
        costs = list(zip((*STEPS, UNITS), _falling(layer), strict=True))
        chosen = [0] * (limit + 1)
        following = [0.0] * (limit + 1)
        for units in range(limit + 1):
            following[units], chosen[units] = min(
                (best[units - step] + cost, step) for step, cost in costs if step <= units
            )
        best = following
        choices.append(chosen)
    found = []
    for average in AVERAGES:
        units = int(average * UNITS * count)
        ratios = []
        for chosen in reversed(choices):
            ratios.append(chosen[units] / UNITS)
            units -= chosen[units]
        found.append(tuple(reversed(ratios)))
    by_mean = {sum(ratios): ratios for ratios in found if any(ratios)}
    return tuple(by_mean[mean] for mean in sorted(by_mean))


def _falling(losses: Sequence[float]) -> list[float]:
    """The losses at `STEPS` and at everything, none smaller than one after it."""
    found = [0.0]
    for loss in reversed(losses):
        found.append(max(found[-1], loss))
    return found[::-1]
