"""Where visual tokens lie: a light in the picture must show in the token said to be there."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny import IMAGE, VIDEO, make_model
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor
from zoo import KINDS, make_zoo_model, zoo_inputs

from alvts_cli import AlvtsError
from alvts_cli.families import family_of
from alvts_cli.families.layout import PIXELS


class Processor:
    """As much of one as a layout needs."""

    image_token, video_token = "<image>", "<video>"

    def __init__(self, image_processor, video_processor=None):
        self.image_processor, self.video_processor = image_processor, video_processor

    def __call__(self, text, images=None, videos=None, do_sample_frames=None, **more):
        assert text == [self.image_token if videos is None else self.video_token]
        if videos is None:
            return self.image_processor(images, **more)
        return self.video_processor(videos, **more)


def near_sighted(family):
    """A model whose vision tower lets no patch see another."""
    model = make_zoo_model(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            blind = ("out_proj.weight", "fc2.weight", "attn.proj.weight", "down_proj.weight")
            # The last is that of Granite's Q-Former.
            blind += ("o_proj.weight", "attention.output.dense.weight")
            inside = "language_model" not in name and "merger" not in name
            if inside and name.endswith(blind):
                weight.zero_()
    return model


def image_features(model, inputs):
    """The visual tokens `[N, D]` of these pixels."""
    unused = ("rows", "cols", "num_patches", "grids", "input_ids", "attention_mask")
    told = {name: value for name, value in inputs.items() if name not in unused}
    if "pixel_values_images" in told:
        told["pixel_values"] = told.pop("pixel_values_images")
    with torch.no_grad():
        made = model.model.get_image_features(**told, return_dict=True)
    tokens = made.pooler_output
    if tokens is None:
        tokens = made.deepstack_features[0][1]
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in tokens])


def features(model, processor, images):
    """The visual tokens `[N, D]` that the model makes of the pictures, and its inputs."""
    inputs = dict(processor.image_processor(images, return_tensors="pt"))
    made = image_features(model, inputs)
    # A word in front, between the pictures' tokens and behind makes no difference.
    inputs["input_ids"] = torch.tensor([[5, *[IMAGE] * len(made), 7]])
    return made, inputs


def cells(view, size):
    """Every token of a view with the middle of its part of the picture, in pixels."""
    rows, columns = view.tokens.shape
    left, top, right, bottom = view.box
    for row in range(rows):
        for column in range(columns):
            x = (left + (column + 0.5) / columns * (right - left)) * size[0]
            y = (top + (row + 0.5) / rows * (bottom - top)) * size[1]
            yield int(view.tokens[row, column]), x, y


def thumb_and_tiles(images, **more):
    """PerceptionLM's, which needs torchvision: the whole, then two tiles beside each other."""
    made = []
    for image in images:
        wide = image.resize((32, 16))
        tiles = [image.resize((16, 16)), *(wide.crop((x, 0, x + 16, 16)) for x in (0, 16))]
        made.append(torch.stack([torch.from_numpy(np.array(t)).permute(2, 0, 1) for t in tiles]))
    return {"pixel_values": torch.stack(made).float() / 255}


