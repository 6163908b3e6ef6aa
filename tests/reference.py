"""The method written down plainly: whole layers with columns hidden, nothing removed, no cache.

Shares no code with the engine, so that the engine can be held against it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from tiny import CACHE, IMAGE, VIDEO, Selectors
from torch import Tensor

from alvts_cli.engine import PAPER, Forward, Policy
from alvts_cli.families import family_of


def added_features(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the decoder of a dense run adds behind each layer but the last, `[B, S, D]`."""
    outputs: list[Tensor] = []
    added: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if outputs:
            added.append((args[0] if args else kwargs["hidden_states"]) - outputs[-1])

    layers = family_of(model).layers(model)
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    handles += [
        layer.register_forward_hook(lambda m, a, output: outputs.append(output)) for layer in layers
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return added


def decoder_inputs(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Embeddings `[B, S, D]` with the images in place, and the rotary tables, of a dense run."""
    seen: dict[str, Any] = {}

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen["hidden"] = args[0]
        seen["positions"] = kwargs["position_embeddings"]

    handle = model.model.language_model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    return seen["hidden"], seen["positions"]


def naive_importance(
    layer: Any,
    hidden: Tensor,
    selector: Any,
    positions: tuple[Tensor, Tensor],
    visual: Tensor,
    text: Tensor,
) -> Tensor:
    """`[T]` of one sample without padding, from the formulas, number by number; 0 at text.

    Args:
        layer: whose queries the text has.
        hidden: `[T, D]`.
        positions: the rotary tables, `[T, d]` each.
        visual, text: bool `[T]`.
    """
    tokens, size = len(hidden), positions[0].shape[-1]
    x = [row.double() for row in hidden]
    latent = [selector.down.double() @ (row / _length(row, selector.eps)) for row in x]
    where = [i for i in range(tokens) if visual[i]]
    asking = [i for i in range(tokens) if text[i] and where and i > where[0]] or where
    norm, query = layer.input_layernorm, layer.self_attn.q_proj
    query_norm = getattr(layer.self_attn, "q_norm", None)
    keys = []
    for j in range(tokens):
        key = selector.up.double() @ latent[j]
        if selector.key_bias is not None:
            key = key + selector.key_bias.double()
        heads = key.split(size)
        if selector.key_norm is not None:
            weight = selector.key_norm.double()
            heads = [weight * head / _length(head, selector.eps) for head in heads]
        keys.append([_turn(head, positions, j) for head in heads])
    from_text = torch.zeros(tokens, dtype=torch.float64)
    for i in asking:
        normed = norm.weight.double() * x[i] / _length(x[i], norm.variance_epsilon)
        states = query.weight.double() @ normed
        if query.bias is not None:
            states = states + query.bias.double()
        heads = states.split(size)
        if query_norm is not None:
            weight, eps = query_norm.weight.double(), query_norm.variance_epsilon
            heads = [weight * head / _length(head, eps) for head in heads]
        for h, head in enumerate(heads):
            own = _turn(head, positions, i)
            shared = h * len(keys[0]) // len(heads)
            # The real part of a product with a conjugate is the product of the pairs.
            logits = [(own * keys[j][shared].conj()).real.sum() / size**0.5 for j in range(i + 1)]
            from_text[: i + 1] += torch.stack(logits).softmax(0) / len(heads) / len(asking)
    return (from_text * visual).float()


def _length(row: Tensor, eps: float) -> Tensor:
    return (row.square().mean() + eps).sqrt()


def _turn(head: Tensor, positions: tuple[Tensor, Tensor], i: int) -> Tensor:
    """Rotary position `i` on one head `[d]`, as `d / 2` complex numbers."""
    half = len(head) // 2
    cos, sin = (table[i, :half].double() for table in positions)
    return torch.complex(head[:half], head[half:]) * torch.complex(cos, sin)


@contextmanager
def watch_selection() -> Iterator[list[dict[int, list[int]]]]:
    """Positions each selecting layer ran on, one dict per forward, of samples alone.

    The reference takes over the choice, after checking it, because real ties exist: the line
    breaks of LLaVA-NeXT share one embedding, and those that every layer so far has skipped differ
    in the last bit at most.
    """
    forwards: list[dict[int, list[int]]] = []
    states: list[Any] = []
    before = Forward.before

    def spy(self: Forward, i: int, *args: Any, **kwargs: Any) -> Any:
        changed = before(self, i, *args, **kwargs)
        running = self._running
        if running is not None:
            if not states or states[-1] is not self:
                states.append(self)
                forwards.append({})
            assert running.choice.layout.valid is None
            forwards[-1][i] = running.choice.rows[0].tolist()
        return changed

    with patch.object(Forward, "before", spy):
        yield forwards


def images_of(visual: Tensor) -> list[int]:
    """Which image each of `visual` `[T]` is of, counted from 0; -1 at text."""
    found, count = [], -1
    for i, is_visual in enumerate(visual.tolist()):
        count += is_visual and (i == 0 or not visual[i - 1])
        found.append(count if is_visual else -1)
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


def naive_latent(hidden: Tensor, selector: Any) -> list[Tensor]:
    """`z` of every row of `hidden` `[T, D]`."""
    x = [row.double() for row in hidden]
    return [selector.down.double() @ (row / _length(row, selector.eps)) for row in x]


def naive_diverse(
    importance: Tensor, latent: list[Tensor], images: list[int], policy: Policy
) -> Tensor:
    """What to rank visual tokens by: `S^q (1 - |cos|)`, to the nearest more important one; those
    chosen in turn before all others."""
    places = [i for i, image in enumerate(images) if image >= 0]
    worth = {i: float(importance[i]) ** policy.quality for i in places}
    scores = torch.full(importance.shape, -torch.inf)
    taken: list[int] = []
    left = dict(worth)

    def alike(i: int, j: int) -> float:
        return abs(cosine(latent[i], latent[j])) if images[i] == images[j] else 0.0

    while len(taken) < min(policy.turns, len(places)):
        best = max((i for i in places if i not in taken), key=lambda i: (left[i], -i))
        scores[best] = 1e9 * (100 - len(taken))
        taken.append(best)
        for i in places:
            left[i] = min(left[i], worth[i] * (1 - alike(i, best) ** 2))
    order = left if policy.turns else {i: float(importance[i]) for i in places}
    for i in places:
        more = [j for j in places if j not in taken and order[j] > order[i]]
        if i not in taken:
            scores[i] = left[i] * (1 - max((alike(i, j) for j in more), default=0.0))
    return scores


def naive_members(latent: list[Tensor], images: list[int], kept: list[int]) -> dict[int, list[int]]:
    """Which tokens each of the `kept` ones stands for."""
    members = {i: [i] for i in kept}
    for i, image in enumerate(images):
        near = [j for j in kept if images[j] == image]
        if image >= 0 and i not in members and near:
            members[max(near, key=lambda j: (cosine(latent[i], latent[j]), -j))].append(i)
    return members


def reference_logits(
    model: Any,
    inputs: dict[str, Tensor],
    selectors: Selectors,
    kept: list[list[int]],
    chunks: list[tuple[int, int]],
    chosen: list[dict[int, list[int]]],
    policy: Policy = PAPER,
) -> Tensor:
    """Logits `[S, V]` of one sample without padding.

    Args:
        inputs: the whole sequence: prompts of all turns and everything generated.
        kept: `[layer][chunk]`, how many of the visual tokens of the chunk each layer keeps.
        chunks: where the prompts with visual tokens start and end.
        chosen: `[chunk]`, what `watch_selection` saw.
        policy: the pieces in use.

    Raises:
        AssertionError: the choice is not the best by the formulas.
    """
    hidden, positions = decoder_inputs(model, inputs)
    added = added_features(model, inputs)
    ids = inputs["input_ids"][0]
    visual = (ids == IMAGE) | (ids == VIDEO)
    size = len(ids)
    causal = torch.ones(size, size).tril().bool()
    text_model = model.model.language_model
    ranked: dict[int, tuple[int, Tensor, list[Tensor]]] = {}
    with torch.no_grad():
        for i, layer in enumerate(text_model.layers):
            runs, bias, skipped = ~visual, torch.zeros(size), torch.zeros(size, dtype=torch.bool)
            means: dict[int, Tensor] = {}
            for c, (start, end) in enumerate(chunks):
                inside = torch.zeros(size, dtype=torch.bool)
                inside[start:end] = True
                images = images_of(visual[start:end])
                selects = 0 < kept[i][c] < int(visual[start:end].sum())
                held = ranked.get(c)
                if selects and (held is None or (policy.every and i - held[0] >= policy.every)):
                    score = naive_importance(
                        layer,
                        hidden[0, start:end],
                        selectors.layers[i],
                        tuple(table[0, start:end] for table in positions),
                        visual[start:end],
                        ~visual[start:end],
                    )
                    latent = naive_latent(hidden[0, start:end], selectors.layers[i])
                    if policy.quality is not None:
                        score = naive_diverse(score, latent, images, policy)
                    held = ranked[c] = (i, score, latent)
                mine = torch.zeros(end - start, dtype=torch.bool)
                mine[chosen[c].get(i, range(end - start))] = True
                assert bool(mine[~visual[start:end]].all())
                mine &= visual[start:end]
                assert int(mine.sum()) == kept[i][c]
                if selects:
                    rest = visual[start:end] & ~mine
                    low, high = held[1][mine].min(), held[1][rest].max()
                    assert low >= high - 1e-3 * abs(high)
                    where = mine.nonzero()[:, 0].tolist()
                    for j, those in naive_members(held[2], images, where).items():
                        if policy.mass:
                            bias[start + j] = math.log(len(those))
                        if policy.pool and held[0] == i:
                            means[start + j] = hidden[0, [start + t for t in those]].mean(dim=0)
                runs[start:end] |= mine
                if kept[i][c] < int(visual[start:end].sum()):
                    skipped[start:end] = visual[start:end] & ~mine
            before = hidden.clone()
            for t, mean in means.items():
                hidden[0, t] = mean
            mask = torch.zeros(size, size).masked_fill(~(causal & runs), -1e9) + bias
            mask = mask[None, None]
            new = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=positions,
                position_ids=None,
                **{CACHE: None},
            )
            hidden = before
            if policy.carry:
                carry = selectors.carries[i]
                for t in skipped.nonzero()[:, 0].tolist():
                    normed = hidden[0, t] / _length(hidden[0, t], carry.eps)
                    hidden[0, t] = hidden[0, t] + carry.up @ (carry.down @ normed)
            hidden = torch.where(runs[None, :, None], new, hidden)
            if i < len(added):
                hidden = hidden + added[i]
        return model.lm_head(text_model.norm(hidden))[0]
