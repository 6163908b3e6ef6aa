"""What a request must look like.

transformers' handler checks the names of the fields and no more: what is wrong inside of them would
end in the template, the processor or the model, each with an error of its own.
"""

from typing import Annotated, Any, Literal

from openai.types.chat import ChatCompletionContentPartImageParam as _Picture
from openai.types.chat import ChatCompletionContentPartTextParam as _Text
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from ..errors import AlvtsError
from .pictures import Sources


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[Annotated[_Picture | _Text, Field(discriminator="type")]], BeforeValidator(_parts)
    ]
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = Field(None, exclude=True)


_NOT_DONE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "logprobs", "top_logprobs"), ()),
    **dict.fromkeys(("audio", "web_search_options", "moderation", "presence_penalty"), ()),
    **dict.fromkeys(("tool_choice", "function_call", "reasoning_effort"), ("none",)),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
"""Fields that would make another answer, of which transformers' server takes no notice, and values
that ask for nothing, beside those that are empty. What leaves the answer as it is (`user`, `store`,
`service_tier`, ...) may be there."""

_COLDEST = 1e-3


class _Request(BaseModel):
    messages: list[_Message] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = Field(None, ge=1, strict=True)
    max_completion_tokens: int | None = Field(None, ge=1, strict=True)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, gt=-1, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    # Of transformers' server: they would let a request change how the model runs.
    generation_config: None = None
    chat_template_kwargs: None = None


def check_request(body: Any, sources: Sources) -> None:
    """Check a request of `/v1/chat/completions`, and read its pictures in place.

    Args:
        body: what came as JSON. Afterwards every content is a list of parts, every picture's URL an
            RGB image, `max_tokens` the one limit, or None, and `stop` a list.
        sources: where pictures may come from.

    Raises:
        AlvtsError: a field that is missing or wrong, or a picture that is.
    """
    try:
        request = _Request.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise AlvtsError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    for name, plain in _NOT_DONE.items():
        if (asked := body.get(name)) and asked not in plain:
            raise AlvtsError(f"{name}: this server cannot do that; leave it out")
    body["messages"] = [message.model_dump() for message in request.messages]
    for name, part in parts_of(body):
        # JSON can hold half of a character that is written as two. No tokenizer takes it.
        if any("\ud800" <= character <= "\udfff" for character in part.get("text", "")):
            raise AlvtsError(f"{name}: half of a surrogate pair is no text")
    pictures = [(name, part) for name, part in parts_of(body) if part["type"] == "image_url"]
    for name, part in pictures:
        part["image_url"]["url"] = sources.read(part["image_url"]["url"], name)
    if not pictures:
        raise AlvtsError("messages: there is no image; send one as a part of type image_url")
    # transformers takes numbers as they came, and no whole ones; an empty bias it refuses.
    body["logit_bias"] = request.logit_bias or None
    ends = [request.stop] if isinstance(request.stop, str) else request.stop or []
    body["stop"] = [end for end in ends if end]
    # Logits over less than this may be infinite: then the likeliest is all that is left anyway.
    if request.temperature is not None and request.temperature < _COLDEST:
        body["temperature"] = 0
    # transformers 5.17 knows the old name alone.
    body["max_tokens"] = body.pop("max_completion_tokens", None) or request.max_tokens


def parts_of(body: Any) -> list[tuple[str, Any]]:
    """The parts of all messages of a checked request, by their names."""
    return [
        (f"messages.{i}.content.{j}", part)
        for i, message in enumerate(body["messages"])
        for j, part in enumerate(message["content"])
    ]