TILES = [[16, 32], [32, 16], [32, 32]]
NEXT = LlavaNextImageProcessorPil(
    size={"shortest_edge": 16}, crop_size=16, image_grid_pinpoints=TILES
)
CASES = {
    # A wide and a high picture lose their ends to the crop in the middle.
    "llava": ("llava", CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)),
    "llava stretched": (
        "llava",
        CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False),
    ),
    "llava with a border": (
        "llava",
        LlavaImageProcessorPil(size={"shortest_edge": 16}, crop_size=16, do_pad=True),
    ),
    # Of every size, in one tensor.
    "mistral3": (
        "mistral3",
        PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
    ),
    "llava_next": ("llava_next", NEXT),
    "llava_next_video": ("llava_next_video", NEXT),
    "llava_onevision": (
        "llava_onevision",
        LlavaOnevisionImageProcessorPil(
            size={"height": 16, "width": 16}, image_grid_pinpoints=TILES, do_pad=True
        ),
    ),
    "granite4_vision": (
        "granite4_vision",
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 32},
            crop_size=32,
            image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]],
        ),
    ),
    "video_llava": (
        "video_llava",
        VideoLlavaImageProcessor(size={"shortest_edge": 16}, crop_size=16),
    ),
    "idefics3": (
        "idefics3",
        Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
    ),
    "smolvlm": (
        "smolvlm",
        SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
    ),
    "smolvlm in one": (
        "smolvlm",
        SmolVLMImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        ),
    ),
    "internvl": (
        "internvl",
        GotOcr2ImageProcessorPil(
            size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=6
        ),
    ),
    "ovis2": (
        "ovis2",
        Ovis2ImageProcessorPil(
            size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4
        ),
    ),
    "perception_lm": ("perception_lm", thumb_and_tiles),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
        ),
    ),
    "glm4v": (
        "glm4v",
        # Its sizes are of both frames of a patch together.
        Glm4vImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 128, "longest_edge": 8192}
        ),
    ),
}
SIZES = {"wide": (128, 64), "high": (48, 96), "odd": (90, 70)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("family", "image_processor"), CASES.values(), ids=CASES)
def test_a_light_shows_in_the_token_that_lies_there(family, image_processor, size):
    model, processor = near_sighted(family), Processor(image_processor)
    # The first picture is there to be told from the second.
    images = [Image.new("RGB", (64, 80)), Image.new("RGB", size)]
    dark, inputs = features(model, processor, images)
    views = family_of(model).layout(model, processor, inputs, [i.size for i in images])
    assert {view.picture for view in views} == {0, 1}
    placed = torch.cat([view.tokens.flatten() for view in views])
    assert len(placed.unique()) == len(placed)
    tried = 0
    for view in (v for v in views if v.picture == 1):
        reach = 0.3 * min(size[0] / view.tokens.shape[1], size[1] / view.tokens.shape[0])
        for token, x, y in cells(view, size):
            if not (0 < x < size[0] and 0 < y < size[1]):
                continue
            lit = images[1].copy()
            ImageDraw.Draw(lit).ellipse((x - reach, y - reach, x + reach, y + reach), fill="white")
            change = (features(model, processor, [images[0], lit])[0] - dark).norm(dim=-1)
            mine = view.tokens.flatten()
            assert int(mine[change[mine].argmax()]) == token
            nowhere = torch.ones(len(dark), dtype=torch.bool).scatter(0, placed, False)
            assert not change[nowhere].any()
            tried += 1
    assert tried >= 8


def test_llava_loses_the_ends_of_a_wide_picture():
    model, processor = make_model("llava"), Processor(CASES["llava"][1])
    picture = Image.new("RGB", (200, 100))
    _, inputs = features(model, processor, [picture])
    (view,) = family_of(model).layout(model, processor, inputs, [picture.size])
    assert view.box == pytest.approx((0.25, 0, 0.75, 1), abs=0.002)


def test_a_border_makes_the_view_larger_than_the_picture():
    model = make_model("llava")
    image_processor = CASES["llava with a border"][1]
    inputs = {
        "input_ids": torch.tensor([[IMAGE] * 16]),
        "pixel_values": torch.zeros(1, 3, 16, 16),
    }
    (view,) = family_of(model).layout(model, Processor(image_processor), inputs, [(200, 100)])
    assert view.box == pytest.approx((0, -0.5, 1, 1.5), abs=0.03)


def test_tiles_of_llava_next_leave_the_border_out():
    model, processor = make_model("llava_next"), Processor(CASES["llava_next"][1])
    picture = Image.new("RGB", (80, 60))
    made, inputs = features(model, processor, [picture])
    whole, tiles = family_of(model).layout(model, processor, inputs, [picture.size])
    assert whole.tokens.shape == (4, 4) and tiles.tokens.shape == (6, 8)
    # A token at the end of each of the six rows.
    assert len(made) == 16 + 6 * 9
    assert (whole.name, tiles.name) == ("whole", "tiles")


def test_a_grid_of_more_tiles_than_onevision_takes_is_shrunk():
    model, processor = near_sighted("llava_onevision"), Processor(CASES["llava_onevision"][1])
    model.config.vision_aspect_ratio = "anyres_max_1"
    picture = Image.new("RGB", (128, 128))
    dark, inputs = features(model, processor, [picture])
    whole, tiles = family_of(model).layout(model, processor, inputs, [picture.size])
    # Two by two tiles of 4 x 4 tokens in the place of one.
    assert whole.tokens.shape == (4, 4) and tiles.tokens.shape == (4, 4)
    for token, x, y in cells(tiles, picture.size):
        lit = picture.copy()
        ImageDraw.Draw(lit).ellipse((x - 9, y - 9, x + 9, y + 9), fill="white")
        change = (features(model, processor, [lit])[0] - dark).norm(dim=-1)
        assert int(tiles.tokens.flatten()[change[tiles.tokens.flatten()].argmax()]) == token


