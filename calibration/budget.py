"""Where visual tokens are worth their cost.

Layers differ: some need every visual token, most need hardly any. What a layer loses at a few
values of `k` is measured with that layer alone restricted, and a layer average is then spent where
it lowers the sum of the losses most.

Measured on pocket with the selectors of then, of the paper's form (dense 96.9 %, 225 calibration
scenes of which 75 ask for counts, 105 questions of easy-VQA's train split; percent right, KL of
the answer in brackets; the same selectors throughout; schedules of `solve`, not refined):

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
  key and value are worth, to first order) instead of `S*`, as an oracle: under a uniform ratio 83.1
  against 77.3 % at 11 %, under the budget 91.1 against 90.7 %: the budget makes up for the score.
- Other scores than the product of both column means, as oracles under one refined schedule at 11 %
  (percent right, KL; and under the uniform ratio). The budget levels them; what is left is
  counting, 72 to 76 % with each of them (dense 91 %), and random choice is far behind:

      product of the column means   92.0 (.113)   77.3
      visual rows alone             88.0 (.211)   74.7
      text rows alone               90.7 (.086)   77.8
      last text row                 90.2 (.159)   84.0
      sum of the column means       92.0 (.105)   76.9
      product, heads by maximum     90.7 (.115)   76.9
      mean of products per head     90.7 (.121)   76.9
      random                        66.7 (1.22)   43.6
- A `k` that differs from image to image, each layer covering a fixed share of its importance, the
  same average over 390 scenes: -.8 points (-2.8 to +1.3) under the schedule for 11 %, -2.8 (-5.6 to
  -.3) for 5 %, -3.6 (-7.4 to +.3) under a uniform 11 %; with `k` held between half and twice the
  fixed one 0 (-2.1 to +1.8), -3.3, -2.1. Counting loses most. One factor per image for the whole
  schedule, by how spread its importance is: 0, -3.1, -2.1 (with 1 to 4 % fewer tokens).
- The table's loss as a mean of roots, of fourth roots or of clipped losses: no difference beyond
  chance (89.3 to 90.7 % at 11 %).
"""

from collections.abc import Sequence
from typing import Any

import torch

from alvts_cli.engine import Keep, LayerSelector
from alvts_cli.families import family_of

from .answers import (
    BATCH_TOKENS,
    Answered,
    Asking,
    answer_divergence,
    check_finite,
    run_restricted,
    score,
)
from .capture import on_device, run_layer

UNITS = 64
"""A layer keeps so many of these: schedules are in 64ths of the visual tokens."""

STEPS = (0, 2, 6, 16)
"""Units at which a layer's loss is measured; at all `UNITS` of them it is nothing."""

RATIOS = tuple(step / UNITS for step in STEPS)

AVERAGES = (3, 7, 14, 21)
"""Units per layer that schedules are found for: 5, 11, 22 and 33 %. What lies between them is
interpolated by the engine."""


@torch.no_grad()
def measure(
    model: Any, index: int, selector: LayerSelector, samples: Sequence[Answered]
) -> tuple[float, ...]:
    """What is lost when layer `index` keeps each of `RATIOS`, the other layers dense.

    The selection is the one of prefill: the answer's tokens run through the layer, but neither
    score nor are scored.

    Args:
        model: of a known family.
        index: of the layer whose input the samples hold.
        selector: of that layer.
        samples: not written to.

    Returns:
        One loss for each of `RATIOS`: KL of the answer's tokens to the dense model's, in nats,
        mean over tokens, then over samples.

    Raises:
        AlvtsError: a loss that is not finite.
    """
    family = family_of(model)
    layers: Any = family.layers(model)
    text_model: Any = family.text_model(model)
    implementation = text_model.config._attn_implementation
    layer = layers[index]
    norm = layer.input_layernorm.weight
    selector = selector.to(norm.device, norm.dtype)
    total = torch.zeros(len(RATIOS), dtype=torch.float64)
    for one in samples:
        hidden, positions = on_device(layer, one.sample)
        visual = one.sample.visual.to(hidden.device)
        text = ~visual
        count = int(one.sample.visual.sum())
        prompt = Asking.of(one.sample.visual, one.asked).to(hidden.device)
        scores = score(layer, selector, hidden, positions, prompt)
        outcomes = [run_layer(layer, implementation, hidden, positions)]
        for ratio in RATIOS:
            kept = Keep((ratio,)).count(0, count)
            texts = visual.shape[1] - count
            outcomes.append(
                run_restricted(layer, implementation, hidden, positions, text, texts, scores, kept)
            )
        # Several outcomes go through the other layers together.
        answers = []
        for states in torch.cat(outcomes).split(max(1, BATCH_TOKENS // visual.shape[1])):
            for later in layers[index + 1 :]:
                states = run_layer(later, implementation, states, one.sample.positions)
            answers.append(family.logits(model, states[:, -one.answer :]))
        found = torch.cat(answers).float().log_softmax(dim=-1)
        # A Mac's GPU has no float64.
        total += answer_divergence(found[:1], found[1:]).cpu().double()
    check_finite(float(total.sum()), model.dtype)
    return tuple((total / len(samples)).tolist())


def solve(losses: Sequence[Sequence[float]], average: int) -> tuple[int, ...]:
    """The units of every layer that have the least sum of losses.

    Exact dynamic programming over `STEPS`, taking the loss of several layers for the sum of theirs
    alone. A loss that is smaller than one measured at more tokens is an accident of the samples,
    and raised to it. What is left, because `STEPS` cannot spend it or it lowers nothing, goes to
    the first layers.

    Args:
        losses: `[layer][ratio]`, as `measure` gives them.
        average: units per layer.

    Returns:
        One number per layer, `average * L` in all.
    """
    limit = average * len(losses)
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
    found: list[int] = []
    left = limit
    for chosen in reversed(choices):
        found.insert(0, chosen[left])
        left -= chosen[left]
    for i, units in enumerate(found):
        more = min(left, UNITS - units)
        found[i] += more
        left -= more
    return tuple(found)


def _falling(losses: Sequence[float]) -> list[float]:
    """The losses at `STEPS` and at everything, none smaller than one after it."""
    found = [0.0]
    for loss in reversed(losses):
        found.append(max(found[-1], loss))
    return found[::-1]
