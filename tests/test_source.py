"""The source itself: its size, its map, and the part that is meant to be copied out of it."""

from __future__ import annotations

import re
import subprocess
import sys
import unittest

import central_webhook_client as product
from tests.support import PROGRAM, TOKEN
from tests.test_signature import BODY, HEADERS

MAX_LINES = 3245
LINES = PROGRAM.read_text(encoding="utf-8").splitlines()
BANNERS = [line for line in LINES if line.startswith("# ----")]

# What a reader who has copied the part writes below it.
USE = f"""
assert verify_signature({BODY!r}, {HEADERS!r}, {TOKEN!r}) is None
for body, token in (({BODY!r} + b" ", {TOKEN!r}), ({BODY!r}, "another")):
    try:
        verify_signature(body, {HEADERS!r}, token)
    except SignatureError:
        continue
    raise SystemExit("accepted a forgery")
print("verified")
"""


class Source(unittest.TestCase):
    def test_it_stays_small_and_its_lines_short(self):
        self.assertLessEqual(len(LINES), MAX_LINES)
        self.assertEqual([line for line in LINES if len(line) > 100], [])

    def test_the_map_in_the_docstring_lists_the_banners_in_order(self):
        listed = product.__doc__.rpartition(":\n\n")[2].splitlines()
        titles = [line.strip("#- ") for line in BANNERS]
        self.assertEqual([line.strip() for line in listed], titles)

    def test_banners_are_all_of_one_form_and_width(self):
        for banner in BANNERS:
            self.assertRegex(banner, r"\A# ---- \S.*\S -+\Z")
        self.assertEqual({banner: len(banner) for banner in BANNERS if len(banner) != 95}, {})


class PartToCopy(unittest.TestCase):
    """The section that verifies a signature of classic Central."""

    @classmethod
    def setUpClass(cls):
        (start,) = (n for n, line in enumerate(LINES) if re.search("the part to copy -+$", line))
        end = next(n for n in range(start + 1, len(LINES)) if LINES[n] in BANNERS)
        cls.section = LINES[start:end]

    def test_the_function_has_at_most_40_lines(self):
        text = "\n".join(self.section)
        self.assertLessEqual(len(text[text.index("def ") :].rstrip().split("\n")), 40)

    def test_the_line_below_its_banner_names_what_it_needs(self):
        for name in ("base64", "hmac", "typing"):
            self.assertIn(name, self.section[1])

    def test_cut_out_it_verifies_the_vector_and_refuses_forgeries(self):
        imports = ["import base64, hmac", "from typing import Mapping"]
        code = "\n".join([*imports, *self.section, USE])
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=30
        )
        self.assertEqual((done.stdout, done.stderr, done.returncode), ("verified\n", "", 0))
