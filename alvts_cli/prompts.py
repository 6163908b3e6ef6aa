"""From a picture and a question to what the model takes."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps
from transformers import BatchFeature, PreTrainedTokenizerBase

from .errors import AlvtsError
from .files import open_regular
from .video import Video

MARKER = "<image>"
"""Where an image stands in a prompt, in every family; without one, images come first."""

# Formats that PIL decodes by itself: no external program is ever started by a picture.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# PIL only warns up to twice the size that `read_image` refuses. `catch_warnings`, which could make
# that an error, is not safe where several threads read.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

# For processors without a chat template: what stands before the user's words, for an image and
# after the user's words.
_LLAVA = ("USER: ", "{token}\n", " ASSISTANT:")
_CHATML = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "<|vision_start|>{token}<|vision_end|>",
    "<|im_end|>\n<|im_start|>assistant\n",
)
_SMOL = ("<|im_start|>User:", "{token}", "<end_of_utterance>\nAssistant:")
_TURNS = {
    "Qwen": _CHATML,
    "InternVL": ("<|im_start|>user\n", "{token}\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "LlavaOnevision": ("<|im_start|>user ", "{token}\n", "<|im_end|><|im_start|>assistant\n"),
    "Idefics3": _SMOL,
    "SmolVLM": _SMOL,
    "Glm": (
        "[gMASK]<sop><|user|>\n",
        "<|begin_of_image|>{token}<|end_of_image|>",
        "<|assistant|>\n",
    ),
    "Pixtral": ("<s>[INST]", "{token}", "[/INST]"),
}
"""By how the name of the processor's class begins; `_LLAVA` for all others."""


