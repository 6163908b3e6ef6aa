"""transformers' server with selection: its model manager, its handler and its app, each changed
where it must be."""

import asyncio
import copy
import logging
from collections.abc import Callable
from functools import partial
from inspect import signature
from time import sleep
from types import SimpleNamespace
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as AnyHTTPException
from torch import Tensor
from transformers import StoppingCriteria
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from ..artifact import Artifact
from ..engine import attach, keep_of
from ..errors import AlvtsError
from ..families import family_of
from ..models import Loaded, first_line
from ..prompts import usual_template
from ..terminal import one_line
from .pictures import Sources
from .request import check_request, parts_of

OFFERED = ("/v1/chat/completions", "/v1/models", "/health")
"""The others of transformers fetch whatever URL they are given, load whatever model, or unload."""


# Whatever is overridden below. A release without one of them would serve without any selection.
_KNOWN = (
    *(ModelManager._load_processor, ModelManager._load_model),
    *(ChatCompletionHandler._streaming, ChatCompletionHandler._non_streaming),
    *(ChatCompletionHandler._build_completion, ChatCompletionHandler._build_chunk_sse),
)


Read = Callable[[], tuple[Loaded, Artifact]]


class Models(ModelManager):
    """Holds one model with its selectors, and brings it back after it was unloaded.

    Attributes:
        keep: of requests that name none.
        selectors: of the model, where it is and in its dtype.
    """

    def __init__(self, name: str, read: Read, keep: str | None, unload_after: int | None) -> None:
        """Load the model.

        Args:
            name: what requests call it.
            read: loads it, with its selectors.
            keep: of requests that name none; None for what the selectors say.
            unload_after: seconds without a request after which the model leaves memory until the
                next one; None for never.

        Raises:
            AlvtsError: whatever `read` refuses, or a `keep` that does not fit the model.
        """
        self.keep = keep
        self._read = read
        super().__init__(model_timeout=unload_after or -1)
        # Not at the start: transformers never unloads a model that it was pinned to there.
        self.force_model: str = name
        self.load()
        keep_of(self.selectors, keep)

    def load(self) -> tuple[Any, Any]:
        """The model and its processor; the time until they are unloaded starts anew."""
        # There is none while it is being unloaded.
        while (found := self.load_model_and_processor(self.force_model))[0] is None:
            sleep(0.05)
        return found

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one that is served."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "alvts"}]

    # As transformers 5.17 calls it.
    get_gen_models = list_models

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """As it is: answers are to have the name that was asked for, without a revision."""
        return model_id

    def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
        loaded, found = self._read()
        # Moved once and not by every request.
        self.selectors = found.to(loaded.device, loaded.dtype)
        self._fresh, processor = loaded.model, loaded.processor
        processor.chat_template = processor.chat_template or usual_template(processor)
        return processor

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        # Always called behind `_load_processor`. Not held on to, or it could not be unloaded.
        model, self._fresh = self._fresh, None
        return model


