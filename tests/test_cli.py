"""The `warmstart` command, run as its users run it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("warmstart")


def warmstart(*arguments, cwd):
    return subprocess.run([COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_help_lists_the_commands(root):
    done = warmstart("--help", cwd=root)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("lab", "course", "prove", "mutants", "grade"))


@pytest.mark.slow
def test_prove_says_that_all_is_proven(root):
    done = warmstart("prove", "start", "--seeds", "2", cwd=root)
    assert (done.returncode, done.stdout) == (0, "all checks proven\n"), done.stderr


@pytest.mark.slow
def test_prove_names_the_topics_there_are(root):
    done = warmstart("prove", "lroa", cwd=root)
    assert done.returncode == 2
    assert (
        "no topic or exercise 'lroa'. Choose from start, features, finetune, batchnorm, lora, export, or a number."
        in " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stderr).split())
    )


@pytest.mark.slow
def test_outside_the_course_it_says_where_to_go(tmp_path):
    done = warmstart("course", cwd=tmp_path)
    assert done.returncode == 2
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stderr).split())
    assert "no nbgrader_config.py here or above. Change to a folder of the course and run this again." in text


@pytest.mark.slow
def test_lab_without_a_display_prints_an_address_that_opens_the_first_chapter(root, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment |= {"JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    log = tmp_path / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [COMMAND, "lab"],
            cwd=root,
            env=environment,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(rb"http://\S+/lab/tree/course/00_start/00_start.ipynb\?token=\w+", log.read_bytes())):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert b"no display here: open the address" in log.read_bytes()
        assert found
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
