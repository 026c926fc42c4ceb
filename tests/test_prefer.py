"""The page on which a person chooses, asked by HTTP; and a binary that is killed between two clicks."""

import http.client
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from flowjax.data import votes
from tools import prefer_page

ROOT = pathlib.Path(__file__).resolve().parent.parent
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8, 1), np.uint8)
ABOUT = {"checkpoint": "runs/x", "step": 7, "weights": "ema", "seed": 3, "num_classes": 3}


@pytest.fixture
def session(tmp_path):
    return votes.create(tmp_path / "s", lambda: IMAGES, ABOUT, np.arange(3))


def request(port, method, path, body=None, kind="application/json", **headers):
    """(status, content type, body) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        body = json.dumps(body) if isinstance(body, dict) else body
        connection.request(method, path, body, {"Content-Type": kind, **headers} if body else headers)
        answer = connection.getresponse()
        return answer.status, answer.headers.get_content_type(), answer.read()
    finally:
        connection.close()


@pytest.fixture
def ask(session):
    """ask(method, path, ...): `request` of a running server."""
    server = prefer_page.serve(session, "ann")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    assert server.server_address[0] == "127.0.0.1"
    yield lambda *a, **k: request(server.server_port, *a, **k)
    server.shutdown()
    server.server_close()


def state(answer):
    assert answer[:2] == (200, "application/json"), answer
    return json.loads(answer[2])


def test_a_sitting(ask, session):
    code, kind, page = ask("GET", "/")
    assert (code, kind) == (200, "text/html") and b"ArrowLeft" in page and b"//" not in page  # nothing comes from elsewhere
    assert state(ask("GET", "/state")) == {"pair": 0, "done": 0, "total": 3, "label": 0, "choice": None}
    for side in (0, 1):
        code, kind, png = ask("GET", f"/image?pair=2&side={side}")
        assert (code, kind) == (200, "image/png")
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), IMAGES[2, side, ..., 0])
    assert state(ask("POST", "/vote", {"pair": 0, "choice": "right"}))["pair"] == 1
    assert state(ask("POST", "/vote", {"pair": 1, "choice": "tie"}))["pair"] == 2
    assert state(ask("GET", "/state?pair=0"))["choice"] == "right"  # one back, and otherwise
    assert state(ask("POST", "/vote", {"pair": 0, "choice": "left"})) == {"pair": 2, "done": 2, "total": 3, "label": 2, "choice": None}
    assert state(ask("POST", "/vote", {"pair": 2, "choice": "skip"})) == {"pair": None, "done": 3, "total": 3}
    lines = [json.loads(line) for line in (session.folder / votes.VOTES).read_text().splitlines()]
    assert [(v["pair"], v["choice"], v["who"]) for v in lines] == [(0, "right", "ann"), (1, "tie", "ann"), (0, "left", "ann"), (2, "skip", "ann")]


def test_bad_requests_get_plain_words_and_keep_nothing(ask, session):
    vote = {"pair": 0, "choice": "left"}
    for arguments, code, words in [
        (("GET", "/image?pair=3&side=0"), 400, "pair = '3' should be a number in 0..2"), (("GET", "/image?pair=0&side=x"), 400, "side = 'x'"),
        (("GET", "/state?pair=-1"), 400, "pair = '-1'"), (("GET", "/../votes.jsonl"), 400, "is not here; valid"),
        (("POST", "/vote", {"pair": 9, "choice": "left"}), 400, "pair 9 is not in 0..2"), (("POST", "/vote", {"pair": 0}), 400, "a vote is"),
        (("POST", "/vote", {"pair": 0, "choice": "up"}), 400, "valid: left, right, tie, skip"), (("POST", "/vote", "nonsense"), 400, "a vote is"),
        (("POST", "/vote", "x" * 5000), 400, "1 to 4096 bytes"), (("POST", "/other", vote), 400, "posted to /vote"),
        (("POST", "/vote", vote, "text/plain"), 400, "a vote is JSON"),  # what a foreign page can send without asking
    ]:  # fmt: skip
        answer = ask(*arguments)
        assert answer[0] == code and words in answer[2].decode(), answer
    assert ask("POST", "/vote", vote, Host="evil.example:80")[0] == 403  # a foreign name that leads here
    assert not (session.folder / votes.VOTES).exists()


def begin(folder, *flags):
    """(process, port) of the binary, when its page is up."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tools.prefer", f"--out={folder}", "--port=0", "--who=ann", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=folder.parent)
    line = process.stdout.readline()
    assert "http://127.0.0.1:" in line, line + process.communicate()[0]
    return process, int(line.split("127.0.0.1:")[1].split("/")[0]), line


def test_a_killed_process_loses_nothing(session):
    process, port, said = begin(session.folder)
    try:
        assert "3 of 3 pairs wait for ann" in said
        assert state(request(port, "POST", "/vote", {"pair": 0, "choice": "left"}))["pair"] == 1
        other = subprocess.run(
            [sys.executable, "-m", "tools.prefer", f"--out={session.folder}", "--port=0"], capture_output=True, text=True, cwd=ROOT
        )
        assert other.returncode == 2 and f"is being used by process {process.pid}" in other.stderr
        other = subprocess.run(
            [sys.executable, "-m", "tools.prefer", f"--out={session.folder}", "--port=0", "--pairs=9"], capture_output=True, text=True, cwd=ROOT
        )
        assert other.returncode == 2 and "--pairs means nothing for pairs that are there already" in other.stderr
    finally:
        process.kill()
        process.wait()
    process, port, said = begin(session.folder)
    try:
        assert "2 of 3 pairs wait for ann" in said
        assert state(request(port, "GET", "/state"))["pair"] == 1
        state(request(port, "POST", "/vote", {"pair": 1, "choice": "right"}))
        process.send_signal(signal.SIGTERM)
        assert "2 of 3 decided" in process.communicate(timeout=20)[0] and process.returncode == 0
    finally:
        process.kill()
    made, counts = session.export(session.folder.parent / "p")
    assert counts == {"left": 1, "right": 1} and made["splits"]["train"]["count"] == 2
