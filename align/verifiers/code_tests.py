"""Unit tests of generated Python code, in a sandbox (see `align.verifiers.sandbox`).

Tests that read and print are judged out here: the expected output never enters the sandbox.  Assertions run beside the
code, in one interpreter; code that ends it early has not passed, but code that is written to deceive (that changes what
`==` means) can.  Where a policy is trained hard against them, prefer the first.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any, Self

from align.verifiers.base import Abstain, Item, PerItem
from align.verifiers.sandbox import Limits, SandboxError, run_python
from align.verifiers.spec_checks import CodeTestsSpec

MOST_CASES = 100
LARGEST_CODE = 200_000  # characters
_FENCED = re.compile(r"^[^\S\n]*```[^\n]*\n(.*?)^[^\S\n]*```[^\S\n]*$", re.DOTALL | re.MULTILINE)

_ASSERTIONS = """\
import os
token, out = os.dup(0), os.dup(1)
nothing = os.open("/dev/null", os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(nothing, fd)
scope = {"__name__": "solution", "__builtins__": __builtins__}
for name in ("solution.py", "tests.py"):
    with open(name, encoding="utf-8", errors="surrogatepass") as file:
        exec(compile(file.read(), name, "exec"), scope)
os.write(out, os.read(token, 64))
os._exit(0)
"""


class CodeTests(PerItem):
    """1 where the code passes every test of its prompt, 0 where it fails one, never ends, or there is none."""

    kind = "binary"

    def __init__(self, name: str, column: str, extract: str, limits: Limits) -> None:
        super().__init__(name)
        self._column, self._extract, self._limits = column, extract, limits

    @classmethod
    def from_spec(cls, spec: CodeTestsSpec) -> Self:
        limits = Limits(
            wall_s=spec.wall_s,
            cpu_s=spec.cpu_s,
            memory_bytes=spec.memory_mib * 2**20,
            processes=spec.processes,
            disk_bytes=spec.disk_mib * 2**20,
        )
        return cls(spec.name, spec.column, spec.extract, limits)

    def value(self, item: Item) -> float:
        """0.0 or 1.0; abstains without usable tests, and where the sandbox cannot be made."""
        tests = item.column(self._column)
        cases = io_cases(tests)
        code = code_of(item.response, self._extract)
        if not code.strip() or len(code) > LARGEST_CODE:
            return 0.0
        try:
            if cases is None:
                return float(self._passes_assertions(code, tests))
            return float(all(self._prints(code, case["input"], case["output"]) for case in cases))
        except SandboxError as error:
            raise Abstain(f"the sandbox could not be set up: {error}") from None

    def _passes_assertions(self, code: str, tests: str) -> bool:
        """The token comes back only from behind the last test: an exit before it, of any status, is no pass."""
        token = secrets.token_hex(16).encode()
        files = {"main.py": _ASSERTIONS, "solution.py": code, "tests.py": tests}
        outcome = run_python(files, "main.py", token, self._limits)
        return outcome.status == 0 and outcome.output == token

    def _prints(self, code: str, given: str, wanted: str) -> bool:
        outcome = run_python({"main.py": code}, "main.py", given.encode(errors="replace"), self._limits)
        return outcome.status == 0 and _lines(outcome.output.decode(errors="replace")) == _lines(wanted)


def code_of(response: str, extract: str) -> str:
    """The last fenced block, or everything where there is none or all is wanted."""
    if extract == "whole":
        return response
    blocks = _FENCED.findall(response)
    return blocks[-1] if blocks else response


def io_cases(tests: str) -> list[dict[str, str]] | None:
    """The cases of a JSON list of inputs and outputs; None where the text is Python; abstains where it is neither."""
    try:
        found: Any = json.loads(tests)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or not 1 <= len(found) <= MOST_CASES:
        raise Abstain(f"the tests are JSON, but no list of 1 to {MOST_CASES} cases")
    for case in found:
        if not isinstance(case, dict) or not all(isinstance(case.get(key), str) for key in ("input", "output")):
            raise Abstain("a test case is not an object with the texts `input` and `output`")
    return found


def _lines(text: str) -> list[str]:
    """Lines without the white space at their ends, nor empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