class _Ends(StoppingCriteria):
    """Ends an answer when one of some texts is in it.

    transformers' own looks for them in a vocabulary of pieces that can be put behind any letters:
    pocket's whole words cannot.
    """

    def __init__(self, tokenizer: Any, read: int, ends: list[str]) -> None:
        """
        Args:
            tokenizer: of the model.
            read: tokens of the prompt.
            ends: none of them empty.
        """
        self._tokenizer, self._read, self._ends = tokenizer, read, ends

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Whether the one answer that is made is at its end."""
        said = self._tokenizer.decode(input_ids[0, self._read :], skip_special_tokens=True)
        ended = any(end in said for end in self._ends)
        return torch.tensor([ended], device=input_ids.device)


class Chat(ChatCompletionHandler):
    """`/v1/chat/completions`. Every request is handled by a copy, which knows what it keeps."""

    model_manager: Models

    def __init__(self, models: Models, state: GenerationState, sources: Sources) -> None:
        super().__init__(models, state)
        self._sources = sources

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer, or refuse in one line."""
        one = copy.copy(self)
        try:
            # Pictures are decoded and a model is loaded while others are listened to.
            await asyncio.to_thread(one._prepare, body)
            return await super(Chat, one).handle_request(body, request_id)
        except HTTPException as error:
            return _refused(error.status_code, str(error.detail))
        except Exception as error:
            bad = isinstance(error, (AlvtsError, ValueError, TemplateError))
            return _refused(400 if bad else 500, first_line(error))

    def _prepare(self, body: dict[str, Any]) -> None:
        keep = body.pop("keep", None)
        check_request(body, self._sources)
        try:
            _, processor = self.model_manager.load()
        except AlvtsError as error:
            raise HTTPException(503, str(error)) from None
        keep = self.model_manager.keep if keep is None else keep
        self._ends = body.pop("stop")
        self._body, self._keep = body, keep_of(self.model_manager.selectors, keep)
        for name, part in parts_of(body):
            for token in (processor.image_token, getattr(processor, "video_token", None)):
                if token and token in part.get("text", ""):
                    raise AlvtsError(f"{name}: {token!r} is not for texts")

    def _selected(self, call: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a generation, with what selects in the place of the model."""
        request_id, model, processor, model_id, inputs, gen_config = call
        ids = inputs["input_ids"]
        room = model.config.text_config.max_position_embeddings - ids.shape[1]
        # transformers leaves a model greedy that is so by itself, and drops the temperature.
        gen_config.do_sample = gen_config.do_sample or bool(self._body.get("temperature"))
        if self._body["max_tokens"] is None:
            gen_config.max_new_tokens = min(gen_config.max_new_tokens, max(room, 1))
        if gen_config.max_new_tokens > room:
            raise AlvtsError(
                f"prompt and images make {ids.shape[1]} tokens, which leaves room for "
                f"{max(room, 0)}; shorten the prompt, give fewer images or a smaller max_tokens"
            )
        self._visual = int(family_of(model).visual_mask(model, ids).sum())
        selecting = SimpleNamespace(config=model.config, generate=partial(self._generate, model))
        return request_id, selecting, processor, model_id, inputs.to(model.dtype), gen_config

    def _generate(self, model: Any, **kwargs: Any) -> Any:
        """`generate` of the model; always in the one thread that transformers generates in."""
        # transformers hands over the processor.
        tokenizer, read = kwargs.pop("tokenizer").tokenizer, kwargs["input_ids"].shape[1]
        if self._ends:
            kwargs["stopping_criteria"] = [_Ends(tokenizer, read, self._ends)]
        with attach(model, self.model_manager.selectors, self._keep) as self._attachment:
            return model.generate(**kwargs)

    def _streaming(self, *call: Any, **more: Any) -> Any:
        return super()._streaming(*self._selected(call), **more)

    async def _non_streaming(self, *call: Any, **more: Any) -> Any:
        return await super()._non_streaming(*self._selected(call), **more)

    def _build_completion(self, *args: Any, **more: Any) -> Any:
        return super()._build_completion(*args, **self._told(more))

    def _build_chunk_sse(self, *args: Any, **more: Any) -> Any:
        return super()._build_chunk_sse(*args, **self._told(more))

    def _told(self, more: dict[str, Any]) -> dict[str, Any]:
        """With what was kept in `usage`, which all but the last chunk of a stream are without."""
        if (usage := more.get("usage")) is not None:
            last = self._attachment.last
            usage.visual_tokens = self._visual
            usage.visual_tokens_kept = last.layer_average if last else float(self._visual)
        return more


def _refused(status: int, message: str) -> JSONResponse:
    if status >= 500:
        logging.getLogger("uvicorn.error").error(one_line(message))
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": one_line(message), "type": kind}}, status)


async def _no_object(request: Request, error: Exception) -> JSONResponse:
    """The answer to a body that FastAPI does not hand on: no JSON, or JSON that is no object."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return _refused(400, f"the body is not JSON: {reason}")
    return _refused(
        400, "the body must be a JSON object, with the header Content-Type: application/json"
    )


async def _no_answer(request: Request, error: Exception) -> JSONResponse:
    """The answer where nothing of ours was reached: a path or a method that is not offered, or a
    body that cannot be decoded."""
    assert isinstance(error, AnyHTTPException)
    answer = _refused(error.status_code, str(error.detail))
    answer.headers.update(error.headers or {})
    return answer


def make_app(models: Models, sources: Sources) -> FastAPI:
    """The app, with the routes in `OFFERED` and no others."""
    state = GenerationState()
    names = (name for name in signature(build_server).parameters if name.endswith("_handler"))
    handlers: dict[str, Any] = dict.fromkeys(names)
    handlers["chat_handler"] = Chat(models, state, sources)
    app = build_server(models, generation_state=state, **handlers)
    app.router.routes[:] = [route for route in app.routes if getattr(route, "path", "") in OFFERED]
    app.add_exception_handler(RequestValidationError, _no_object)
    app.add_exception_handler(AnyHTTPException, _no_answer)
    return app