def read_image(source: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """A picture from a file, RGB, turned as its EXIF data says, on white where it is transparent.

    Args:
        source: a path, or an open binary file.
        name: what to call it in a message; by default the path.

    Raises:
        AlvtsError: no such file, no picture, cut short, of 32-bit numbers, or so large that it may
            be a bomb.
    """
    name = name or str(source)
    file = open_regular(source, "image") if isinstance(source, Path) else source
    try:
        with file, Image.open(file, formats=FORMATS) as image:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise Image.DecompressionBombError
            upright = ImageOps.exif_transpose(image)
            mode = upright.mode
            # What these formats hold as "I" is of 16 bits; that of others is of any range.
            if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
                upright = _eight_bit(upright)
            elif mode in ("I", "F"):
                raise AlvtsError(
                    f"{name} has pixels of 32-bit numbers, of which nothing says what is white; "
                    "save it with 8 or 16 bits"
                )
            return _on_white(upright)
    except Image.DecompressionBombError:
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise AlvtsError(f"{name} has more than {limit} million pixels") from None
    # What the decoders raise on damaged files.
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged or not a picture"
        raise AlvtsError(f"cannot read the image {name}: {reason}") from None


def _eight_bit(grey: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits, as PIL itself takes them of colours; of grey it would cut off, and
    nearly everything would be white."""
    return Image.fromarray((np.asarray(grey) >> 8).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, as viewers show it: what is transparent hides its colours, and white is behind."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() != (255, 255):
            white = Image.new("RGBA", layer.size, "white")
            return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def build_inputs(
    processor: Any,
    images: Sequence[Image.Image],
    prompt: str,
    max_tokens: int | None = None,
    videos: Sequence[Video] = (),
) -> BatchFeature:
    """A user turn with `images`, `videos` and `prompt`, ready for the model: a batch of one.

    The processor's chat template is used where there is one, else the family's usual prompt.

    Args:
        processor: of the model.
        images: RGB.
        prompt: the user's words. `<image>` (or the model's own placeholder) in it says where an
            image stands; without any, the images come first.
        max_tokens: what the model takes at most (`max_position_embeddings`).
        videos: they stand behind the last image.

    Raises:
        AlvtsError: neither image nor video, a model that takes no videos, not as many places as
            images, a template without a place for them or that fails, text that is not Unicode,
            or a prompt that is too long.
    """
    if not images and not videos:
        raise AlvtsError("give at least one image")
    if videos and getattr(processor, "video_token", None) is None:
        raise AlvtsError("this model takes no videos; give images")
    rendered = render(processor, [user_turn(processor, prompt, len(images), len(videos))])
    return process(processor, images, rendered, max_tokens, videos)


def user_turn(processor: Any, prompt: str, images: int, videos: int = 0) -> dict[str, Any]:
    """What a user says, as chat templates take it.

    Args:
        processor: of the model.
        prompt: the user's words, with places for the images or without, as in `build_inputs`.
        images: how many go with them; none in a later turn.
        videos: how many, behind the last image.

    Raises:
        AlvtsError: not as many places as images, text that is not Unicode, or a processor of text
            alone.
    """
    check_text(prompt)
    # A tokenizer may know the token, too.
    text_alone = isinstance(processor, PreTrainedTokenizerBase)
    if text_alone or getattr(processor, "image_token", None) is None:
        raise AlvtsError(
            "a processor of pictures, as AutoProcessor gives it for the model, is wanted here, not "
            f"a {type(processor).__name__}"
        )
    parts = _parts(prompt, processor.image_token, images)
    behind = max((i + 1 for i, part in enumerate(parts) if part["type"] == "image"), default=0)
    parts[behind:behind] = [{"type": "video"} for _ in range(videos)]
    return {"role": "user", "content": parts}


def check_text(prompt: str) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        AlvtsError: text that is not Unicode.
    """
    if re.search("[\ud800-\udfff]", prompt):
        raise AlvtsError("the prompt is not text: it holds bytes that are not UTF-8")


def assistant_turn(answer: str) -> dict[str, Any]:
    """What the model said, as chat templates take it."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def process(
    processor: Any,
    images: Sequence[Image.Image],
    rendered: str,
    max_tokens: int | None = None,
    videos: Sequence[Video] = (),
) -> BatchFeature:
    """A rendered conversation, its images and its videos, ready for the model: a batch of one.

    Raises:
        AlvtsError: not one place for each image and video, what the processor refuses or makes
            otherwise than processors do, or more tokens than `max_tokens`.
    """
    for kind, these in {"image": images, "video": videos}.items():
        if these and rendered.count(getattr(processor, f"{kind}_token")) != len(these):
            raise AlvtsError(
                f"the chat template of this model's processor has no place for {kind}s"
            )
    # All frames: they are those that were to be looked at.
    more: dict[str, Any] = {}
    if videos:
        more = {"videos": [list(video.frames) for video in videos], "do_sample_frames": False}
        more["video_metadata"] = [video.metadata for video in videos]
    bos = processor.tokenizer.bos_token
    try:
        inputs: BatchFeature = processor(
            images=list(images) or None,
            text=[rendered],
            return_tensors="pt",
            # Some templates write the first token themselves.
            add_special_tokens=not (bos and rendered.startswith(bos)),
            **more,
        )
    # Whatever a processor out of a model's folder raises.
    except Exception as error:
        raise AlvtsError(f"the processor refused the prompt: {error}") from error
    shape: Any = getattr(inputs.get("input_ids"), "shape", ())
    if len(shape) != 2 or shape[0] != 1:
        raise AlvtsError("the processor made no input_ids of the prompt as a tensor [1, T]")
    tokens = shape[1]
    if max_tokens is not None and tokens > max_tokens:
        raise AlvtsError(
            f"prompt and images make {tokens} tokens but the model takes {max_tokens}; "
            "shorten the prompt or give fewer images"
        )
    return inputs


def _parts(prompt: str, token: str, images: int) -> list[dict[str, str]]:
    """The turn as a chat template wants it: images and pieces of text in order."""
    pieces = prompt.replace(token, MARKER).split(MARKER)
    places = len(pieces) - 1
    if places == 0:
        pieces = [""] * images + pieces
    elif places != images:
        raise AlvtsError(f"the prompt has {places} places for images ({MARKER}) but gets {images}")
    parts = []
    for i, piece in enumerate(pieces):
        if i > 0:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def render(processor: Any, turns: Sequence[dict[str, Any]]) -> str:
    """A conversation in the words that the model reads, up to where its next answer begins.

    Args:
        processor: of the model.
        turns: as chat templates take them, the last one the user's.

    Raises:
        AlvtsError: the chat template fails.
    """
    own = getattr(processor, "chat_template", None)
    if not own and len(turns) == 1:
        before, _, after = _turn(processor)
        return before + "".join(_words(processor, part) for part in turns[0]["content"]) + after
    try:
        return processor.apply_chat_template(
            list(turns),
            chat_template=own or usual_template(processor),
            add_generation_prompt=True,
            tokenize=False,
        )
    # A template is a program: it may fail in any way.
    except Exception as error:
        raise AlvtsError(f"the chat template of this model's processor fails: {error}") from error


def usual_template(processor: Any) -> str:
    """What `build_inputs` makes without a chat template, as one in Jinja, for several turns.

    Args:
        processor: of the model, without a chat template.
    """
    before, image, after = _turn(processor)
    # What stands once in front of all turns, such as a system turn, is left out of later ones.
    again = before[max(0, before.rfind("<|im_start|>")) :]
    again = again.removeprefix("<s>").removeprefix("[gMASK]<sop>")
    ends = (repr(end + "\n") for end in ("<|im_end|>", "<end_of_utterance>") if end in after)
    # GLM ends an answer with what begins the next turn.
    end = next(ends, "''" if after.startswith("<|assistant|>") else "eos_token")
    space = "" if after.endswith("\n") else " "
    return (
        "{% for message in messages %}{% if message.role == 'user' %}"
        f"{{{{ {before!r} if loop.first else {again!r} }}}}"
        "{% for part in message.content %}"
        f"{{{{ part.text if part.type == 'text' else {image!r} }}}}"
        f"{{% endfor %}}{{{{ {after!r} }}}}"
        "{% elif message.role == 'assistant' %}"
        f"{{{{ {space!r} }}}}{{% for part in message.content %}}{{{{ part.text }}}}{{% endfor %}}"
        f"{{{{ {end} }}}}"
        "{% else %}{{ raise_exception('this model has no place for ' + message.role + ' turns') }}"
        "{% endif %}{% endfor %}"
    )


def _words(processor: Any, part: dict[str, str]) -> str:
    """A part of a turn, where there is no chat template."""
    if part["type"] == "text":
        return part["text"]
    image = _turn(processor)[1]
    if part["type"] == "video":
        image = image.replace(processor.image_token, processor.video_token)
        return image.replace("_of_image", "_of_video")
    return image


def _turn(processor: Any) -> tuple[str, str, str]:
    """What stands before the user's words, for an image and after the user's words."""
    name = type(processor).__name__
    known = (turn for begin, turn in _TURNS.items() if name.startswith(begin))
    before, image, after = next(known, _LLAVA)
    return before, image.format(token=processor.image_token), after


def padding_token(model: Any) -> int:
    """What `generate` is to fill finished answers with: the padding token of the model's generation
    config, or else its first end token, or 0."""
    config = model.generation_config
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    end = config.eos_token_id
    return int(end[0] if isinstance(end, list) else end or 0)
