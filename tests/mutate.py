"""Mutation tests of the engine, run by hand: how many small breakages do the quick tests notice?

    python tests/mutate.py --count 200 --seed 0 --json /tmp/mutants.json
    python tests/mutate.py --count 60 --only scene.py mass.py

Draws mutants at random out of all that there are (or all of the modules named), writes each into a
copy of the tree, and runs the tests of its module there (`TESTS`), until the first that fails.
Figure and survivors stand in tests/README.md. Our own, for mutmut and cosmic-ray start an
interpreter for every mutant, and importing torch takes longer than most of these tests: here a
process that has imported it forks.
"""

import argparse
import ast
import copy
import gc
import importlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ENGINE = "alvts_cli/engine"

SECONDS, TIMES = 60, 3
"""Of processor time until a mutant counts as one that never ends: these, or so many times what the
tests take without it, where that is more."""


_PIECES = "test_engine_pieces:not compiled"
_REFERENCE = "test_engine_reference:(llava- or qwen3_vl-) and sdpa"
_PAPER = "test_paper_form:not command_line"
_WATCH = "test_engine_watch:not compiled"
_SCALED = "test_families:ministral3 and (later_text or own_attention)"
_SCORING = ("test_engine_scoring", "test_engine_few", _REFERENCE)
_ATTACHED = ("test_engine_dense", _WATCH, "test_engine_batch:llava")

TESTS: dict[str, tuple[str, ...]] = {
    "__init__.py": ("test_engine_keep", _WATCH),
    "attaching.py": ("test_python_interface", *_ATTACHED, "test_engine_keep:resolved_before"),
    "attachment.py": (
        *("test_engine_calls", *_ATTACHED, "test_engine_buffer", "test_python_interface"),
        *("test_engine_cache:named", "test_engine_keep:resolved_before"),
        *("test_engine_reference:recorded and llava-", "test_engine_pieces:looks"),
        *("test_engine_compiling:phases or told", _PAPER),
    ),
    "cache.py": ("test_engine_cache", *_ATTACHED, "test_engine_batch:mask or turn"),
    "calls.py": ("test_engine_calls", "test_engine_cache", "test_engine_dense"),
    "carry.py": (_PIECES, "test_engine_few", "test_calibration_policy:carry"),
    "compiling.py": (
        "test_engine_compiling:bits and llava] or all_lengths and llava] or limit_it or detaching "
        "or text_turn",
    ),
    "diversity.py": (_PIECES, "test_engine_few"),
    "flops.py": (
        "test_plan:arithmetic",
        "test_engine_cache",
        "test_cli_bench:counted or everything",
        "test_families:arithmetic",
        _PAPER,
    ),
    "forward.py": (
        *(_PIECES, _REFERENCE, _WATCH, "test_engine_buffer", "test_engine_masks", _SCALED),
        *("test_engine_reference:original and llava]", "test_engine_batch:neighbour or hidden"),
    ),
    "keep.py": ("test_engine_keep", "test_properties:count or resolved or budget", _WATCH),
    "masks.py": ("test_engine_masks", _PIECES, "test_engine_batch:llava", _REFERENCE),
    "mass.py": (_PIECES, "test_engine_few", "test_engine_batch:neighbour"),
    "merging.py": ("test_engine_scoring", "test_engine_buffer", _REFERENCE),
    "normed.py": _SCORING,
    "paper.py": (_PAPER,),
    "placing.py": ("test_engine_few", _PIECES, _PAPER, _REFERENCE),
    "plan.py": ("test_engine_plan", _REFERENCE, *_ATTACHED, "test_engine_batch:mask or neighbour"),
    "policy.py": (_PIECES, "test_calibration_policy", "test_artifact:wrong_kind"),
    "probe.py": (
        "test_families:scores_otherwise or not_known_is_seen",
        "test_calibration_reference",
        "test_engine_scoring",
        "test_methods_peers",
    ),
    "scene.py": ("test_engine_plan", _PAPER, *_SCORING, _PIECES),
    "scorer.py": (_PAPER, *_SCORING, _PIECES),
    "scoring.py": (*_SCORING, _SCALED),
    "selecting.py": ("test_engine_scoring", _REFERENCE, "test_methods_budgets"),
    "sizes.py": (_PAPER, "test_plan:arithmetic", "test_engine_few"),
}
"""The quick tests of each module of the engine: files, or files and a `-k` behind a colon."""

_NEAR: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
"""What an operator is mistaken for."""

Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Mutant:
    """One change to one file.

    Attributes:
        file: relative to the tree.
        line: of the original.
        before, after: the statement or expression, and what it became.
        source: of the whole file, changed.
    """

    file: str
    line: int
    before: str
    after: str
    source: str


def changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """What a node might be mistaken for; None where the statement might be left out."""
    made: Any = copy.deepcopy(node)
    match made:
        case ast.Compare(ops=[op]) | ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in _NEAR:
            near = _NEAR[type(op)]()
            if isinstance(made, ast.Compare):
                made.ops = [near]
            else:
                made.op = near
            yield made
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=str(value)) if value:
            yield ast.Constant(f"{value}?")
        case ast.IfExp(body=body, orelse=orelse):
            yield body
            yield orelse
        case ast.If() | ast.While():
            for value in (True, False):
                if isinstance(made, ast.If) or not value:
                    yield _with(made, test=ast.Constant(value))
        case ast.Return(value=value) if value is not None and ast.unparse(value) != "None":
            yield ast.Return(None)
        case ast.Expr(value=ast.Call() | ast.Yield()) | ast.Raise() | ast.AugAssign():
            yield None
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield None
        case ast.Call(keywords=keywords):
            for i, keyword in enumerate(keywords):
                if keyword.arg is not None:
                    yield _with(made, keywords=keywords[:i] + keywords[i + 1 :])
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()


def _with(node: Any, **fields: Any) -> Any:
    made = copy.copy(node)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every place of a child that may be changed: its parent, field, and index in a list.

    What only a reader or a type checker sees is left out: annotations, documentation, messages of
    errors, decorators, imports.
    """
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _unseen(child):
                continue
            yield node, name, index
            if not isinstance(child, ast.Raise | ast.JoinedStr):
                yield from places(child)


def _unseen(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Constant()) | ast.Import() | ast.ImportFrom():
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.Call(func=ast.Name(id="TypeVar" | "cast")):
            return True
    return False


def mutants(root: Path, file: str) -> Iterator[Mutant]:
    """All mutants of a file."""
    tree = ast.parse((root / file).read_text())
    for parent, name, index in list(places(tree)):
        held: Any = getattr(parent, name)
        node = held if index is None else held[index]
        for changed in changes(node):
            put = ast.Pass() if changed is None else changed
            _put(parent, name, index, put)
            ast.fix_missing_locations(tree)
            yield Mutant(file, node.lineno, _shown(node), _shown(put), ast.unparse(tree))
            _put(parent, name, index, node)


def _put(parent: Any, name: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[index] = node


def _shown(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0]


def run_tests(folder: Path, module: str, seconds: int) -> int:
    """Run the tests of a module in a process of their own.

    Args:
        folder: the copy of the tree.
        module: of the engine.
        seconds: of processor time that they may take.

    Returns:
        pytest's exit code, or the signal that ended it below 0.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            code = _in_child(folder, module, seconds)
        finally:
            # Whatever happens, it does not go on as if it were the parent.
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _in_child(folder: Path, module: str, seconds: int) -> int:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    import pytest

    options = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
    for tests in TESTS[module]:
        file, _, named = tests.partition(":")
        more = ["-k", named] if named else []
        code = int(pytest.main([*options, f"tests/{file}.py", *more]))
        if code:
            return code
    return 0


def _import_libraries() -> None:
    """Once, in the process that forks. Nothing of ours: each child imports its mutant."""
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo
    import transformers

    for name in ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "mistral", "llama"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    for name in ("CLIPModel", "GenerationMixin", "LlavaProcessor", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    torch.set_num_threads(1)
    gc.freeze()
    assert "alvts_cli" not in sys.modules


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="such as scene.py")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-check", action="store_true")
    asked = parser.parse_args()

    sys.dont_write_bytecode = True
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("alvts_cli", "calibration", "tests"):
            # A compiled file may look as new as the mutant that is written next to it.
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
        shutil.copy(ROOT / "pyproject.toml", folder)
        _import_libraries()
        files = asked.only or sorted(path.name for path in (folder / ENGINE).glob("*.py"))
        found = [one for name in files for one in mutants(folder, f"{ENGINE}/{name}")]
        # A child that does not know its tests would count as one that fails.
        if unknown := {Path(one.file).name for one in found} - set(TESTS):
            sys.exit(f"no tests are named for {', '.join(sorted(unknown))}")
        # First the engine as it is: tests that fail on that would kill everything.
        limits: dict[str, int] = {}
        for name in () if asked.skip_check else sorted(set(files) & set(TESTS)):
            began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            code = run_tests(folder, name, 10 * SECONDS)
            took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began
            limits[name] = max(SECONDS, round(TIMES * took))
            print(f"{name}: {took:.1f} s of processor time", flush=True)
            if code:
                sys.exit(f"the tests of {name} fail without any change")
        drawn = random.Random(asked.seed).sample(found, min(asked.count, len(found)))
        print(f"{len(drawn)} of {len(found)} mutants", flush=True)
        survived = []
        for number, mutant in enumerate(drawn, 1):
            path = folder / mutant.file
            original = path.read_text()
            path.write_text(mutant.source)
            code = run_tests(folder, path.name, limits.get(path.name, SECONDS))
            path.write_text(original)
            told = f"{mutant.file}:{mutant.line}: {mutant.before}  ->  {mutant.after}"
            if code == 0:
                survived.append(told)
            print(f"{number} {'SURVIVED' if code == 0 else 'killed'} ({code}) {told}", flush=True)
        killed = len(drawn) - len(survived)
        print(f"killed {killed} of {len(drawn)}", *survived, sep="\n")
        if asked.json:
            asked.json.write_text(json.dumps({"killed": killed, "survived": survived}, indent=1))


if __name__ == "__main__":
    main()
