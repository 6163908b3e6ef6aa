"""Conversations: what a later turn sees, and `alvts run` on a terminal."""

import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from cli_tools import alvts, model_folder, refused, scene_file
from reference import reference_logits, watch_selection
from tiny import IMAGE, LAYERS, make_inputs, make_model, make_selectors, one_image
from transformers import BatchFeature

from alvts_cli import AlvtsError, attach
from alvts_cli.bench.timing import generate
from alvts_cli.chat import Chat
from alvts_cli.commands import run_chat
from alvts_cli.engine import Policy
from alvts_cli.models import Loaded

FAMILIES = ("llava", "qwen2_5_vl")
PICTURES = ["one"]
NEW = 5


class Words:
    """A tokenizer whose words are ids."""

    bos_token = None

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(str(int(i)) for i in ids)


class Processor:
    """Makes the tiny inputs of a family; 70 begins a user's turn, 71 ends it, 72 an answer."""

    image_token = "<image>"
    chat_template = "own"
    tokenizer = Words()

    def __init__(self, model, family, forgets=False):
        self.model, self.family, self.forgets, self.calls = model, family, forgets, 0

    def apply_chat_template(self, turns, **more):
        said = ""
        for i, turn in enumerate(turns):
            words = " ".join(part.get("text", "<image>") for part in turn["content"])
            if turn["role"] == "user":
                said += f" 70 {words} 71"
            elif self.forgets and i < len(turns) - 1:
                # As templates do that leave out what a model thought before.
                said += " 69"
            else:
                said += f" {words} 72"
        return said

    def __call__(self, images, text, **more):
        self.calls += 1
        before, behind = (Words()(part)["input_ids"] for part in text[0].split("<image>"))
        prompt = one_image(self.family)
        prompt.text, prompt.at = [*before, *behind], len(before)
        return BatchFeature(make_inputs(self.model, prompt))


def talking(family, selectors=None, **more):
    model = make_model(family)
    processor = Processor(model, family, **more)
    chat = Chat(Loaded("tiny", "tiny", None, model, processor), NEW)
    chat.use(selectors, "0.25")
    chat.show(PICTURES)
    return chat, model, processor


