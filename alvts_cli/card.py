"""The card of selectors on the hub: what they are for, how well they do, and how they were made."""

import re
import shlex
from pathlib import Path

from huggingface_hub import ModelCardData

from .artifact import Artifact
from .header import Trial, written_keep

LIBRARY = "alvts"

_ID = r"[\w-][\w.-]*/[\w.-]+"


def make_card(artifact: Artifact, repo: str) -> str:
    """A README.md in Markdown, under the metadata that the hub reads.

    Args:
        artifact: the selectors.
        repo: where they will be.
    """
    record = artifact.calibration
    of_hub = _is_id(artifact.model_id)
    # A folder's path is nobody else's business.
    model = artifact.model_id if of_hub else Path(artifact.model_id).name
    data = ModelCardData(
        base_model=artifact.model_id if of_hub else None,
        datasets=[record.data] if _is_id(record.data) else None,
        library_name=LIBRARY,
        pipeline_tag="image-text-to-text",
        tags=["alvts", "visual-token-selection"],
    )
    samples = record.fitted + record.held_out
    made = {
        "--model": model,
        "--data": "pocket" if record.data == "pocket scenes" else record.data,
        "--samples": samples,
        **({"--form": "paper"} if artifact.paper else {}),
        "--rank": artifact.rank,
        "--seed": record.settings.get("seed", 0),
    }
    command = shlex.join(["alvts", "calibrate", *(str(x) for pair in made.items() for x in pair)])
    run = (
        f"alvts run --model {shlex.quote(model)} --selectors {repo} --keep 0.11 --image x.jpg "
        '--prompt "What is this?"'
    )
    mean = record.mean
    keep = record.settings.get("keep")
    recall_at = written_keep(keep if isinstance(keep, (int, float)) else artifact.default_keep)
    versions = ", ".join(f"{name} {value}" for name, value in record.versions.items())
    at = f" @ `{artifact.revision}`" if artifact.revision else ""
    return f"""---
{data.to_yaml()}
---

# Selectors for {model}

Fitted by alvts for [adaptive layer-wise visual token selection](https://arxiv.org/abs/2606.14277):
every decoder layer picks the few visual tokens it needs, the others skip it. The base model stays
as it is, and is not in this repo.

```sh
{run}
```

```python
from alvts_cli import Artifact, attach

with attach(model, Artifact.from_pretrained("{repo}"), keep=0.11):
    model.generate(**inputs)
```

| | |
|---|---|
| base model | `{_cell(model)}`{at}, {artifact.family} |
| layers, width, rank | {len(artifact.layers)}, {artifact.hidden_size}, {artifact.rank} |
| default keep | {written_keep(artifact.default_keep)} |
| data | {_cell(record.data)}: {record.fitted} samples fitted, {record.held_out} measured on |
| sample ids (SHA-256) | `{record.sample_ids}` |
| versions | {_cell(versions)} |

## What is kept
{_policies(artifact)}
Recall of each layer's own choice on the samples that were not fitted, at a keep of
{recall_at}: {mean.recall_after:.3f} (mean over layers;
{mean.recall_before:.3f} before the fit).

| layer | loss before | loss after | recall before | recall after |
|---|---|---|---|---|
{_layers(artifact)}

## How they were made

```sh
{command}
```
"""


def _cell(text: str) -> str:
    """Text that stands in a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("`", "'").split())


def _policies(artifact: Artifact) -> str:
    record = artifact.calibration
    trials = record.trials
    if not trials:
        return ""
    picked = {one.keep: one.policy for one in artifact.picked}
    rows = [
        f"| {t.keep:.0%} | {t.policy}{' **(picked)**' * (picked.get(t.keep) == t.policy)} "
        f"| {_answers(t)} | {'-' if t.time is None else f'{1 / t.time:.2f}x'} |"
        for t in trials
    ]
    return "\n".join(
        [
            "",
            f"Answers that are the dense model's own, token for token, on {record.samples_tried} "
            f"samples that were not fitted ({record.data_tried}), their loss (KL to the dense "
            "model's, in nats), and how many times as fast as the dense model's the prefill was on "
            "the machine that calibrated. Out at 16: clearly behind after so many samples, and "
            "dropped:",
            "",
            "| keep | policy | same answers | loss | prefill |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _answers(trial: Trial) -> str:
    """Two cells. What was dropped was measured on other samples: not to be compared."""
    if trial.dropped_after is not None:
        return f"out at {trial.dropped_after} | -"
    return f"{trial.same:.1%} | {trial.loss:.3f}"


def _layers(artifact: Artifact) -> str:
    return "\n".join(
        f"| {i} | {fit.loss_before:.4f} | {fit.loss_after:.4f} | {fit.recall_before:.3f} "
        f"| {fit.recall_after:.3f} |"
        for i, fit in enumerate(artifact.calibration.layers)
    )


def _is_id(name: str) -> bool:
    """Whether it reads as an id of the hub, and is not a folder of this machine."""
    return re.fullmatch(_ID, name) is not None and not Path(name).exists()
