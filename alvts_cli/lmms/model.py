"""The model class that lmms-eval makes from `--model_args` and asks its questions."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import Image
from tqdm import tqdm

from ..answer import selectors_for
from ..batches import collate, end_token, ended
from ..engine import Attachment, attach, parse_policy
from ..engine.keep import KeepArgument, resolve_keep
from ..errors import AlvtsError
from ..families import family_of
from ..methods import FITTED, check_method, make_method
from ..methods.base import Method
from ..models import load_model
from ..prompts import MARKER, build_inputs, read_image

# For tasks that name no length, as lmms-eval's own LLaVA has it.
_MAX_NEW_TOKENS = 1024


@dataclass
class _Totals:
    """What a call of `generate_until` took."""

    samples: int = 0
    seconds: float = 0.0
    new_tokens: int = 0
    visual_tokens: int = 0
    kept: float = 0.0


class Alvts(lmms):
    """A model with visual token selection, or with one of its peers, or dense.

    `keep` is read as everywhere in alvts, except that a list of one value per layer is written in
    brackets: `keep=[0.5,0.1,...]`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        selectors: str | None = None,
        keep: KeepArgument = None,
        method: str = "alvts",
        device: str = "auto",
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        policy: str | None = None,
        other_weights: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            pretrained: a name, hub id or folder, as `load_model` takes it.
            selectors: a file, a folder or `user/repo[@revision]` of the hub; None for those that
                `find_selectors` finds.
            keep: layer average; None for what the selectors say.
            method: one of `METHODS`; "dense" for the baseline, which needs neither of the two.
            device: "auto" is this process's GPU, or the CPU.
            dtype: as `load_model` takes it.
            batch_size: questions at once.
            max_batch_size: not used; lmms-eval passes it on for models that try sizes.
            policy: of the method alvts, by name; None for what calibration picked for `keep`.
            other_weights: take selectors of a model of the same shape.
            trust_remote_code: run code that the model brings with it.

        Raises:
            AlvtsError: an unknown method, policy or batch size, a policy for another method, what
                `load_model`, `find_selectors` and `attach` refuse, or a method without `keep`.
        """
        super().__init__()
        check_method(method)
        if policy is not None and method != "alvts":
            raise AlvtsError(f"the method {method} has no policies; leave policy out")
        chosen = None if policy is None else parse_policy(policy)
        self.batch_size = _batch_size(batch_size)
        self._loaded = load_model(pretrained, device, dtype, trust_remote_code)
        self.device = self._loaded.device
        self._attachment: Attachment | None = None
        self._peer: tuple[Method, int | float] | None = None
        if isinstance(keep, str):
            keep = keep.strip("[]")
        model = self._loaded.model
        if method == "alvts":
            # Once for all batches: every attachment takes the selectors to the device again.
            given = selectors_for(self._loaded, selectors, other_weights)
            self._attachment = attach(model, given, keep, policy=chosen)
        elif method != "dense":
            values = set(resolve_keep(keep, len(family_of(model).layers(model))).values)
            if len(values) > 1:
                raise AlvtsError(f"the method {method} takes one keep, not one per layer")
            fitted = None
            if method in FITTED:
                fitted = selectors_for(self._loaded, selectors, other_weights)
            self._peer = make_method(method, fitted), values.pop()

    @torch.inference_mode()
    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answers, in the order of `requests`.

        Raises:
            AlvtsError: a question that is not one turn with pictures, a picture that cannot be
                read, or a prompt that does not fit the model.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[2]), []).append(i)
        results: dict[int, GenerationResult] = {}
        totals = _Totals()
        with tqdm(total=len(requests), desc="alvts", disable=self.rank != 0) as bar:
            for group in groups.values():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    answers = self._answer([requests[i] for i in batch], totals)
                    results |= zip(batch, answers, strict=True)
                    bar.update(len(batch))
        if totals.samples:
            log_metrics(
                total_elapsed_time=totals.seconds,
                total_gen_tokens=totals.new_tokens,
                avg_speed=totals.new_tokens / totals.seconds,
                # lmms-eval writes them beside the scores.
                additional_metrics={
                    "visual_tokens": totals.visual_tokens / totals.samples,
                    "visual_tokens_kept": totals.kept / totals.samples,
                },
            )
        return [results[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refused: what a layer keeps depends on the text, which here holds the answer."""
        raise AlvtsError(
            f"the task {requests[0].task_name} compares likelihoods of given answers; alvts only "
            "answers by itself: choose a task of the type generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Refused."""
        raise AlvtsError(
            f"the task {requests[0].task_name} goes over several rounds; alvts answers single "
            "questions: choose a task of the type generate_until"
        )

    def clean(self) -> None:
        """Free the memory; lmms-eval asks for it when all answers are there."""
        for name in ("_attachment", "_peer", "_loaded"):
            self.__dict__.pop(name, None)
        super().clean()

    def _answer(self, requests: Sequence[Instance], totals: _Totals) -> list[GenerationResult]:
        """One batch, of requests with the same settings."""
        loaded = self._loaded
        model, tokenizer = loaded.model, loaded.processor.tokenizer
        longest = model.config.text_config.max_position_embeddings
        names, samples = [], []
        for request in requests:
            _, to_messages, _, number, task, split = request.args
            names.append(f"{task}/{number}")
            try:
                pictures, prompt = read_turn(to_messages(self.task_dict[task][split][number]))
                if self._peer is not None:
                    method, budget = self._peer
                    pictures = method.images(model, loaded.processor, pictures, budget)
                made = build_inputs(loaded.processor, pictures, prompt, longest)
            except AlvtsError as error:
                raise AlvtsError(f"question {number} of the task {task}: {error}") from error
            samples.append(made.to(self.device, loaded.dtype))
        pad = end_token(model, tokenizer)
        inputs = collate(samples, pad)
        settings = dict(requests[0].args[2])
        start = time.perf_counter()
        with self._selecting(names) as attachment:
            output = model.generate(**inputs, **generation(settings), pad_token_id=pad)
            last = None if attachment is None else attachment.last
        # On a GPU, this waits for it.
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        totals.seconds += time.perf_counter() - start
        said = [ended(row, model.generation_config.eos_token_id) for row in rows]
        visual = int(family_of(model).visual_mask(model, inputs["input_ids"]).sum())
        totals.samples += len(requests)
        totals.new_tokens += sum(map(len, said))
        totals.visual_tokens += visual
        totals.kept += visual if last is None else last.layer_average * len(requests)
        return [
            GenerationResult(
                cut(tokenizer.decode(row, skip_special_tokens=True), settings.get("until")),
                TokenCounts(input_tokens=int(mask.sum()), output_tokens=len(row)),
            )
            for row, mask in zip(said, inputs["attention_mask"], strict=True)
        ]

    def _selecting(self, names: Sequence[str]) -> AbstractContextManager[Attachment | None]:
        """What a batch runs under."""
        if self._peer is None:
            return nullcontext(self._attachment)
        method, budget = self._peer
        return method.attached(self._loaded.model, budget, names)


def read_turn(messages: Sequence[dict[str, Any]]) -> tuple[list[Image.Image], str]:
    """The pictures of a question, and its words with a mark where each picture stands.

    Raises:
        AlvtsError: several turns, a video or sound, or a picture that cannot be read.
    """
    if len(messages) != 1:
        raise AlvtsError(
            f"it is a conversation of {len(messages)} messages; alvts answers single ones"
        )
    pictures, pieces, words = [], [], []
    for part in messages[0]["content"]:
        if part["type"] == "text":
            pieces.append(part["text"])
            words.append(part["text"])
        elif part["type"] == "image":
            source = part["url"]
            if not isinstance(source, Image.Image):
                source = read_image(Path(source))
            pictures.append(source.convert("RGB"))
            pieces.append(MARKER)
        else:
            raise AlvtsError(f"it has {part['type']} in it; alvts answers questions about images")
    text = "".join(words)
    # Some tasks mark the places in their words, and list the pictures in front of them.
    return pictures, text if MARKER in text else "".join(pieces)


def generation(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` for what a task asks for.

    Greedy unless a temperature is asked for. What is not about choosing tokens (`until`, settings
    of other models' image processors) is left out.
    """
    temperature = settings.get("temperature") or 0
    sample = temperature > 0 and settings.get("do_sample") is not False
    return {
        "max_new_tokens": settings.get("max_new_tokens", _MAX_NEW_TOKENS),
        "num_beams": settings.get("num_beams", 1),
        "do_sample": sample,
        # None also where the checkpoint brings values: unused, they would give warnings.
        "temperature": temperature if sample else None,
        "top_p": settings.get("top_p") if sample else None,
        "top_k": settings.get("top_k") if sample else None,
    }


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """An answer up to the first of the stop words, as the task asks for it."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.partition(stop)[0]
    return text.strip()


def _batch_size(size: int | str) -> int:
    """
    Raises:
        AlvtsError: not a number of at least 1.
    """
    if not str(size).isdecimal() or int(size) < 1:
        raise AlvtsError(f"batch_size must be a whole number of at least 1, not {size!r}")
    return int(size)
