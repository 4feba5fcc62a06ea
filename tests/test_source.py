"""The source of the program: its size, its map, the part to copy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import unittest

import central_webhook_client as product
from tests.support import PROGRAM, TOKEN
from tests.test_signature import BODY, HEADERS

MAX_LINES = 3450


class CopiedOut(unittest.TestCase):
    """The section that verifies classic Central is meant to be copied out of the file."""

    def setUp(self):
        lines = PROGRAM.read_text(encoding="utf-8").splitlines()
        start = next(
            n for n, line in enumerate(lines) if line.endswith("the part to copy " + "-" * 32)
        )
        end = next(n for n in range(start + 1, len(lines)) if lines[n].startswith("# ----"))
        self.section = lines[start:end]

    def test_the_function_has_at_most_40_lines(self):
        text = "\n".join(self.section)
        self.assertLessEqual(len(text[text.index("def ") :].rstrip().split("\n")), 40)

    def test_the_line_below_its_banner_names_what_it_needs(self):
        for name in ("base64", "hmac", "typing"):
            self.assertIn(name, self.section[1])

    def test_it_verifies_the_vector_in_an_interpreter_of_its_own(self):
        use = f"""
headers = {HEADERS!r}
assert verify_signature({BODY!r}, headers, {TOKEN!r}) is None
for body, token in (({BODY!r} + b" ", {TOKEN!r}), ({BODY!r}, "another")):
    try:
        verify_signature(body, headers, token)
    except SignatureError:
        continue
    raise SystemExit("accepted what is forged")
print("verified")
"""
        code = "\n".join(["import base64, hmac", "from typing import Mapping", *self.section, use])
        done = subprocess.run(
            [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=30
        )
        self.assertEqual((done.stdout, done.stderr, done.returncode), ("verified\n", "", 0))


class Source(unittest.TestCase):
    """What `ruff format` and the map in the module's docstring promise to a reader."""

    @classmethod
    def setUpClass(cls):
        cls.lines = PROGRAM.read_text(encoding="utf-8").splitlines()

    def test_it_stays_small(self):
        self.assertLessEqual(len(self.lines), MAX_LINES)

    def test_no_line_is_longer_than_100_characters(self):
        self.assertEqual([line for line in self.lines if len(line) > 100], [])

    def test_the_map_in_the_docstring_lists_the_sections_in_their_order(self):
        banners = [line for line in self.lines if line.startswith("# ----")]
        self.assertEqual({len(banner) for banner in banners}, {95})
        titles = [banner.strip("# -") for banner in banners]
        (shown,) = re.findall(r"(?s)prints this map\):\n\n(.*?)\n\Z", product.__doc__)
        self.assertEqual([line.strip() for line in shown.splitlines()], titles)

    def test_each_public_function_says_what_it_does(self):
        missing = [
            node.name
            for node in ast.walk(ast.parse("\n".join(self.lines)))
            if isinstance(node, (ast.ClassDef, ast.FunctionDef))
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ]
        nested = {"run", "first", "to_object", "parse", "on_signal", "respell"}
        overridden = {"readable", "writable", "handle", "format"}
        self.assertEqual(set(missing) - nested - overridden, set())
