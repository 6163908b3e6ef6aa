"""`alvts show`: what is noted, what is drawn, and what the command refuses."""

import json
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_tools import alvts, model_folder, refused, scene_file
from PIL import Image, ImageColor
from show_tools import LAYERS, WHOLE, answered, make_shown, make_trace, squares
from tiny import (
    FAMILIES,
    VIDEO,
    VISION_START,
    Prompt,
    make_inputs,
    make_model,
    make_selectors,
    one_image,
)
from transformers import BatchFeature

from alvts_cli.engine import NAMED, Picked, Policy, attach
from alvts_cli.families import View, family_of
from alvts_cli.models import Loaded, load_model
from alvts_cli.show.page import steps
from alvts_cli.show.png import DIM, edges, to_png, under
from alvts_cli.show.trace import Shown, trace

POCKET = "alvts_cli/pocket/example.png"
QUESTION = "what digit is on the teal cross?"


def tiny(family):
    """A tiny model as `load_model` gives one, with a tokenizer that only counts."""
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
    return Loaded("tiny", "tiny", None, make_model(family), SimpleNamespace(tokenizer=tokenizer))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_is_what_the_layers_ran_on(family):
    loaded = tiny(family)
    inputs = make_inputs(loaded.model, one_image(family))
    policy = Policy(every=2, quality=0.3, mass=True)
    selectors = make_selectors(family, policy=policy)
    seen = trace(loaded, inputs, selectors, "1.0,0.25,0,0.25", 2)
    with torch.no_grad(), attach(loaded.model, selectors, [1.0, 0.25, 0, 0.25]) as attachment:
        loaded.model(**inputs)
    assert seen.counts == [count for (count,) in attachment.last.kept]
    assert seen.answer.visual_tokens_kept == attachment.last.layer_average
    assert seen.policy == str(policy)
    assert seen.kept.shape == (4, seen.answer.visual_tokens)
    assert seen.ranked_in == (None, 1, None, 3)
    assert np.isnan(seen.importance[[0, 2]]).all()
    np.testing.assert_allclose(seen.importance[[1, 3]].mean(axis=1), 1, rtol=1e-5)


def test_without_the_wish_to_differ_the_most_important_are_kept():
    loaded = tiny("llava")
    prompt = Prompt([1, 5, 9, 12, 33], [(16, 16), (16, 16)])
    seen = trace(loaded, make_inputs(loaded.model, prompt), make_selectors(), "0.25", 2)
    for kept, importance in zip(seen.kept, seen.importance, strict=True):
        assert importance[kept].min() >= importance[~kept].max()
    assert not (seen.kept == seen.kept[0]).all()


def test_the_layers_of_pocket_keep_what_they_are_asked_about():
    from pathlib import Path

    from alvts_cli.answer import prepare, selectors_for
    from alvts_cli.prompts import read_image

    loaded = load_model("pocket")
    picture = read_image(Path(POCKET))
    inputs = prepare(loaded, [picture], QUESTION, 4)
    # One choice for all layers, which is picked for pocket, is made before much is asked for.
    policy = Picked(0.11, replace(NAMED["every-4"], pool=False))
    selectors = replace(selectors_for(loaded, None), picked=(policy,))
    seen = trace(loaded, inputs, selectors, "0.11", 4)
    (view,) = family_of(loaded.model).layout(loaded.model, loaded.processor, inputs, [picture.size])
    # The teal cross is 24 pixels wide about (131, 59) of 192; a token is 12 wide.
    cross = view.tokens[4:6, 10:12].flatten().numpy()
    later = seen.kept[4:]
    assert later[:, cross].mean() > 0.8 and later.mean() < 0.12