def video_inputs(model, steps, grid, images=()):
    """A prompt with a video behind images, as `image_grid_thw` and `video_grid_thw` tell."""
    count = steps * grid[0] * grid[1] // 4
    ids = [5]
    for height, width in images:
        ids += [92, *[IMAGE] * (height * width // 4), 6]
    ids += [92, *[VIDEO] * count, 7]
    inputs = {"input_ids": torch.tensor([ids]), "video_grid_thw": torch.tensor([[steps, *grid]])}
    if images:
        inputs["image_grid_thw"] = torch.tensor([[1, *one] for one in images])
    return inputs


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "glm4v", "glm46v"])
def test_a_video_has_a_view_for_every_two_frames(kind):
    model = make_zoo_model(kind)
    inputs = video_inputs(model, 3, (4, 8), images=[(4, 4), (2, 6)])
    if kind != "qwen2_5_vl":
        # Of one id, and told apart elsewhere.
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        inputs["input_ids"] = ids.masked_fill(ids == VIDEO, IMAGE)
    views = family_of(model).layout(model, None, inputs, [(16, 16), (24, 8)])
    assert [(v.picture, v.frames) for v in views] == [
        *((0, None), (1, None), (0, (0, 1)), (0, (2, 3)), (0, (4, 5)))
    ]
    assert [tuple(v.tokens.shape) for v in views] == [(2, 2), (1, 3), *[(2, 4)] * 3]
    assert torch.cat([v.tokens.flatten() for v in views]).tolist() == list(range(4 + 3 + 24))


def test_a_light_in_a_frame_shows_in_its_view():
    model = near_sighted("qwen2_5_vl")
    image_processor = CASES["qwen2_5_vl"][1]
    frames = [Image.new("RGB", (64, 32)) for _ in range(3)]
    frames[1] = frames[1].copy()

    def tokens():
        # Two equal frames at a time are what an image is to Qwen.
        made = image_processor(frames, return_tensors="pt")
        (_, height, width), *_ = made["image_grid_thw"].tolist()
        with torch.no_grad():
            seen = model.model.get_video_features(
                made["pixel_values"], torch.tensor([[3, height, width]]), return_dict=True
            )
        return torch.cat(list(seen.pooler_output)), (height, width)

    dark, size = tokens()
    views = family_of(model).layout(model, None, video_inputs(model, 3, size), [])
    for token, x, y in cells(views[1], frames[1].size):
        lit = Image.new("RGB", (64, 32))
        ImageDraw.Draw(lit).ellipse((x - 2, y - 2, x + 2, y + 2), fill="white")
        frames[1] = lit
        assert int((tokens()[0] - dark).norm(dim=-1).argmax()) == token
    assert views[1].frames == (2, 3)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_tokens_that_do_not_fit_are_refused_by_name(family):
    model, processor = make_model(family), Processor(CASES[family][1])
    picture = Image.new("RGB", (64, 64))
    _, inputs = features(model, processor, [picture])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[IMAGE]])], dim=1)
    with pytest.raises(AlvtsError, match=f"where the .* of this {family_of(model).name} prompt"):
        family_of(model).layout(model, processor, inputs, [picture.size])


def test_an_encoder_that_sees_an_image_several_times_is_refused():
    model = make_model("llava")
    # Four views of 16 tokens would also make a square.
    inputs = {
        "input_ids": torch.tensor([[IMAGE] * 64]),
        "pixel_values": torch.zeros(4, 3, 16, 16),
    }
    with pytest.raises(AlvtsError, match="does not know where the 64 visual tokens"):
        family_of(model).layout(model, Processor(CASES["llava"][1]), inputs, [(64, 64)])


