"""The recipe: packed questions equal single prompts; a resumed run equals an uninterrupted one."""

import sys
from pathlib import Path

import pytest
import torch
from cli_tools import refused

from alvts_cli.errors import AlvtsError
from alvts_cli.pocket.build import make_model
from alvts_cli.pocket.training import train as recipe
from alvts_cli.pocket.training.examples import scene_example
from alvts_cli.pocket.training.packed import packed_logits
from alvts_cli.pocket.training.segments import make_segments
from alvts_cli.pocket.training.vision import encode
from alvts_cli.pocket.words import IMAGE, make_tokenizer

torch.set_num_threads(1)


def stirred_model():
    """An untrained model whose branches do not end in zeros."""
    model = make_model(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.normal_(std=0.05)
    return model


@torch.no_grad()
def test_packed_questions_are_answered_as_prompts_of_their_own() -> None:
    model, tokenizer = stirred_model(), make_tokenizer()
    example = scene_example(0, 3, 2, 4)
    text = make_segments([example], tokenizer).text[:, :3]
    visual = encode(model, example.pixels[None])
    where = torch.arange(256)[None]
    packed, (tapped,) = packed_logits(model, visual, where, text, (5,))
    assert tapped.shape == (1, *text.shape[1:], model.lm_head.in_features)
    model.model.language_model.config._attn_implementation = "sdpa"
    head = tokenizer(f"USER: {IMAGE * 256}", return_tensors="pt").input_ids
    for q in range(3):
        alone = model(
            input_ids=torch.cat([head, text[:, q]], 1), pixel_values=example.pixels[None]
        ).logits[:, head.shape[1] :]
        torch.testing.assert_close(packed[:, q], alone, atol=1e-4, rtol=1e-4)


SHORT = (
    recipe.Phase("speech", 2, 2, 0, 0.0, 1e-3, 0.5),
    recipe.Phase("answers", 3, 2, 40, 1e-3, 1e-4, 0.0),
)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiling, and saving after every step."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(recipe, "SAVE_EVERY", 1)


@pytest.mark.usefixtures("plain")
def test_training_resumes_where_it_stopped(tmp_path: Path) -> None:
    losses: list[float] = []
    whole = recipe.train(tmp_path / "a", phases=SHORT, on_step=lambda s: losses.append(s.loss))
    again: list[float] = []

    def stop_at_four(step: recipe.Step) -> None:
        again.append(step.loss)
        if len(again) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.train(tmp_path / "b", phases=SHORT, on_step=stop_at_four)
    # The interrupted step was not saved: it is taken again.
    again.pop()
    resumed = recipe.train(tmp_path / "b", phases=SHORT, on_step=lambda s: again.append(s.loss))
    assert again == losses
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


@pytest.mark.usefixtures("plain")
def test_a_checkpoint_of_another_seed_is_refused(tmp_path: Path) -> None:
    recipe.train(tmp_path, phases=SHORT[:1])
    with pytest.raises(AlvtsError, match="another recipe or seed"):
        recipe.train(tmp_path, seed=1, phases=SHORT[:1])


def test_an_install_without_the_recipes_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "alvts_cli.pocket.training", None)
    out, gguf = tmp_path / "out", tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    for command in (("pocket", "train"), ("smol", "train", gguf)):
        assert "python -m alvts_cli" in refused(*command, "--out", out)
    assert not out.exists()
