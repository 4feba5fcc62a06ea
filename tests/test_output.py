"""Alerts on stdout, everything else on stderr, and nothing that a sender wrote does harm there."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import unittest

import central_webhook_client as product
from tests.support import (
    DUPLICATE,
    HARMFUL,
    OK,
    PATH,
    PROGRAM,
    TOKEN,
    LogTest,
    Receiver,
    ReceiverTest,
    UnreadStdout,
    at_once,
    central_headers,
    config_of,
    deadline_poll,
    hmac_sha256,
    hook,
    ids_of,
    in_parallel,
    is_refused,
    new_body,
    now_stamp,
    parse_lines,
    raw_request,
    signed,
)

try:
    import fcntl
    import pty
except ImportError:  # Windows
    fcntl = pty = None

HOSTILE = "".join(map(chr, range(32))) + "\x7f\x80\x9b\u202e\u2066\u200f\u2028\ud800\ufeff"
COLOUR = re.compile("\x1b\\[[0-9;]*m")
ALERT = {
    "alert_type": "AP disconnected",
    "severity": "Critical",
    "state": "Open",
    "description": "AP lobby-1 disconnected",
    "details": {"serial": "CN1", "name": "B\xfcro \u6771\u4eac"},
    "list": [1, 2.50, [], {}],
}
needs_terminals = unittest.skipUnless(pty, "needs pseudo-terminals")
FIELDS = ["received_at", "webhook", "type", "delivery_id", "sent_at", "alert"]


def delivery(body, **changes):
    """Return the delivery of a body, given as bytes or as what is to become JSON."""
    if not isinstance(body, bytes):
        body = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    found = {
        "received_at": 1795293312.123,
        "webhook": "noc",
        "type": "central",
        "delivery_id": "72d3162e",
        "sent_at": "2026-11-21T20:35:12Z",
        "body": body,
        "text": product.json_text(body),
        "key": "00",
    }
    return product.Delivery(**{**found, **changes})


# ---- stdout ----------------------------------------------------------------------------------


class JsonLines(unittest.TestCase):
    def render(self, body, **changes):
        line = product.render_json(delivery(body, **changes))
        self.assertRegex(line, r"\A[\x20-\x7e]+\n\Z")
        return line

    def test_a_line_has_these_fields_and_the_alert_as_it_was_sent(self):
        for text in ('{"alert_type":"AP disconnected","nid":1.50}', " [1e400 ]", "17", "null"):
            with self.subTest(text):
                expected = (
                    '{"received_at": "2026-11-21T20:35:12.123Z", "webhook": "noc", '
                    '"type": "central", "delivery_id": "72d3162e", '
                    f'"sent_at": "2026-11-21T20:35:12Z", "alert": {text}}}\n'
                )
                self.assertEqual(self.render(text.encode()), expected)

    def test_a_body_that_is_not_json_is_text(self):
        forged = '", "key": "forged"}\n{"received_at": "'
        for text in ("", "plain", '{"a":1', "\x1b[2J\x9b31m\r\n\0\x7f\u202e\u2028\xe9", forged):
            with self.subTest(text):
                found = json.loads(self.render(text.encode()))
                self.assertEqual(list(found), [*FIELDS, "body"])
                self.assertEqual((found["alert"], found["body"]), (None, text))

    def test_a_body_that_is_not_utf8_is_base64(self):
        for body in (b"\xff", bytes(range(256)), '{"a":1}'.encode("utf-16")):
            with self.subTest(body[:9]):
                found = json.loads(self.render(body))
                self.assertEqual(list(found), [*FIELDS, "body_base64"])
                self.assertEqual(base64.b64decode(found["body_base64"], validate=True), body)

    def test_deep_nesting_is_kept_on_one_line(self):
        body = b"[" * 100_000 + b"]" * 100_000
        self.assertIn(body.decode(), self.render(body))

    def test_names_and_headers_are_escaped(self):
        for value in ("\xe9\x85\x9b31m", '", "key": "forged', "\\", "\x80\xff" * 50, "a\tb\u2713"):
            with self.subTest(value[:9]):
                line = self.render(b"{}", webhook=value, delivery_id=value, sent_at=value)
                found = json.loads(line)
                self.assertEqual(list(found), FIELDS)
                self.assertEqual({found[name] for name in FIELDS[1:5]}, {value, "central"})


class Stdout(ReceiverTest):
    config = config_of(
        webhook=[
            {"name": "n\xfc\u2713", "path": PATH, "token": TOKEN},
            hook("fabric", type="ip-fabric"),
        ]
    )

    def test_a_delivery_is_a_line_with_what_its_sender_signed(self):
        zone = time.gmtime(time.time() - 7 * 3600)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.250-07:00", zone)
        body, before = new_body(), time.time()
        self.assertEqual(self.receiver.deliver(body, timestamp=stamp, delivery_id="7").json, OK)
        found = self.wait_for_line(body)
        self.assertEqual(list(found), FIELDS)
        self.assertEqual(
            [found[name] for name in FIELDS[1:5]], ["n\xfc\u2713", "central", "7", stamp]
        )
        received_at = product.parse_timestamp(found["received_at"])
        self.assertTrue(before - 1 <= received_at <= time.time() + 1, found)

    def test_a_sender_that_signs_neither_id_nor_time_has_null_there(self):
        body = new_body()
        headers = {"X-IPF-Signature": hmac_sha256(TOKEN, body).hex()}
        self.assertEqual(self.receiver.post(body, headers, "/fabric").json, OK)
        found = self.wait_for_line(body)
        values = [found[name] for name in ("type", "delivery_id", "sent_at")]
        self.assertEqual(values, ["ip-fabric", None, None])

    def test_hostile_headers_and_deep_bodies_are_one_line_each(self):
        for body, value in (
            (new_body(), '\xe9\x85\x9b31m", "key": "forged'),
            (b"[" * 100_000 + b"]" * 100_000, "deep"),
        ):
            count = len(self.receiver.stdout_lines)
            answer = self.receiver.deliver(body, service=value, delivery_id=value)
            self.assertEqual(answer.json, OK)
            line = self.receiver.wait_for_stdout(count + 1)[-1]
            self.assertRegex(line, r"\A[\x20-\x7e]+\Z")
            self.assertIn(f'"delivery_id": {json.dumps(value)}', line)


class Pretty(unittest.TestCase):
    def render(self, payload, colour=False):
        """Return header line and the rest; nothing in them does harm, and the rest is indented."""
        text = product.render_pretty(delivery(payload), colour)
        self.assertNotRegex(COLOUR.sub("", text) if colour else text, HARMFUL)
        header, _, rest = text.partition("\n")
        for line in rest.splitlines():
            self.assertTrue(line.startswith("  "), line)
        self.assertTrue(rest.endswith("\n"))
        return header, rest

    def test_a_header_line_and_the_indented_alert(self):
        header, rest = self.render(ALERT)
        self.assertRegex(header, r"\A\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
        for part in ("noc", "CRITICAL", "Open", "AP disconnected", "AP lobby-1 disconnected"):
            self.assertIn(part, header)
        self.assertEqual(json.loads(rest), ALERT)
        self.assertIn("B\xfcro \u6771\u4eac", rest)

    def test_the_header_line_shows_the_alerts_of_other_senders(self):
        new_central = {
            "name": "AP Down",
            "severity": "Major",
            "state": "Active",
            "summary": "An AP is down",
            "impactedEntities": {"deviceSerial": "CN7", "siteName": "HQ"},
        }
        mist = {"topic": "alarms", "events": [{"type": "device_down", "site_name": "Lab"}, {}]}
        for payload, parts in (
            (new_central, ("AP Down", "MAJOR", "Active", "An AP is down", "CN7", "HQ")),
            (mist, ("alarms", "device_down", "2 events", "Lab")),
            ({"alert_type": "Of another sender", "events": [{}]}, ("Of another sender",)),
        ):
            header, _ = self.render(payload)
            for part in parts:
                with self.subTest(part):
                    self.assertIn(part, header)

    def test_numbers_and_order_are_kept(self):
        body = b'{"z":1.5,"a":12345678901234567890123,"c":-0.0,"b":[]}'
        self.assertEqual("".join(self.render(body)[1].split()), body.decode())

    def test_colours_change_nothing_else(self):
        header, rest = self.render(ALERT, colour=True)
        self.assertIn("\x1b[", header)
        self.assertEqual((COLOUR.sub("", header), rest), self.render(ALERT))

    def test_nothing_a_sender_wrote_moves_the_cursor_or_begins_a_line(self):
        names = ("alert_type", "severity", "state", "description", "device_id", "details")
        payloads = [
            dict.fromkeys(names, HOSTILE),
            {"name": HOSTILE, "summary": HOSTILE, "siteId": HOSTILE, HOSTILE: HOSTILE},
            {"details": {"serial": HOSTILE, "severity": HOSTILE}},
            [HOSTILE],
            HOSTILE,
            json.dumps(dict.fromkeys(names, HOSTILE)).encode(),
            ("not JSON " + HOSTILE).encode("utf-8", "surrogatepass"),
            b"\xff\x1b[2J" + bytes(range(256)),
            {"alert_type": "\x1b[31mred\x1b[0m", "severity": "\x1b[0m"},
        ]
        for number, payload in enumerate(payloads):
            for colour in (False, True):
                with self.subTest(number, colour=colour):
                    self.render(payload, colour)

    def test_json_of_any_type_is_shown(self):
        odd = {"severity": None, "state": 5, "details": []}
        for payload in (None, True, 5, 1.5, "x", [], {}, [[]], {"": ""}, odd):
            with self.subTest(payload):
                header, rest = self.render(payload)
                self.assertIn("noc", header)
                self.assertEqual(json.loads(rest), payload)
        deep = b"[" * 100_000 + b"]" * 100_000
        self.assertEqual(self.render(deep)[1].count("["), 100_000)
        self.assertIn("9" * 5000, self.render(b'{"severity":' + b"9" * 5000 + b"}")[1])


class Formats(unittest.TestCase):
    def test_pretty_into_a_pipe_has_no_colours_and_masks_an_api_key(self):
        webhook = hook("noc", api_key={"field": "apiKey", "value": "K-very-secret"})
        body = json.dumps({**ALERT, "apiKey": "K-very-secret"}, ensure_ascii=False).encode()
        with Receiver(config_of(webhook=webhook), ["--format", "pretty"]) as receiver:
            self.assertEqual(receiver.post(body, central_headers(body), "/noc").status, 200)
            deadline_poll(lambda: "  }" in receiver.stdout_lines)
            header, *rest = receiver.stdout_lines
        self.assertRegex(header, "^[^\x1b]*CRITICAL[^\x1b]*AP disconnected[^\x1b]*$")
        self.assertEqual(json.loads("\n".join(rest)), {**ALERT, "apiKey": "***"})
        self.assertIn("B\xfcro \u6771\u4eac", "\n".join(rest))

    @needs_terminals
    def test_a_terminal_gets_the_pretty_form_in_colour_unless_told_otherwise(self):
        usual = {"TERM": "xterm-256color", "NO_COLOR": "", "PYTHONIOENCODING": "utf-8"}
        cases = (  # arguments, environment, is it pretty, is it in colour
            ([], usual, True, True),
            ([], {**usual, "NO_COLOR": "1"}, True, False),
            (["--format", "json"], usual, False, False),
        )
        alert = {**ALERT, "hostile": "\x1b[2J\u202e", "end": "the end"}
        terminals = [pty.openpty() for _ in cases]
        for descriptor in (one for terminal in terminals for one in terminal):
            self.addCleanup(os.close, descriptor)
        receivers = [
            Receiver(config_of(), arguments, environment, stdout=slave)
            for (arguments, environment, _, _), (_, slave) in zip(cases, terminals)
        ]
        with at_once(*receivers):
            for case, receiver, (master, _) in zip(cases, receivers, terminals):
                with self.subTest(case):
                    self.assertEqual(receiver.deliver(json.dumps(alert).encode()).status, 200)
                    text = self.read_terminal(master)
                    self.assertEqual("\x1b[" in text, case[3])
                    plain = COLOUR.sub("", text).replace("\r\n", "\n")
                    self.assertNotRegex(plain, HARMFUL)
                    if case[2]:
                        self.assertEqual(json.loads(plain.partition("\n")[2]), alert)
                    else:
                        self.assertEqual(json.loads(plain)["alert"], alert)

    def read_terminal(self, master):
        """Return what was written up to the end of the alert."""
        data, end = b"", time.monotonic() + 10
        while not re.search(rb'the end"\s*\}+\s*\n', data) and time.monotonic() < end:
            if select.select([master], [], [], 0.1)[0]:
                data += os.read(master, 65536)
        return data.decode()


class ReaderOfStdout(LogTest):
    """A reader of stdout that is slow, stalls or is gone."""

    HUGE = "x" * UnreadStdout.HUGE

    def test_a_closed_reader_means_503_and_exit_1(self):
        body, headers = signed()
        with UnreadStdout(self.config()) as (stdout, receiver):
            self.assertEqual(receiver.deliver().json, OK)
            stdout.pipe.close()
            self.assertEqual(receiver.post(body, headers).status, 503)
            self.assertEqual(receiver.wait(), 1)
        said = "\n".join(receiver.stderr_lines)
        self.assertRegex(said, " ERROR .*stdout")
        self.assertNotIn("Traceback", said)
        self.assertEqual(len(self.read_log()), 1)
        with self.started() as receiver:
            self.assertEqual(receiver.post(body, headers).json, OK)
            self.assertEqual(receiver.post(body, headers).json, DUPLICATE)
        self.assertEqual(len(self.read_log()), 2)

    def test_a_reader_that_closes_during_a_write_means_503_and_exit_1(self):
        body, headers = signed(filler=self.HUGE)
        with UnreadStdout(self.config()) as (stdout, receiver), receiver.connect() as connection:
            connection.send(raw_request(headers=headers, body=body))
            stdout.wait_until_written()
            stdout.pipe.close()
            self.assertEqual(connection.read().status, 503)
            connection.socket.close()
            self.assertEqual(receiver.wait(), 1)
        self.assertEqual(self.read_log(), [])

    def test_a_closed_reader_means_exit_1_even_if_a_signal_follows(self):
        config = self.config(request_timeout_seconds=5)
        with UnreadStdout(config) as (stdout, receiver), receiver.connect() as unfinished:
            unfinished.send(b"POST / HTTP/1.1\r\n")  # in flight, so it is waited for
            stdout.pipe.close()
            self.assertEqual(receiver.deliver().status, 503)
            deadline_poll(lambda: is_refused(receiver.port))
            receiver.process.terminate()
            unfinished.send(b"Host: localhost\r\nContent-Length: 0\r\n\r\n")
            self.assertEqual(unfinished.read().status, 404)
            unfinished.socket.close()
            self.assertEqual(receiver.wait(), 1)

    def test_a_stalled_reader_means_503_for_all_until_it_reads_again(self):
        sent = [signed(filler=self.HUGE)] + [signed() for _ in range(4)]
        with UnreadStdout(self.config(request_timeout_seconds=0.2)) as (stdout, receiver):
            self.assertEqual(receiver.health(), 200)
            started = time.monotonic()
            self.assertEqual(receiver.post(*sent[0]).status, 503)  # half of its line is written
            self.assertGreater(time.monotonic() - started, 0.15)
            self.assertEqual(receiver.health(), 503)
            started = time.monotonic()
            statuses = in_parallel(lambda one: receiver.post(*one).status, sent)
            self.assertEqual(statuses, [503] * len(sent))
            self.assertLess(time.monotonic() - started, 5, "they waited one after the other")
            self.assertEqual(receiver.health(), 503)
            self.assertEqual(self.read_log(), [])
            receiver.wait_for_log(r" ERROR .*stdout")
            stdout.read_on()
            for one in sent:
                deadline_poll(lambda one=one: receiver.post(*one).json == OK)
                self.assertEqual(receiver.health(), 200)
            for one in sent:
                self.assertEqual(receiver.post(*one).json, DUPLICATE)
            shown = ids_of(stdout.end())
        ids = [headers["X-Central-Delivery-ID"] for _, headers in sent]
        self.assertEqual(ids_of(self.read_log()), ids)
        self.assertEqual(list(dict.fromkeys(shown)), ids)  # what got 503 may be repeated

    def test_a_half_line_that_a_stall_leaves_is_ended_before_the_next_one(self):
        sent = [signed(filler=letter * UnreadStdout.HUGE) for letter in "abc"]
        with UnreadStdout(self.config(request_timeout_seconds=0.1)) as (stdout, receiver):
            for one in sent:  # each takes up some more of the pipe, or nothing at all
                self.assertEqual(receiver.post(*one).status, 503)
                self.assertEqual(receiver.post(*one).status, 503)
                stdout.read_some(20_000)
            stdout.read_on()
            deadline_poll(lambda: all(receiver.post(*one).status == 200 for one in sent))
            shown = ids_of(stdout.end())
        self.assertEqual(len(self.read_log()), len(sent))
        self.assertEqual(set(shown), set(ids_of(self.read_log())))

    def test_a_slow_reader_is_waited_for(self):
        body, headers = signed(filler=self.HUGE)
        with UnreadStdout(self.config()) as (stdout, receiver), receiver.connect() as connection:
            connection.send(raw_request(headers=headers, body=body))
            while not stdout.parts or not stdout.parts[-1].endswith(b"\n"):
                stdout.read_some(30_000)
                time.sleep(0.01)
            self.assertEqual(connection.read().json, OK)
            self.assertEqual(len(parse_lines(b"".join(stdout.parts))), 1)

    def test_a_stop_waits_for_a_delivery_that_waits_for_the_reader(self):
        body, headers = signed(filler=self.HUGE)
        with UnreadStdout(self.config()) as (stdout, receiver), receiver.connect() as connection:
            connection.send(raw_request(headers=headers, body=body))
            stdout.wait_until_written()
            receiver.process.terminate()
            stdout.read_on()
            self.assertEqual(connection.read().json, OK)
            connection.socket.close()
            self.assertEqual(receiver.wait(), 0)
            self.assertEqual(len(stdout.end()), 1)
        self.assertEqual(len(self.read_log()), 1)

    def test_a_stdout_that_is_closed_from_the_start_ends_the_program_with_1(self):
        environment = {"PYTHON": sys.executable}
        python = [self.script('exec "$PYTHON" "$@" >&-')]
        receiver = Receiver(self.config(), python=python, environment=environment)
        self.addCleanup(receiver.__exit__)
        self.assertEqual(receiver.wait(), 1)
        said = "\n".join(receiver.stderr_lines)
        self.assertIn("stdout", said)
        self.assertNotIn("Traceback", said)

    def test_a_file_on_a_full_disk_has_every_line_whole_in_the_end(self):
        disk, ballast = self.small_disk()
        output, sent, refused = disk / "stdout.jsonl", [], []
        with open(output, "ab") as file:
            receiver = Receiver(self.config(), stdout=file)
        with receiver:
            while len(refused) < 3 and len(sent) < 100:
                sent.append(signed(filler="x" * 1500))
                status = receiver.post(*sent[-1]).status
                if status != 200:
                    self.assertEqual((status, receiver.health()), (503, 503))
                    refused.append(sent[-1])
            self.assertEqual(len(refused), 3)
            self.assertEqual(len(self.read_log()), len(sent) - len(refused))
            ballast.unlink()
            for one in refused:
                self.assertEqual(receiver.post(*one).json, OK)
                self.assertEqual(receiver.health(), 200)
        ids = sorted(headers["X-Central-Delivery-ID"] for _, headers in sent)
        self.assertEqual(sorted(ids_of(self.read_log())), ids)
        self.assertEqual(sorted(set(ids_of(self.read_log(output)))), ids)


# ---- stderr ----------------------------------------------------------------------------------


class RejectionTest(unittest.TestCase):
    """A receiver for each test, since it logs at most ten rejections a second."""

    URL = "https://central.example.com/new"
    CONFIG = config_of(
        webhook=[
            {"name": "noc", "path": PATH, "token": TOKEN},
            hook("new", type="new-central", public_url=URL),
            hook("keyed", api_key={"header": "X-Key", "value": "right-key-1"}),
            hook("both", path="/both"),
            hook("both-new", type="new-central", public_url=URL, path="/both"),
        ]
    )

    def setUp(self):
        self.receiver = Receiver(self.CONFIG).__enter__()
        self.addCleanup(self.receiver.__exit__)
        self.secrets = {TOKEN, "body-marker", "right-key-1", "wrong-key-2", "token-new"}
        self.body = new_body(text="body-marker")

    def tearDown(self):
        for line in self.receiver.stderr_lines:
            self.assertRegex(line, r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S* (INFO|WARNING) \S")
            self.assertNotRegex(line, HARMFUL)
            for secret in self.secrets:
                self.assertNotIn(secret, line)

    def signed(self, **signing):
        """Return the request of a body that is not to be logged."""
        return raw_request(headers=central_headers(self.body, **signing), body=self.body)

    def rejected(self, raw, *patterns, status=401):
        """Send until it has a line of its own, which the limit may delay; return the line."""
        found = re.finditer(rb"Signature: (?:sig1=)?:?([^:\r]{20,})", raw)
        self.secrets.update(match[1].decode("latin-1") for match in found)
        end = time.monotonic() + 10
        line = None
        while line is None and time.monotonic() < end:
            before = len(self.receiver.stderr_lines)
            self.assertEqual(self.receiver.request(raw).status, status)
            with contextlib.suppress(AssertionError):
                line = self.receiver.wait_for_log(rf" WARNING .*\b{status}\b", 1, before)
        self.assertIsNotNone(line, "no line in the log")
        for pattern in patterns:
            self.assertRegex(line, pattern)
        return line


class Rejections(RejectionTest):
    def test_a_rejection_is_one_line_with_peer_webhook_and_reason(self):
        self.rejected(self.signed(token="another"), r"127\.0\.0\.1", r"\bnoc\b", "signature")
        self.assertEqual(self.receiver.deliver().status, 200)
        self.assertEqual(self.receiver.stop(), 0)
        self.assertEqual(sum("WARNING" in line for line in self.receiver.stderr_lines), 1)

    def test_the_peer_behind_a_proxy_is_the_last_forwarded_address(self):
        for values, peer in (
            (["198.51.100.7"], "198.51.100.7"),
            (["192.0.2.66, 198.51.100.8"], "198.51.100.8"),
            (["192.0.2.66", "198.51.100.9"], "198.51.100.9"),
            (["198.51.100.7:4711"], "198.51.100.7"),
            (["2001:db8::1"], "2001:db8::1"),
            (["[2001:db8::2]:4711"], "2001:db8::2"),
            (["192.0.2.66, nonsense"], "127.0.0.1"),
            ([""], "127.0.0.1"),
        ):
            with self.subTest(values):
                pairs = [("X-Real-IP", "192.0.2.66")]
                pairs += [("X-Forwarded-For", value) for value in values]
                line = self.rejected(raw_request(headers=pairs, body=self.body), re.escape(peer))
                self.assertNotIn("192.0.2.66", line)

    def test_every_kind_of_rejection_has_its_line(self):
        large = {"Content-Length": "99999999"}
        for status, raw, pattern in (
            (400, raw_request(headers={"X-Header ": "x"}), "malformed"),
            (401, self.signed(timestamp=now_stamp(-49.5 * 3600)), r"stale.*49\.5 hours"),
            (404, raw_request(path="/other"), "/other"),
            (405, raw_request("PUT"), "PUT"),
            (411, raw_request(length=False), "[lL]ength"),
            (413, raw_request(headers=large, length=False), "max_body_bytes|too large"),
            (414, raw_request(path="/" + "x" * 9000), "above 8192 bytes"),
            (431, raw_request(headers={"X": "x" * 70000}), "headers_too_large"),
            (501, raw_request(headers={"Transfer-Encoding": "gzip"}, length=False), "gzip"),
            (505, raw_request(version="HTTP/2.0"), r"2\.0"),
        ):
            with self.subTest(status):
                self.rejected(raw, r"127\.0\.0\.1", pattern, status=status)

    def test_a_hostile_request_cannot_begin_a_second_line(self):
        good, evil = central_headers(b"{}"), "\x85\x9b2J\t\xa0\xad"
        for status, raw in (
            (404, raw_request(path="/%0a%0d2026-01-01T00:00:00Z%20WARNING%20forged")),
            (404, raw_request(path="/x", headers={"X-Forwarded-For": f"fe80::1%{evil}"})),
            (405, raw_request("FORGED'|`", headers={"X-Forwarded-For": evil})),
            (401, raw_request(headers={**good, "X-Central-Service": evil}, body=b"\n\x1b[2J")),
            (401, raw_request(headers={**good, "X-Central-Delivery-Timestamp": evil}, body=b"{}")),
            (401, raw_request(headers={"Signature": evil, "Signature-Input": evil + "=()"})),
            (501, raw_request(headers={"Transfer-Encoding": evil}, length=False)),
            (400, raw_request(headers={"Content-Length": evil}, length=False)),
            (400, raw_request(host="\x85\x9b31m")),
        ):
            with self.subTest(raw[:30]):
                self.rejected(raw, status=status)  # tearDown looks at the lines

    def test_more_than_ten_lines_a_second_are_summed_up(self):
        start = int(time.monotonic())
        with self.receiver.connect() as connection:
            connection.send(raw_request(body=b"forged") * 100)
            for _ in range(100):
                self.assertEqual(connection.read().status, 401)
        seconds = int(time.monotonic()) - start + 2

        def total():
            lines = [line for line in list(self.receiver.stderr_lines) if "WARNING" in line]
            single = sum("127.0.0.1" in line for line in lines)
            sums = [re.search(r"\b(\d+) more\b", line) for line in lines]
            more = sum(int(match[1]) for match in sums if match)
            return (single, more) if single + more == 100 else None

        single, more = deadline_poll(total)
        self.assertLessEqual(single, 10 * seconds)
        self.assertGreater(more, 0)


class Hints(RejectionTest):
    """The line of a rejection says more where more is known."""

    def test_the_missing_header_is_named_and_no_other(self):
        names = ["x-central-signature", "x-central-service"]
        names += ["x-central-delivery-id", "x-central-delivery-timestamp"]
        headers = {name.lower(): value for name, value in central_headers(self.body).items()}
        for name in names:
            without = {key: value for key, value in headers.items() if key != name}
            for changed in (without, {**headers, name: ""}):
                with self.subTest(name, present=name in changed):
                    line = self.rejected(raw_request(headers=changed, body=self.body), "missing")
                    self.assertEqual([one for one in names if one in line.lower()], [name])

    def test_of_two_types_on_one_path_the_one_that_is_meant_is_named(self):
        covered = f'("@method" "@target-uri" "date");created={int(time.time())}'
        fields = {"Signature-Input": f"s={covered}", "Signature": "s=:AAAA:", "Date": "x"}
        new = raw_request(path="/both", headers=fields, body=self.body)
        self.rejected(new, "'both-new': signature: signature does not match")
        forged = central_headers(self.body, token="another")
        line = self.rejected(raw_request(path="/both", headers=forged, body=self.body), "'both'")
        self.assertNotIn("looks like", line)
        del forged["X-Central-Service"]
        incomplete = raw_request(path="/both", headers=forged, body=self.body)
        self.rejected(incomplete, "'both': signature: x-central-service is missing")

    def test_a_clock_that_is_off_is_named_with_by_how_much(self):
        ahead = self.signed(timestamp=now_stamp(3 * 3600 + 60))
        self.rejected(ahead, "clock", "18[01] min")

    def test_a_time_that_is_not_understood_is_shown(self):
        self.rejected(self.signed(timestamp="yesterday"), "yesterday.*not understood")

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "needs SIGHUP")
    def test_a_token_that_a_reload_removed_is_named_as_such(self):
        webhook = {"name": "noc", "path": PATH, "token": "token-new"}
        self.receiver.reload(config_of(webhook=webhook))
        self.assertEqual(self.receiver.deliver(token="token-new").status, 200)
        self.rejected(self.signed(), "older token")
        self.assertNotIn("older token", self.rejected(self.signed(token="never valid")))

    def test_a_signature_over_the_body_alone_is_named(self):
        signature = base64.b64encode(hmac_sha256(TOKEN, self.body)).decode()
        for headers in ({}, central_headers(self.body)):
            headers = {**headers, "X-Central-Signature": signature}
            self.rejected(raw_request(headers=headers, body=self.body), "body alone", "prox")

    def test_the_wrong_generation_of_central_is_named(self):
        headers = {
            "Date": "Tue, 12 Aug 2025 01:50:03 GMT",
            "Signature-Input": 'sig1=("@method" "@target-uri" "date");created=1754963403',
            "Signature": "sig1=:59xCXJTPTyTNhdcu7DD/Yrf2JiKMjngC2DAcGsydc20=:",
        }
        new = raw_request(headers=headers, body=self.body)
        self.rejected(new, "new Central", "new-central")
        classic = raw_request(path="/new", headers=central_headers(self.body), body=self.body)
        self.rejected(classic, "classic Central")

    def test_tls_and_the_proxy_protocol_on_the_plain_port_are_named(self):
        tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n"
        proxy = b"PROXY TCP4 192.0.2.1 192.0.2.2 4711 443\r\n"
        self.rejected(tls, "TLS", status=400)
        self.rejected(proxy, "PROXY protocol", status=400)

    def test_a_wrong_api_key_is_named_by_its_header(self):
        headers = central_headers(self.body)
        for extra in ({"X-Key": "wrong-key-2"}, {"X-Key": ""}, {}):
            request = raw_request(path="/keyed", headers={**headers, **extra}, body=self.body)
            self.rejected(request, "(?i)x-key")


class ReaderOfStderr(unittest.TestCase):
    @needs_terminals
    def test_readers_that_stall_delay_neither_deliveries_nor_a_stop(self):
        receivers = []
        for begin in (self.with_stalled_stderr, self.with_stalled_terminal):
            receivers.append(begin())
            receivers[-1].process.terminate()  # it waits a while for its reader
        for receiver in receivers:
            self.assertEqual(receiver.wait(), 0)

    def with_stalled_stderr(self):
        """Return a receiver that has delivered more than its stderr, which is not read, takes."""
        read_end, write_end = os.pipe()
        is_short = hasattr(fcntl, "F_SETPIPE_SZ")
        if is_short:
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
        receiver = Receiver(arguments=["--verbose"], stdout=subprocess.DEVNULL, stderr=write_end)
        os.close(write_end)
        self.addCleanup(receiver.__exit__)
        reader = open(read_end, "rb", buffering=0)
        self.addCleanup(reader.close)
        line = reader.readline()  # it has started; from here on nothing is read
        receiver.port = int(re.search(rb"listens on \S+ port (\d+)", line)[1])
        for _ in range(150 if is_short else 1500):  # a line of 50 characters each
            self.assertEqual(receiver.deliver().json, OK)
        return receiver

    def with_stalled_terminal(self):
        """Return a receiver whose stdout is a terminal that stalls, so that it answers 503."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        self.addCleanup(os.close, slave)
        receiver = Receiver(config_of(request_timeout_seconds=0.2), stdout=slave).__enter__()
        self.addCleanup(receiver.__exit__)
        statuses, end = set(), time.monotonic() + 20
        while 503 not in statuses and time.monotonic() < end:
            statuses.add(receiver.deliver(new_body(filler="x" * 3000)).status)
        self.assertEqual(statuses, {200, 503})
        self.assertEqual(receiver.deliver().status, 503)
        return receiver

    def test_a_closed_stderr_leaves_stdout_to_the_alerts(self):
        command = ["sh", "-c", 'exec "$0" "$1" -i=/dev/null/missing 2>&-']
        command += [sys.executable, str(PROGRAM)]
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=30)
        self.assertEqual((done.returncode, done.stdout), (78, b""))
