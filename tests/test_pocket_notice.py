import numpy as np
import pytest
from PIL import Image

from alvts_cli.pocket.easy import load_easy
from alvts_cli.pocket.notice import foreign_words, is_pocket, looks_rendered
from alvts_cli.pocket.scenes import make_scene, render, seed_of
from alvts_cli.pocket.words import make_tokenizer


def test_all_scenes_look_rendered():
    for index in range(200):
        assert looks_rendered(render(make_scene(seed_of("test", index))))


def test_all_easy_vqa_pictures_look_rendered():
    pytest.importorskip("easy_vqa")
    for picture in load_easy("test"):
        assert looks_rendered(picture.open())


def test_a_scene_saved_as_jpeg_still_looks_rendered(tmp_path):
    for quality in (50, 90):
        path = tmp_path / "scene.jpg"
        render(make_scene(seed_of("test", 1))).save(path, quality=quality)
        with Image.open(path) as image:
            assert looks_rendered(image)


def _noise():
    return np.random.default_rng(0).integers(0, 256, (100, 120, 3))


def _gradient():
    return np.linspace(150, 255, 120)[None, :, None] + np.zeros((100, 1, 3))


def _landscape():
    """Sky that pales towards the horizon over rough ground, as photographs have it."""
    sky = np.linspace(140, 235, 60)[:, None, None] + np.array([-20, 0, 15])
    ground = 90 + np.random.default_rng(1).normal(0, 30, (60, 120, 3))
    return np.concatenate([sky + np.zeros((1, 120, 1)), ground])


@pytest.mark.parametrize("make", [_noise, _gradient, _landscape, lambda: np.zeros((9, 9, 3))])
def test_other_pictures_do_not(make):
    assert not looks_rendered(Image.fromarray(make().clip(0, 255).astype(np.uint8)))


def test_foreign_words_are_named_once_as_written():
    tokenizer = make_tokenizer()
    assert is_pocket(tokenizer)
    assert foreign_words(tokenizer, "Is there a RED circle, or a Dog? a Dog!") == ["Dog", "!"]
    assert foreign_words(tokenizer, "what digit is on the blue star?") == []
