"""The method written down plainly: whole layers with columns hidden, nothing removed, no cache.

Shares no code with the engine, so that the engine can be held against it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from tiny import IMAGE, VIDEO, Selectors
from torch import Tensor

from alvts_cli.engine import Attachment


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
    hidden: Tensor, selector: Any, visual: Tensor, text: Tensor, causal: bool
) -> Tensor:
    """`[T]` of one sample without padding, from the formulas, with `T x T` stored whole."""
    x = hidden.float()
    x = x / (x.pow(2).mean(-1, keepdim=True) + selector.eps).sqrt()
    query = x @ selector.query.float().T
    if selector.query_bias is not None:
        query = query + selector.query_bias.float()
    logits = query @ (x @ selector.key.float().T).T
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
    attention = logits.softmax(-1)
    score = attention[visual].mean(0)
    if text.any():
        score = score * attention[text].mean(0)
    return score


@contextmanager
def watch_selection() -> Iterator[list[dict[int, list[int]]]]:
    """Positions each selecting layer ran on, one dict per forward, of samples alone.

    The reference takes over the choice, after checking it, because real ties exist: the line
    breaks of LLaVA-NeXT share one embedding, and those that every layer so far has skipped differ
    in the last bit at most.
    """
    forwards: list[dict[int, list[int]]] = []
    plans: list[Any] = []
    select = Attachment._select

    def spy(self: Attachment, i: int, layer: Any, hidden: Tensor, plan: Any, kwargs: Any) -> Any:
        index, valid = select(self, i, layer, hidden, plan, kwargs)
        if not plans or plans[-1] is not plan:
            plans.append(plan)
            forwards.append({})
        assert valid is None
        forwards[-1][i] = index[0].tolist()
        return index, valid

    with patch.object(Attachment, "_select", spy):
        yield forwards


def reference_logits(
    model: Any,
    inputs: dict[str, Tensor],
    selectors: Selectors,
    kept: list[list[int]],
    chunks: list[tuple[int, int]],
    chosen: list[dict[int, list[int]]],
) -> Tensor:
    """Logits `[S, V]` of one sample without padding.

    Args:
        inputs: the whole sequence: prompts of all turns and everything generated.
        kept: `[layer][chunk]`, how many of the visual tokens of the chunk each layer keeps.
        chunks: where the prompts with visual tokens start and end.
        chosen: `[chunk]`, what `watch_selection` saw.

    Raises:
        AssertionError: the choice is not the best by the formulas.
    """
    hidden, positions = decoder_inputs(model, inputs)
    ids = inputs["input_ids"][0]
    visual = (ids == IMAGE) | (ids == VIDEO)
    size = len(ids)
    causal = torch.ones(size, size).tril().bool()
    text_model = model.model.language_model
    with torch.no_grad():
        for i, layer in enumerate(text_model.layers):
            runs = ~visual
            for c, (start, end) in enumerate(chunks):
                inside = torch.zeros(size, dtype=torch.bool)
                inside[start:end] = True
                score = naive_importance(
                    hidden[0, start:end],
                    selectors.layers[i],
                    visual[start:end],
                    ~visual[start:end],
                    selectors.causal,
                )
                score = torch.where(visual[start:end], score, -1.0)
                score = score[visual[start:end]]
                mine = torch.zeros(end - start, dtype=torch.bool)
                mine[chosen[c].get(i, range(end - start))] = True
                assert bool(mine[~visual[start:end]].all())
                mine = mine[visual[start:end]]
                assert int(mine.sum()) == kept[i][c]
                if 0 < kept[i][c] < len(mine):
                    assert score[mine].min() >= score[~mine].max() * (1 - 1e-3)
                runs[start:end][visual[start:end]] = mine
            mask = torch.zeros(size, size).masked_fill(~(causal & runs), -1e9)[None, None]
            new = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=positions,
                position_ids=None,
                past_key_values=None,
            )
            hidden = torch.where(runs[None, :, None], new, hidden)
        return model.lm_head(text_model.norm(hidden))[0]
