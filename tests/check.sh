#!/usr/bin/env bash
# Everything that must hold before a change goes in: lint, types, tests.  Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python

$python -m ruff check .
$python -m mypy
if ! $python -m pytest "$@"; then
  echo "The failures once more, by themselves. One that passes now depends on timing or on its neighbours: mend that too."
  $python -m pytest --last-failed --last-failed-no-failures none "$@"
fi
