"""Recipe blocks of the verifiers that run checks on a response: instructions, and unit tests in a sandbox."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from align.verifiers.spec_base import VerifierBlock


class InstructionsSpec(VerifierBlock):
    """Instructions that a program can check: counts, words in or out, JSON, bullets (binary: all are followed)."""

    output = "binary"
    kind: Literal["instructions"]
    checks: tuple[dict[str, Any], ...] = ()
    """Checks of every response: `{check: words, minimum: 50}`; the names are in the table of the README."""
    column: str | None = None
    """Column of the prompt source with the prompt's own checks: a list of such objects, as JSON or as text."""
    loose: bool = False
    """Also pass a response that passes without its first line, its last line, or its asterisks, as IFEval does."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of checks."""
        return () if self.column is None else (self.column,)

    @field_validator("checks")
    @classmethod
    def _known(cls, checks: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        from align.verifiers.instruction_checks import check_fault

        for place, check in enumerate(checks):
            fault = check_fault(check)
            if fault is not None:
                raise ValueError(f"{place}: {fault}")
        return checks

    @model_validator(mode="after")
    def _something_to_check(self) -> InstructionsSpec:
        if not self.checks and self.column is None:
            raise ValueError("checks: give at least one, or name their `column`")
        return self


class CodeTestsSpec(VerifierBlock):
    """Unit tests of Python code, run in a sandbox without network or files (binary)."""

    output = "binary"
    kind: Literal["code_tests"]
    timeout_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 60.0
    """Longest time one response may take with all its tests; past it the verdict is none."""
    column: str = "tests"
    """Column of the prompt source with the tests: Python text with assertions, or a list of
    `{"input": …, "output": …}` for programs that read and print."""
    extract: Literal["fenced", "whole"] = "fenced"
    """Which part of the response is the code: the last fenced block (all of it where there is none), or all of it."""
    wall_s: Annotated[float, Field(gt=0.0, le=600.0)] = 10.0
    """Longest time of one test run; past it the code has failed."""
    cpu_s: Annotated[int, Field(ge=1, le=600)] = 10
    """Longest processor time of one process."""
    memory_mib: Annotated[int, Field(ge=64, le=4096)] = 512
    """Address space of one process."""
    processes: Annotated[int, Field(ge=1, le=256)] = 8
    """Processes and threads at a time."""
    disk_mib: Annotated[int, Field(ge=1, le=4096)] = 64
    """Size of the scratch folder, which is in memory."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of tests."""
        return (self.column,)