def test_the_png_is_clear_where_a_token_is_kept_and_grey_elsewhere():
    picture = squares(4, 4, 0)
    view = View(0, WHOLE, torch.arange(16).view(4, 4))
    traced = make_trace(16, 0.25, "a cat", 3)
    shown = Shown("tiny", "what?", [picture], [], [view], answered("a dog", 16, 16), [traced])
    drawn = np.asarray(Image.open(BytesIO(to_png(shown, traced))).convert("RGB")).astype(int)
    colours = np.asarray(picture)[8::16, 8::16].astype(int)
    # The first panel keeps everything: there is a line around all of it.
    line = (drawn == ImageColor.getrgb("#e69f00")).all(axis=-1)
    (top, left), *_ = np.argwhere(line)
    side = int(line[top, left:].argmin())
    across = (drawn.shape[1] - 2 * left + 14) // (side + 14)
    assert LAYERS % across == 0
    for layer in range(LAYERS):
        x0 = left + layer % across * (side + 14)
        y0 = top + layer // across * (side + 22 + 14)
        for r in range(4):
            for c in range(4):
                pixel = drawn[y0 + (2 * r + 1) * side // 8, x0 + (2 * c + 1) * side // 8]
                clear = bool(np.abs(pixel - colours[r, c]).max() <= 2)
                assert clear == traced.kept[layer, 4 * r + c], (layer, r, c)
                # Without its colour, and with little contrast.
                assert clear or np.ptp(pixel) <= 14


@pytest.mark.parametrize("layers_as_one", [True, False])
def test_a_png_of_several_views_is_drawn(layers_as_one):
    shown = make_shown("word " * 400)
    chosen = shown.traces[0 if layers_as_one else 1]
    image = Image.open(BytesIO(to_png(shown, chosen)))
    assert image.format == "PNG" and image.width >= 1200


def test_views_beyond_the_picture_are_grey_and_those_within_cut_it():
    picture = Image.new("RGB", (40, 20), "red")
    border = under(picture, View(0, (0, -0.5, 1, 1.5), torch.zeros(2, 2)), (40, 40))
    assert border.getpixel((20, 2)) == (128, 128, 128) and border.getpixel((20, 20)) == (255, 0, 0)
    picture.paste("blue", (0, 0, 10, 20))
    middle = under(picture, View(0, (0.25, 0, 0.75, 1), torch.zeros(2, 2)), (20, 20))
    assert middle.getpixel((1, 10)) == (255, 0, 0)


def test_labels_tell_views_apart():
    shown = make_shown()
    assert [shown.label(view) for view in shown.views] == [
        *("image 1", "image 2, whole", "image 2, tiles")
    ]
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(4)]
    views = [View(0, WHOLE, torch.zeros(1, 1), (i, i + 1)) for i in (0, 2)]
    video = Shown("tiny", "?", [], [frames], views, shown.dense, shown.traces)
    assert [video.label(view) for view in views] == ["frames 1-2", "frames 3-4"]
    assert video.picture(views[1]) is frames[2]
    alone = Shown("tiny", "?", shown.images[:1], [], shown.views[:1], shown.dense, shown.traces)
    assert alone.label(alone.views[0]) == ""


def test_a_last_frame_without_another_is_named_alone():
    frames = [Image.new("RGB", (8, 8)) for _ in range(3)]
    view = View(0, WHOLE, torch.zeros(1, 1), (2, 3))
    video = Shown("tiny", "?", [], [frames], [view], answered("", 1, 1), [])
    assert video.label(view) == "frame 3"


def test_importance_is_packed_within_a_tenth_of_a_percent():
    values = np.array([0, 1e-6, 0.02, 1, 3.7, 2880], dtype=np.float32)
    packed = steps(values).astype(float)
    assert packed[0] == 0
    np.testing.assert_allclose(2 ** ((packed[1:] - 32768) / 1024), values[1:], rtol=1e-3)


def test_edges_make_up_the_whole():
    assert edges(10, 4) == [0, 2, 5, 8, 10]
    assert DIM.startswith("#")


def shows(out, *more, image=None):
    return (
        *("show", "--model", model_folder(), "--image", image or scene_file()),
        *("--prompt", "what color is the circle?", "--max-new-tokens", 2, "--out", out, *more),
    )


def test_the_command_writes_a_page_and_a_png(tmp_path):
    page, png = tmp_path / "x.html", tmp_path / "x.PNG"
    result = alvts(*shows(page, "--keep", "0.25", "--keep", "8"))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("8.0 of 256 visual tokens: ")
    assert lines[1].startswith("64.0 of 256 visual tokens: ")
    assert lines[2].startswith("all of them: ")
    text = page.read_text()
    assert "what color is the circle?" in text and "://" not in text
    result = alvts(*shows(png, "--image", scene_file()))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("128.0 of 512 visual tokens: ")
    assert Image.open(png).width >= 1200
    assert sorted(tmp_path.iterdir()) == [png, page]


def test_a_policy_that_calibration_did_not_pick_is_shown_too(tmp_path):
    picked, asked = tmp_path / "a.html", tmp_path / "b.html"
    line = ("--model", "pocket", "--image", POCKET, "--prompt", QUESTION, "--keep", "0.11")
    for out, more in ((picked, ()), (asked, ("--policy", "every-4"))):
        result = alvts("show", *line, "--max-new-tokens", "1", "--out", out, *more)
        assert result.exit_code == 0, result.output
    assert str(NAMED["every-4"]) in asked.read_text()
    assert str(NAMED["every-4"]) not in picked.read_text()


