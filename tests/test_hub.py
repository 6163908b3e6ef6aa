"""Selectors shared through a hub: a real HTTP server on loopback."""

import re
from pathlib import Path

import pytest
from cli_tools import alvts, model_folder, scene_file
from hub_tools import at_hub, running_hub

from alvts_cli import AlvtsError, Artifact
from alvts_cli.artifact import load_artifact, save_artifact
from alvts_cli.hub import selectors_file

ASK = ("--image", scene_file(), "--prompt", "what color is the circle?", "--max-new-tokens", 2)


def selectors():
    return model_folder() / "selectors.safetensors"


@pytest.fixture
def hub():
    with running_hub() as running:
        yield running


def test_pushed_and_used_by_another(hub, tmp_path):
    # Ours is written anew, a model's own is left alone.
    hub.add("me/old", {"README.md": b"---\nlibrary_name: alvts\n---\nold\n"})
    hub.add("me/model", {"README.md": b"# My model\n"})
    repos = ("me/picks", "me/old", "me/model")
    pushed = at_hub(hub, tmp_path / "a", *(("push", selectors(), repo) for repo in repos))
    for repo, done in zip(repos, pushed, strict=True):
        assert done.code == 0, done
        assert f"pushed to {hub.address}/{repo}/commit/" in done.stdout
        assert hub.repos[repo]["main"]["selectors.safetensors"] == selectors().read_bytes()
    card = hub.repos["me/picks"]["main"]["README.md"].decode()
    for words in ("library_name: alvts", "Selectors for tiny", "--selectors me/picks", "0.750"):
        assert words in card
    assert "alvts calibrate --model tiny --data nothing --samples 4 --rank" in card
    assert hub.repos["me/old"]["main"]["README.md"].decode() == card.replace("/picks", "/old")
    assert hub.repos["me/model"]["main"]["README.md"] == b"# My model\n"
    assert "own README.md was left as it is" in pushed[2].stdout

    command = ("token=", "run", "--model", model_folder(), *ASK, "--selectors", "me/picks")
    (used,) = at_hub(hub, tmp_path / "b", command)
    assert used.code == 0, used
    # From the cache, where nobody answers.
    cached, away = at_hub(None, tmp_path / "b", ("info", "me/picks"), ("info", "me/old"))
    assert cached.code == 0 and "tiny" in cached.stdout
    assert away.stderr.startswith("error: cannot get the selectors me/old: it is not on this")
    assert away.code == 1 and "hub cannot be reached" in away.stderr


def test_revisions_addresses_and_what_is_not_there(hub, tmp_path):
    good, other = selectors().read_bytes(), b"not selectors"
    hub.add("me/picks", {"selectors.safetensors": other, "deep/x.safetensors": good})
    hub.add("me/picks", {"selectors.safetensors": good}, "v1")
    names = {
        "me/picks@v1": "",
        "hf://me/picks@v1": "",
        "hf://me/picks/deep/x.safetensors": "",
        "me/picks": "is not a safetensors file",
        "me/none": "no such repo, or it asks for a login",
        "me/picks@v2": "has no such revision",
        "hf://me/picks/y.safetensors": "has no such file",
        "hf://picks": "no selectors 'hf://picks'",
        "what/is/this": "there is no selector file what/is/this",
    }
    commands = [("info", name) for name in names]
    *told, refused = at_hub(
        hub, tmp_path, *commands, ("token=hf_wrong", "push", selectors(), "me/new")
    )
    for done, words in zip(told, names.values(), strict=True):
        assert done.code == bool(words), done
        assert done.stderr.count("error: ") == bool(words)
        assert words in done.stderr
    assert "cannot push to me/new" in refused.stderr and "hf auth login" in refused.stderr
    assert refused.code == 1 and "me/new" not in hub.repos


def test_selectors_in_the_repo_of_a_model_are_found(hub, tmp_path):
    files = {path.name: path.read_bytes() for path in model_folder().iterdir()}
    hub.add("me/tiny", files)
    hub.add("me/bare", {n: data for n, data in files.items() if n != "selectors.safetensors"})
    commands = [("run", "--model", model, *ASK) for model in ("me/tiny", "me/bare")]
    found, bare = at_hub(hub, tmp_path, *commands)
    assert found.code == 0, found
    assert "kept 64.0 (25 %" in found.stdout
    assert bare.code == 1 and "error: no selectors for me/bare" in bare.stderr
    assert "alvts calibrate" in bare.stderr


