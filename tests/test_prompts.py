"""From a picture and a question to the model's inputs."""

from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alvts_cli import AlvtsError
from alvts_cli.pocket.build import make_processor
from alvts_cli.pocket.words import IMAGE, make_prompt
from alvts_cli.prompts import build_inputs, padding_token, read_image, render, usual_template

PICTURE = Image.new("RGB", (40, 30), "red")


def rendered(processor: Any, prompt: str, images: int = 1) -> str:
    """The words the processor was given."""
    told: list[str] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(processor, name)

        def __call__(self, text: list[str], **more: Any) -> Any:
            told.extend(text)
            return processor(text=text, **more)

    Spy.__name__ = type(processor).__name__
    build_inputs(Spy(), [PICTURE] * images, prompt)
    return told[0]


@pytest.mark.parametrize("images", [1, 3])
def test_without_a_template_the_familys_own_prompt_is_used(images: int) -> None:
    processor = make_processor()
    question = "what color is the circle?"
    inputs = build_inputs(processor, [PICTURE] * images, question)
    expected = processor(
        images=[PICTURE] * images,
        text=make_prompt(question, images),
        return_tensors="pt",
    )
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert inputs["pixel_values"].shape[0] == images
    token = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert (inputs["input_ids"] == token).sum() == 256 * images


def test_a_marker_says_where_images_stand() -> None:
    processor = make_processor()
    assert rendered(processor, "<image>\nwhat?") == rendered(processor, "what?")
    assert rendered(processor, "in <image> what?") == "USER: in<image>\nwhat? ASSISTANT:"
    both = rendered(processor, "<image> or <image>?", images=2)
    assert both == "USER: <image>\nor<image>\n? ASSISTANT:"


def test_a_chat_template_is_used_and_its_first_token_not_doubled() -> None:
    processor = make_processor()
    processor.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
        "{% endfor %}]{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    assert rendered(processor, "what?") == "<s>[<image>what?] ASSISTANT:"
    ids = build_inputs(processor, [PICTURE], "what?")["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    processor.chat_template = "{% for m in messages %}no place{% endfor %}"
    with pytest.raises(AlvtsError, match="no place for images"):
        build_inputs(processor, [PICTURE], "what?")


def test_qwens_own_prompt() -> None:
    class QwenProcessor:
        image_token = "<|image_pad|>"
        chat_template = None
        tokenizer = SimpleNamespace(bos_token=None)

        def __call__(self, text: list[str], **more: Any) -> Any:
            self.text = text[0]
            return {"input_ids": SimpleNamespace(shape=(1, 5))}

    processor = QwenProcessor()
    build_inputs(processor, [PICTURE], "what?")
    assert processor.text.endswith(
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # The model's own placeholder counts as a place too, and cannot smuggle one in.
    with pytest.raises(AlvtsError, match="2 places for images"):
        build_inputs(processor, [PICTURE], "<|image_pad|> <image>")


@pytest.mark.parametrize("ids", [[[1, 2]], torch.ones(5), torch.ones(2, 5), None])
def test_a_processor_that_makes_no_batch_of_one(ids: Any) -> None:
    class LlavaProcessor:
        image_token = "<image>"
        tokenizer = SimpleNamespace(bos_token=None)

        def __call__(self, **_: Any) -> Any:
            return {"input_ids": ids}

    with pytest.raises(AlvtsError, match=r"made no input_ids of the prompt as a tensor \[1, T\]"):
        build_inputs(LlavaProcessor(), [PICTURE], "what?")


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("InternVLProcessor", "<|im_start|>user\n<I>\nwhat?<|im_end|>\n<|im_start|>assistant\n"),
        ("LlavaOnevisionProcessor", "<|im_start|>user <I>\nwhat?<|im_end|><|im_start|>assistant\n"),
        ("SmolVLMProcessor", "<|im_start|>User:<I>what?<end_of_utterance>\nAssistant:"),
        (
            "Glm4vProcessor",
            "[gMASK]<sop><|user|>\n<|begin_of_image|><I><|end_of_image|>what?<|assistant|>\n",
        ),
        ("PixtralProcessor", "<s>[INST]<I>what?[/INST]"),
        ("LlavaProcessor", "USER: <I>\nwhat? ASSISTANT:"),
    ],
)
def test_prompts_without_a_chat_template(name: str, prompt: str) -> None:
    def call(self: Any, text: list[str], **more: Any) -> Any:
        self.text = text[0]
        return {"input_ids": SimpleNamespace(shape=(1, 5))}

    facts = dict(image_token="<I>", chat_template=None, __call__=call)
    processor = type(name, (), facts | {"tokenizer": SimpleNamespace(bos_token="<s>")})()
    build_inputs(processor, [PICTURE], "what?")
    assert processor.text == prompt


def test_prompts_without_room() -> None:
    processor = make_processor()
    with pytest.raises(AlvtsError, match=r"has 2 places for images .* but gets 1"):
        build_inputs(processor, [PICTURE], "<image> <image>")
    with pytest.raises(AlvtsError, match=r"has 1 places for images .* but gets 2"):
        build_inputs(processor, [PICTURE] * 2, "<image> what?")
    with pytest.raises(AlvtsError, match="at least one image"):
        build_inputs(processor, [], "what?")
    with pytest.raises(AlvtsError, match="make 263 tokens but the model takes 262"):
        build_inputs(processor, [PICTURE], "what is it?", max_tokens=262)
    build_inputs(processor, [PICTURE], "what is it?", max_tokens=263)


