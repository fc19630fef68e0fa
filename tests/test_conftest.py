"""What conftest.py adds to a run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = """
import locale
import pytest
from conftest import shared_file

BEFORE = locale.setlocale(locale.LC_ALL)

@pytest.mark.parametrize("name", ["a", "b"])
def test_with_data(name):
    assert shared_file("ct", name)

@pytest.mark.skip(reason="need a clear night")
def test_stars(): ...

def test_writing_dicom(): locale.setlocale(locale.LC_ALL, "C")

def test_after_it(): assert locale.setlocale(locale.LC_ALL) == BEFORE
"""


def test_skips_are_counted_and_the_locale_is_put_back(tmp_path):
    """Beside a checkout without shared/, in xdist's processes."""
    folder = tmp_path / "checkout" / "tests"
    folder.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    (folder / "test_some.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--numprocesses=1", "-p", "no:cacheprovider"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = "3 tests skipped: 2 need shared/ct beside the checkout, 1 need a clear night"
    assert line in done.stdout.splitlines()
