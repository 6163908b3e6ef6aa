"""The closed vocabulary, the tokenizer over it, and the prompt."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .questions import NUMBERS
from .scenes import COLORS, SHAPES

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"

# Groups of words of which a patch speaks exactly one (see `training.vision`).
COLOR_WORDS = (*COLORS, "background")
SHAPE_WORDS = SHAPES
DIGIT_WORDS = (*"0123456789", "blank")
VERTICAL_WORDS = ("top", "middle", "bottom")
HORIZONTAL_WORDS = ("left", "center", "right")

PATCH_GROUPS = (COLOR_WORDS, SHAPE_WORDS, DIGIT_WORDS, VERTICAL_WORDS, HORIZONTAL_WORDS)
"""What a patch says, and a phrase that names a thing: of each group one word, or none."""
PHRASE_GROUPS = (NUMBERS, ("left", "right"), ("above", "below"))
"""What a phrase comes down to besides: a number of things, or the side another thing is on."""

# fmt: off
_OTHERS = (
    "user:", "assistant:", "?", ".", ",", "yes", "no", "is", "there", "a", "an", "what", "color",
    "shape", "the", "object", "objects", "with", "how", "many", "are", "where", "of", "above",
    "below", "digit", "on", "in", "image", "does", "contain", "not", "present", "circles",
    "rectangles", "triangles", "stars", "diamonds", "crosses", "which", "it", "and", "to",
    "picture", "number", "i", "see", "or", "kind",
)
# fmt: on

VOCABULARY = tuple(
    dict.fromkeys(
        (
            *(PAD, BOS, EOS, UNKNOWN, IMAGE),
            *COLOR_WORDS,
            *SHAPE_WORDS,
            *DIGIT_WORDS,
            *VERTICAL_WORDS,
            *HORIZONTAL_WORDS,
            *NUMBERS,
            *_OTHERS,
        )
    )
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word tokenizer over `VOCABULARY`; other words become `<unk>`."""
    table = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\w+:|\w+|[^\w\s]"), behavior="removed", invert=True
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, table[BOS])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
    )
    return fast


def make_prompt(question: str, images: int = 1) -> str:
    """The LLaVA-1.5 prompt for one question about `images` pictures."""
    return f"USER: {IMAGE * images}\n{question} ASSISTANT:"
