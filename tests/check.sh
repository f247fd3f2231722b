#!/usr/bin/env bash
# Everything that must hold before a change goes in: lint, types, tests.  Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python

$python -m ruff check .
$python -m mypy
$python -m pytest "$@"
