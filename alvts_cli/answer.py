"""A question about images, answered by a loaded model."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import TextStreamer

from .artifact import Artifact, load_artifact, quantised
from .bench.timing import generate
from .engine import Watch, attach
from .errors import AlvtsError
from .families import family_of
from .models import Loaded, find_selectors
from .prompts import build_inputs
from .terminal import note, say
from .video import Video


@dataclass(frozen=True)
class Answer:
    """What was said, and what it took.

    Attributes:
        answer: without special tokens.
        mode: "dense" or "selective".
        visual_tokens: in the prompt.
        visual_tokens_kept: layer average.
        text_tokens: in the prompt.
        new_tokens: of the answer, its end token included.
        vision_ms: vision tower.
        prefill_ms: language model on the prompt.
        ttft_ms: from the call to the first token.
        decode_ms_per_token: mean of the tokens after the first; 0 if there was none.
        kv_bytes: cache after prefill.
    """

    answer: str
    mode: str
    visual_tokens: int
    visual_tokens_kept: float
    text_tokens: int
    new_tokens: int
    vision_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms_per_token: float
    kv_bytes: int


class Streamer(TextStreamer):
    """Prints words as they come, as `say` does."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is sure."""
        say(text, end="\n" if stream_end else "")


def prepare(
    loaded: Loaded,
    pictures: Sequence[Image.Image],
    prompt: str,
    max_new_tokens: int,
    videos: Sequence[Video] = (),
) -> dict[str, Tensor]:
    """Inputs on the model's device and in its dtype.

    Raises:
        AlvtsError: what `build_inputs` refuses; prompt and answer must fit the model together.
    """
    longest = longest_prompt(loaded, max_new_tokens)
    inputs = build_inputs(loaded.processor, pictures, prompt, longest, videos)
    return dict(inputs.to(loaded.model.device, loaded.model.dtype))


def longest_prompt(loaded: Loaded, max_new_tokens: int) -> int:
    """How many tokens a prompt may have beside its answer.

    Raises:
        AlvtsError: none.
    """
    most = loaded.model.config.text_config.max_position_embeddings
    if max_new_tokens >= most:
        raise AlvtsError(
            f"an answer of up to {max_new_tokens} tokens leaves no room for a prompt: the model "
            f"takes {most}; lower --max-new-tokens"
        )
    return int(most - max_new_tokens)


def selectors_for(loaded: Loaded, named: str | None, other_weights: bool = False) -> Artifact:
    """The selectors that are named, or those that are found, checked against the model.

    Raises:
        AlvtsError: none are found, the file is damaged, or it is of another model.
    """
    artifact = load_artifact(find_selectors(loaded, named))
    artifact = artifact.check_model(loaded.model, loaded.name, other_weights)
    if quantised(loaded.model):
        note(
            f"note: {loaded.name} is quantised; the selectors were fitted on {artifact.model_id}, "
            "with more bits or not"
        )
    if artifact.other_weights:
        note(f"note: {of_other_weights(artifact, loaded.name)}")
    return artifact


def of_other_weights(artifact: Artifact, name: str) -> str:
    """What every result says where selectors are used on weights they were not fitted for."""
    return f"the selectors were fitted on the weights of {artifact.model_id}, not of {name}"


def answer(
    loaded: Loaded,
    inputs: dict[str, Tensor],
    selectors: Artifact | None,
    keep: str | None,
    max_new_tokens: int,
    stream: bool,
    watch: Watch | None = None,
) -> Answer:
    """Answer greedily.

    Args:
        loaded: the model.
        inputs: from `prepare`.
        selectors: of this model; None for the dense model.
        keep: as `resolve_keep` reads it; None for what the selectors say.
        max_new_tokens: longest answer.
        stream: print the words as they come.
        watch: of the `Attachment`; not called for the dense model.

    Raises:
        AlvtsError: a `keep` that does not fit the model.
    """
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    streamer = Streamer(tokenizer, skip_special_tokens=True) if stream else None
    selecting: Any = nullcontext() if selectors is None else attach(model, selectors, keep)
    with selecting as attachment:
        if attachment is not None:
            attachment.watch = watch
        made = generate(
            model,
            inputs,
            max_new_tokens,
            attachment,
            on_tokens=None if streamer is None else streamer.put,
        )
        last = None if attachment is None else attachment.last
    if streamer is not None:
        streamer.end()
    visual = int(family_of(model).visual_mask(model, inputs["input_ids"]).sum())
    new = made.tokens.shape[1]
    return Answer(
        answer=tokenizer.decode(made.tokens[0], skip_special_tokens=True).strip(),
        mode="dense" if selectors is None else "selective",
        visual_tokens=visual,
        visual_tokens_kept=float(visual) if last is None else last.layer_average,
        text_tokens=inputs["input_ids"].shape[1] - visual,
        new_tokens=new,
        vision_ms=made.vision_ms,
        prefill_ms=made.prefill_ms,
        ttft_ms=made.ttft_ms,
        decode_ms_per_token=made.decode_ms,
        kv_bytes=made.kv_bytes,
    )
