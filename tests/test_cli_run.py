import json
import shutil

import numpy as np
import pytest
from cli_tools import DEPTH, alvts, model_folder, refused, scene_file
from PIL import Image

PROMPT = "what color is the circle?"


def run(*more, prompt=PROMPT, image=None):
    return (
        *("run", "--model", model_folder(), "--image", image or scene_file()),
        *("--prompt", prompt, "--max-new-tokens", 4, *more),
    )


def answered(*more, **changes):
    result = alvts(*run("--json", *more, **changes))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_answer_comes_first_then_one_line():
    result = alvts(*run())
    assert result.exit_code == 0, result.output
    *_, last = lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert "visual tokens 256, kept 64.0 (25 %, layer average)" in last
    assert "prefill" in last and "4 new tokens" in last and "KV cache" in last
    assert result.stderr == ""


def test_json_is_one_object_and_nothing_else():
    said = answered()
    assert set(said) == {
        *("model", "answer", "mode", "visual_tokens", "visual_tokens_kept", "text_tokens"),
        *("new_tokens", "vision_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token", "kv_bytes"),
    }
    assert said["mode"] == "selective"
    assert (said["visual_tokens"], said["visual_tokens_kept"]) == (256, 64)
    # Of every layer keys and values, 3 heads of 64 floats.
    assert said["kv_bytes"] == DEPTH * 2 * 192 * 4 * (64 + said["text_tokens"])


def test_keep_is_a_count_or_a_ratio():
    assert answered("--keep", 32)["visual_tokens_kept"] == 32
    assert answered("--keep", 0.5)["visual_tokens_kept"] == 128
    schedule = ",".join(["1.0"] + ["0"] * (DEPTH - 1))
    assert answered("--keep", schedule)["visual_tokens_kept"] == 256 / DEPTH


def test_keeping_everything_is_the_dense_answer():
    dense, whole = answered("--dense"), answered("--keep", "1.0")
    assert dense["mode"] == "dense" and whole["mode"] == "selective"
    for name in ("answer", "kv_bytes", "visual_tokens_kept"):
        assert dense[name] == whole[name]


def test_dense_needs_no_selectors(tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model_folder(), bare)
    (bare / "selectors.safetensors").unlink()
    command = ("run", "--model", bare, "--image", scene_file(), "--prompt", PROMPT)
    assert "alvts calibrate --model" in refused(*command)
    assert alvts(*command, "--dense", "--max-new-tokens", 1).exit_code == 0


def test_selectors_in_the_current_folder_are_found(tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    shutil.copytree(model_folder(), bare)
    (bare / "selectors.safetensors").rename(tmp_path / "bare.alvts.safetensors")
    monkeypatch.chdir(tmp_path)
    result = alvts("run", "--model", "bare", "--image", scene_file(), "--prompt", PROMPT)
    assert result.exit_code == 0, result.output


def test_compare_shows_both():
    both = answered("--compare")
    assert set(both) == {"dense", "selective"}
    assert both["dense"]["visual_tokens_kept"] == 256
    assert both["selective"]["visual_tokens_kept"] == 64
    assert both["dense"]["answer"] == answered("--dense")["answer"]
    assert both["selective"]["answer"] == answered()["answer"]
    table = alvts(*run("--compare")).stdout
    for word in ("dense", "selective", "answer", "64.0 of 256", "prefill", "per token", "KV"):
        assert word in table


def test_several_images():
    said = answered("--image", scene_file(), prompt="is <image> in <image> ?")
    assert said["visual_tokens"] == 512
    assert said["visual_tokens_kept"] == 128


def test_words_that_pocket_does_not_know_are_named():
    result = alvts(*run("--dense", prompt="Is there a Zebra in the <image> picture?"))
    assert result.stderr == "note: pocket does not know these words: Zebra\n"


def test_pictures_that_pocket_does_not_know(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    result = alvts(*run("--dense", image=tmp_path / "noise.png"))
    assert result.exit_code == 0
    assert len(result.stderr.splitlines()) == 1
    assert "rendered scenes only" in result.stderr


def _text(path):
    path.write_text("not a picture")


def _corrupt(path):
    path.write_bytes(scene_file().read_bytes()[:300])


def _folder(path):
    path.mkdir()


@pytest.mark.parametrize("make", [_text, _corrupt, _folder, lambda path: None])
def test_a_bad_image_is_one_line(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x.jpg")
    before = sorted(tmp_path.iterdir())
    assert "x.jpg" in refused(*run(image="x.jpg"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_picture_too_large_to_open_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused(*run())


@pytest.mark.parametrize("keep", ["0", "-1", "2.5", "nan", "inf", "many", "0.5,nan", ""])
def test_a_bad_keep_is_one_line(keep):
    assert "--keep" in refused(*run("--keep", keep), code=2)


def test_a_schedule_of_another_depth_is_one_line():
    assert "4 layers" in refused(*run("--keep", "0.5,0.5"))


@pytest.mark.parametrize(
    "more",
    [("--dense", "--keep", "0.5"), ("--dense", "--compare"), ("--dense", "--selectors", "x")],
)
def test_contradicting_options_are_one_line(more):
    assert "--dense" in refused(*run(*more), code=2)


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("<image> and <image>", "2 places"),
        ("is it " * 2500, "shorten"),
    ],
)
def test_a_prompt_without_room_for_the_image_is_one_line(prompt, word):
    assert word in refused(*run(prompt=prompt))


def test_an_empty_prompt_is_one_line():
    refused(*run(prompt="  "), code=2)


def test_an_answer_longer_than_the_model_is_one_line():
    refused(*run("--max-new-tokens", 5000))


def test_selectors_of_another_model_are_one_line():
    other = model_folder(seed=1) / "selectors.safetensors"
    assert "made for tiny" in refused(*run("--selectors", other))


@pytest.mark.parametrize("size", [0, 5, 100, 5000, -1])
def test_a_truncated_artifact_is_one_line(size, tmp_path):
    whole = (model_folder() / "selectors.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[:size])
    assert "cut.safetensors" in refused(*run("--selectors", path))
    assert "cut.safetensors" in refused("info", path)


def test_a_missing_artifact_is_one_line():
    refused(*run("--selectors", "nowhere.safetensors"))


def test_a_damaged_picture_is_found_before_the_model_is_loaded(tmp_path):
    _text(tmp_path / "x.jpg")
    command = ("run", "--model", "/nowhere", "--image", tmp_path / "x.jpg", "--prompt", PROMPT)
    assert "x.jpg" in refused(*command)


def test_selectors_of_other_weights_are_used_when_asked_and_told():
    other = model_folder(seed=1) / "selectors.safetensors"
    line = refused(*run("--selectors", other))
    assert "the weights of" in line and "--other-weights" in line
    result = alvts(*run("--json", "--selectors", other, "--other-weights"))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["other_weights"] is True
    assert "note: the selectors were fitted on the weights of" in result.stderr
    # Of the right weights nothing is said.
    assert "other_weights" not in answered("--other-weights")
