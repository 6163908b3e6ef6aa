"""What is read from files, checked in one way: JSON without surprises, then a pydantic schema."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .errors import AlvtsError

Checked = TypeVar("Checked")

Count = Annotated[int, Field(ge=0, le=2**53)]
"""A whole number of at least 0; no larger than a double holds exactly, as JSON promises."""

Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""Any whole number of 64 bits."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
"""Neither infinite nor not a number."""


def _unicode(text: str) -> str:
    if re.search("[\ud800-\udfff]", text):
        raise ValueError("Input should be Unicode")
    return text


Text = Annotated[str, AfterValidator(_unicode)]
"""Without half characters such as JSON's "\\ud800"."""


class Record(BaseModel):
    """An object of JSON. Types are taken at their word, and unknown names are left out."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


def parse_json(text: str | bytes) -> Any:
    """A value out of JSON as the standard has it.

    Raises:
        ValueError: it is none, it nests too deep, a name stands twice in an object, or a number is
            NaN or infinite.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def check(
    schema: type[Checked] | TypeAdapter[Checked], value: Any, what: str, of_json: bool = True
) -> Checked:
    """A value, checked.

    Args:
        schema: a `Record`, or another type that pydantic knows.
        value: plain.
        what: where it is from, for the message.
        of_json: the value is one of `parse_json`: where the schema has a tuple, it has a list.

    Raises:
        AlvtsError: the first thing that is wrong with it, by its name.
    """
    adapter = schema if isinstance(schema, TypeAdapter) else TypeAdapter(schema)
    try:
        if not of_json:
            return adapter.validate_python(value)
        # As JSON again: there, a strict schema takes a list for a tuple.
        return adapter.validate_json(json.dumps(value, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise AlvtsError(f"{what} is not valid: a text in it is not Unicode") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        # Not the names that our classes have: they tell a user nothing.
        why = first["msg"].removeprefix("Value error, ").partition(" or instance of ")[0]
        about = f"{where!r}: {why}" if where else why
        raise AlvtsError(f"{what} is not valid: {about[:200]}") from None
    except AlvtsError as error:
        raise AlvtsError(f"{what} is not valid: {str(error)[:200]}") from None


def refuse_newer(found: Any, known: int, path: Path) -> None:
    """Refuse a file of a format that is not known yet: its names may mean something else.

    Args:
        found: an object with a `format`; of anything else, `check` tells.
        known: the newest that is.
        path: of the file.

    Raises:
        AlvtsError: it is of a newer one.
    """
    version = found.get("format") if isinstance(found, dict) else None
    if isinstance(version, int) and version > known:
        raise AlvtsError(
            f"{path} has format {version}, this alvts reads up to {known}; upgrade alvts"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
