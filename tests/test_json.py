"""JSON: what is JSON, what is kept of it, what is escaped, and what a body that is not JSON is."""

from __future__ import annotations

import json
import re
import unittest

import central_webhook_client as product

NOT_JSON = (
    "",
    "plain text",
    "<alert>\xe9</alert>",
    '{"a":1',
    "{'a':1}",
    '{"a":NaN}',
    '{"a":Infinity}',
    '{"a":01}',
    '{"a":1,}',
    '{"a":1} {"a":2}',
    '{"a":"line\nfeed"}',
    '{"a":"\x1b[2J"}',
    "\u00a0{}",
)
HOSTILE = "\xe9\u20ac\U0001f600\u202e\u2066\u2028\u2029\x85\x9b\x7f\u200b\ufeff"


class Parsing(unittest.TestCase):
    def test_a_body_that_is_json_is_its_text(self):
        for text in ("{}", "[]", '"x"', "17", "null", ' {"a" : 1.50}\r\n', '{"a":1,"a":2}'):
            with self.subTest(text):
                self.assertEqual(product.json_text(text.encode()), text)

    def test_a_byte_order_mark_is_not_part_of_it(self):
        self.assertEqual(product.json_text(b'\xef\xbb\xbf{"a":1}'), '{"a":1}')

    def test_a_body_that_is_not_json_has_no_text(self):
        not_utf8 = (b'{"a":"\xe9"}', b"\xed\xa0\x80", b"\xc0\xaf", '{"a":1}'.encode("utf-16"))
        for body in (*(text.encode() for text in NOT_JSON), *not_utf8):
            with self.subTest(body):
                self.assertIsNone(product.json_text(body))

    def test_parsing_anything_else_raises_value_error(self):
        for text in (*NOT_JSON, "[" * 100_000, "[" * 100_000 + "]" * 100_000):
            with self.subTest(text[:20]), self.assertRaises(ValueError):
                product.parse_json(text)

    def test_repeated_keys_of_every_object_are_returned(self):
        value, repeated = product.parse_json('{"a":1,"a":2,"b":{"c":1,"c":2},"d":[{"e":1}]}')
        self.assertEqual(value, {"a": 2, "b": {"c": 2}, "d": [{"e": 1}]})
        self.assertEqual(sorted(repeated), ["a", "c"])

    def test_numbers_that_python_cannot_hold_become_strings(self):
        digits = "9" * 5000
        value, _ = product.parse_json(f"[1, 1.5, -0.0, 1e999, {digits}, {'7' * 40}]")
        self.assertEqual(value, [1, 1.5, -0.0, "1e999", digits, int("7" * 40)])


class OneLine(unittest.TestCase):
    def test_numbers_order_and_spelling_are_kept(self):
        for text in (
            '{"a":1.0,"b":1.50,"c":1e400,"d":-0,"e":-0.0,"f":1E+2}',
            '{"n":123456789012345678901234567890123456789,"m":' + "9" * 5000 + "}",
            '{"n":0.1000000000000000055511151231257827}',
            '{"z":1,"a":2,"m":3,"a":2,"a":1}',
            '{"e":"\\u00e9\\ud83d\\ude00","s":"\\/","t":"\\u0041","lone":"\\udc00\\ud800"}',
            '{"escapes":"\\u001b[2J\\u202e\\n\\r\\t\\b\\f\\u0000"}',
            '{"spaces" :  [ 1 , 2 ] , "empty":{ } }',
            "1e999999999",
            ' {"space":"around"} ',
        ):
            with self.subTest(text[:40]):
                self.assertEqual(product.to_ascii_line(text), text)

    def test_other_white_space_becomes_spaces(self):
        text = '{\r\n\t"a": "x  y",\n\n\t"b": [\n1,\r2\n]\r\n}\n'
        self.assertEqual(product.to_ascii_line(text), re.sub(r"\s", " ", text))

    def test_what_is_not_ascii_is_escaped(self):
        text = json.dumps({"text": HOSTILE, HOSTILE: 1}, ensure_ascii=False)
        line = product.to_ascii_line(text)
        self.assertRegex(line, r"\A[\x20-\x7e]+\Z")
        self.assertEqual(json.loads(line), json.loads(text))


class Escaping(unittest.TestCase):
    def test_what_moves_a_cursor_or_reorders_text_is_escaped_as_in_json(self):
        harmful = [*range(0x20), *range(0x7F, 0xA0), 0xAD, 0x200B, 0x202E, 0x2028, 0x2066, 0xFEFF]
        for character in map(chr, [*harmful, 0xD800, 0xE0001]):
            with self.subTest(ascii(character)):
                escaped = product.escape_text(f"a{character}b")
                self.assertRegex(escaped, r"\Aa\\[\x20-\x7e]+b\Z")
                self.assertEqual(json.loads(f'"{escaped}"'), f"a{character}b")

    def test_readable_text_stays(self):
        text = "Störung in 東京 \U0001f600, 100 % \\ \" '"
        self.assertEqual(product.escape_text(text), text)


class Guesses(unittest.TestCase):
    def test_a_body_that_is_not_json_is_named_in_the_terms_of_an_operator(self):
        for body, guess in (
            (b"", "empty"),
            (b" \r\n", "empty"),
            (b"\x1f\x8b\x08\0", "gzip"),
            (b"<?xml version='1.0'?><a/>", "XML"),
            (b"payload=%7B%7D&token=x", "form"),
            (b'{"a":1', "almost JSON"),
            (b"[" * 100_000, "almost JSON"),
            (b"St\xf6rung", "not UTF-8"),
            (b"all quiet", "plain text"),
        ):
            with self.subTest(body[:20]):
                self.assertIn(guess, product.guess_format(body))
