"""`alvts serve` on loopback, asked by OpenAI's own client."""

import gc
import json
import signal
import subprocess
import sys
import threading
import time
import weakref
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from random import Random
from socket import create_server
from typing import Any

import pytest
from cli_tools import alvts, refused
from PIL import Image

from alvts_cli import AlvtsError
from alvts_cli.answer import answer, prepare, selectors_for
from alvts_cli.models import load_model
from alvts_cli.pocket.questions import ask as about
from alvts_cli.pocket.scenes import make_scene, render, seed_of
from alvts_cli.prompts import read_image
from alvts_cli.serve import require_serving
from alvts_cli.serve.pictures import Sources

openai = pytest.importorskip("openai", reason="no server test: alvts[serve] is not installed")

EXAMPLE = Path("alvts_cli/pocket/example.png").resolve()
QUESTION = "what digit is on the teal cross?"
END = 2
"""pocket's end token."""


def data_url(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


URL = data_url(Image.open(EXAMPLE))


def read() -> Any:
    loaded = load_model("pocket", "cpu")
    return loaded, selectors_for(loaded, None)


@contextmanager
def serving(sources: Sources = Sources(), unload_after: int | None = None) -> Iterator[Any]:  # noqa: B008
    """A running server's `Models`, and a client of it."""
    import uvicorn

    from alvts_cli.serve.app import Models, make_app

    models = Models("pocket", read, None, unload_after)
    with create_server(("127.0.0.1", 0)) as socket:
        server = uvicorn.Server(uvicorn.Config(make_app(models, sources), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            base = f"http://127.0.0.1:{socket.getsockname()[1]}/v1"
            yield models, openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=600)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    with serving() as both:
        yield both


@pytest.fixture(scope="module")
def client(served: Any) -> Any:
    return served[1]


def ask(client: Any, question: str = QUESTION, url: str = URL, **more: Any) -> Any:
    picture = {"type": "image_url", "image_url": {"url": url}}
    content = [picture, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(**{"model": "pocket", "messages": messages, **more})


def said(reply: Any) -> str:
    return reply.choices[0].message.content


def kept(reply: Any) -> tuple[int, float]:
    return reply.usage.visual_tokens, reply.usage.visual_tokens_kept


def refusal(client: Any, *args: Any, **more: Any) -> tuple[int, str]:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, *args, **more)
    error = caught.value
    assert set(error.response.json()) == {"error"}
    assert "\n" not in error.body["message"]
    return error.status_code, error.body["message"]


@pytest.mark.parametrize("keep", [None, 0.05, 9])
def test_an_answer_is_that_of_alvts_run(client: Any, keep: Any) -> None:
    more = () if keep is None else ("--keep", keep)
    result = alvts("run", "--json", "--image", EXAMPLE, "--prompt", QUESTION, *more)
    run = json.loads(result.stdout)
    reply = ask(client, extra_body={} if keep is None else {"keep": keep})
    assert said(reply) == run["answer"]
    assert kept(reply) == (run["visual_tokens"], run["visual_tokens_kept"])
    assert reply.usage.prompt_tokens == run["visual_tokens"] + run["text_tokens"]
    assert reply.usage.completion_tokens == run["new_tokens"]
    assert (reply.model, reply.choices[0].finish_reason) == ("pocket", "stop")


def test_a_stream_says_the_same(client: Any) -> None:
    more = {"max_tokens": 12, "logit_bias": {END: -100}}
    chunks = list(ask(client, stream=True, **more))
    whole = ask(client, **more)
    words = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert words == said(whole) and whole.usage.completion_tokens == 12
    assert len(chunks) > 10
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_eight_clients_at_once(client: Any) -> None:
    loaded, selectors = read()
    cases: list[tuple[str, str, int, str]] = []
    for i, keep in enumerate((3, 5, 9, 16, 28, 40, 64, 256)):
        scene = make_scene(seed_of("test", i))
        question, image = about(scene, 1, Random(i))[0].text, render(scene)
        inputs = prepare(loaded, [image], question, 8)
        right = answer(loaded, inputs, selectors, str(keep), 8, False).answer
        cases.append((data_url(image), question, keep, right))

    def ask_all(first: int) -> int:
        for i in range(10):
            url, question, keep, right = cases[(first + i) % len(cases)]
            reply = ask(client, question, url, extra_body={"keep": keep})
            assert (said(reply), kept(reply)) == (right, (256, keep))
        return 10

    with ThreadPoolExecutor(8) as clients:
        assert sum(clients.map(ask_all, range(8))) == 80


def _bomb() -> str:
    return data_url(Image.new("1", (10_000, 10_000)))


def _message(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


_PART = {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (_message({"type": "text", "text": QUESTION}), "no image"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        (_message({"type": "video_url", "video_url": {"url": "x"}}), "video_url"),
        ({"url": "data:image/png;base64,@@@@"}, "base64"),
        ({"url": "data:image/png;base64,aGVsbG8="}, "not a picture"),
        ({"url": _bomb}, "million pixels"),
        ({"url": EXAMPLE.as_uri()}, "does not give out"),
        ({"url": "http://127.0.0.1:1/latest/meta-data"}, "does not fetch"),
        ({"url": "http://["}, "needs a URL"),
        ({"url": str(EXAMPLE)}, "needs a URL"),
        ({"extra_body": {"keep": -1}}, "keep"),
        ({"extra_body": {"keep": -1}, "stream": True}, "keep"),
        ({"extra_body": {"keep": 10**400}}, "keep"),
        ({"extra_body": {"keep": [0.5, 0.5]}}, "16 layers"),
        ({"extra_body": {"kepe": 3}}, "kepe"),
        ({"extra_body": {"generation_config": "{}"}}, "generation_config"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, "chat_template_kwargs"),
        ({"model": "other"}, "other"),
        ({"model": "o\nther"}, "o ther"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4000}, "leaves room for"),
        ({"question": "is it " * 2500}, "leaves room for 0"),
        ({"question": "what is <image> ?"}, "<image>"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": True}, "max_tokens"),
        ({"logit_bias": {"3": -1e308}}, "logit_bias"),
        ({"n": 2}, "n: "),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: "),
        ({"tool_choice": "required"}, "tool_choice: "),
        ({"functions": [{"name": "f"}]}, "functions: "),
        ({"response_format": {"type": "json_object"}}, "response_format: "),
        ({"response_format": {"type": "json_object"}, "stream": True}, "response_format: "),
        ({"logprobs": True}, "logprobs: "),
        ({"top_logprobs": 3}, "top_logprobs: "),
        ({"presence_penalty": 0.5}, "presence_penalty: "),
        ({"modalities": ["text", "audio"]}, "modalities: "),
        ({"reasoning_effort": "high"}, "reasoning_effort: "),
        (
            {
                "messages": [
                    *_message(_PART)["messages"],
                    {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
                ]
            },
            "messages.1.tool_calls: ",
        ),
        (
            {"messages": [{"role": "system", "content": "x"}, *_message(_PART)["messages"]]},
            "system",
        ),
    ],
)
def test_a_bad_request_is_one_line(client: Any, request_: dict[str, Any], word: str) -> None:
    values = {name: value() if callable(value) else value for name, value in request_.items()}
    status, message = refusal(client, **values)
    assert 400 <= status < 500 and word in message


@pytest.mark.parametrize(
    ("body", "word"),
    [
        *((text, "must be a JSON object") for text in ("[1]", '"x"', "null", "3", "")),
        ("{", "not JSON: Expecting property name enclosed in double quotes at character 1"),
        ('{"model": "pocket",}', "not JSON"),
        (b"\xff", "parsing the body"),
        ("[" * 100_000, "parsing the body"),
        # Half of a character, which JSON can hold and UTF-8 cannot.
        (json.dumps(_message(_PART) | {"model": "\ud83d"}), r"\ud83d"),
        (
            json.dumps(_message(_PART, {"type": "text", "text": "\ud83d, cut off"})),
            "messages.0.content.1: half of a surrogate pair",
        ),
    ],
)
def test_a_body_that_no_client_would_send_is_one_line(client: Any, body: Any, word: str) -> None:
    url = f"{client.base_url}chat/completions"
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(url, cast_to=object, content=body)
    error = caught.value.response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert word in error["message"] and "\n" not in error["message"]


def test_a_body_that_is_not_said_to_be_json_is_told_the_header(client: Any) -> None:
    headers = {"Content-Type": "text/plain"}
    with pytest.raises(openai.BadRequestError, match="Content-Type: application/json"):
        ask(client, extra_headers=headers)


def test_others_go_on_beside_bad_requests(client: Any) -> None:
    with ThreadPoolExecutor(4) as clients:
        good = [clients.submit(ask, client) for _ in range(4)]
        bad = [clients.submit(refusal, client, url=_bomb()) for _ in range(4)]
        assert [said(reply.result()) for reply in good] == ["9"] * 4
        assert {reply.result()[0] for reply in bad} == {400}


def test_what_generation_takes(client: Any) -> None:
    long = {"max_tokens": 8, "logit_bias": {END: -100}}
    greedy = said(ask(client, **long))
    for cold in (0, 1e-300):
        assert said(ask(client, temperature=cold, stop=[], **long)) == greedy
    assert said(ask(client, temperature=0, max_tokens=8, logit_bias={}))
    drawn = {said(ask(client, temperature=2, seed=seed, **long)) for seed in range(4)}
    assert len(drawn) > 1
    assert said(ask(client, temperature=2, seed=0, **long)) in drawn
    limited = ask(client, max_completion_tokens=3, logit_bias={END: -100})
    assert (limited.usage.completion_tokens, limited.choices[0].finish_reason) == (3, "length")


def test_fields_that_leave_an_answer_as_it_is(client: Any) -> None:
    unasked = {
        **{"tools": [], "functions": [], "tool_choice": "none", "logprobs": False},
        **{"top_logprobs": None, "response_format": {"type": "text"}, "modalities": ["text"]},
        **{"presence_penalty": 0, "parallel_tool_calls": True, "user": "somebody"},
        **{"metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
    }
    assert said(ask(client, extra_body=unasked)) == "9"


def test_an_answer_ends_with_a_stop(client: Any) -> None:
    long = {"max_tokens": 8, "logit_bias": {END: -100}}
    words = said(ask(client, **long)).split()
    # In the middle of a word, and over the space between two; and a word that is never said.
    for end in (words[2][1:] or words[2], f"{words[1]} {words[2]}"):
        reply = ask(client, stop=["xyzzy", end], **long)
        first = min(n for n in range(9) if end in " ".join(words[:n]))
        assert (said(reply), reply.choices[0].finish_reason) == (" ".join(words[:first]), "stop")
    chunks = list(ask(client, stop=words[1], stream=True, **long))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == said(ask(client, stop=words[1], **long))
    assert said(ask(client, stop=["", "xyzzy"], **long)).split() == words


def test_several_pictures_and_turns(client: Any) -> None:
    messages = [
        {"role": "user", "content": [_PART, _PART, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": "9"},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    assert kept(ask(client, messages=messages, extra_body={"keep": 20})) == (512, 20)


def test_a_client_that_hangs_up_ends_its_generation(served: Any) -> None:
    models, client = served
    forwards: list[int] = []
    hook = models.load()[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    stream = ask(client, stream=True, max_tokens=3000, logit_bias={END: -100})
    for _ in range(3):
        next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.001))
    assert said(ask(client)) == "9"
    hook.remove()
    assert len(forwards) < 1000


def test_an_idle_model_is_unloaded_and_comes_back_selecting() -> None:
    with serving(unload_after=1) as (models, client):
        before = weakref.ref(models.load()[0])
        first = ask(client)
        end = time.monotonic() + 600
        while (models.loaded_models or before() is not None) and time.monotonic() < end:
            time.sleep(0.1)
            gc.collect()
        assert before() is None
        again = ask(client)
    assert kept(first) == kept(again) == (256, 28)
    assert said(first) == said(again) == "9"


def test_only_what_is_safe_is_offered(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["pocket"]
    for path in ("/reset", "/load_model", "/v1/responses", "/v1/completions", "/docs"):
        with pytest.raises(openai.NotFoundError) as missing:
            client.post(f"{client.base_url.copy_with(path=path)}", cast_to=object, body={})
        assert missing.value.body["message"] == "Not Found"
    with pytest.raises(openai.APIStatusError) as wrong:
        client.get("/chat/completions", cast_to=object)
    assert wrong.value.response.headers["allow"] == "POST"
    assert (wrong.value.status_code, wrong.value.body["message"]) == (405, "Method Not Allowed")


class _Host(BaseHTTPRequestHandler):
    """`/picture` is one, `/away` leads to it, all else is none."""

    def do_GET(self) -> None:
        self.send_response(302 if self.path == "/away" else 200)
        self.send_header("Location", "/picture")
        self.end_headers()
        self.wfile.write(EXAMPLE.read_bytes() if self.path == "/picture" else b"words")

    def log_message(self, *args: Any) -> None:
        pass


def test_pictures_of_allowed_hosts_alone() -> None:
    with HTTPServer(("127.0.0.1", 0), _Host) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        name = f"127.0.0.1:{host.server_port}"
        sources = Sources(hosts=(name,))
        assert sources.read(f"http://{name}/picture", "it") == read_image(EXAMPLE)
        for url, word in {
            f"http://{name}/away": "302",
            f"http://{name}/words": "not a picture",
            f"http://localhost:{host.server_port}/picture": "does not fetch",
            f"http://user@{name}/picture": "does not fetch",
            f"http://{name}@127.0.0.2/picture": "does not fetch",
            f"ftp://{name}/picture": "needs a URL",
        }.items():
            with pytest.raises(AlvtsError, match=word):
                sources.read(url, "it")
        host.shutdown()
    with pytest.raises(AlvtsError, match="cannot be fetched"):
        sources.read(f"http://{name}/picture", "it")


def test_files_of_the_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "in side"
    folder.mkdir()
    picture = read_image(EXAMPLE)
    picture.save(folder / "a.png")
    picture.save(tmp_path / "b.png")
    (folder / "link.png").symlink_to(tmp_path / "b.png")
    sources = Sources(folder)
    assert sources.read((folder / "a.png").as_uri(), "it") == picture
    for path in (folder / "link.png", folder / ".." / "b.png", tmp_path / "b.png", Path("/etc")):
        with pytest.raises(AlvtsError, match="does not give out"):
            sources.read(f"file://{path}", "it")


def test_the_command_listens_and_stops() -> None:
    command = (sys.executable, "-m", "alvts_cli", "serve", "--port", "0", "--keep", "0.05")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("serving pocket at http://localhost:")
        client = openai.OpenAI(base_url=line.split()[-1], api_key="none", timeout=600)
        assert kept(ask(client)) == (256, 12)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0 and "Traceback" not in errors, errors
    finally:
        process.kill()
        process.wait()


def test_what_cannot_be_served_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    with create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in refused("serve", "--port", taken.getsockname()[1])
    assert "cannot listen" in refused("serve", "--port", 0, "--host", "192.0.2.1")
    assert "--keep" in refused("serve", "--keep", 0, code=2)
    assert "16 layers" in refused("serve", "--port", 0, "--keep", "1,1")
    assert "not a folder" in refused("serve", "--image-folder", tmp_path / "none", code=2)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "alvts[serve]" in refused("serve")


def test_a_server_that_is_not_known_is_refused_by_name(monkeypatch: Any) -> None:
    from transformers.cli.serving.chat_completion import ChatCompletionHandler

    import alvts_cli.serve as package

    require_serving()
    monkeypatch.delattr(ChatCompletionHandler, "_streaming")
    monkeypatch.delattr(package, "app")
    monkeypatch.delitem(sys.modules, "alvts_cli.serve.app")
    with pytest.raises(
        AlvtsError, match=r"transformers 5\..* not one that alvts knows.*_streaming"
    ):
        require_serving()