def test_a_command_line_that_makes_no_sense_is_refused(tmp_path):
    name = tmp_path / "x.gif"
    assert "must end in .png or .html" in refused(*shows(name), code=2)
    name = tmp_path / "x.png"
    line = refused(*shows(name, "--keep", "0.1", "--keep", "0.2"), code=2)
    assert "a .png shows one" in line
    assert "keep=" in refused(*shows(name, "--keep", "many"), code=2)
    assert "unknown policy 'x'" in refused(*shows(name, "--policy", "x"))
    assert "cannot write" in refused(*shows(tmp_path / "no" / "x.png"))
    assert "no image" in refused(*shows(name, image=tmp_path / "no.png"))
    assert list(tmp_path.iterdir()) == []


class Watching:
    """A processor of Qwen2.5-VL's inputs: every two frames are an image to it, the first twice."""

    image_token, video_token, chat_template = "<image>", "<video>", None
    tokenizer = SimpleNamespace(
        bos_token=None,
        decode=lambda ids, skip_special_tokens: " ".join(map(str, ids.tolist())),
        get_vocab=dict,
    )

    def __init__(self):
        self.said, self.more = [], {}

    def __call__(self, images, text, videos, return_tensors, **more):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        assert images is None
        self.said, self.more = text, more
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
        )
        made = image_processor(videos[0][::2], return_tensors="pt")
        (_, height, width), *_ = made["image_grid_thw"].tolist()
        steps = len(videos[0][::2])
        ids = [1, VISION_START, *[VIDEO] * (steps * height * width // 4), 5, 6]
        ids = torch.tensor([ids])
        return BatchFeature(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": 2 * (ids == VIDEO).int(),
                "pixel_values_videos": made["pixel_values"],
                "video_grid_thw": torch.tensor([[steps, height, width]]),
            }
        )


@pytest.fixture
def watching(monkeypatch):
    """The command runs on a tiny model that takes videos."""
    processor = Watching()
    loaded = Loaded("tiny", "tiny", None, make_model("qwen2_5_vl"), processor)
    monkeypatch.setattr("alvts_cli.models.load_model", lambda *args: loaded)
    monkeypatch.setattr(
        "alvts_cli.answer.selectors_for", lambda *args: make_selectors("qwen2_5_vl")
    )
    return processor


def films(out, video, *more):
    return (
        "show",
        "--video",
        video,
        "--prompt",
        "what?",
        "--max-new-tokens",
        2,
        "--out",
        out,
        *more,
    )


def test_a_folder_of_frames_is_drawn(watching, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (32, 16), (20 * i, 0, 0)).save(folder / f"{i:02}.png")
    out = tmp_path / "x.html"
    result = alvts(*films(out, folder, "--keep", "0.25", "--frames", "5"))
    assert result.exit_code == 0, result.output
    assert watching.said == ["USER: <video>\nwhat? ASSISTANT:"]
    assert watching.more["do_sample_frames"] is False
    assert watching.more["video_metadata"][0]["frames_indices"] == [1, 3, 6, 8, 10]
    data = json.loads(out.read_text().split('id="data">')[1].split("</script>")[0])
    assert [view["label"] for view in data["views"]] == ["frames 1-2", "frames 3-4", "frame 5"]
    # Under each step in time lies its first frame.
    shown = [data["pictures"][view["picture"]] for view in data["views"]]
    pictures = [Image.open(BytesIO(b64decode(url.split(",")[1]))) for url in shown]
    assert [picture.getpixel((0, 0))[0] for picture in pictures] == [20, 120, 200]
    png = tmp_path / "x.png"
    assert alvts(*films(png, folder, "--keep", "0.25")).exit_code == 0
    assert Image.open(png).width >= 1200


def test_videos_that_cannot_be_shown(watching, tmp_path):
    out = tmp_path / "x.png"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no pictures in the folder" in refused(*films(out, empty))
    assert "there is no video" in refused(*films(out, tmp_path / "no.mp4"))
    assert "--image: it is missing" in refused("show", "--prompt", "x", "--out", out, code=2)
    assert "--frames" in refused(*films(out, empty, "--frames", "0"), code=2)


def test_a_model_without_videos_says_so(tmp_path):
    Image.new("RGB", (32, 16)).save(tmp_path / "a.png")
    out = tmp_path / "x.html"
    line = refused(*films(out, tmp_path, "--model", model_folder()))
    assert "this model takes no videos" in line
