"""No network and no telemetry: a run, a comparison and a report where every socket refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

GUARD = '''
"""Loaded by Python at its start: only local sockets may be made, and no host be looked up."""
import socket

ATTEMPTS = []
_make = socket.socket.__init__


def refuse(*words, **_):
    ATTEMPTS.append(words)
    raise AssertionError(f"the network was touched: {words}")


def make(self, family=-1, *words, **more):
    if family != socket.AF_UNIX:
        refuse("socket", family)
    _make(self, family, *words, **more)


socket.socket.__init__ = make
for name in ("getaddrinfo", "gethostbyname", "create_connection", "gethostbyaddr"):
    setattr(socket, name, refuse)
'''

WORK = """
import socket
import sitecustomize

for touch in (
    lambda: socket.socket(socket.AF_INET), lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: socket.getaddrinfo("localhost", 80),
):
    try:
        touch()
    except AssertionError:
        continue
    raise SystemExit("the guard does not guard")
sitecustomize.ATTEMPTS.clear()

from pathlib import Path
from outlay.cli.app import run_app

words = ("salt", "plum", "axe")
lines = [f"{word} {n},{word}" for n in range(12) for word in words]
Path("rows.csv").write_text("\\n".join(["text,label", *lines]))
Path("small.yaml").write_text(
    "name: small\\nmodel: {config: bert, layers: 1, width: 32}\\ndata: {path: rows.csv}\\n"
    "budget: 3steps\\n"
)
Path("new.csv").write_text("text\\nsalt 1\\n")

def outlay(*words):
    assert run_app([*words, "--quiet"]) == 0, words

outlay("plan", "small.yaml")
outlay("run", "small.yaml", "--method", "bone(r=4)")
outlay("export", "small", "--out", "adapted")
outlay("predict", "small", "--data", "new.csv", "--out", "answers.csv")
arms = ("--arm", "probe=probe", "--arm", "bone=bone(r=4)")
outlay("compare", "small.yaml", *arms, "--seeds", "2")
(comparison,) = Path("runs").glob("comparison-*")
outlay("report", str(comparison))
assert (comparison / "report.html").exists()
# Also what was tried and then forgiven would be an attempt.
assert not sitecustomize.ATTEMPTS, sitecustomize.ATTEMPTS
print("nothing was touched")
"""


def test_nothing_touches_a_network(tmp_path: Path) -> None:
    """The hub's offline switches are not set: outlay does not rely on them."""
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    (tmp_path / "work.py").write_text(WORK)
    source = Path(__file__).resolve().parents[1] / "src"
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "OUTLAY_OFFLINE")}
    env |= {"PYTHONPATH": f"{guard}{os.pathsep}{source}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "work.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "nothing was touched"