def ids_of(text):
    return torch.tensor([Words()(text)["input_ids"]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_answer_is_that_of_one_call_with_all_of_the_history(family):
    chat, model, processor = talking(family)
    first = chat.ask("5 9 12")
    later = chat.ask("33 47")
    assert processor.calls == 1
    whole = Processor(model, family)(None, [f"70 <image> 5 9 12 71 {first.text} 72 70 33 47 71"])
    made = generate(model, dict(whole), NEW)
    assert later.text == Words().decode(made.tokens[0])
    # All but the last token of the answer, which no layer had run on, is in the cache.
    assert later.read == 1 + len([72, 70, 33, 47, 71])
    assert first.read == whole["input_ids"].shape[1] - NEW - 5
    assert (first.visual_tokens, first.visual_tokens_kept) == (later.visual_tokens,) * 2


@pytest.mark.parametrize("policy", [Policy(), Policy(every=2, quality=0.3, mass=True, carry=True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_selective_one_too_with_what_each_layer_chose_at_first(family, policy):
    """Recomputed from nothing, without a cache, by the formulas of `reference`."""
    selectors = make_selectors(family, policy=policy)
    chat, model, processor = talking(family, selectors)
    with watch_selection() as chosen:
        first = chat.ask("5 9 12")
    answers = [first.text, chat.ask("33 47").text, chat.ask("51").text]
    history = (
        f"70 <image> 5 9 12 71 {answers[0]} 72 70 33 47 71 {answers[1]} 72 70 51 71 {answers[2]}"
    )
    whole = dict(processor(None, [history]))
    start = int((whole["input_ids"] == IMAGE).nonzero()[-1, 1]) + 5
    kept = [[int(0.25 * first.visual_tokens)]] * LAYERS
    expected = reference_logits(model, whole, selectors, kept, [(0, start)], chosen, policy)
    right = expected.index_fill(1, torch.tensor(model.generation_config.suppress_tokens), -1e9)
    ends = [len(ids_of(text)[0]) for text in (f"{answers[1]} 72 70 51 71 {answers[2]}", answers[2])]
    for answer, end in zip(answers[1:], ends, strict=True):
        at = whole["input_ids"].shape[1] - end
        assert right[at - 1 : at - 1 + NEW].argmax(1).tolist() == ids_of(answer)[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_another_keep_reads_all_again(family):
    selectors = make_selectors(family)
    chat, model, processor = talking(family)
    first = chat.ask("5 9 12")
    chat.use(selectors, "3")
    later = chat.ask("33 47")
    whole = dict(processor(None, [f"70 <image> 5 9 12 71 {first.text} 72 70 33 47 71"]))
    assert later.read == whole["input_ids"].shape[1]
    assert later.visual_tokens_kept == 3
    with attach(model, selectors, "3") as attachment:
        made = generate(model, whole, NEW, attachment)
    assert later.text == Words().decode(made.tokens[0])


def test_a_history_that_the_template_rewrites_is_read_again():
    chat, _, processor = talking("llava", forgets=True)
    chat.ask("5 9 12")
    second = chat.ask("33 47")
    assert processor.calls == 2
    assert second.read == chat._inputs["input_ids"].shape[1] - NEW
    assert "69" in chat._rendered


def test_an_answer_that_is_stopped_is_forgotten():
    chat, _, _ = talking("llava", make_selectors())
    first = chat.ask("5 9 12")

    def stop(ids):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("33 47", stop)
    again = chat.ask("51")
    other, *_ = talking("llava", make_selectors())
    other.ask("5 9 12")
    other.use(make_selectors(), "0.25")
    assert again.text == other.ask("51").text
    # The cache that was half filled is not gone on with.
    assert again.read > first.read


def test_what_cannot_be_asked():
    chat, _, _ = talking("llava")
    chat.show([])
    with pytest.raises(AlvtsError, match="no picture"):
        chat.ask("5")
    chat.show(PICTURES)
    first = chat.ask("5")
    with pytest.raises(AlvtsError, match="1 places for images"):
        chat.ask("6 <image>")
    with pytest.raises(AlvtsError, match=r"has come to .* begin anew"):
        chat.ask("7 " * 1200)
    # Neither of them was in the way of the next.
    assert chat.ask("33").read == 5 and first.visual_tokens == 16


def terminal(*args):
    """A process of `alvts run` at a terminal of its own, and what reads it up to its next line."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "alvts_cli", "run", *map(str, args)],
        stdin=its,
        stdout=its,
        stderr=its,
        env=os.environ | {"TERM": "dumb"},
    )
    os.close(its)

    def read():
        seen = b""
        while not re.search(rb"(^|\n)> $", seen):
            try:
                seen += os.read(ours, 4096)
            except OSError:
                # Linux's way of saying that nobody is at the other end any more.
                break
        return seen.decode().replace("\r\n", "\n")

    def say(line):
        os.write(ours, line.encode() + b"\n")
        return read()

    return process, read, say


def test_a_conversation_on_a_terminal(tmp_path):
    picture = "alvts_cli/pocket/example.png"
    process, read, say = terminal("--image", picture, "--keep", "0.11")
    try:
        assert "/image FILE" in read()
        said = say("what digit is on the teal cross?")
        assert "\n9\n[267 tokens read; visual tokens 256, kept 28.0 (11 %, layer average)" in said
        said = say("how many crosses are there?")
        assert "tokens read; visual tokens 256, kept 28.0" in said and "[267" not in said
        assert say("/keep 12").count("\n") == 1
        assert "kept 12.0 (5 %" in say("what digit is on the teal cross?")
        say("/dense")
        assert "kept 256.0 (100 %" in say("how many crosses are there?")
        assert "error: there is no image nowhere.png" in say("/image nowhere.png")
        assert "error: keep" in say("/keep -1")
        assert "error: /keep is no command; /image FILE: another picture" in say("/keep")
        assert "error: the prompt has 1 places" in say("what is <image> ?")
        say(f"/image '{picture}'")
        say("/keep 0.11")
        assert "\n9\n[267 tokens read" in say("what digit is on the teal cross?")
        say("/quit")
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def typed(monkeypatch):
    """Runs `alvts run` as on a terminal where these lines are typed, then Ctrl-D."""

    def run(*lines, args=()):
        waiting = iter(lines)

        def line(prompt):
            one = next(waiting, None)
            if one is None:
                raise EOFError
            return one

        monkeypatch.setattr("builtins.input", line)
        monkeypatch.setattr("alvts_cli.commands.run._talks", lambda: True)
        return alvts("run", "--model", model_folder(), "--max-new-tokens", 3, *args)

    return run


def test_without_a_picture_one_is_asked_for(typed):
    result = typed("what is it?", "/keep 9", f"/image {scene_file()}", "what is it?", "")
    assert result.exit_code == 0, result.output
    assert "there is no picture yet; name one: /image FILE" in result.stderr
    assert "kept 9.0 (4 %, layer average)" in result.stdout


def test_dense_needs_no_selectors_until_one_is_asked_for(typed, tmp_path):
    image = ("--image", scene_file(), "--dense", "--selectors", tmp_path / "none")
    assert typed(args=image).exit_code == 2
    result = typed("is it?", "/keep 0.5", "is it?", args=image[:3])
    assert result.exit_code == 0 and result.stdout.count("256, kept 256.0") == 1
    assert "256, kept 128.0 (50 %" in result.stdout


def test_an_odd_line_does_not_end_the_conversation(typed):
    image = ("--image", scene_file())
    odd = ("\udcff\udcfe bad", "/image ~nobody-of-this-name/x", "/image ''", "is it?")
    result = typed("is it?", *odd, args=image)
    assert result.exit_code == 0, result.output
    errors = result.stderr.split("error: ")[1:]
    assert len(errors) == 3
    for words, line in zip(("not UTF-8", "no such user", "is no command"), errors, strict=True):
        assert words in line
    assert result.stdout.count("tokens read") == 2


def test_ctrl_c_stops_an_answer_and_not_the_conversation(typed, monkeypatch):
    def stop(self, words, on_tokens):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_chat.Chat, "ask", stop)
    result = typed("is it?", args=("--image", scene_file()))
    assert result.exit_code == 0 and "(stopped; that question is forgotten)" in result.stdout


@pytest.mark.parametrize("more", [(), ("--json",), ("--compare",)])
def test_through_a_pipe_a_prompt_is_needed(more):
    command = ("run", "--model", model_folder(), "--image", scene_file(), *more)
    assert "--prompt: it is missing" in refused(*command, code=2)
    assert "--image: it is missing" in refused("run", code=2)
    if not more:
        line = [sys.executable, "-m", "alvts_cli", *map(str, command)]
        piped = subprocess.run(line, input="what?\n", capture_output=True, text=True)
        assert piped.returncode == 2 and piped.stdout == ""
        assert re.fullmatch(r"error: .*--prompt.*missing.*\n", piped.stderr)


@pytest.mark.parametrize("more", [("--json",), ("--compare",)])
def test_on_a_terminal_too_where_it_is_no_conversation(more, typed):
    result = typed(args=("--image", scene_file(), *more))
    assert result.exit_code == 2 and "missing" in result.stderr


def test_the_streams_decide(monkeypatch):
    from alvts_cli.commands.run import _talks

    for stdin in (True, False):
        for stdout in (True, False):
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda s=stdin: s))
            monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda s=stdout: s))
            assert _talks() == (stdin and stdout)