def as_it_is(kind):
    """Shows a model of a kind whole pictures, in tensors as `zoo_inputs` has them."""

    def process(images, **more):
        pictures = iter(images)

        def shown(*shape):
            one = next(pictures).resize((shape[-1], shape[-2]))
            return (torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255).expand(shape)

        return KINDS[kind].pixels(1, KINDS[kind].side, shown)

    return process


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_right(kind):
    """Where a token is said to lie, a change of the encoder's input changes it."""
    model, images = near_sighted(kind), 2
    inputs = zoo_inputs(model, kind, images=images)
    family = family_of(model)
    views = family.layout(model, Processor(as_it_is(kind)), inputs, [(32, 32)] * images)
    placed = torch.cat([view.tokens.flatten() for view in views])
    assert len(placed) == len(placed.unique()) >= 6 * images
    # Of these, tiles are tested above.
    if "image_grid_thw" in inputs or len(views) > images:
        return
    given = {k: v for k, v in inputs.items() if k in (*PIXELS, "image_sizes")}
    (name,) = (name for name in PIXELS if name in given)
    whole = given[name].flatten(0, -4)
    before = image_features(model, given)
    for view in views:
        rows, columns = view.tokens.shape
        side = whole.shape[-1]
        height, width = side // rows, side // columns
        for row in range(rows):
            for column in range(columns):
                pixels = whole.clone()
                part = pixels[view.picture, :, row * height :, column * width :]
                part[:, :height, :width] += 1.0
                made = image_features(model, {**given, name: pixels.view_as(given[name])})
                change = (made - before).norm(dim=-1)
                # Not always the most: FastVLM's convolutions look beyond.
                assert change[view.tokens[row, column]] > 0.4 * change.max()


# Those of the others are grids, which have tests above.
VIDEOS = [
    kind
    for kind, facts in KINDS.items()
    if facts.video is not None and not kind.startswith(("qwen", "glm"))
]


@pytest.mark.parametrize("kind", VIDEOS)
def test_every_frame_has_a_view(kind):
    """Behind an image; its frames are changed where a token is said to lie."""
    model = near_sighted(kind)
    inputs = zoo_inputs(model, kind, images=1, video=True)
    family = family_of(model)
    visual = family.visual_mask(model, inputs["input_ids"])[0]
    is_video = (inputs["input_ids"][0] == VIDEO)[visual]

    def stretched(videos, return_tensors):
        ((frame,),) = videos
        small = torch.from_numpy(np.array(frame.resize((16, 16)))).permute(2, 0, 1)
        return {"pixel_values_videos": small[None, None] / 255}

    processor = Processor(as_it_is(kind), stretched)
    views = family.layout(model, processor, inputs, [(32, 32)], [(40, 20)])
    frames = [view for view in views if view.frames is not None]
    assert [view.frames for view in frames] == [(0, 0), (1, 1)]
    assert all(view.box == (0, 0, 1, 1) and view.picture == 0 for view in frames)
    assert all(bool(is_video[view.tokens].all()) for view in frames)
    assert not any(bool(is_video[v.tokens].any()) for v in views if v.frames is None)

    def made(pixels):
        get = getattr(model.model, "get_video_features", model.model.get_image_features)
        with torch.no_grad():
            found = get(pixels, return_dict=True).pooler_output
        return torch.cat([one.reshape(-1, one.shape[-1]) for one in found])

    before, first = made(inputs["pixel_values_videos"]), int(is_video.nonzero()[0])
    for view in frames:
        rows, columns = view.tokens.shape
        for row in range(rows):
            for column in range(columns):
                pixels = inputs["pixel_values_videos"].clone()
                lit = pixels[0, view.frames[0], :, row * 16 // rows :, column * 16 // columns :]
                lit[:, : 16 // rows, : 16 // columns] += 1.0
                change = (made(pixels) - before).norm(dim=-1)
                assert int(change.argmax()) == int(view.tokens[row, column]) - first


@pytest.mark.parametrize("kind", ["internvl", "smolvlm"])
def test_frames_that_are_images_to_a_model(kind):
    model = make_zoo_model(kind)
    inputs = zoo_inputs(model, kind, images=3)
    processor = Processor(as_it_is(kind), lambda videos, **more: as_it_is(kind)(videos[0]))
    views = family_of(model).layout(model, processor, inputs, [(32, 32)], [(40, 20)])
    assert [(view.picture, view.frames) for view in views] == [(0, None), (0, (0, 0)), (0, (1, 1))]
    assert [int(view.tokens[0, 0]) for view in views] == [0, 16, 32]


def test_videos_whose_tokens_are_more_or_less_are_refused():
    model = make_zoo_model("llava_onevision")
    inputs = zoo_inputs(model, "llava_onevision", images=0, video=True)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[VIDEO]])], dim=1)
    processor = Processor(
        None, lambda *args, **more: {"pixel_values_videos": torch.ones(1, 1, 3, 16, 16)}
    )
    with pytest.raises(AlvtsError, match="the 10 visual tokens of this LLaVA-OneVision prompt"):
        family_of(model).layout(model, processor, inputs, [], [(40, 20)])