def test_folders(tmp_path):
    artifact = load_artifact(selectors())
    artifact.save_pretrained(tmp_path / "a" / "b")
    again = Artifact.from_pretrained(tmp_path / "a" / "b")
    assert again.rank == artifact.rank
    assert (tmp_path / "a" / "b" / "selectors.safetensors").read_bytes() == selectors().read_bytes()
    assert selectors_file(str(model_folder())) == selectors()
    one = tmp_path / "one"
    one.mkdir()
    with pytest.raises(AlvtsError, match="neither selectors"):
        selectors_file(str(one))
    for name in ("x", "y"):
        (one / f"{name}.alvts.safetensors").touch()
        if name == "x":
            assert selectors_file(str(one)) == one / "x.alvts.safetensors"
    with pytest.raises(AlvtsError, match="several files"):
        selectors_file(str(one))
    (tmp_path / "file").touch()
    with pytest.raises(AlvtsError, match="cannot make"):
        artifact.save_pretrained(tmp_path / "file" / "c")


def test_a_card_says_what_was_measured_and_no_path_of_this_machine():
    from dataclasses import replace

    from alvts_cli.card import make_card
    from alvts_cli.pocket import WEIGHTS

    shipped = load_artifact(WEIGHTS / "selectors.safetensors")
    card = make_card(replace(shipped, model_id="/home/me/secret/llava"), "me/picks")
    assert "/home" not in card and "Selectors for llava" in card and "base_model" not in card
    trials = shipped.calibration.trials
    assert card.count("**(picked)**") == len(shipped.picked)
    assert len(re.findall(r"^\| \d+% \|", card, re.M)) == len(trials)
    assert len(re.findall(r"^\| \d+ \| \d", card, re.M)) == len(shipped.layers)
    of_hub = make_card(replace(shipped, model_id="org/llava", revision="abc"), "me/picks")
    assert "base_model: org/llava" in of_hub and "@ `abc`" in of_hub


@pytest.mark.parametrize(
    ("keep", "words"), [(64, "64 tokens"), (64.0, "64 tokens"), (1, "1 token"), (0.11, "0.110")]
)
def test_a_default_keep_is_told_as_what_it_is(keep, words, tmp_path):
    from dataclasses import replace

    from alvts_cli.card import make_card
    from alvts_cli.pocket import WEIGHTS

    shipped = load_artifact(WEIGHTS / "selectors.safetensors")
    artifact = replace(shipped, default_keep=keep)
    assert f"| default keep | {words} |" in make_card(artifact, "me/picks")
    save_artifact(artifact, tmp_path / "x.safetensors")
    told = alvts("info", tmp_path / "x.safetensors").stdout
    assert f"default keep {words}" in " ".join(told.split())


def test_a_card_of_odd_names_and_of_the_papers_form():
    from dataclasses import replace

    from alvts_cli.card import make_card
    from alvts_cli.pocket import WEIGHTS

    shipped = load_artifact(WEIGHTS / "selectors.safetensors")
    record = replace(shipped.calibration, data="a|b`c\nd.jsonl")
    card = make_card(replace(shipped, model_id="/home/me/my model", calibration=record), "me/x")
    assert "alvts run --model 'my model' --selectors" in card
    assert "| data | a\\|b'c d.jsonl: " in card and "--form" not in card
    paper = load_artifact(Path(__file__).parent / "artifacts" / "format-2.safetensors")
    assert "--form paper" in make_card(paper, "me/x")


def test_figures_of_other_samples_are_not_set_beside_each_other():
    """What was dropped early was measured on the first samples alone."""
    from dataclasses import replace

    from rich.console import Console

    from alvts_cli.card import make_card
    from alvts_cli.commands.fit_tables import policy_table
    from alvts_cli.pocket import WEIGHTS

    shipped = load_artifact(WEIGHTS / "selectors.safetensors")
    first, *others = shipped.calibration.trials
    dropped = replace(first, same=0.123, loss=9.87, dropped_after=16)
    record = replace(shipped.calibration, trials=(dropped, *others))
    console = Console(width=200)
    with console.capture() as shown:
        console.print(policy_table(record, shipped.picked))
    card = make_card(replace(shipped, calibration=record), "me/picks")
    for text in (shown.get(), card):
        assert "out at 16" in text and "12%" not in text and "9.87" not in text
    row = next(line for line in card.splitlines() if "out at 16" in line)
    assert row.count("|") == 6 and f"{1 / first.time:.2f}x" in row
