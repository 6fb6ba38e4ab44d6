"""Output that cannot be written is dropped, and the run goes on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from bim.orchestrator.reporting.log import configure_console
from bim.orchestrator.reporting.streams import guarded_streams
import logging

with guarded_streams():
    configure_console()
    print({text!r}, flush=True)
    if {wait}:
        sys.stdin.readline()
    for number in range(2000):
        print("line", number, {text!r})
        logging.getLogger("bim.x").info("%s", {text!r})
        logging.getLogger("bim.x").error("%s", {text!r})
    with open({done!r}, "w") as file:
        file.write("done")
sys.exit(3)
"""

NAME = b"caf\xe9 \xe2\x82\xac.png".decode("utf-8", "surrogateescape")


def script(done: object, wait: bool = False) -> str:
    return SCRIPT.format(text=NAME, wait=wait, done=str(done))


def test_a_reader_that_goes_away_ends_nothing(tmp_path: object) -> None:
    done = os.path.join(str(tmp_path), "done")
    with subprocess.Popen(
        [sys.executable, "-c", script(done, wait=True)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        process.stderr.close()
        process.stdin.write(b"go\n")
        process.stdin.flush()
        assert process.wait(60) == 3  # Python's own flush at the end would make it 120
    assert os.path.exists(done)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_and_characters_that_a_terminal_lacks_are_shown_as_escapes(
    tmp_path: object, encoding: str
) -> None:
    done = os.path.join(str(tmp_path), "done")
    finished = subprocess.run(
        [sys.executable, "-c", script(done)],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        check=False,
    )
    assert finished.returncode == 3, finished.stderr[-500:]
    assert os.path.exists(done)
    euro = "€".encode() if encoding == "utf-8" else rb"\u20ac"
    assert finished.stdout.splitlines()[0] == rb"caf\xe9 " + euro + b".png"
    assert b"Traceback" not in finished.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_ends_nothing(tmp_path: object) -> None:
    done = os.path.join(str(tmp_path), "done")
    with open("/dev/full", "w") as full:
        finished = subprocess.run([sys.executable, "-c", script(done)], stdout=full, stderr=full, check=False)
    assert finished.returncode == 3
    assert os.path.exists(done)


def test_closed_streams_end_nothing(tmp_path: object) -> None:
    done = os.path.join(str(tmp_path), "done")
    finished = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "$SCRIPT" >&- 2>&-'],
        env=os.environ | {"SCRIPT": script(done)},
        check=False,
    )
    assert finished.returncode == 3
    assert os.path.exists(done)
