"""Properties that hold for whatever is drawn. A fixed draw in CI; more, and others every time, with

pytest tests/test_properties.py --hypothesis-profile long
"""

import json
import math
import struct
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_artifact import make_artifact
from tiny import LAYERS, Prompt, make_inputs, make_model, make_selectors, one_image

from alvts_cli import AlvtsError, attach
from alvts_cli.artifact import load_artifact, save_artifact
from alvts_cli.bench.metrics import METRICS, parse_gate, parse_share
from alvts_cli.data import Source, read_data
from alvts_cli.engine import Policy, cache_of
from alvts_cli.engine.calls import going_on
from alvts_cli.engine.keep import Keep, resolve_keep, spend
from alvts_cli.schema import parse_json
from alvts_cli.terminal import safe

# Unknown names are told, and many are drawn.
pytestmark = pytest.mark.filterwarnings("ignore:.*holds things this alvts")

_ratios = st.floats(0, 1)
_counts = st.integers(0, 5000)


# Keep.


@given(st.one_of(_ratios, _counts), st.integers(0, 5000))
def test_a_count_is_within_the_tokens(value: int | float, tokens: int) -> None:
    kept = Keep((value,)).count(0, tokens)
    assert 0 <= kept <= tokens
    if isinstance(value, int):
        assert kept == min(value, tokens)
    else:
        assert (kept > 0) == (value > 0 and tokens > 0)
        assert abs(kept - value * tokens) < 1 or kept == 1
    assert Keep((1.0,)).count(0, tokens) == tokens


@given(st.one_of(st.text(), st.floats(), st.integers(), st.lists(st.floats()), st.none()))
def test_whatever_is_asked_for_is_resolved_or_refused(value: Any) -> None:
    try:
        kept = resolve_keep(value, 3)
    except AlvtsError as error:
        assert "\n" not in str(error) or isinstance(value, str)
        return
    assert len(kept.values) == 3
    assert all(0 <= kept.count(i, 100) <= 100 for i in range(3))


@st.composite
def _schedules(draw: Any) -> list[list[float]]:
    """Sorted by their means, no two alike."""
    layers = draw(st.integers(1, 6))
    drawn = draw(st.lists(st.lists(_ratios, min_size=layers, max_size=layers), max_size=4))
    means: dict[float, list[float]] = {}
    for ratios in drawn:
        if 0 < sum(ratios) < layers:
            means[sum(ratios) / layers] = ratios
    return [means[mean] for mean in sorted(means)] or [[0.5] * layers]


@given(_schedules(), st.integers(1, 3000), st.data())
def test_a_budget_is_spent_whole(schedules: list[list[float]], tokens: int, data: Any) -> None:
    average = data.draw(st.integers(0, tokens))
    spent = spend(schedules, average, tokens)
    assert len(spent) == len(schedules[0]) and all(0 <= k <= tokens for k in spent)
    assert sum(spent) == average * len(spent)


# Gates.


@given(st.text(max_size=30))
def test_a_gate_is_one_or_none(text: str) -> None:
    try:
        gate = parse_gate(text)
    except AlvtsError:
        return
    assert gate.metric in METRICS and math.isfinite(gate.limit)


