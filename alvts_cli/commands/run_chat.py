"""`alvts run` on a terminal without `--prompt`: a conversation about pictures."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..answer import Streamer, selectors_for
from ..artifact import Artifact
from ..bench.report import megabytes
from ..chat import Chat, Reply
from ..data import read_pictures
from ..engine import keep_of
from ..errors import AlvtsError
from ..models import load_model
from ..prompts import check_text
from ..terminal import say
from .options import Setup
from .run import notice

if TYPE_CHECKING:
    from PIL import Image

HELP = (
    "/image FILE: another picture, from the start; /keep 64 or /keep 0.11: visual tokens that each "
    "layer keeps; /dense: all of them; /quit"
)


def chat(setup: Setup, images: Sequence[Path]) -> None:
    """Answer what is typed, until `/quit` or the end of the input.

    Args:
        setup: the model and how it answers.
        images: files and folders; without any the first picture is named by `/image`.

    Raises:
        AlvtsError: whatever loading the model, its selectors and the pictures refuses.
    """
    # Where it is there, lines can be edited, and called back.
    with suppress(ImportError):
        import readline  # noqa: F401

    pictures = read_pictures(images)
    talk = _Talk(setup)
    talk.show(pictures)
    say(HELP)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            say("")
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                talk.obey(*line.split(maxsplit=1))
            elif line:
                talk.answer(line)
        except AlvtsError as error:
            say(f"error: {error}", error=True)


class _Talk:
    """A conversation, and what its commands change."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._loaded = load_model(setup.model, setup.device, setup.dtype, setup.trust_remote_code)
        self._selectors: Artifact | None = None
        self._chat = Chat(self._loaded, setup.max_new_tokens)
        if not setup.dense:
            self._select(setup.keep)

    def show(self, pictures: "Sequence[Image.Image]") -> None:
        """Talk about these."""
        self._chat.show(pictures)
        self._unseen = pictures

    def obey(self, command: str, what: str = "") -> None:
        """Do as a line that begins with a slash says.

        Raises:
            AlvtsError: no such command, or one that cannot be done; all is then as it was.
        """
        # As a shell takes it, and as a file that is dragged to a terminal arrives.
        file = what.strip("'\"")
        if command == "/image" and file:
            try:
                self.show(read_pictures([Path(file).expanduser()]))
            except RuntimeError:
                raise AlvtsError(f"{file}: there is no such user") from None
        elif command == "/keep" and what:
            self._select(what)
        elif command == "/dense" and not what:
            self._chat.use(None)
        elif command == "/help":
            say(HELP)
        else:
            line = f"{command} {what}".strip()
            raise AlvtsError(f"{line} is no command; {HELP}")

    def answer(self, words: str) -> None:
        """Print an answer as it comes, then a line about it.

        Raises:
            AlvtsError: there can be none.
        """
        if not self._chat.pictures:
            raise AlvtsError("there is no picture yet; name one: /image FILE")
        check_text(words)
        tokenizer = self._loaded.processor.tokenizer
        notice(tokenizer, words, self._unseen)
        self._unseen = ()
        streamer = Streamer(tokenizer, skip_special_tokens=True)
        try:
            reply = self._chat.ask(words, streamer.put)
        except KeyboardInterrupt:
            say("\n(stopped; that question is forgotten)")
            return
        streamer.end()
        say(_line(reply))

    def _select(self, keep: str | None) -> None:
        setup = self._setup
        if self._selectors is None:
            self._selectors = selectors_for(self._loaded, setup.selectors, setup.other_weights)
        keep_of(self._selectors, keep)
        self._chat.use(self._selectors, keep)


def _line(reply: Reply) -> str:
    share = 100 * reply.visual_tokens_kept / reply.visual_tokens
    return (
        f"[{reply.read} tokens read; visual tokens {reply.visual_tokens}, kept "
        f"{reply.visual_tokens_kept:.1f} ({share:.0f} %, layer average); first token after "
        f"{reply.ttft_ms:.1f} ms; KV cache {megabytes(reply.kv_bytes)}]"
    )
