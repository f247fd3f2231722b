"""The rules of the house that can be measured; the others are in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from align.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("align", "reward_models") for path in (ROOT / package).rglob("*.py"))
FILE_LINES, LOOP_LINES, FUNCTION_LINES, POSITIONAL = 400, 250, 80, 7
FOREIGN = {"packed_attention"}  # called by transformers
Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions(module: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(module) if isinstance(node, Function))


# ---- size ---------------------------------------------------------------------------------------------------------


def test_files_and_functions_are_short() -> None:
    found = []
    for path in SOURCES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            found.append(f"{relative(path)}: {lines} lines; split it by idea")
        for function in functions(tree(path)):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{relative(path)}: {function.name} has {length} lines")
    assert found == []


def test_functions_take_few_positional_parameters() -> None:
    """`self` and `cls` are not counted, nor is what can be given by keyword only.

    Signatures that another library lays down are its own: torch calls an autograd function's `forward` without
    keywords, and transformers decides what an attention function takes.
    """
    found = []
    for path in SOURCES:
        for parent in ast.walk(tree(path)):
            for function in ast.iter_child_nodes(parent):
                if not isinstance(function, Function) or is_autograd_function(parent) or function.name in FOREIGN:
                    continue
                names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
                count = len([n for n in names if n not in ("self", "cls")])
                if count > POSITIONAL:
                    found.append(f"{relative(path)}: {function.name} takes {count} positional parameters")
    assert found == []


def is_autograd_function(node: ast.AST) -> bool:
    bases = node.bases if isinstance(node, ast.ClassDef) else []
    return any(ast.unparse(base) == "torch.autograd.Function" for base in bases)


def test_the_loop_can_be_read_in_one_sitting() -> None:
    lines = (ROOT / "align" / "loop.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LOOP_LINES


# ---- what may not stand in the source -----------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "yaml.load": "use yaml.safe_load",
    "yaml.unsafe_load": "use yaml.safe_load",
    "yaml.full_load": "use yaml.safe_load",
    "torch.load": "reads pickles; weights are safetensors",
    "numpy.load": "may read pickles",
    "np.load": "may read pickles",
    "os.system": "runs a shell",
}


def offences(module: ast.Module) -> Iterator[str]:
    """Everything forbidden in a module, as `line: what`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.split(".")[0] in FORBIDDEN_MODULES:
                    yield f"{node.lineno}: imports {name}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield f"{node.lineno}: {name}: {FORBIDDEN_CALLS[name]}"
            for keyword in node.keywords:
                allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and not allowed:
                    yield f"{node.lineno}: {keyword.arg} is not False"
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                named = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                if named and isinstance(value, ast.Constant) and value.value is True:
                    yield f"{node.lineno}: trust_remote_code is True"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{node.lineno}: a bare except hides everything"


def test_nothing_forbidden_stands_in_the_source() -> None:
    assert [f"{relative(path)}:{offence}" for path in SOURCES for offence in offences(tree(path))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "import yaml\nyaml.load(text)",
        "torch.load(path, weights_only=True)",
        "from_pretrained(name, trust_remote_code=True)",
        "from_pretrained(name, trust_remote_code=asked)",
        "arguments = {'trust_remote_code': True}",
        "subprocess.run(command, shell=True)",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_the_check_finds_each_offence(source: str) -> None:
    assert list(offences(ast.parse(source)))


def test_every_function_is_annotated() -> None:
    found = []
    for path in SOURCES:
        for function in functions(tree(path)):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if missing or function.returns is None:
                found.append(f"{relative(path)}: {function.name}: {missing or 'return type'}")
    assert found == []


def test_every_module_says_what_it_is_for() -> None:
    written = [path for path in SOURCES if path.read_text(encoding="utf-8").strip()]
    assert [relative(path) for path in written if not ast.get_docstring(tree(path))] == []


# ---- recipes and text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_recipe_loads_and_is_listed(path: Path) -> None:
    assert load_recipe(path).name == path.stem
    assert f"]({path.name})" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


def tracked_text() -> list[Path]:
    """Files under version control that are text; without git (a source archive) nothing is looked at."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in found if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


MACHINE_PATH = re.compile(r"(?<![\w.}$~/-])/(?:work|root|home|tmp|Users|mnt)/\w")
INDEX_HOST = re.compile(
    r"(?i)(?:--(?:extra-)?index-url|--find-links|trusted-host)[ =]+(?!<)\S+|https?://[^\s\"')]*simple\b"
)
SECRET = re.compile(r"\b(?:hf_[A-Za-z]{30,}|sk-[A-Za-z0-9]{32,}|AKIA[A-Z0-9]{16}|ghp_[A-Za-z0-9]{36})\b")
EXAMPLES = {
    "tests/unit/test_style.py",
    "tests/unit/test_model_card.py",  # checks that such paths are not published
}


def test_no_machine_no_index_and_no_secret_is_written_down() -> None:
    """What belongs to one machine breaks on the next: absolute paths, package indexes, tokens."""
    found = []
    for path in tracked_text():
        if relative(path) in EXAMPLES:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            for pattern in (MACHINE_PATH, INDEX_HOST, SECRET):
                if match := pattern.search(line):
                    found.append(f"{relative(path)}:{number}: {match[0]}")
    assert found == []


@pytest.mark.parametrize(
    "line",
    ["see /home/me/x", 'open("/work/data")', "pip install --index-url https://host/x", "https://host/pypi/simple/"],
)
def test_the_text_check_finds_each(line: str) -> None:
    assert MACHINE_PATH.search(line) or INDEX_HOST.search(line)


@pytest.mark.parametrize("line", ["recipes/home/x", "--index-url <address>", "tests/work/x", "${policy.model}/root/x"])
def test_the_text_check_lets_the_rest_through(line: str) -> None:
    assert not MACHINE_PATH.search(line) and not INDEX_HOST.search(line)
