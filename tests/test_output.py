"""What is written: alerts on stdout, all else on stderr, and nothing that a sender wrote does harm
there.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import select
import signal
import time
import unittest

import central_webhook_client as product
from tests.support import (
    PATH,
    TOKEN,
    Receiver,
    at_once,
    central_headers,
    config_of,
    deadline_poll,
    new_body,
    now_stamp,
    raw_request,
)

try:
    import pty
except ImportError:  # Windows
    pty = None

# Control characters but for line feed, bidi controls, other separators of lines, surrogates, zero
# width.
HARMFUL = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
SIGNING_HEADERS = (
    "X-Central-Signature",
    "X-Central-Service",
    "X-Central-Delivery-ID",
    "X-Central-Delivery-Timestamp",
)
COLOUR = re.compile("\x1b\\[[0-9;]*m")


def field_key():
    """Return a configuration that demands an API key in the body."""
    return {
        "name": "noc",
        "path": PATH,
        "token": TOKEN,
        "api_key": {"field": "apiKey", "value": "K-very-secret"},
    }


def sign(body, token, *values):
    return hmac.new(token.encode(), body + b"".join(values), hashlib.sha256).digest()


# ---- JSON Lines -----------------------------------------------------------------------


class JsonLines(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        config = config_of(
            webhook=[
                {"name": "noc", "path": PATH, "token": TOKEN},
                {**field_key(), "name": "keyed", "path": "/keyed"},
                {"name": "fabric", "path": "/fabric", "type": "ip-fabric", "token": TOKEN},
                {"name": "n\xfc\u2713", "path": "/name", "token": TOKEN},
            ],
            log_file="alerts.log",
        )
        cls.receiver = Receiver(config).__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def deliver(self, body, path=PATH, headers=None, **signing):
        """Deliver; return the lines on stdout and in the log that this made."""
        before = len(self.receiver.stdout_lines)
        answer = self.receiver.post(
            body, central_headers(body, **signing) if headers is None else headers, path
        )
        self.assertEqual((answer.status, answer.json), (200, {"status": "ok"}))
        line = self.receiver.wait_for_stdout(before + 1)[-1]
        self.assertEqual(len(self.receiver.stdout_lines), before + 1)
        return line, self.logged()[-1]

    def logged(self):
        text = (self.receiver.folder / "alerts.log").read_bytes()
        self.assertTrue(text.endswith(b"\n"))
        return text.decode("ascii").split("\n")[:-1]

    def test_a_line_has_exactly_these_fields(self):
        body = b'{"alert_type":"AP disconnected","nid":1}'
        line, logged = self.deliver(body, delivery_id="72d3162e", timestamp=now_stamp())
        found = json.loads(line)
        self.assertEqual(
            list(found), ["received_at", "webhook", "type", "delivery_id", "sent_at", "alert"]
        )
        self.assertRegex(found["received_at"], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\Z")
        self.assertEqual(
            (found["webhook"], found["type"], found["delivery_id"]), ("noc", "central", "72d3162e")
        )
        expected = (
            f'{{"received_at": "{found["received_at"]}", "webhook": "noc", "type": "central", '
            f'"delivery_id": "72d3162e", "sent_at": "{found["sent_at"]}", '
            f'"alert": {body.decode()}}}'
        )
        self.assertEqual(line, expected)
        self.assertTrue(logged.startswith(line[:-1] + ', "key": "'), logged)
        self.assertEqual(list(json.loads(logged)), [*found, "key"])

    def test_the_time_it_was_received_is_utc(self):
        before = time.time()
        line, _ = self.deliver(new_body())
        text = json.loads(line)["received_at"]
        seconds = product.parse_timestamp(text)
        self.assertTrue(before - 1 <= seconds <= time.time() + 1, text)

    def test_sent_at_is_as_the_sender_wrote_it(self):
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.250-07:00", time.gmtime(time.time() - 7 * 3600))
        line, _ = self.deliver(new_body(), timestamp=stamp)
        self.assertEqual(json.loads(line)["sent_at"], stamp)

    def test_a_sender_without_id_and_time_has_null_there(self):
        body = new_body()
        line, _ = self.deliver(body, "/fabric", {"X-IPF-Signature": sign(body, TOKEN).hex()})
        found = json.loads(line)
        self.assertEqual(
            (found["type"], found["delivery_id"], found["sent_at"]), ("ip-fabric", None, None)
        )

    def test_numbers_order_and_spelling_are_kept(self):
        for number, text in enumerate(
            (
                '{"a":1.0,"b":1.50,"c":1e400,"d":-0,"e":-0.0,"f":1E+2}',
                '{"n":123456789012345678901234567890123456789}',
                '{"n":' + "9" * 5000 + "}",
                '{"n":0.1000000000000000055511151231257827}',
                '{"z":1,"a":2,"m":3}',
                '{"a":1,"a":2,"a":1}',
                '{"e":"\\u00e9\\ud83d\\ude00","s":"\\/","t":"\\u0041"}',
                '{"lone":"\\ud800","other":"\\udc00\\ud800"}',
                '{"escapes":"\\u001b[2J\\u202e\\n\\r\\t\\b\\f\\u0000"}',
                '{"spaces" :  [ 1 , 2 ] , "empty":{ } }',
                "[]",
                '"only a string"',
                "17",
                "1e999999999",
                "null",
                "true",
                ' {"space":"around"} ',
            )
        ):
            with self.subTest(text[:40]):
                line, logged = self.deliver(text.encode(), delivery_id=f"kept-{number}")
                self.assertTrue(line.endswith(f'"alert": {text}}}'), line[-200:])
                self.assertIn(f'"alert": {text}, "key": ', logged)

    def test_other_white_space_outside_of_strings_becomes_spaces(self):
        body = b'{\r\n\t"a": "x  y",\n\n\t"b": [\n1,\r2\n]\r\n}\n'
        line, _ = self.deliver(body)
        shown = line.partition('"alert": ')[2][:-1]
        self.assertEqual(json.loads(shown), json.loads(body))
        self.assertEqual(re.sub(r"\s+", "", shown), re.sub(r"\s+", "", body.decode()))
        self.assertIn('"x  y"', shown)

    def test_what_is_not_ascii_is_escaped(self):
        hostile = "\xe9\u20ac\U0001f600\u202e\u2066\u2028\u2029\x85\x9b\x7f\u200b\ufeff"
        body = json.dumps({"text": hostile, hostile: 1}, ensure_ascii=False).encode()
        line, _ = self.deliver(body)
        self.assertRegex(line, r"\A[\x20-\x7e]+\Z")
        self.assertEqual(json.loads(line)["alert"], {"text": hostile, hostile: 1})

    def test_a_body_that_is_not_json_is_text(self):
        for text in (
            "",
            "plain text",
            "<alert>\xe9</alert>",
            '{"a":1',
            "{'a':1}",
            '{"a":NaN}',
            '{"a":01}',
            '{"a":1,}',
            '{"a":"line\nfeed"}',
            '{"a":"\x1b[2J"}',
            "\x1b[2J\x9b31m\x07\r\n\x00\x7f\u202e\u2028",
            '", "key": "forged"}\n{"received_at": "',
        ):
            with self.subTest(text):
                line, logged = self.deliver(text.encode(), delivery_id=f"text-{hash(text)}")
                self.assertRegex(line, r"\A[\x20-\x7e]+\Z")
                found = json.loads(line)
                self.assertEqual(list(found)[-2:], ["alert", "body"])
                self.assertEqual((found["alert"], found["body"]), (None, text))
                self.assertEqual(json.loads(logged)["body"], text)

    def test_a_body_that_is_not_utf8_is_base64(self):
        for body in (
            b"\xff",
            b'{"a":"\xe9"}',
            bytes(range(256)),
            b"\xed\xa0\x80",
            b"\xc0\xaf",
            '{"a":1}'.encode("utf-16"),
        ):
            with self.subTest(body[:9]):
                line, _ = self.deliver(body)
                found = json.loads(line)
                self.assertEqual(list(found)[-2:], ["alert", "body_base64"])
                self.assertIsNone(found["alert"])
                self.assertEqual(base64.b64decode(found["body_base64"], validate=True), body)

    def test_deep_nesting_is_kept_on_one_line(self):
        body = b"[" * 100000 + b"]" * 100000
        line, logged = self.deliver(body)
        self.assertIn("[" * 1000, line)
        self.assertTrue(logged.startswith(line[:-1]))

    def test_hostile_headers_are_escaped(self):
        for value in ("\xe9\x85\x9b31m", '", "key": "forged', "\\", "\x80\xff" * 50, "a\tb"):
            body = new_body()
            stamp = now_stamp()
            signed = sign(
                body, TOKEN, value.encode("latin-1"), value.encode("latin-1"), stamp.encode()
            )
            headers = {
                "X-Central-Service": value,
                "X-Central-Delivery-ID": value,
                "X-Central-Delivery-Timestamp": stamp,
                "X-Central-Event": value,
                "X-Central-Signature": base64.b64encode(signed).decode(),
            }
            with self.subTest(value[:9]):
                line, logged = self.deliver(body, headers=headers)
                self.assertRegex(line, r"\A[\x20-\x7e]+\Z")
                found = json.loads(line)
                self.assertEqual(len(found), 6)
                self.assertEqual(found["delivery_id"], value)
                self.assertTrue(logged.startswith(line[:-1] + ', "key": "'))

    def test_the_name_of_the_webhook_is_ascii_as_well(self):
        line, _ = self.deliver(new_body(), "/name")
        self.assertRegex(line, r"\A[\x20-\x7e]+\Z")
        self.assertEqual(json.loads(line)["webhook"], "n\xfc\u2713")

    def test_an_api_key_of_the_body_is_masked(self):
        for text, expected in (
            ('{"apiKey":"K-very-secret","a":1.0}', '{"apiKey":"***","a":1.0}'),
            ('{"a": 2, "apiKey" : "K-very-secret" }', '{"a":2,"apiKey":"***"}'),
            ('{"\\u0061piKey":"K-very-secret","a":3}', '{"apiKey":"***","a":3}'),
            ('{"apiKey":"K\\u002dvery-secret","a":1e999}', '{"apiKey":"***","a":"1e999"}'),
            (
                '{"x":{"apiKey":"inner"},"apiKey":"K-very-secret"}',
                '{"x":{"apiKey":"inner"},"apiKey":"***"}',
            ),
        ):
            with self.subTest(text):
                line, logged = self.deliver(text.encode(), "/keyed")
                for written in (line, logged):
                    self.assertEqual(json.loads(written)["alert"], json.loads(expected))
                    self.assertNotIn("very-secret", written)

    def test_a_wrong_api_key_of_the_body_is_refused(self):
        for text in (
            "{}",
            '{"apiKey":""}',
            '{"apiKey":"another"}',
            '{"apiKey":null}',
            '{"apiKey":["K-very-secret"]}',
            '{"x":{"apiKey":"K-very-secret"}}',
            '{"apiKey":"K-very-secret","apiKey":"K-very-secret"}',
            '{"apiKey":"K-very-secret","apiKey":"another"}',
            '{"apikey":"K-very-secret"}',
            '["apiKey","K-very-secret"]',
            '"apiKey"',
            "apiKey=K-very-secret",
            "",
        ):
            with self.subTest(text):
                body = text.encode()
                self.assertEqual(
                    self.receiver.post(body, central_headers(body), "/keyed").status, 401
                )

    def test_the_log_has_what_stdout_has_and_a_key_that_tells_deliveries_apart(self):
        lines = [self.deliver(new_body())[1] for _ in range(3)]
        keys = [json.loads(line)["key"] for line in lines]
        self.assertEqual(len(set(keys)), 3)
        self.assertTrue(all(isinstance(key, str) and key for key in keys))
        self.assertEqual(len(self.logged()), len(self.receiver.stdout_lines))


# ---- For people ----------------------------------------------------------------------------


def delivery(body, **changes):
    """Return a Delivery of the product, as it would be for this body."""
    try:
        json.loads(body)
        text = body.decode()
    except (ValueError, RecursionError):
        text = None
    found = {
        "received_at": 1795293312.123,
        "webhook": "noc",
        "type": "central",
        "delivery_id": "72d3162e",
        "sent_at": "2026-11-21T20:35:12Z",
        "body": body,
        "text": text,
        "key": "00",
        **changes,
    }
    return product.Delivery(**found)


ALERT = {
    "alert_type": "AP disconnected",
    "severity": "Critical",
    "state": "Open",
    "description": "AP lobby-1 disconnected",
    "details": {"serial": "CN1", "name": "B\xfcro \u6771\u4eac"},
    "list": [1, 2.50, [], {}],
}


class Pretty(unittest.TestCase):
    def render(self, payload, colour=False, **changes):
        body = (
            payload
            if isinstance(payload, bytes)
            else json.dumps(payload, ensure_ascii=False).encode("utf-8", "surrogatepass")
        )
        return product.render_pretty(delivery(body, **changes), colour)

    def test_a_header_line_and_the_indented_alert(self):
        text = self.render(ALERT)
        header, _, rest = text.partition("\n")
        for part in ("noc", "CRITICAL", "Open", "AP disconnected", "AP lobby-1 disconnected"):
            self.assertIn(part, header)
        self.assertRegex(header, r"\A\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
        self.assertTrue(rest.endswith("\n"))
        self.assertEqual(json.loads(rest), ALERT)
        self.assertIn("B\xfcro \u6771\u4eac", rest)
        for line in rest.splitlines():
            self.assertTrue(line.startswith("  "), line)
        self.assertNotIn("\x1b", text)

    def test_new_central_has_its_name_and_summary_in_the_header(self):
        payload = {
            "name": "AP Down",
            "severity": "Major",
            "state": "Active",
            "summary": "An AP is down",
        }
        header = self.render(payload).partition("\n")[0]
        for part in ("AP Down", "MAJOR", "Active", "An AP is down"):
            self.assertIn(part, header)

    def test_numbers_order_and_spelling_are_kept(self):
        body = b'{"z":1.5,"a":12345678901234567890123,"c":-0.0,"b":[]}'
        rest = self.render(body).partition("\n")[2]
        self.assertEqual("".join(rest.split()), body.decode())

    def test_colours(self):
        text = self.render(ALERT, colour=True)
        self.assertIn("\x1b[", text.partition("\n")[0])
        self.assertEqual(COLOUR.sub("", text), self.render(ALERT))

    def test_nothing_the_sender_wrote_moves_the_cursor(self):
        hostile = (
            "".join(map(chr, range(32)))
            + "\x7f\x80\x85\x9b\u202e\u2066\u2069\u200f\u2028\u2029\ud800\ufeff"
        )
        payloads = [
            {
                name: hostile
                for name in (
                    "alert_type",
                    "severity",
                    "state",
                    "description",
                    "device_id",
                    "details",
                )
            },
            {"name": hostile, "summary": hostile, "siteId": hostile, hostile: hostile},
            {"details": {"serial": hostile, "severity": hostile}},
            [hostile],
            hostile,
            ("no JSON " + hostile[:-2]).encode("utf-8", "surrogatepass"),
            b"\xff\x1b[2J" + bytes(range(256)),
            b"\x9b31m",
            json.dumps({"severity": hostile, "state": hostile, "description": hostile}).encode(),
        ]
        for number, payload in enumerate(payloads):
            for colour in (False, True):
                with self.subTest(number, colour=colour):
                    text = self.render(payload, colour=colour)
                    self.assertNotRegex(COLOUR.sub("", text) if colour else text, HARMFUL)
                    rest = text.partition("\n")[2]
                    self.assertTrue(all(line.startswith("  ") for line in rest.splitlines()))

    def test_a_colour_of_the_sender_does_not_come_through(self):
        text = self.render(
            {"alert_type": "\x1b[31mred\x1b[0m", "severity": "\x1b[0m"}, colour=False
        )
        self.assertNotIn("\x1b", text)

    def test_whatever_the_alert_is_it_is_shown(self):
        for payload in (
            None,
            True,
            5,
            1.5,
            "x",
            [],
            {},
            [[]],
            {"": ""},
            {"severity": None, "state": 5, "details": []},
        ):
            with self.subTest(payload):
                text = self.render(payload)
                self.assertIn("noc", text.partition("\n")[0])
                self.assertEqual(json.loads(text.partition("\n")[2]), payload)
        deep = b"[" * 100000 + b"]" * 100000
        text = product.render_pretty(delivery(deep, text=deep.decode()), False)
        self.assertEqual(text.count("["), 100000)
        number = b'{"severity":' + b"9" * 5000 + b"}"
        text = product.render_pretty(delivery(number, text=number.decode()), False)
        self.assertIn("9" * 5000, text)


class PrettyProcess(unittest.TestCase):
    def test_pretty_into_a_pipe_has_no_colours(self):
        body = json.dumps({**ALERT, "apiKey": "K-very-secret"}, ensure_ascii=False).encode()
        with Receiver(config_of(webhook=field_key()), ["--format", "pretty"]) as receiver:
            self.assertEqual(receiver.post(body, central_headers(body)).status, 200)
            deadline_poll(lambda: "  }" in receiver.stdout_lines)
            header, *rest = receiver.stdout_lines
            self.assertIn("AP disconnected", header)
            self.assertIn("CRITICAL", header)
            self.assertEqual(json.loads("\n".join(rest)), {**ALERT, "apiKey": "***"})
            text = "\n".join(receiver.stdout_lines)
            self.assertIn("B\xfcro \u6771\u4eac", text)
            self.assertNotIn("\x1b", text)
            self.assertNotIn("very-secret", text)

    @unittest.skipUnless(pty, "there are no pseudo-terminals here")
    def test_on_a_terminal_it_is_pretty_and_in_colour_unless_told_otherwise(self):
        usual = {
            "TERM": "xterm-256color",
            "NO_COLOR": "",
            "COLUMNS": "100",
            "PYTHONIOENCODING": "utf-8",
        }
        cases = (
            ("auto", [], usual, True, True),
            ("NO_COLOR", [], {**usual, "NO_COLOR": "1"}, True, False),
            ("json", ["--format", "json"], usual, False, False),
        )
        terminals, receivers = [], []
        for _, arguments, environment, _, _ in cases:
            terminals.append(pty.openpty())
            for descriptor in terminals[-1]:
                self.addCleanup(os.close, descriptor)
            receivers.append(Receiver(config_of(), arguments, environment, stdout=terminals[-1][1]))
        with at_once(*receivers):
            for (what, _, _, pretty, colour), (master, _), receiver in zip(
                cases, terminals, receivers
            ):
                with self.subTest(what):
                    text = self.on_terminal(receiver, master)
                    self.assertEqual("\x1b[" in text, colour)
                    plain = COLOUR.sub("", text).replace("\r\n", "\n")
                    self.assertNotRegex(plain, HARMFUL)
                    if pretty:
                        header, _, rest = plain.partition("\n")
                        self.assertIn("AP disconnected", header)
                        self.assertEqual(
                            json.loads(rest),
                            {**ALERT, "hostile": "\x1b[2J\u202e", "end": "the end"},
                        )
                    else:
                        self.assertEqual(json.loads(plain)["alert"]["end"], "the end")

    def on_terminal(self, receiver, master):
        """Deliver an alert to a receiver whose stdout is a terminal; return what was written
        there.
        """
        body = json.dumps({**ALERT, "hostile": "\x1b[2J\u202e", "end": "the end"}).encode()
        self.assertEqual(receiver.deliver(body).status, 200)
        data, end = b"", time.monotonic() + 10
        while (
            not re.search(rb'the end"\s+\}+\s*\n|the end"\}+\r?\n', data) and time.monotonic() < end
        ):
            if select.select([master], [], [], 0.1)[0]:
                data += os.read(master, 65536)
        return data.decode()


# ---- stderr ------------------------------------------------------------------------------


class LogTestCase(unittest.TestCase):
    """Looks at the lines for rejections, and that none of them holds a secret."""

    SECRETS = (TOKEN, "body-marker")

    def setUp(self):
        self.receivers = []
        self.signatures = set()
        self.addCleanup(self.assert_clean)

    def receiver(self):
        receiver = Receiver().__enter__()
        self.addCleanup(receiver.__exit__)
        self.receivers.append(receiver)
        return receiver

    def assert_clean(self):
        for receiver in self.receivers:
            for line in receiver.stderr_lines:
                self.assertRegex(line, r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S* (INFO|WARNING) \S")
                self.assertNotRegex(line, HARMFUL)
                for secret in (*self.SECRETS, *self.signatures):
                    self.assertNotIn(secret, line)

    def rejected(self, receiver, raw, *patterns, status=401):
        """Send until it has a line of its own, which the limit of lines a second may delay; return
        it.
        """
        self.signatures.update(
            match[1].decode()
            for match in re.finditer(rb"Signature: (?:sig1=)?:?([^:\r]{20,})", raw)
        )
        end = time.monotonic() + 10
        while True:
            before = len(receiver.stderr_lines)
            self.assertEqual(receiver.request(raw).status, status)
            with contextlib.suppress(AssertionError):
                line = receiver.wait_for_log(r" WARNING .*\b%d\b" % status, 0.3, before)
                break
            self.assertLess(time.monotonic(), end, "no line in the log")
        for pattern in patterns:
            self.assertRegex(line, pattern)
        return line

    def body(self):
        return new_body(text="body-marker")


class Rejections(LogTestCase):
    """One WARNING for each rejection, with peer, webhook and reason."""

    def test_a_rejection_is_one_line_with_peer_webhook_and_reason(self):
        receiver = self.receiver()
        body = self.body()
        before = len(receiver.stderr_lines)
        self.assertEqual(receiver.deliver(body, token="another").status, 401)
        self.assertEqual(receiver.deliver().status, 200)
        line = receiver.wait_for_log("WARNING", start=before)
        for pattern in (r"127\.0\.0\.1", r"'noc'|\"noc\"|\bnoc\b", "signature"):
            self.assertRegex(line, pattern)
        self.assertEqual(receiver.stop(), 0)
        self.assertEqual(len([one for one in receiver.stderr_lines if "WARNING" in one]), 1)

    def test_the_peer_behind_a_proxy_is_the_last_forwarded_address(self):
        receiver = self.receiver()
        for pairs, peer in (
            ([("X-Forwarded-For", "198.51.100.7")], "198.51.100.7"),
            ([("X-Forwarded-For", "192.0.2.66, 198.51.100.8")], "198.51.100.8"),
            (
                [("X-Forwarded-For", "192.0.2.66"), ("X-Forwarded-For", "198.51.100.9")],
                "198.51.100.9",
            ),
            ([("X-Forwarded-For", "2001:db8::1")], "2001:db8::1"),
            ([("X-Forwarded-For", "192.0.2.66, nonsense")], "127.0.0.1"),
            ([("X-Forwarded-For", "")], "127.0.0.1"),
            ([("X-Real-IP", "192.0.2.66")], "127.0.0.1"),
        ):
            with self.subTest(pairs):
                line = self.rejected(
                    receiver, raw_request(headers=pairs, body=self.body()), re.escape(peer)
                )
                self.assertNotIn("192.0.2.66", line)

    def test_every_kind_of_rejection_has_its_line(self):
        receiver = self.receiver()
        body = self.body()
        stale = central_headers(body, timestamp=now_stamp(-49.5 * 3600))
        for status, raw, patterns in (
            (400, raw_request(headers={"X-Header ": "x"}), ["malformed"]),
            (401, raw_request(headers=stale, body=body), ["stale|old|ago", "49|2 day|178200|1782"]),
            (404, raw_request(path="/other"), ["/other"]),
            (405, raw_request("PUT"), ["PUT"]),
            (411, raw_request(length=False), ["length|Length"]),
            (
                413,
                raw_request(headers={"Content-Length": "99999999"}, length=False),
                ["max_body_bytes|too large"],
            ),
            (414, raw_request(path="/" + "x" * 9000), []),
            (431, raw_request(headers={"X": "x" * 70000}), []),
            (501, raw_request(headers={"Transfer-Encoding": "gzip"}, length=False), ["gzip"]),
            (505, raw_request(version="HTTP/2.0"), ["2.0"]),
        ):
            with self.subTest(status):
                self.rejected(receiver, raw, r"127\.0\.0\.1", *patterns, status=status)

    def test_a_hostile_request_cannot_start_a_second_line(self):
        receiver = self.receiver()
        good = central_headers(b"{}")
        for status, raw in (
            (404, raw_request(path="/%0a%0d2026-01-01T00:00:00Z%20WARNING%20forged")),
            (404, raw_request(path="/x", headers={"X-Forwarded-For": "fe80::1%\x85\x9b31m\xad"})),
            (405, raw_request("FORGED'|`", headers={"X-Forwarded-For": "\x85\x9b2J"})),
            (
                401,
                raw_request(
                    headers={**good, "X-Central-Service": "\x85\x9b2J\t\xa0\xad"}, body=b"\n\x1b[2J"
                ),
            ),
            (
                401,
                raw_request(
                    headers={**good, "X-Central-Delivery-Timestamp": "\x85\x9b"}, body=b"{}"
                ),
            ),
            (
                401,
                raw_request(
                    headers={"Signature": "\x85", "Signature-Input": "\x9b\x85=()"}, body=b"{}"
                ),
            ),
            (501, raw_request(headers={"Transfer-Encoding": "\x85\x9b31m\xad"}, length=False)),
            (400, raw_request(headers={"Content-Length": "\x85\x9b31m"}, length=False)),
            (400, raw_request(host="\x85\x9b31m")),
        ):
            with self.subTest(raw[:30]):
                line = self.rejected(receiver, raw, status=status)
                self.assertNotRegex(line, HARMFUL)

    def test_more_than_ten_lines_a_second_are_summed_up(self):
        receiver = self.receiver()
        start = int(time.monotonic())
        with receiver.connect() as connection:
            connection.send(raw_request(body=b"forged") * 100)
            for _ in range(100):
                self.assertEqual(connection.read().status, 401)
        seconds = int(time.monotonic()) - start + 2

        def total():
            lines = list(receiver.stderr_lines)
            single = [line for line in lines if "127.0.0.1" in line and "WARNING" in line]
            sums = [re.search(r"WARNING .*?\b(\d+) more\b", line) for line in lines]
            found = sum(int(match[1]) for match in sums if match)
            return (single, found) if len(single) + found == 100 else None

        single, found = deadline_poll(total)
        self.assertLessEqual(len(single), 10 * seconds)
        self.assertGreater(found, 0)


class Hints(LogTestCase):
    """The line of a rejection says more where more is known."""

    @classmethod
    def setUpClass(cls):
        """Start two receivers, each for tests that make ten lines at most; the others have one
        each.
        """
        url = "https://central.example.com/new"
        webhooks = [
            {"name": "noc", "path": PATH, "token": TOKEN},
            {"name": "new", "type": "new-central", "token": TOKEN, "public_url": url},
            {
                "name": "keyed",
                "path": "/keyed",
                "token": TOKEN,
                "api_key": {"header": "X-Key", "value": "right-key-1"},
            },
        ]
        cls.shared, cls.second = (Receiver(config_of(webhook=webhooks)) for _ in range(2))
        for receiver in (cls.shared, cls.second):
            cls.addClassCleanup(receiver.__exit__)
        for receiver in (cls.shared, cls.second):
            receiver.__enter__()

    def setUp(self):
        super().setUp()
        self.receivers += [self.shared, self.second]

    def test_the_missing_header_is_named(self):
        receiver = self.receiver()
        body = self.body()
        headers = central_headers(body)
        for name in SIGNING_HEADERS:
            for changed in (
                {**headers, name: ""},
                {key: value for key, value in headers.items() if key != name},
            ):
                with self.subTest(name):
                    line = self.rejected(
                        receiver, raw_request(headers=changed, body=body), "(?i)missing"
                    )
                    self.assertIn(name.lower(), line.lower())
                    for other in SIGNING_HEADERS:
                        if other != name:
                            self.assertNotIn(other.lower(), line.lower())

    def test_of_two_types_on_one_path_the_one_that_is_meant_is_named(self):
        url = "https://central.example.com/both"
        receiver = Receiver(
            config_of(
                webhook=[
                    {"name": "noc", "path": "/both", "token": TOKEN},
                    {"name": "new", "type": "new-central", "token": TOKEN, "public_url": url},
                ]
            )
        ).__enter__()
        self.addCleanup(receiver.__exit__)
        covered = f'("@method" "@target-uri" "date");created={int(time.time())}'
        fields = {"Signature-Input": f"s={covered}", "Signature": "s=:AAAA:", "Date": "x"}
        receiver.post(b"{}", fields, "/both")
        self.assertIn("'new': signature: signature does not", receiver.wait_for_log("WARNING 401"))
        body = new_body()
        lines = len(receiver.stderr_lines)
        receiver.post(body, central_headers(body, token="another"), "/both")
        line = receiver.wait_for_log("WARNING 401", start=lines)
        self.assertIn("'noc': signature: x-central-signature does not match", line)
        self.assertNotIn("looks like", line)

    def test_a_clock_that_is_off_is_named_with_by_how_much(self):
        receiver = self.shared
        body = self.body()
        raw = raw_request(
            headers=central_headers(body, timestamp=now_stamp(3 * 3600 + 60)), body=body
        )
        self.rejected(receiver, raw, "(?i)clock", r"3:0[01]|3\.0\d? ?h|18[01] min|108\d\d")

    def test_a_time_stamp_that_is_not_understood_is_named(self):
        receiver = self.shared
        body = self.body()
        raw = raw_request(headers=central_headers(body, timestamp="yesterday"), body=body)
        self.rejected(receiver, raw, "(?i)time ?stamp|time|timestamp", "understood")

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "there is no SIGHUP here")
    def test_an_older_token_is_named(self):
        receiver = self.receiver()
        receiver.write_config(
            config_of(webhook={"name": "noc", "path": PATH, "token": "token-new"})
        )
        start = len(receiver.stderr_lines)
        receiver.process.send_signal(signal.SIGHUP)
        receiver.wait_for_log("reloaded", start=start)
        self.assertEqual(receiver.deliver(token="token-new").status, 200)
        body = self.body()
        line = self.rejected(
            receiver, raw_request(headers=central_headers(body), body=body), "(?i)old(er)? token"
        )
        self.assertNotIn("token-new", line)

    def test_a_signature_over_the_body_alone_is_named(self):
        receiver = self.shared
        body = self.body()
        signature = base64.b64encode(sign(body, TOKEN)).decode()
        for headers in (
            {"X-Central-Signature": signature},
            {**central_headers(body), "X-Central-Signature": signature},
        ):
            self.rejected(
                receiver, raw_request(headers=headers, body=body), "(?i)body alone", "(?i)prox"
            )

    def test_new_central_at_a_webhook_of_classic_central_is_named(self):
        receiver = self.shared
        headers = {
            "Date": "Tue, 12 Aug 2025 01:50:03 GMT",
            "Signature-Input": 'sig1=("@method" "@target-uri" "date");created=1754963403',
            "Signature": "sig1=:59xCXJTPTyTNhdcu7DD/Yrf2JiKMjngC2DAcGsydc20=:",
        }
        self.rejected(
            receiver, raw_request(headers=headers, body=self.body()), "new Central", "new-central"
        )

    def test_classic_central_at_a_webhook_of_new_central_is_named(self):
        body = self.body()
        raw = raw_request(path="/new", headers=central_headers(body), body=body)
        self.rejected(self.shared, raw, "(?i)classic Central")

    def test_hints_do_no_harm(self):
        """Looking for a hint must not fail, nor accept anything."""
        receiver = self.receiver()
        before = len(receiver.stdout_lines)
        for body in (
            b"",
            b"[" * 100000,
            b"[" * 100000 + b"]" * 100000,
            b'{"a":' + b"9" * 5000 + b"}",
            b'{"a":1e400,"b":"\\ud800"}',
            b"\xff\xfe",
            b"NaN",
            b'"' + b"\\" * 9999,
            b"[1" + b",1" * 200000 + b"]",
        ):
            for headers in (
                central_headers(b"x"),
                {"X-Central-Signature": "\xff"},
                {"Signature-Input": "\xff"},
                {},
            ):
                with self.subTest(body[:9], headers=list(headers)[:1]):
                    begin = time.monotonic()
                    self.assertEqual(receiver.post(body, headers).status, 401)
                    self.assertLess(time.monotonic() - begin, 3)
        self.assertEqual(receiver.deliver().status, 200)
        self.assertEqual(len(receiver.wait_for_stdout(before + 1)), before + 1)

    def test_a_wrong_api_key_is_not_logged(self):
        receiver = self.second
        body = self.body()
        for value in ("wrong-key-2", "", None):
            headers = {**central_headers(body), **({"X-Key": value} if value is not None else {})}
            raw = raw_request(path="/keyed", headers=headers, body=body)
            line = self.rejected(receiver, raw, "(?i)x-key")
            self.assertNotIn("right-key-1", line)
            self.assertNotIn("wrong-key-2", line)
        for value in ("right-key-1", "Bearer right-key-1", "ApiKey right-key-1"):
            body = new_body()
            headers = {**central_headers(body), "X-Key": value}
            self.assertEqual(receiver.post(body, headers, "/keyed").status, 200)
        self.assertFalse([line for line in receiver.stderr_lines if "right-key-1" in line])


# ---- --demo and --send-sample -------------------------------------------------------------------


if __name__ == "__main__":
    unittest.main()
