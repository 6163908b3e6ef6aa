"""What `attach` is asked for, checked before anything of the model is touched."""

from collections.abc import Mapping
from typing import Any

from ..errors import AlvtsError
from ..families import check_whole, family_of
from ..families.layer import parts_of
from .attachment import Attachment, Compile
from .compiling import keep_in_place
from .forward import Pieces, Scorer
from .keep import Keep, KeepArgument, check_length, resolve_keep
from .placing import (
    Selectors,
    check_pieces,
    check_selectors,
    make_pieces,
    make_scorer,
    place_selectors,
)
from .policy import NAMED, Policy, parse_policy, policy_for
from .scoring import LayerSelector


def attach(
    model: Any,
    selectors: Selectors,
    keep: KeepArgument | Keep = None,
    *,
    policy: Policy | str | None = None,
    compile: Compile = False,
) -> "Attachment":
    """Make `model` select its visual tokens in every layer, until the attachment is detached.

        with attach(model, selectors, keep=0.11):
            model.generate(**inputs)

    Args:
        model: a vision-language model of a known family.
        selectors: fitted for this model.
        keep: see `resolve_keep`; a layer average is spent as the selectors' schedules say, where
            they have any, and None takes their default.
        policy: which pieces are in use, or the name of a policy (see `policy.NAMED`); None takes
            what calibration picked for this `keep`.
        compile: run the decoder's selecting prefill, and single tokens behind it, through
            `torch.compile`, without graph breaks (see `compiling`); True, or keyword arguments of
            `torch.compile`. True takes CUDA graphs on a GPU, `{"mode": "reduce-overhead"}`.

    Raises:
        AlvtsError: unknown architecture, sliding windows, an unknown attention implementation,
            an argument of another kind, an invalid `keep`, selectors of another model, selectors
            without what the policy needs, or a model that is attached already or compiled by
            someone else.
    """
    check_whole(model)
    if not isinstance(compile, bool | Mapping):
        raise AlvtsError(f"compile is True, False or options of torch.compile, not {compile!r}")
    layers: Any = family_of(model).layers(model)
    check_selectors(selectors, layers)
    resolved = keep_of(selectors, keep)
    for i, selector in enumerate(selectors.layers):
        if selector is None and resolved.chooses(i):
            raise AlvtsError(
                f"layer {i} has no selector but keep={resolved.values[i]}; keep 1.0 or 0 there"
            )
        if selector is not None:
            parts = parts_of(layers[i])
            mine, its = f"a width of {selector.width}", f"a width of {len(parts.norm.weight)}"
            if isinstance(selector, LayerSelector):
                if not hasattr(parts.key, "out_features"):
                    raise AlvtsError(
                        f"the k_proj of layer {i} is a {type(parts.key).__name__} that does not "
                        "say how many numbers it makes; give it out_features, as nn.Linear has"
                    )
                mine += f" and keys of {selector.up.shape[0]}"
                its += f" and keys of {parts.key.out_features}"
            if mine != its:
                raise AlvtsError(
                    f"the selector of layer {i} is for {mine} but the model has {its}; "
                    "use selectors fitted for this model"
                )
    if isinstance(policy, str):
        policy = parse_policy(policy)
    chosen = policy_of(selectors, resolved) if policy is None else policy
    if not isinstance(chosen, Policy):
        raise AlvtsError(f"policy is a Policy or one of {', '.join(NAMED)}, not {policy!r}")

    def place() -> tuple[Scorer, Pieces]:
        placed = place_selectors(selectors.layers, layers)
        pieces = make_pieces(model, selectors, chosen, placed)
        if compile is not False:
            keep_in_place([one for one in placed if one is not None], pieces)
        return make_scorer(placed, layers), pieces

    return Attachment(model, place, resolved, compile)


def policy_of(selectors: Selectors, keep: Keep) -> Policy:
    """What calibration picked for the layer average of `keep`. A number of tokens is a share of
    those that a calibration sample has."""
    values = keep.values
    tokens = max(1, selectors.visual_tokens)
    ratios = [min(1.0, v / tokens) if isinstance(v, int) else v for v in values]
    return policy_for(selectors.picked, sum(ratios) / len(ratios))


def keep_of(selectors: Selectors, keep: KeepArgument | Keep) -> Keep:
    """What each layer keeps when `attach` is given `keep`; the same errors as `resolve_keep`."""
    layers = len(selectors.layers)
    if not isinstance(keep, Keep):
        return resolve_keep(keep, layers, selectors.schedules, selectors.default_keep)
    check_length(keep, layers)
    return keep


def attach_scorer(
    model: Any, scorer: Scorer, keep: KeepArgument | Keep, pieces: Pieces | None = None
) -> "Attachment":
    """`attach` for any other way of ranking tokens; the same errors. `pieces` come from
    `make_pieces`, for the model as it is; without them what is skipped is left alone."""
    check_whole(model)
    if isinstance(scorer, type) or not callable(getattr(scorer, "importance", None)):
        name = getattr(scorer, "__name__", type(scorer).__name__)
        raise AlvtsError(f"a scorer is an object with a method importance, not {name}")
    layers: Any = family_of(model).layers(model)
    if not isinstance(keep, Keep):
        keep = resolve_keep(keep, len(layers))
    check_length(keep, len(layers))
    made = Pieces() if pieces is None else pieces

    def place() -> tuple[Scorer, Pieces]:
        check_pieces(made, layers)
        return scorer, made

    return Attachment(model, place, keep)
