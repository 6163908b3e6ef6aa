"""The numbers of any model of a known family, from its config: counted on tensors without numbers.

`python -m alvts_cli.plan.describe` writes those of the known models into `models.json`, which
spares `alvts plan` loading torch. Run it whenever a model is added, or a launch saved (with names:
for these models alone); a test says when.
"""

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from ..bench.inputs import synthetic_inputs, usual_visual_tokens
from ..bench.launches import KEEP, TEXT, VISUAL, Prompts, count_launches
from ..engine.flops import head_size, mlp_of
from ..engine.keep import Keep
from ..engine.policy import NAMED, Policy, parse_policy
from ..errors import AlvtsError
from ..families import family_of
from ..files import write_whole
from ..memory import count_parameters
from ..models import first_line, resolve_name
from ..shapes import SHAPES, cut_decoder, shape_config
from .shape import MODELS, Counts, Kind, Moved, Shape, Vision

_KEPT = {
    "dense": 1.0,
    "chooses": KEEP,
    "goes_on": KEEP,
    "goes_on_again": KEEP,
    "goes_on_otherwise": KEEP / 2,
    "text_only": 0,
    "text_goes_on": 0,
}
"""By kind, of the visual tokens where `count_launches` counts it."""

_MOST = {"text_config": ("decoder", 10_000), "vision_config": ("vision tower", 1000)}
"""Layers: more than selectors are made for, and many times those of any tower. A tower is counted
layer by layer."""


def describe(
    name: str, config: Any, policies: Mapping[str, Policy] = NAMED, device: str = "cuda"
) -> Shape:
    """What `alvts plan` needs of a model. Takes some seconds; no weights are made.

    Args:
        name: as the user calls it.
        config: of a model of a known family.
        policies: to count the launches of, by name.
        device: that launches are counted on, "cuda" or "cpu".

    Raises:
        AlvtsError: some of its layers have experts and others none, or experts that all share; or
            more layers than any model has.
    """
    for part, (called, most) in _MOST.items():
        about = getattr(config, part)
        layers = getattr(about, "num_hidden_layers", getattr(about, "depth", 0))
        if layers > most:
            raise AlvtsError(
                f"alvts plan knows models of up to {most:,} layers in the {called}; {name} has "
                f"{layers:,}"
            )
    text = config.text_config
    mlp, *others = {mlp_of(text, i) for i in range(text.num_hidden_layers)}
    if others:
        raise AlvtsError(
            f"alvts plan knows models whose layers are all alike; some of {name} have experts and "
            "others none"
        )
    if mlp.shared:
        raise AlvtsError(f"alvts plan knows no experts that all tokens share, as {name} has them")
    counts = {
        policy: _counts(config, policy, device)
        for policy in {replace(policy, every=1) for policy in policies.values()}
    }
    return Shape(
        name=name,
        width=text.hidden_size,
        mlp=mlp.size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_size(text),
        vocabulary=text.vocab_size,
        positions=text.max_position_embeddings,
        parameters=_parameters(config),
        visual_tokens=usual_visual_tokens(config),
        vision=_vision(config),
        # How often a policy chooses makes no other layers.
        counts={name: counts[replace(policy, every=1)] for name, policy in policies.items()},
        experts=mlp.experts,
        chosen=mlp.chosen,
        adds_behind=family_of(config).adds_behind(config),
    )


def describe_named(name: str, policy: str, device: str = "cuda") -> Shape:
    """`describe` for a model by its name, hub id or folder; only its config is read.

    Args:
        name: the names of known models need nothing on this machine.
        policy: the only one to count the launches of, by its name: each takes seconds.
        device: as `describe` has it.

    Raises:
        AlvtsError: an unknown policy, no such model, a config that is not on this machine, or an
            unknown architecture.
    """
    policies = {policy: parse_policy(policy)}
    if name in SHAPES:
        return describe(name, shape_config(name), policies, device)

    from transformers import AutoConfig

    model_id = resolve_name(name)
    try:
        config = AutoConfig.from_pretrained(model_id, local_files_only=True)
    except Exception as error:
        # The libraries raise half a dozen types, for a file that is missing or no config.
        raise AlvtsError(
            f"cannot read the config of {model_id} on this machine: {first_line(error)}; pass the "
            "folder that it is in"
        ) from None
    family_of(config)
    try:
        return describe(name, config, policies, device)
    except AlvtsError:
        raise
    except Exception as error:
        # As above: transformers builds a model of whatever numbers stand there.
        raise AlvtsError(
            f"the config of {model_id} makes no model that runs: {first_line(error)}"
        ) from None


