"""The names that `alvts_cli` offers to programs, and transformers' own pipeline around it."""

import subprocess
import sys

from cli_tools import model_folder, scene_file
from PIL import Image

import alvts_cli
from alvts_cli import Artifact, attach, calibrate
from alvts_cli.models import load_model

# pocket brings none; this one writes a message's parts one after the other.
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endfor %}"
)


def test_the_names_are_there_and_loaded_late():
    from calibration import calibrate as fit

    assert calibrate is fit
    assert set(alvts_cli.__all__) >= {"Artifact", "attach", "calibrate"}
    code = "import alvts_cli, sys; sys.exit(sum(n in sys.modules for n in ('torch', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_pipeline_with_an_attached_model():
    from transformers import pipeline

    loaded = load_model(str(model_folder()), "cpu")
    loaded.processor.chat_template = TEMPLATE
    made = pipeline(
        "image-text-to-text", model=loaded.model, processor=loaded.processor, device="cpu"
    )
    picture = Image.open(scene_file()).convert("RGB")
    content = [
        {"type": "image", "image": picture},
        {"type": "text", "text": "what color is the circle?"},
    ]

    def ask():
        said = made(
            text=[{"role": "user", "content": content}],
            max_new_tokens=4,
            return_full_text=False,
            generate_kwargs={"do_sample": False},
        )
        return said[0]["generated_text"]

    dense = ask()
    with attach(loaded.model, Artifact.from_pretrained(model_folder()), keep=32) as attachment:
        ask()
        assert attachment.last.layer_average == 32
    with attach(loaded.model, Artifact.from_pretrained(model_folder()), keep=1.0):
        assert ask() == dense
    assert ask() == dense
