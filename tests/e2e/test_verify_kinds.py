"""`align verify` with a judge behind a server, instruction checks, unit tests: columns reach them, costs are told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_verifiers_sandbox import needs_sandbox

RECIPE = """
name: check
policy: {{from_scratch: {{}}}}
cold_start: {{source: file.jsonl}}
prompts: {{source: none.jsonl}}
sampling: {{max_new_tokens: 8}}
verifiers:
  - {{kind: judge, name: judge, model: tiny, endpoint: "{address}", key_variable: THE_KEY, context_column: debate}}
  - {{kind: instructions, name: rules, column: checks}}
  - {{kind: code_tests, name: unit, wall_s: 1.0}}
"""


class Server(BaseHTTPRequestHandler):
    """Yes to what adds; what loops is answered with nonsense that is longer than it may be."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][1]["content"]
        assert self.headers["Authorization"] == "Bearer canary-secret" and "A says" in said
        chances = {"Yes": -0.1, "No": -2.4} if "a + b" in said else {"Yes": -2.4, "No": -0.1}
        tops = [{"token": token, "logprob": logprob} for token, logprob in chances.items()]
        found: dict[str, Any] = {"choices": [{"logprobs": {"content": [{"top_logprobs": tops}]}}]}
        answer = json.dumps({**found, "usage": {"prompt_tokens": 5, "completion_tokens": 1}}).encode()
        answer = b"x" * 2**21 if "nonsense" in said else answer
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        try:
            self.wfile.write(answer)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


@needs_sandbox
def test_three_kinds_over_a_file(tmp_path: Path, align: Callable, address: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("THE_KEY", "canary-secret")
    (tmp_path / "r.yaml").write_text(RECIPE.format(address=address))
    rows = []
    for k in range(3):
        for code, good in (("return a + b", 1), ("return a - b", 0), ("while True: pass  # nonsense", 0)):
            row = {"prompt": f"Task {k}: write f.", "response": f"def f(a, b):\n    {code}\n", "gold": good}
            row |= {"debate": "A says one, B says two.", "checks": [{"check": "lines", "maximum": 2}]}
            row |= {"tests": f"assert f({k}, 1) == {k + 1}"}
            rows.append(row)
    rows[2]["tests"], rows[5]["checks"] = None, "[{]"
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = align("verify", tmp_path / "r.yaml", tmp_path / "r.jsonl", "--out", tmp_path / "out")
    assert done.status == 0, done.err
    text = (tmp_path / "out" / "report.json").read_text()
    assert "canary-secret" not in text + done.out + done.err
    judge, rules, unit = json.loads(text)["verifiers"]
    assert judge["coverage"] == pytest.approx(6 / 9)
    assert judge["failures"] == {"the endpoint's answer is longer than 1048576 bytes": 3}
    assert (rules["positive_rate"], rules["failures"]) == (1.0, {"column checks is not JSON": 1})
    assert unit["positive_rate"] == pytest.approx(3 / 8)
    assert unit["failures"] == {"the prompt has no text in column tests": 1}
    true = json.loads(text)["true"]["verifiers"]
    assert [row["accuracy"] for row in true if row["name"] == "unit"] == [1.0]
