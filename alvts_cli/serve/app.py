"""transformers' server with selection: its model manager, its handler and its app, each changed
where it must be."""

import asyncio
import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from time import sleep
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from ..artifact import Artifact
from ..engine import Attachment, attach, keep_of
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


class Models(ModelManager):
    """Holds one model with its selectors, and brings back both after they were unloaded."""

    def __init__(
        self,
        name: str,
        read: Callable[[], tuple[Loaded, Artifact]],
        keep: str | None = None,
        unload_after: int | None = None,
    ) -> None:
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
        self._fresh: Any = None
        self._selectors: WeakKeyDictionary[Any, Artifact] = WeakKeyDictionary()
        super().__init__(model_timeout=unload_after or -1)
        # Not at the start: transformers never unloads a model that it was pinned to there.
        self.force_model: str = name
        keep_of(self.selectors_of(self.load()[0]), keep)

    def load(self) -> tuple[Any, Any]:
        """The model and its processor; the time until they are unloaded starts anew."""
        while True:
            model, processor = self.load_model_and_processor(self.force_model)
            if model is not None:
                return model, processor
            # It is being unloaded at this moment.
            sleep(0.05)

    def selectors_of(self, model: Any) -> Artifact:
        """The selectors of a loaded model, where it is and in its dtype."""
        return self._selectors[model]

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
        place = loaded.device, loaded.dtype
        self._selectors[loaded.model] = replace(
            found,
            layers=tuple(layer.to(*place) for layer in found.layers),
            carries=tuple(carry.to(*place) for carry in found.carries),
        )
        self._fresh, processor = loaded.model, loaded.processor
        processor.chat_template = processor.chat_template or usual_template(processor)
        return processor

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        # Always called behind `_load_processor`. Not held on to, or it could not be unloaded.
        model, self._fresh = self._fresh, None
        return model


class Selecting:
    """Stands in for a model where transformers generates with it: it selects while it does.

    Attributes:
        visual_tokens: in the prompt.
        visual_tokens_kept: layer average, once the prefill has been.
    """

    def __init__(self, model: Any, selectors: Artifact, keep: Any, input_ids: Any) -> None:
        self.config = model.config
        self.visual_tokens = int(family_of(model).visual_mask(model, input_ids).sum())
        self._model, self._selectors, self._keep = model, selectors, keep
        self._attachment: Attachment | None = None

    @property
    def visual_tokens_kept(self) -> float:
        assert self._attachment is not None
        last = self._attachment.last
        return float(self.visual_tokens) if last is None else last.layer_average

    def generate(self, **kwargs: Any) -> Any:
        """`generate` of the model; always in the one thread that transformers generates in."""
        # transformers hands over the processor, which cannot look for the ends of an answer.
        kwargs["tokenizer"] = kwargs["tokenizer"].tokenizer
        with attach(self._model, self._selectors, self._keep) as self._attachment:
            return self._model.generate(**kwargs)


class Chat(ChatCompletionHandler):
    """`/v1/chat/completions`. Every request is handled by a copy, which knows what it keeps."""

    model_manager: Models
    _keep: Any
    _limited: bool
    _sampled: bool
    _selecting: Selecting

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
        except (AlvtsError, ValueError, TemplateError) as error:
            return _refused(400, first_line(error))
        except HTTPException as error:
            return _refused(error.status_code, str(error.detail))
        except Exception as error:
            logging.getLogger("uvicorn.error").error(
                "%s: %s", type(error).__name__, one_line(str(error))
            )
            return _refused(500, first_line(error))

    def _prepare(self, body: dict[str, Any]) -> None:
        keep = body.pop("keep", None)
        check_request(body, self._sources)
        self._limited = body["max_tokens"] is not None
        self._sampled = bool(body.get("temperature"))
        try:
            model, processor = self.model_manager.load()
        except AlvtsError as error:
            raise HTTPException(503, str(error)) from None
        selectors = self.model_manager.selectors_of(model)
        self._keep = keep_of(selectors, self.model_manager.keep if keep is None else keep)
        for kind in ("image", "video"):
            token = getattr(processor, f"{kind}_token", None)
            for name, part in parts_of(body):
                if token and token in part.get("text", ""):
                    raise AlvtsError(f"{name}: {token!r} is not for texts")

    def _selected(self, call: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a generation, with a model that selects."""
        request_id, model, processor, model_id, inputs, gen_config = call
        ids = inputs["input_ids"]
        room = model.config.text_config.max_position_embeddings - ids.shape[1]
        # transformers leaves a model greedy that is so by itself, and drops the temperature.
        gen_config.do_sample = gen_config.do_sample or self._sampled
        if not self._limited:
            gen_config.max_new_tokens = min(gen_config.max_new_tokens, max(room, 1))
        if gen_config.max_new_tokens > room:
            raise AlvtsError(
                f"prompt and images make {ids.shape[1]} tokens, which leaves room for "
                f"{max(room, 0)}; shorten the prompt, give fewer images or a smaller max_tokens"
            )
        selectors = self.model_manager.selectors_of(model)
        self._selecting = Selecting(model, selectors, self._keep, ids)
        inputs = inputs.to(model.dtype)
        return request_id, self._selecting, processor, model_id, inputs, gen_config

    def _streaming(self, *call: Any, **more: Any) -> Any:
        return super()._streaming(*self._selected(call), **more)

    async def _non_streaming(self, *call: Any, **more: Any) -> Any:
        return await super()._non_streaming(*self._selected(call), **more)

    def _build_completion(self, *args: Any, **more: Any) -> Any:
        self._tell(more["usage"])
        return super()._build_completion(*args, **more)

    def _build_chunk_sse(self, *args: Any, **more: Any) -> Any:
        self._tell(more.get("usage"))
        return super()._build_chunk_sse(*args, **more)

    def _tell(self, usage: Any) -> None:
        """Put what was kept into `usage`, which all but the last chunk of a stream are without."""
        if usage is not None:
            usage.visual_tokens = self._selecting.visual_tokens
            usage.visual_tokens_kept = self._selecting.visual_tokens_kept


def _refused(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind}}, status)


def make_app(models: Models, sources: Sources) -> FastAPI:
    """The app, with the routes in `OFFERED` and no others."""
    state = GenerationState()
    names = (name for name in signature(build_server).parameters if name.endswith("_handler"))
    handlers: dict[str, Any] = dict.fromkeys(names)
    handlers["chat_handler"] = Chat(models, state, sources)
    app = build_server(models, generation_state=state, **handlers)
    app.router.routes[:] = [route for route in app.routes if getattr(route, "path", "") in OFFERED]
    return app