def test_pictures_are_read_as_rgb_and_upright(tmp_path: Path) -> None:
    for mode in ("RGB", "RGBA", "P", "L", "1", "LA", "I;16"):
        Image.new(mode, (4, 2)).save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png").mode == "RGB"
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (2, 4)
    assert read_image(BytesIO((tmp_path / "a.jpg").read_bytes()), "x").size == (2, 4)


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_grey_of_16_bits_is_no_white_page(name: str, tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [0x8000, 0xFEFF, 0xFFFF]], np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    said = np.asarray(read_image(tmp_path / name))
    assert said.tolist() == [[[v >> 8] * 3 for v in row] for row in values.tolist()]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(kind: Any, tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 70_000, kind)).save(tmp_path / "a.tiff")
    with pytest.raises(AlvtsError, match="tiff has pixels of 32-bit numbers"):
        read_image(tmp_path / "a.tiff")


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    layer = np.zeros((1, 3, 4), np.uint8)
    layer[..., 0] = 200
    layer[0, :, 3] = (0, 51, 255)
    Image.fromarray(layer).save(tmp_path / "a.png")
    shown = np.asarray(read_image(tmp_path / "a.png"))
    assert shown.tolist() == [[[255, 255, 255], [244, 204, 204], [200, 0, 0]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 8, 8, 8])
    palette.putdata([0, 1])
    palette.save(tmp_path / "b.png", transparency=0)
    shown = np.asarray(read_image(tmp_path / "b.png"))
    assert shown.tolist() == [[[255, 255, 255], [8, 8, 8]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_layer_stays_as_it_is(mode: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    picture = Image.fromarray(pixels).convert(mode.removesuffix("A"))
    picture.putalpha(255)
    assert picture.mode == mode
    picture.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tobytes() == picture.convert("RGB").tobytes()


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AlvtsError, match="there is no image"):
        read_image(tmp_path / "none.png")
    with pytest.raises(AlvtsError, match="it is a folder"):
        read_image(tmp_path)
    whole = BytesIO()
    PICTURE.save(whole, "JPEG")
    PICTURE.save(tmp_path / "a.eps")
    bad = {
        "a.jpg": b"words",
        "b.png": b"",
        "c.jpg": whole.getvalue()[:200],
        "d.png": (tmp_path / "a.eps").read_bytes(),
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AlvtsError, match=f"{name}: it is damaged or not a picture"):
            read_image(tmp_path / name)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(AlvtsError, match=r"has more than 89 million pixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("pad", "end", "expected"),
    [(7, 2, 7), (0, 2, 0), (None, 2, 2), (None, [3, 4], 3), (None, None, 0)],
)
def test_finished_answers_are_filled_with(pad: Any, end: Any, expected: int) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(pad_token_id=pad, eos_token_id=end))
    assert padding_token(model) == expected


def test_a_video_stands_between_marks_of_its_own() -> None:
    facts = dict(image_token="<I>", video_token="<V>", chat_template=None)
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what?"}]}
    for name, marks in {
        "Glm46VProcessor": "<|user|>\n<|begin_of_video|><V><|end_of_video|>",
        "Qwen3VLProcessor": "user\n<|vision_start|><V><|vision_end|>",
    }.items():
        assert f"{marks}what?" in render(type(name, (), facts)(), [turn])


@pytest.mark.parametrize(
    "name", ["Llava", "Qwen", "InternVL", "LlavaOnevision", "SmolVLM", "Glm4v"]
)
def test_the_usual_prompt_as_a_template(name: str) -> None:
    processor = make_processor()
    processor.__class__ = type(f"{name}Processor", (type(processor),), {})

    def words(*turns: tuple[str, str]) -> str:
        messages: list[Any] = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns
        ]
        messages[0]["content"].insert(0, {"type": "image"})
        template = usual_template(processor)
        return processor.apply_chat_template(messages, chat_template=template, tokenize=False)

    first = words(("user", "what?"))
    assert first == rendered(processor, "what?")
    both = words(("user", "what?"), ("assistant", "that"), ("user", "and?"))
    assert both.startswith(first)
    answered, question = both.removeprefix(first).split("and?")
    assert answered.startswith((" that", "that")) and first.endswith(question)
    assert "helpful" not in answered and "<image>" not in answered
    if name == "Glm4v":
        assert both.endswith("<|assistant|>\nthat<|user|>\nand?<|assistant|>\n")
    if name == "Llava":
        assert both == "USER: <image>\nwhat? ASSISTANT: that</s>USER: and? ASSISTANT:"
    with pytest.raises(Exception, match="no place for system turns"):
        words(("system", "be good"))


def test_a_processor_of_text_alone_is_named() -> None:
    for none in (None, make_processor().tokenizer):
        with pytest.raises(AlvtsError, match="a processor of pictures, as AutoProcessor gives it"):
            build_inputs(none, [PICTURE], "what?")