@given(
    st.sampled_from(sorted(METRICS)),
    st.sampled_from([">=", "<=", "==", ">", "<"]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_a_gate_holds_as_it_reads(name: str, sign: str, limit: float, value: float) -> None:
    try:
        gate = parse_gate(f" {name} {sign} {limit!r} ")
    except AlvtsError:
        ends = (METRICS[name].values.least, METRICS[name].values.most)
        assert len({eval(f"end {sign} limit", {"end": end, "limit": limit}) for end in ends}) == 1
        return
    holds, line = gate.check({name: value})
    assert holds == eval(f"{value!r} {sign} {limit!r}")
    assert line.startswith("gate passed" if holds else "gate failed")


@given(st.text(max_size=12))
def test_a_share_is_one_or_none(text: str) -> None:
    try:
        share = parse_share(text)
    except AlvtsError:
        return
    assert 0 <= share < 1


# Text and JSON.


@given(st.text(st.characters(exclude_categories=())))
def test_what_is_printed_is_harmless_and_stays(text: str) -> None:
    said = safe(text)
    assert safe(said) == said
    assert all(c in "\n\t" or c >= " " for c in said) and "\x9b" not in said
    said.encode()


@given(st.binary(max_size=60))
def test_bytes_are_json_or_not(data: bytes) -> None:
    try:
        value = parse_json(data)
    except ValueError:
        return
    assert parse_json(json.dumps(value)) == value


# Artifacts.


@cache
def _file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_artifact(make_artifact(), Path(folder) / "a")
        return (Path(folder) / "a").read_bytes()


def _load(data: bytes) -> None:
    """Loads, or is refused in one line: nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(data)
        try:
            found = load_artifact(path)
        except AlvtsError as error:
            assert str(path) in str(error) and "\n" not in safe(str(error))
            return
    assert all(0 < layer.eps <= 0.01 for layer in found.layers)
    assert all(
        bool(tensor.isfinite().all())
        for layer in found.layers
        for tensor in layer.tensors().values()
    )


@given(st.data())
def test_a_file_with_other_bytes_loads_or_is_refused(data: Any) -> None:
    """Bytes changed, cut out, put in, and the end lost; most in the header, where it matters."""
    whole = bytearray(_file())
    (length,) = struct.unpack("<Q", whole[:8])
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.sampled_from([8, 8 + length, len(whole)]))
        at = data.draw(st.integers(0, max(0, min(end, len(whole)) - 1)))
        what = data.draw(st.sampled_from(["change", "cut", "put", "end"]))
        if what == "change":
            whole[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif what == "cut":
            del whole[at : at + data.draw(st.integers(1, 40))]
        elif what == "put":
            whole[at:at] = data.draw(st.binary(max_size=20))
        else:
            del whole[at:]
    _load(bytes(whole))


_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@given(st.data())
def test_metadata_with_other_values_load_or_are_refused(data: Any) -> None:
    """Any value in the place of any other, at any depth."""
    whole = _file()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    told = json.loads(header["__metadata__"]["alvts"])
    inside: Any = told
    while True:
        key = data.draw(
            st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside)))
        )
        if not inside[key] or not isinstance(inside[key], dict | list) or data.draw(st.booleans()):
            break
        inside = inside[key]
    if isinstance(inside, dict) and data.draw(st.booleans()):
        inside[data.draw(st.text(max_size=8))] = data.draw(_values)
    else:
        inside[key] = data.draw(_values)
    header["__metadata__"]["alvts"] = json.dumps(told)
    text = json.dumps(header).encode()
    _load(struct.pack("<Q", len(text)) + text + whole[8 + length :])


# Data.

# With halves of characters, as JSON can have them.
_any_text = st.text(st.characters(exclude_categories=()), max_size=8)
_turn = st.fixed_dictionaries(
    {
        "from": st.sampled_from(["human", "gpt"]) | _values,
        "value": st.sampled_from(["<image>\nwhat?", "this"]) | _any_text | _values,
    }
)
_record = st.dictionaries(
    st.sampled_from(["image", "images", "question", "conversations", "answer", "id", "kind"])
    | _any_text,
    _values
    | _any_text
    | st.just("a.png")
    | st.just("../a.png")
    | st.lists(_turn | _values, max_size=4)
    | st.just([{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]),
)


@given(st.lists(st.one_of(_record, _values), max_size=5), st.sampled_from([".json", ".jsonl"]))
def test_records_are_read_or_skipped_by_name(records: list[Any], ending: str) -> None:
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (4, 4)).save(Path(folder) / "a.png")
        path = Path(folder) / f"data{ending}"
        lines = [json.dumps(record) for record in records]
        path.write_text(f"[{','.join(lines)}]" if ending == ".json" else "\n".join(lines))
        reader = read_data(Source(str(path)), None, None)
        samples = list(reader)
        assert len(samples) + len(reader.skipped) == len(records)
        for sample in samples:
            sample.prompt.encode()
            assert sample.images and sample.prompt.strip()
            assert all(answer.strip() and answer.encode() for answer in sample.answers)
        assert all(line.startswith(path.name) and "\n" not in line for line in reader.skipped)


@given(st.text(), st.sampled_from([".json", ".jsonl", ".csv"]))
def test_a_file_of_records_is_read_or_refused(text: str, ending: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data{ending}"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            reader = read_data(Source(str(path)), None, None)
        except AlvtsError:
            return
        assert list(reader) == []


# Ragged caches: a batch gives every sample what it gets alone.


@dataclass(frozen=True)
class _Case:
    """A batch and what is done with it.

    Attributes:
        family: of the model. In LLaVA-NeXT pictures differ in tokens, and some of them are alike.
        schedules: that the selectors have.
        first, later: the turns of words before and behind the prompts: how many each sample has, 0
            where it has no such turn.
    """

    family: str
    prompts: tuple[Prompt, ...]
    keep: Any
    schedules: tuple[tuple[float, ...], ...]
    policy: Policy
    first: tuple[tuple[int, ...], ...]
    later: tuple[tuple[int, ...], ...]


@st.composite
def _cases(draw: Any) -> _Case:
    family = draw(st.sampled_from(["llava", "llava_next"]))
    sizes = [(32, 32), (16, 32)] if family == "llava_next" else [one_image("llava").images[0]]

    def prompt() -> Prompt:
        images = draw(st.lists(st.sampled_from(sizes), max_size=2))
        if images and draw(st.integers(0, 9)) == 0:
            return Prompt([], images, at=0)
        length = draw(st.integers(2, 8))
        at = draw(st.integers(1, length))
        text = [draw(st.integers(5, 80)) for _ in range(length)]
        return Prompt([1, *text], images, at=at, seed=draw(st.integers(0, 99)))

    prompts = tuple(prompt() for _ in range(draw(st.integers(1, 3))))
    keep = draw(
        st.floats(0.05, 1.0)
        | st.sampled_from([1, 5, 20, 60])
        | st.lists(st.sampled_from([0, 0.1, 0.4, 1.0, 2, 20, 60]), min_size=LAYERS, max_size=LAYERS)
    )
    ratio = st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.99])
    one = st.lists(ratio, min_size=LAYERS, max_size=LAYERS).filter(any).map(tuple)
    schedules = draw(st.just(()) | one.map(lambda ratios: (ratios,)))
    policy = Policy(
        every=draw(st.integers(0, 3)),
        quality=draw(st.sampled_from([None, 0.3, 1.0])),
        mass=draw(st.booleans()),
        pool=draw(st.booleans()),
    )
    samples = len(prompts)
    # Often one token or none: what a single token is told of is another path.
    number = st.sampled_from([0, 1, 1, 2, 3])
    lengths = st.lists(number, min_size=samples, max_size=samples).filter(any).map(tuple)
    first, later = (tuple(draw(st.lists(lengths, max_size=most))) for most in (1, 3))
    return _Case(family, prompts, keep, schedules, policy, first, later)


def _words(number: int, length: int) -> list[int]:
    return [40 + number] * length


def _told(model: Any, case: _Case) -> list[torch.Tensor]:
    """The logits `[B, V]` of the last token after every turn, the prompts' among them. All turns
    are left-padded; positions count what is real."""
    prompts = make_inputs(model, *case.prompts)
    words = ("input_ids", "attention_mask")
    pixels = {name: prompts.pop(name) for name in list(prompts) if name not in words}
    batch = len(case.prompts)
    mask = prompts["input_ids"].new_zeros(batch, 0)
    told, before = [], {}
    for number, turn in enumerate([*case.first, None, *case.later]):
        if turn is None:
            ids, real = prompts["input_ids"], prompts["attention_mask"]
        else:
            rows = [[0] * (max(turn) - length) + _words(number, length) for length in turn]
            ids = torch.tensor(rows)
            real = (ids != 0).long()
        mask = torch.cat([mask, real], dim=1)
        at = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        more = pixels if turn is None else {}
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=at, use_cache=True, **more, **before
        )
        before = going_on(output)
        told.append(output.logits[:, -1])
    assert {layer.get_seq_length() for layer in cache_of(output).layers} == {mask.shape[1]}
    return told


def _alone(model: Any, case: _Case, i: int) -> list[torch.Tensor | None]:
    """The same of one sample, `[1, V]`, without any padding; None where it has no turn."""
    told: list[torch.Tensor | None] = []
    before = {}
    for number, turn in enumerate([*case.first, None, *case.later]):
        if turn is None:
            inputs = make_inputs(model, case.prompts[i])
        elif turn[i]:
            inputs = {"input_ids": torch.tensor([_words(number, turn[i])])}
        else:
            told.append(None)
            continue
        # Without a mask, and at the positions that follow.
        inputs.pop("attention_mask", None)
        output = model(**inputs, use_cache=True, **before)
        before = going_on(output)
        told.append(output.logits[:, -1])
    return told


@given(_cases())
def test_a_ragged_batch_is_its_samples(case: _Case) -> None:
    model = make_model(case.family)
    selectors = make_selectors(case.family, schedules=case.schedules)
    if not any(case.keep) if isinstance(case.keep, list) else False:
        return
    with torch.no_grad(), attach(model, selectors, case.keep, policy=case.policy):
        together = _told(model, case)
        for i in range(len(case.prompts)):
            for all_of, one in zip(together, _alone(model, case, i), strict=True):
                if one is not None:
                    torch.testing.assert_close(all_of[i], one[0], rtol=1e-3, atol=1e-3)


@given(_cases(), st.integers(2, 3))
def test_beams_of_a_ragged_batch_are_its_samples(case: _Case, beams: int) -> None:
    model = make_model(case.family)
    selectors = make_selectors(case.family, schedules=case.schedules)
    if not any(case.keep) if isinstance(case.keep, list) else False:
        return
    how = {"max_new_tokens": 3, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), attach(model, selectors, case.keep, policy=case.policy):
        inputs = make_inputs(model, *case.prompts)
        said = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
        for i, prompt in enumerate(case.prompts):
            alone = make_inputs(model, prompt)
            own = model.generate(**alone, **how)[0, alone["input_ids"].shape[1] :]
            assert torch.equal(said[i, : len(own)], own)