def _counts(config: Any, policy: Policy, device: str) -> Counts:
    """Launches by the kind of a layer, and bytes as functions of the tokens: from two prompts."""
    prompts = [Prompts(visual_tokens=times * VISUAL) for times in (1, 4)]
    counted = [count_launches(config, policy, prompt, device=device) for prompt in prompts]
    tokens = [prompt.visual_tokens + prompt.text_tokens for prompt in prompts]
    running = counted[0].moved["dense"] / tokens[0]

    def line(name: str, running: float, kept: float = 0) -> Kind:
        """What it moves beside a dense layer on as few tokens, as a straight line."""
        first, last = (
            one.moved[name] - running * (TEXT + Keep((kept,)).count(0, prompt.visual_tokens))
            for one, prompt in zip(counted, prompts, strict=True)
        )
        every = (last - first) / (tokens[1] - tokens[0])
        return Kind(getattr(counted[0], name), Moved(running, first - every * tokens[0], every))

    return Counts(
        **{name: line(name, running, kept) for name, kept in _KEPT.items()},
        once=line("once", 0),
        rest=line("rest", 0),
        decode=counted[0].decode,
        decode_dense=counted[0].decode_dense,
        decode_rest=counted[0].decode_rest,
    )


def _parameters(config: Any) -> int:
    """All weights of a model whose layers are alike: two shallow ones tell, however deep it is."""
    first, second = (count_parameters(_shallow(config, layers)) for layers in (1, 2))
    return first + (config.text_config.num_hidden_layers - 1) * (second - first)


def _shallow(config: Any, layers: int) -> Any:
    """`config` with so many decoder layers."""
    config = copy.deepcopy(config)
    cut_decoder(config, layers)
    return config


def _vision(config: Any) -> Vision:
    """The vision tower on one usual image.

    Weights, and what follows from them, have no numbers; pixels and the small tensors that say how
    images lie do: some towers look.
    """
    from transformers import AutoModelForImageTextToText

    # The decoder is thrown away, and building all of it takes longer than the tower.
    config = _shallow(config, 1)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    like: Any = SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cpu"))
    image = {
        name: value
        for name, value in synthetic_inputs(like, 1, None, 2).items()
        if name not in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    tally, flops = _Tally(), FlopCounterMode(display=False)
    with torch.no_grad(), _Attention(tally), tally, flops:
        model.model.get_image_features(**image)
    decoder = sum(one.numel() for one in family_of(config).text_model(model).parameters())
    tied = getattr(config.text_config, "tie_word_embeddings", config.tie_word_embeddings)
    head = 0 if tied else model.lm_head.weight.numel()
    every = sum(one.numel() for one in model.parameters())
    return Vision(flops.get_total_flops() + tally.flops, every - decoder - head, tally.launches)


_FEW = 2**22


class _Tally(TorchDispatchMode):
    """Counts operators on tensors without numbers, whatever else meets them.

    What is made of tensors with numbers, or of nothing, has numbers too where they are few: towers
    ask for how images lie on the device of their weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(map(_empty, tree_leaves((args, kwargs)))):
            made = func(*args, **kwargs)
            if _empty(made) and made.numel() <= _FEW:
                made = func(*args, **{**kwargs, "device": torch.device("cpu")})
            return made
        args, kwargs = tree_map(
            lambda one: one.to("meta") if isinstance(one, Tensor) else one, (args, kwargs)
        )
        self.launches += not func.is_view
        return func(*args, **kwargs)


class _Attention(TorchFunctionMode):
    """An attention is one kernel, whichever it is."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self._tally = tally

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key = args[:2]
        self._tally.launches += 1
        self._tally.flops += 4 * query.numel() * key.shape[-2]
        return torch.empty_like(query)


def _empty(one: Any) -> bool:
    return isinstance(one, Tensor) and one.device.type == "meta"


def write_known(names: Sequence[str]) -> None:
    """Write known models' numbers; those of others stay as they are.

    Args:
        names: of `SHAPES`.
    """
    models = json.loads(MODELS.read_text()) if MODELS.is_file() else {}
    for name in names:
        models[name] = asdict(describe(name, shape_config(name)))
        kept = {known: models[known] for known in SHAPES if known in models}
        write_whole(MODELS, f"{json.dumps(kept, indent=1)}\n".encode())


if __name__ == "__main__":
    write_known(sys.argv[1:] or list(SHAPES))
