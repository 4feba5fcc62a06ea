"""HTTP as section 7 of the contract has it, and the way of a delivery: raw requests in, statuses out."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import select
import socket
import struct
import threading
import time
import unittest

from tests.support import (
    PATH,
    TOKEN,
    Receiver,
    central_headers,
    config_of,
    deadline_poll,
    new_body,
    now_stamp,
    raw_request,
)

with contextlib.suppress(
    ImportError
):  # three hundred connections need more descriptors than some systems give
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 2048:
        wanted = 2048 if hard == resource.RLIM_INFINITY else min(2048, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def good(body=None, **request):
    """Return a request that is answered with 200."""
    body = new_body() if body is None else body
    return raw_request(headers=central_headers(body), body=body, **request)


def with_lines(*lines, body=None, length=True):
    """Return a request like that of `good` with these header lines, as they are, at the end."""
    body = new_body() if body is None else body
    head = raw_request(headers=central_headers(body), body=b"", length=False)[:-2]
    if length:
        head += b"Content-Length: %d\r\n" % len(body)
    return head + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


def chunked(raw, body, *lines):
    """Return a signed request for `body` whose bytes on the wire are `raw`."""
    head = raw_request(headers=central_headers(body), body=b"", length=False)[:-2]
    return (
        head
        + b"".join(line + b"\r\n" for line in (b"Transfer-Encoding: chunked", *lines))
        + b"\r\n"
        + raw
    )


def chunks(body, size):
    """Encode a body in chunks of `size` bytes."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


SHARED = []  # one receiver, with room and time enough, for all classes that need nothing special


def setUpModule():
    SHARED.append(Receiver(config_of(max_connections=512, request_timeout_seconds=20)).__enter__())
    unittest.addModuleCleanup(lambda: SHARED.pop().__exit__())


class Served(unittest.TestCase):
    """One receiver for a whole class, or for all, and whatever it is sent, no traceback."""

    config = None

    @classmethod
    def setUpClass(cls):
        if cls.config is None:
            cls.receiver = SHARED[0]
        else:
            cls.receiver = Receiver(cls.config).__enter__()
            cls.addClassCleanup(cls.receiver.__exit__)

    def setUp(self):
        self.addCleanup(self.assert_sound)

    def assert_sound(self):
        self.assertIsNone(self.receiver.process.poll())
        for line in list(self.receiver.stderr_lines):
            self.assertNotRegex(line, r"Traceback|internal error| ERROR |^\s")

    def assert_reply(self, answer, status, head_only=False):
        """Check what is true of every reply."""
        self.assertEqual(answer.status, status)
        self.assertNotIn("server", answer.headers)
        self.assertTrue(answer.headers["content-length"].isdigit())
        if not head_only:
            self.assertEqual(answer.headers["content-type"].partition(";")[0], "application/json")
            self.assertEqual(list(answer.json), ["status"] if status == 200 else ["error"])
            if status == 401:
                self.assertEqual(answer.json, {"error": "unauthorized"})
        self.assertEqual("www-authenticate" in answer.headers, status == 401)
        self.assertEqual("allow" in answer.headers, status == 405)

    def assert_status(self, raw, status):
        """Send a request whole; after 200 and 401 the connection goes on, after all others it is closed."""
        with self.receiver.connect() as connection:
            connection.send(raw)
            answer = connection.read()
            self.assert_reply(answer, status)
            if status in (200, 401):
                self.assertNotEqual(answer.headers.get("connection"), "close")
                connection.send(good())
                self.assert_reply(connection.read(), 200)
            else:
                self.assertEqual(answer.headers.get("connection"), "close")
                self.assertTrue(connection.is_closed())

    def assert_statuses(self, table, status):
        for what, raw in table.items():
            with self.subTest(what):
                self.assert_status(raw, status)


# ---- One request and its status ---------------------------------------------------


class Statuses(Served):
    def test_good_requests(self):
        body = new_body()
        headers = central_headers(body)
        self.assert_statuses(
            {
                "as Central sends it": good(),
                "header names in lower case": raw_request(
                    headers={name.lower(): value for name, value in central_headers(body).items()},
                    body=body,
                ),
                "a query": good(path=PATH + "?a=b"),
                "an empty query": good(path=PATH + "?"),
                "another media type": with_lines(b"X-Other: 1", body=b"no JSON"),
                "an empty body": good(b""),
                "bytes that are no text": good(bytes(range(256))),
                "white space around a value": with_lines(b"X-Space: \t value \t "),
                "no white space before a value": with_lines(b"X-Space:value"),
                "a tab within a value": with_lines(b"X-Tab: a\tb"),
                "an empty value": with_lines(b"X-Empty:"),
                "bytes above ASCII in a value": with_lines(b"X-Latin: \xe9\xff\x80"),
                "a field name of all characters": with_lines(b"!#$%&'*+-.^_`|~09azAZ: 1"),
                "a Host with a port": good(host="central.example.com:8443"),
                "a Host that is an IPv6 address": good(host="[::1]:8010"),
                "leading zeros of Content-Length": with_lines(
                    b"Content-Length: 0005", body=b"12345", length=False
                ),
                "the absolute form": good(path="http://localhost" + PATH),
                "the absolute form with a query": good(path=f"HTTP://[::1]:80{PATH}?http://x"),
                "other headers twice": with_lines(b"Accept: a", b"Accept: b"),
            },
            200,
        )
        self.assert_status(raw_request(headers=headers, body=body), 200)

    def test_malformed_requests(self):
        request = good()
        line = b"POST %b HTTP/1.1" % PATH.encode()
        self.assert_statuses(
            {
                "no version": request.replace(line, b"POST " + PATH.encode()),
                "a scheme of other characters": good(path="a/b://z" + PATH),
                "a scheme with a query": good(path="x?y://z" + PATH),
                "the absolute form without an authority": good(path="http://" + PATH),
                "the absolute form with a user": good(path="http://u:p@z" + PATH),
                "a fragment": good(path=PATH + "#frag"),
                "a fragment in the absolute form": good(path=f"http://z{PATH}#frag"),
                "no target": request.replace(line, b"POST HTTP/1.1"),
                "two spaces": request.replace(line, line.replace(b" ", b"  ", 1)),
                "a tab for a space": request.replace(line, line.replace(b" ", b"\t", 1)),
                "a space at the end": request.replace(line, line + b" "),
                "a space at the start": b" " + request,
                "the version in lower case": request.replace(b"HTTP/1.1", b"http/1.1"),
                "no number": request.replace(b"HTTP/1.1", b"HTTP/x.y"),
                "another protocol": request.replace(b"HTTP/1.1", b"SPDY/1.1"),
                "a method of wrong characters": request.replace(b"POST", b"PO(ST"),
                "a space within the target": request.replace(PATH.encode(), b"/central webhook"),
                "a control character in the target": request.replace(
                    PATH.encode(), PATH.encode() + b"\x01"
                ),
                "a byte above ASCII in the target": request.replace(
                    PATH.encode(), PATH.encode() + b"\xe9"
                ),
                "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n",
                "the PROXY protocol, version 1": b"PROXY TCP4 192.0.2.7 192.0.2.8 5 80\r\n" + request,
                "the PROXY protocol, version 2": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12),
                "no colon": with_lines(b"X-Header"),
                "an empty name": with_lines(b": value"),
                "white space before the colon": with_lines(b"X-Header : value"),
                "a tab before the colon": with_lines(b"X-Header\t: value"),
                "white space within the name": with_lines(b"X Header: value"),
                "white space before the name": with_lines(b" X-Header: value"),
                "brackets in the name": with_lines(b"X(Header): value"),
                "a quote in the name": with_lines(b'X"Header: value'),
                "a byte above ASCII in the name": with_lines(b"X-H\xe9ader: value"),
                "NUL in the name": with_lines(b"X-\0: value"),
                "a folded line": with_lines(b"X-Header: a", b" b"),
                "a line folded with a tab": with_lines(b"X-Header: a", b"\tb"),
                "a folded empty line": with_lines(b"X-Header: a", b" "),
                "NUL in a value": with_lines(b"X-Header: a\0b"),
                "a bare CR in a value": with_lines(b"X-Header: a\rb"),
                "a bare CR at the end of a value": with_lines(b"X-Header: a\r"),
                "a bare LF": with_lines(b"X-Header: a\nX-Other: b"),
                "bare LF everywhere": good(b"").replace(b"\r\n", b"\n"),
                "a control character": with_lines(b"X-Header: a\x01b"),
                "a vertical tab": with_lines(b"X-Header: a\x0bb"),
                "an escape": with_lines(b"X-Header: a\x1b[2Jb"),
                "DEL": with_lines(b"X-Header: a\x7fb"),
                "no Host": good(host=None),
                "two Hosts": with_lines(b"Host: localhost"),
                "two different Hosts": with_lines(b"Host: other"),
                "a list of Hosts": good(host="a, b"),
                "a path in Host": good(host="a/b"),
                "a user in Host": good(host="user@a"),
            },
            400,
        )

    def test_a_wrong_length_is_malformed(self):
        body = b"12345"

        def length(*values):
            return with_lines(
                *(b"Content-Length: " + value for value in values), body=body, length=False
            )

        coding = b"Transfer-Encoding: chunked"
        self.assert_statuses(
            {
                **{
                    f"{value!r}": length(value)
                    for value in (
                        b"+5",
                        b"-5",
                        b"-0",
                        b"5_0",
                        b"0x5",
                        b"5.0",
                        b"5e0",
                        b"5, 5",
                        b"5,5",
                        b"5 5",
                        b"5;",
                        b"five",
                        b'"5"',
                        b"\xd9\xa5",
                        b"\xb2",
                        b",5",
                        b"5,",
                    )
                },
                "an empty one": length(b""),
                "an empty one, no body": with_lines(b"Content-Length:", body=b"", length=False),
                "two different": length(b"5", b"4"),
                "two equal": length(b"5", b"5"),
                "two, one empty": length(b"5", b""),
                "of a GET": raw_request("GET", "/health", {"Content-Length": "+0"}, length=False),
                "length and chunked": with_lines(
                    b"Content-Length: 5", coding, body=chunks(body, 5), length=False
                ),
                "chunked and length": with_lines(
                    coding, b"Content-Length: 5", body=chunks(body, 5), length=False
                ),
                "length 0 and chunked": with_lines(
                    coding, b"Content-Length: 0", body=chunks(body, 5), length=False
                ),
                "chunked twice": with_lines(coding, coding, body=chunks(body, 5), length=False),
                "chunked, chunked": with_lines(
                    coding + b", chunked", body=chunks(body, 5), length=False
                ),
                "space before the colon": with_lines(
                    b"Transfer-Encoding : chunked", body=chunks(body, 5), length=False
                ),
            },
            400,
        )

    def test_a_post_without_a_length(self):
        body = new_body()
        raw = raw_request(headers=central_headers(body), length=False)
        self.assert_statuses({"1.1": raw, "1.0": raw.replace(b"HTTP/1.1", b"HTTP/1.0")}, 411)

    def test_another_transfer_coding(self):
        for coding in (b"gzip", b"gzip, chunked", b"identity", b"chunked, gzip", b"xchunked", b"x"):
            with self.subTest(coding):
                raw = with_lines(
                    b"Transfer-Encoding: " + coding, length=False, body=chunks(b"12345", 5)
                )
                self.assert_status(raw, 501)

    def test_another_version(self):
        for version in ("HTTP/2.0", "HTTP/3.0", "HTTP/9.9"):
            with self.subTest(version):
                self.assert_status(good(version=version), 505)

    def test_an_unknown_path(self):
        paths = (
            "/",
            "/other",
            "/centralwebhook/",
            "/centralwebhoo",
            "/CentralWebhook",
            "//centralwebhook",
        )
        paths += (
            "/./centralwebhook",
            "/x/../centralwebhook",
            "/%63entralwebhook",
            "/centralwebhook;x",
            "/?/centralwebhook",
        )
        for path in (
            *paths,
            "/centralwebhook%3F",
            "/healthz",
            "/metrics/",
            "/Health",
            "/favicon.ico",
        ):
            for method in ("POST", "GET", "DELETE"):
                with self.subTest(path, method=method):
                    self.assert_status(good(path=path, method=method), 404)

    def test_another_method(self):
        for method in (
            "GET",
            "PUT",
            "PATCH",
            "DELETE",
            "OPTIONS",
            "TRACE",
            "PROPFIND",
            "BREW",
            "post",
            "POSTS",
        ):
            with self.subTest(method):
                raw = raw_request(method, headers={"X-Other": "1"})
                self.assert_status(raw, 405)
                self.assertEqual(self.receiver.request(raw).headers["allow"], "POST")

    def test_a_post_to_a_path_of_our_own(self):
        for path in ("/health", "/metrics"):
            for method in ("POST", "PUT", "DELETE"):
                with self.subTest(path, method=method):
                    answer = self.receiver.request(good(path=path, method=method))
                    self.assert_reply(answer, 405)
                    self.assertIn("GET", answer.headers["allow"])

    def test_what_is_not_signed_for_this_webhook(self):
        body = new_body()
        headers = central_headers(body)
        signed = (
            "X-Central-Service",
            "X-Central-Delivery-ID",
            "X-Central-Delivery-Timestamp",
            "X-Central-Signature",
        )
        table = {
            "no header at all": raw_request(body=body),
            "another body": raw_request(headers=headers, body=body + b" "),
            "another token": raw_request(headers=central_headers(body, token="another"), body=body),
            "an empty body": raw_request(headers=headers),
        }
        for name in signed:
            others = {key: value for key, value in headers.items() if key != name}
            table[f"no {name}"] = raw_request(headers=others, body=body)
            table[f"{name} is empty"] = raw_request(headers={**headers, name: ""}, body=body)
            table[f"{name} is changed"] = raw_request(
                headers={**headers, name: headers[name] + "x"}, body=body
            )
            pairs = list(headers.items())
            table[f"{name} twice"] = raw_request(headers=[*pairs, (name, headers[name])], body=body)
            table[f"{name} twice, one is empty"] = raw_request(
                headers=[*pairs, (name.lower(), "")], body=body
            )
            table[f"{name} twice, the first is wrong"] = raw_request(
                headers=[(name, "x"), *pairs], body=body
            )
            table[f"{name} with an underscore"] = raw_request(
                headers={**others, name.replace("-", "_"): headers[name]}, body=body
            )
        self.assert_statuses(table, 401)
        self.assert_status(raw_request(headers=headers, body=body), 200)

    def test_a_header_that_is_not_signed_may_not_occur_twice_either(self):
        body = new_body()
        for name in ("X-Central-Event", "X-Central-Customer-ID"):
            pairs = [*central_headers(body).items(), (name, "another")]
            with self.subTest(name):
                self.assert_status(raw_request(headers=pairs, body=body), 401)

    def test_the_size_of_the_request_line(self):
        self.assert_status(good(path=PATH + "?" + "x" * 8000), 200)
        self.assert_status(good(path=PATH + "?" + "x" * 8300), 414)
        self.assert_status(good(path="/" + "x" * 60000), 414)
        self.assert_status(b"POST /" + b"x" * 20000, 414)
        self.assert_status(b"x" * 20000, 414)

    def test_the_size_of_the_header_section(self):
        self.assert_status(with_lines(b"X-Large: " + b"x" * 60000), 200)
        self.assert_status(with_lines(b"X-Large: " + b"x" * 66000), 431)
        self.assert_status(with_lines(*(b"X-Large-%d: " % n + b"x" * 1000 for n in range(70))), 431)
        self.assert_status(with_lines(b"X-Large: " + b"x" * 66000)[:66500], 431)
        self.assert_status(with_lines(b"x" * 70000), 431)

    def test_the_number_of_header_fields(self):
        present = good().partition(b"\r\n\r\n")[0].count(b"\r\n")
        for number, status in ((100, 200), (101, 431), (2000, 431)):
            lines = [b"X-%d: 1" % n for n in range(number - present)]
            with self.subTest(number):
                self.assert_status(with_lines(*lines), status)

    def test_nothing_of_what_was_refused_is_kept(self):
        deadline_poll(lambda: self.receiver.deliver(new_body(last="one")).status == 200)
        deadline_poll(lambda: any('"last": "one"' in line for line in self.receiver.stdout_lines))
        before = len(self.receiver.stdout_lines)
        for raw in (
            with_lines(b"X-Header : value"),
            with_lines(b"Content-Length: 5"),
            good(path="/other"),
            good(method="PUT"),
            good(version="HTTP/2.0"),
        ):
            self.assertGreaterEqual(self.receiver.request(raw).status, 400)
        self.assertEqual(self.receiver.deliver(new_body(last="two")).status, 200)
        deadline_poll(lambda: len(self.receiver.stdout_lines) > before)
        self.assertEqual(len(self.receiver.stdout_lines), before + 1)


# ---- The same bytes in other pieces ---------------------------------------------------


class Pieces(Served):
    def test_byte_by_byte(self):
        body = new_body()
        for what, raw, status in (
            ("a delivery", good(), 200),
            ("chunked", chunked(chunks(body, 7), body), 200),
            ("forged", raw_request(body=b"12345"), 401),
            ("malformed", raw_request(headers={"X-Header ": "1"}), 400),
            ("another path", good(path="/other"), 404),
            ("health", raw_request("GET", "/health", length=False), 200),
        ):
            with self.subTest(what), self.receiver.connect() as connection:
                connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with contextlib.suppress(ConnectionError):  # it may be refused before its end
                    for number in range(len(raw)):
                        connection.send(raw[number : number + 1])
                self.assert_reply(connection.read(), status)

    def test_cut_in_two_at_every_place_around_the_ends_of_lines(self):
        raw = good()
        ends = [match.start() for match in re.finditer(b"\r\n", raw)]
        with self.receiver.connect() as connection:
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for end in ends[-3:]:
                for cut in (end, end + 1, end + 2):
                    connection.send(raw[:cut])
                    time.sleep(0.005)
                    connection.send(raw[cut:])
                    self.assert_reply(connection.read(), 200)

    def test_an_empty_line_before_a_request_may_come_in_two_parts(self):
        with self.receiver.connect() as connection:
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.send(raw_request("GET", "/health", length=False))
            self.assertEqual(connection.read().status, 200)
            connection.send(b"\r")
            with self.receiver.connect() as other:  # answered after the first part has arrived
                other.send(raw_request("GET", "/health", length=False))
                self.assertEqual(other.read().status, 200)
            connection.send(b"\n" + raw_request("GET", "/health", length=False))
            self.assertEqual(connection.read().status, 200)

    def test_pipelined_requests_are_answered_in_order(self):
        twice = good()
        requests = [
            (good(), 200, {"status": "ok"}),
            (raw_request(body=b"x"), 401, {"error": "unauthorized"}),
            (twice, 200, {"status": "ok"}),
            (raw_request("GET", "/health", length=False), 200, {"status": "ok"}),
            (twice, 200, {"status": "duplicate"}),
            (chunked(chunks(b"chunked", 3), b"chunked"), 200, {"status": "ok"}),
            (raw_request(body=b""), 401, {"error": "unauthorized"}),
            (good(b""), 200, {"status": "ok"}),
            (good(path="/other"), 404, None),
        ]
        with self.receiver.connect() as connection:
            connection.send(b"".join(raw for raw, _, _ in requests))
            for number, (_, status, answer) in enumerate(requests):
                with self.subTest(number):
                    found = connection.read()
                    self.assertEqual(found.status, status)
                    if answer:
                        self.assertEqual(found.json, answer)
            self.assertTrue(connection.is_closed())

    def test_what_follows_a_refusal_is_not_served(self):
        for raw in (
            with_lines(b"X-Header : value"),
            good(path="/other"),
            with_lines(b"Content-Length: 5"),
        ):
            body = new_body()
            before = len(self.receiver.stdout_lines)
            with self.receiver.connect() as connection:
                connection.send(raw + good(body))
                self.assertGreaterEqual(connection.read().status, 400)
                self.assertTrue(connection.is_closed())
            self.assertEqual(self.receiver.deliver().status, 200)
            deadline_poll(lambda before=before: len(self.receiver.stdout_lines) > before)
            self.assertFalse([line for line in self.receiver.stdout_lines if body.decode() in line])

    def test_fifty_deliveries_over_one_connection(self):
        with self.receiver.connect() as connection:
            for _ in range(50):
                connection.send(good())
                answer = connection.read()
                self.assertEqual((answer.status, answer.json), (200, {"status": "ok"}))
                self.assertEqual("keep-alive", answer.headers["connection"])


# ---- Bodies --------------------------------------------------------------------------------


class Bodies(Served):
    def padded(self, size):
        body = new_body()
        return body[:-1] + b" " * (size - len(body)) + b"}"

    def test_a_body_of_the_largest_size_is_accepted_and_one_byte_more_refused(self):
        largest, larger = self.padded(1 << 20), self.padded((1 << 20) + 1)
        self.assert_status(good(largest), 200)
        self.assert_status(good(larger), 413)
        largest = self.padded(1 << 20)
        self.assert_status(chunked(chunks(largest, 50000), largest), 200)
        self.assert_status(chunked(chunks(larger, 50000), larger), 413)

    def test_a_length_that_is_too_large_is_refused_before_the_body(self):
        for length in ("1048577", "99999999999", "9" * 400, "9" * 5000):
            with self.subTest(length[:12]):
                self.assert_status(
                    raw_request(headers={"Content-Length": length}, length=False), 413
                )

    def test_a_chunk_that_is_too_large_is_refused_before_its_data(self):
        for size in (b"100001", b"ffffffff", b"7fffffffffffffff", b"ffffffffffffffff"):
            with self.subTest(size):
                self.assert_status(chunked(size + b"\r\n", b""), 413)

    def test_a_sender_that_sends_all_of_a_body_that_is_too_large_can_still_read_the_answer(self):
        body = bytes(4 << 20)
        for what, raw in (("length", good(body)), ("chunked", chunked(chunks(body, 100000), body))):
            with self.subTest(what), self.receiver.connect() as connection:
                connection.send(raw)
                self.assert_reply(connection.read(), 413)

    def test_a_sender_that_sends_all_of_a_body_that_nobody_wants_can_still_read_the_answer(self):
        body = bytes(1 << 20)
        for what, raw, status in (
            ("another path", good(body, path="/other"), 404),
            ("another method", good(body, method="PUT"), 405),
            ("malformed", with_lines(b"X-Header : value", body=body), 400),
            (
                "another coding",
                with_lines(b"Transfer-Encoding: gzip", body=body, length=False),
                501,
            ),
        ):
            with self.subTest(what), self.receiver.connect() as connection:
                connection.send(raw)
                self.assert_reply(connection.read(), status)

    def test_chunked_bodies(self):
        body = new_body()
        number = b"%x" % len(body)
        table = {
            "one chunk": chunks(body, 1000),
            "chunks of one byte": chunks(body, 1),
            "chunks of 16 bytes": chunks(body, 16),
            "the size in upper case": chunks(body, 27).replace(b"1b\r\n", b"1B\r\n"),
            "leading zeros": b"000" + number + b"\r\n" + body + b"\r\n0000\r\n\r\n",
            "an extension": number + b";name=value\r\n" + body + b"\r\n0\r\n\r\n",
            "an extension in quotes": number + b';name="a;b\\"c"\r\n' + body + b"\r\n0;x\r\n\r\n",
            "a trailer": number + b"\r\n" + body + b"\r\n0\r\nX-Trailer: 1\r\n\r\n",
            "two trailers": number + b"\r\n" + body + b"\r\n0\r\nX-A: 1\r\nX-B:\r\n\r\n",
        }
        with self.receiver.connect() as connection:
            for what, raw in table.items():
                with self.subTest(what):
                    connection.send(chunked(raw, body))
                    self.assertEqual(connection.read().status, 200)
            for coding in (b"CHUNKED", b"Chunked"):
                connection.send(chunked(chunks(body, 9), body).replace(b"chunked", coding, 1))
                self.assertEqual(connection.read().status, 200)
            connection.send(chunked(b"0\r\n\r\n", b""))
            self.assertEqual(connection.read().status, 200)

    def test_chunks_that_are_malformed(self):
        tail = b"\r\n12345\r\n0\r\n\r\n"
        sizes = (
            b"",
            b"-5",
            b"+5",
            b"0x5",
            b"5 ",
            b" 5",
            b"5\t",
            b"g",
            b"5g",
            b"5.0",
            b"5_",
            b"5,",
            b"\xd9\xa5",
            b"5\0",
        )
        extensions = (
            b"5;\0",
            b"5;a\x7f",
            b"5;=x",
            b'5;a="b',
            b"5;a=\xe9",
            b"5; a = (",
            b"5 x",
            b"5;a\rb",
        )
        table = {f"{size!r}": size + tail for size in (*sizes, *extensions)}
        table.update(
            {
                "a bare LF after the size": b"5\n12345\r\n0\r\n\r\n",
                "a bare CR after the size": b"5\r12345\r\n0\r\n\r\n",
                "LF for CRLF after the data": b"5\r\n12345\n0\r\n\r\n0\r\n\r\n",
                "two other bytes after the data": b"5\r\n12345xx0\r\n\r\n",
                "LF twice after the data": b"5\r\n12345\n\n0\r\n\r\n",
                "CR twice after the data": b"5\r\n12345\r\r0\r\n\r\n",
                "LF and CR after the data": b"5\r\n12345\n\r0\r\n\r\n",
                "nothing after the data": b"5\r\n123450\r\n\r\n\r\n",
                "more data than the size": b"4\r\n12345\r\n0\r\n\r\n",
                "less data than the size": b"6\r\n12345\r\n0\r\n\r\n0\r\n\r\n",
                "a size of 5 000 digits": b"0" * 5000 + tail,
                "an extension of 64 KiB": b"5;" + b"x" * 65536 + tail,
                "a malformed trailer": b"5\r\n12345\r\n0\r\nno colon\r\n\r\n",
                "white space before the colon of a trailer": b"5\r\n12345\r\n0\r\nX-A : 1\r\n\r\n",
                "a folded trailer": b"5\r\n12345\r\n0\r\nX-A: 1\r\n 2\r\n\r\n",
                "a trailer with NUL": b"5\r\n12345\r\n0\r\nX-A: \0\r\n\r\n",
                "a trailer with a bare LF": b"5\r\n12345\r\n0\r\nX-A: 1\nX-B: 2\r\n\r\n",
            }
        )
        for what, raw in table.items():
            with self.subTest(what):
                self.assert_status(chunked(raw, b"12345"), 400)

    def test_trailers_are_no_headers(self):
        body = new_body()
        headers = central_headers(body)
        trailer = f"X-Central-Signature: {headers.pop('X-Central-Signature')}\r\n".encode()
        head = raw_request(headers={**headers, "Transfer-Encoding": "chunked"}, length=False)
        self.assert_status(head + chunks(body, 10)[:-2] + trailer + b"\r\n", 401)
        self.assert_status(head[:-2] + trailer + b"\r\n" + chunks(body, 10), 200)

    def test_endless_trailers_are_refused(self):
        raw = b"5\r\n12345\r\n0\r\n" + b"X-A: %b\r\n" % (b"x" * 1000) * 100
        with self.receiver.connect() as connection:
            connection.send(chunked(raw, b"12345"))
            self.assertIn(connection.read().status, (400, 413, 431))

    def test_a_body_that_ends_early_is_not_kept(self):
        for raw in (
            good(b'{"marker":"early"}')[:-1],
            chunked(b"12\r\n" + b'{"marker":"early"}', b'{"marker":"early"}'),
        ):
            with self.receiver.connect() as connection:
                connection.send(raw)
                connection.socket.shutdown(socket.SHUT_WR)
                with contextlib.suppress(EOFError, ConnectionError):
                    self.assertGreaterEqual(connection.read().status, 400)
        self.assertEqual(self.receiver.deliver(new_body(last=True)).status, 200)
        deadline_poll(lambda: any('"last": true' in line for line in self.receiver.stdout_lines))
        self.assertFalse([line for line in self.receiver.stdout_lines if "early" in line])

    def test_a_sender_that_vanishes_does_no_harm(self):
        for raw in (b"", b"POST", good()[:50], good()[:-5], good()):
            connection = self.receiver.connect()
            connection.socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            connection.send(raw)
            connection.socket.close()  # with a reset
        self.assert_status(good(), 200)


# ---- Expect: 100-continue ----------------------------------------------------------------


class Expect(Served):
    EXPECT = b"Expect: 100-continue"

    def test_100_comes_before_the_body(self):
        for what, raw, body in (
            ("length", with_lines(self.EXPECT, body=b'{"a":1}'), b'{"a":1}'),
            ("other case", with_lines(b"expect: 100-Continue", body=b'{"a":2}'), b'{"a":2}'),
            (
                "chunked",
                chunked(chunks(b'{"a":3}', 3), b'{"a":3}', self.EXPECT),
                chunks(b'{"a":3}', 3),
            ),
        ):
            with self.subTest(what), self.receiver.connect() as connection:
                connection.send(raw[: -len(body)])
                self.assertEqual(connection.read().status, 100)
                connection.send(body)
                self.assertEqual(connection.read().status, 200)
                connection.send(good())
                self.assertEqual(connection.read().status, 200)

    def test_the_final_status_comes_without_100_where_it_is_already_known(self):
        head = with_lines(self.EXPECT, body=b"")[:-2].replace(b"Content-Length: 0\r\n", b"")
        for what, raw, status in (
            (
                "another path",
                head.replace(PATH.encode(), b"/other") + b"Content-Length: 5\r\n\r\n",
                404,
            ),
            ("another method", head.replace(b"POST", b"PUT") + b"Content-Length: 5\r\n\r\n", 405),
            ("too large", head + b"Content-Length: 1048577\r\n\r\n", 413),
            ("no length", head + b"\r\n", 411),
            ("another coding", head + b"Transfer-Encoding: gzip\r\n\r\n", 501),
            ("malformed", head + b"Content-Length: 5\r\nX : y\r\n\r\n", 400),
        ):
            with self.subTest(what), self.receiver.connect() as connection:
                connection.send(raw)
                self.assert_reply(connection.read(), status)
                self.assertTrue(connection.is_closed())

    def test_a_forged_delivery_is_refused_after_its_body(self):
        body = b'{"a":4}'
        raw = raw_request(headers={"Expect": "100-continue"}, body=body)
        with self.receiver.connect() as connection:
            connection.send(raw[: -len(body)])
            self.assertEqual(connection.read().status, 100)
            connection.send(body)
            self.assert_reply(connection.read(), 401)

    def test_a_client_of_http_1_0_gets_no_100(self):
        raw = with_lines(self.EXPECT).replace(b"HTTP/1.1", b"HTTP/1.0")
        self.assertEqual(self.receiver.request(raw).status, 200)


# ---- Connections ---------------------------------------------------------------------------


class Connections(Served):
    def test_http_1_1_keeps_the_connection_unless_told_otherwise(self):
        for lines, closes in (
            ([], False),
            ([b"Connection: keep-alive"], False),
            ([b"Connection: close"], True),
            ([b"Connection: Close"], True),
            ([b"Connection: TE, close"], True),
            ([b"Connection: TE", b"Connection: close"], True),
        ):
            with self.subTest(lines), self.receiver.connect() as connection:
                connection.send(with_lines(*lines))
                answer = connection.read()
                self.assertEqual(answer.status, 200)
                self.assertEqual(answer.headers.get("connection") == "close", closes)
                if closes:
                    self.assertTrue(connection.is_closed())
                else:
                    connection.send(good())
                    self.assertEqual(connection.read().status, 200)

    def test_http_1_0_closes_the_connection_unless_told_otherwise(self):
        for lines, closes in (
            ([], True),
            ([b"Connection: close"], True),
            ([b"Connection: keep-alive"], False),
            ([b"Connection: Keep-Alive"], False),
        ):
            with self.subTest(lines), self.receiver.connect() as connection:
                raw = with_lines(*lines).replace(b"HTTP/1.1", b"HTTP/1.0")
                connection.send(raw)
                answer = connection.read()
                self.assertEqual(answer.status, 200)
                if closes:
                    self.assertTrue(connection.is_closed())
                else:
                    self.assertEqual(answer.headers.get("connection", "").lower(), "keep-alive")
                    connection.send(good())
                    self.assertEqual(connection.read().status, 200)

    def test_http_1_0_needs_no_host(self):
        self.assertEqual(self.receiver.request(good(version="HTTP/1.0", host=None)).status, 200)

    def test_a_401_keeps_the_connection_and_says_how_to_authenticate(self):
        with self.receiver.connect() as connection:
            for _ in range(5):
                connection.send(raw_request(body=b"forged"))
                answer = connection.read()
                self.assert_reply(answer, 401)
                self.assertTrue(answer.headers["www-authenticate"])
            connection.send(good())
            self.assert_reply(connection.read(), 200)

    def test_head_is_answered_without_a_body(self):
        with self.receiver.connect() as connection:
            connection.send(raw_request("GET", "/health", length=False))
            full = connection.read()
            connection.send(raw_request("HEAD", "/health", length=False))
            answer = connection.read(head_only=True)
            self.assert_reply(answer, 200, head_only=True)
            self.assertEqual(answer.headers["content-length"], full.headers["content-length"])
            connection.send(raw_request("HEAD", "/health", length=False) + good())
            self.assertEqual(connection.read(head_only=True).status, 200)
            self.assert_reply(connection.read(), 200)
            connection.send(raw_request("HEAD", PATH, length=False))
            answer = connection.read(head_only=True)
            self.assert_reply(answer, 405, head_only=True)
            self.assertTrue(connection.is_closed())

    def test_health(self):
        answer = self.receiver.request(raw_request("GET", "/health", length=False))
        self.assert_reply(answer, 200)
        self.assertEqual(answer.json, {"status": "ok"})

    def test_replies_are_json_and_say_nothing_of_the_cause(self):
        body = new_body()
        headers = central_headers(body)
        causes = [
            raw_request(headers={**headers, "X-Central-Signature": "x"}, body=body),
            raw_request(headers={name: "" for name in headers}, body=body),
            raw_request(headers=central_headers(body, timestamp=now_stamp(-50 * 3600)), body=body),
            raw_request(headers=central_headers(body, token="another"), body=body),
        ]
        answers = [self.receiver.request(raw) for raw in causes]
        for answer in answers:
            self.assert_reply(answer, 401)
            self.assertEqual(answer.body, answers[0].body)
            self.assertEqual(
                answer.headers["www-authenticate"], answers[0].headers["www-authenticate"]
            )

    def test_no_reply_names_software_and_version(self):
        for raw in (
            good(),
            good(path="/other"),
            b"x\r\n\r\n",
            raw_request("GET", "/metrics", length=False),
        ):
            answer = self.receiver.request(raw)
            for name, value in answer.headers.items():
                self.assertNotIn(name, ("server", "x-powered-by"))
                self.assertNotIn("python", value.lower())


class Limits(Served):
    config = config_of(max_connections=4)

    def test_too_many_connections_wait_until_there_is_a_place(self):
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(self.receiver.connect()) for _ in range(4)]
            requests = [good() for _ in held]
            for connection, request in zip(held, requests):
                connection.send(request[:-1])
            waiting = [stack.enter_context(self.receiver.connect()) for _ in range(20)]
            for connection in waiting:
                connection.send(good())
            self.assertFalse(select.select([one.socket for one in waiting], [], [], 0.3)[0])
            for connection, request in zip(held, requests):  # they are served, and make room
                connection.send(request[-1:])
                self.assert_reply(connection.read(), 200)
            for connection in waiting:
                self.assert_reply(connection.read(), 200)

    def test_idle_connections_keep_nobody_waiting(self):
        with contextlib.ExitStack() as stack:
            for _ in range(12):
                connection = stack.enter_context(self.receiver.connect())
                connection.send(good())
                self.assert_reply(connection.read(), 200)


class Crowd(Served):
    def test_three_hundred_connections_at_once_are_all_answered(self):
        def crowd():
            return [line for line in list(self.receiver.stdout_lines) if '"crowd"' in line]

        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(self.receiver.connect(30)) for _ in range(300)]
            for connection in connections:
                connection.send(good(new_body(crowd=True)))
            for connection in connections:
                self.assertEqual(connection.read().status, 200)
            for connection in connections[::10]:
                connection.send(good(new_body(crowd=True)))
                self.assertEqual(connection.read().status, 200)
        deadline_poll(lambda: len(crowd()) >= 330)
        numbers = {json.loads(line)["alert"]["number"] for line in crowd()}
        self.assertEqual((len(crowd()), len(numbers)), (330, 330))


class Timeouts(Served):
    LIMIT = 0.25  # seconds
    config = config_of(request_timeout_seconds=LIMIT)

    def timed_out(self, connection, begin):
        """Read the 408 that is due `LIMIT` after `begin`."""
        self.assert_reply(connection.read(), 408)
        self.assertGreater(time.monotonic() - begin, self.LIMIT * 0.8)
        self.assertLess(time.monotonic() - begin, self.LIMIT + 3)
        self.assertTrue(connection.is_closed())

    def test_what_is_not_complete_in_time_is_refused(self):
        body = b'{"a":1}'
        table = {
            "nothing": b"",
            "a few bytes": b"POS",
            "half the header": good()[:100],
            "no body": good(body)[: -len(body)],
            "half the body": good(body)[:-3],
            "half a chunk": chunked(b"5\r\n12", b"12345"),
            "no last chunk": chunked(b"5\r\n12345\r\n", b"12345"),
            "no end of the trailers": chunked(b"5\r\n12345\r\n0\r\n", b"12345"),
            "no body after 100": with_lines(b"Expect: 100-continue", body=body)[: -len(body)],
        }
        with contextlib.ExitStack() as stack:
            begin = time.monotonic()
            opened = {what: stack.enter_context(self.receiver.connect()) for what in table}
            for what, connection in opened.items():
                connection.send(table[what])
            self.assertEqual(opened["no body after 100"].read().status, 100)
            for what, connection in opened.items():
                with self.subTest(what):
                    self.timed_out(connection, begin)

    def test_the_time_is_that_of_the_whole_request_however_it_drips(self):
        body = bytes(200)
        full, begun = good(body), chunked(b"c8\r\n", body)
        stop = threading.Event()

        def drip(connection, rest):
            with contextlib.suppress(OSError):
                for number in range(len(rest)):
                    if stop.wait(0.02):
                        return
                    connection.send(rest[number : number + 1])

        with contextlib.ExitStack() as stack:
            stack.callback(stop.set)
            begin, opened = time.monotonic(), []
            for what, sent, rest in (
                ("header", b"", full),
                ("body", full[: -len(body)], body),
                ("chunk", begun, body),
            ):
                connection = stack.enter_context(self.receiver.connect())
                connection.send(sent)
                thread = threading.Thread(target=drip, args=(connection, rest), daemon=True)
                stack.callback(thread.join, 10)
                opened.append((what, connection))
                thread.start()
            for what, connection in opened:
                with self.subTest(what):
                    self.assert_reply(connection.read(), 408)
                    self.assertGreater(time.monotonic() - begin, self.LIMIT * 0.8)
                    self.assertLess(time.monotonic() - begin, self.LIMIT + 2)
            stop.set()

    def test_a_connection_kept_alive_may_rest_longer_than_a_request(self):
        with self.receiver.connect() as connection:
            connection.send(good())
            self.assertEqual(connection.read().status, 200)
            connection.socket.settimeout(self.LIMIT * 2)
            with self.assertRaises(socket.timeout):
                connection.socket.recv(1)
            connection.socket.settimeout(10)
            raw = good()
            connection.send(raw[:20])
            connection.send(raw[20:])
            self.assertEqual(connection.read().status, 200)
            begin = time.monotonic()
            connection.send(raw[:20])
            self.timed_out(connection, begin)


# ---- Metrics -----------------------------------------------------------------------------


def series(receiver):
    """Return {sample with its labels: value} of /metrics."""
    answer = receiver.request(raw_request("GET", "/metrics", length=False))
    assert answer.status == 200, answer.status
    assert answer.headers["content-type"].startswith("text/plain"), answer.headers
    lines = [
        line
        for line in answer.body.decode("ascii").splitlines()
        if line and not line.startswith("#")
    ]
    pairs = [line.rsplit(" ", 1) for line in lines]
    assert len(dict(pairs)) == len(pairs), "a series occurs twice"
    return {name: float(value) for name, value in pairs}


class Metrics(Served):
    config = config_of(
        webhook=[
            {"name": "first", "path": "/first", "token": TOKEN},
            {"name": 'a "quote" \\ back', "path": "/second", "token": TOKEN},
        ]
    )

    def found(self, found, *labels):
        """Return the one series with these in its name."""
        names = [name for name in found if all(label in name for label in labels)]
        self.assertEqual(len(names), 1, (labels, names))
        return found[names[0]]

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.at_start = series(cls.receiver)

    def test_all_series_exist_at_0_from_the_start_and_no_sender_adds_one(self):
        for name, value in self.at_start.items():
            self.assertLessEqual(value, 1 if "flight" in name else 0, name)
        start = series(self.receiver)
        self.assertEqual(set(start), set(self.at_start))
        for result in ("accepted", "duplicate", "signature", "stale"):
            self.found(start, 'webhook="first"', f'"{result}"')
            self.found(start, r'webhook="a \"quote\" \\ back"', f'"{result}"')
        body = new_body()
        raw = good(body, path="/first")
        stale = raw_request(
            path="/first", headers=central_headers(body, timestamp=now_stamp(-(10**6))), body=body
        )
        for request in (
            raw,
            raw,
            stale,
            good(path="/second"),
            good(path="/evil-label"),
            good(path="/first", method="EVILMETHOD"),
            raw_request(path="/first", headers={"X-Evil": "evil"}, body=b"forged"),
            with_lines(b"X-Evil : x"),
            good(version="HTTP/2.0"),
            raw_request(path="/first", length=False),
            raw_request(path="/first", headers={"Content-Length": "9" * 12}, length=False),
            raw_request(path="/first", headers={"Transfer-Encoding": "evil"}, length=False),
            b"x" * 9000,
            with_lines(b"X-Evil: " + b"x" * 70000),
        ):
            self.receiver.request(request)
        end = series(self.receiver)
        self.assertEqual(set(start), set(end))
        self.assertFalse([name for name in end if "evil" in name.lower()])
        for result, expected in (("accepted", 1), ("duplicate", 1), ("stale", 1), ("signature", 1)):
            with self.subTest(result):
                labels = 'webhook="first"', f'"{result}"'
                self.assertEqual(self.found(end, *labels) - self.found(start, *labels), expected)
        self.assertEqual(self.found(end, 'webhook="a', '"accepted"'), 1)
        moved = {name for name in end if end[name] > start[name]}
        for status_reason in (
            "not_found",
            "method",
            "malformed",
            "version",
            "length",
            "large",
            "long",
            "coding",
        ):
            with self.subTest(status_reason):
                self.assertTrue([name for name in moved if status_reason in name], moved)

    def test_the_bytes_and_the_time_of_the_last_delivery_are_there(self):
        body = new_body()
        before, start = time.time(), series(self.receiver)
        self.assertEqual(self.receiver.request(good(body, path="/first")).status, 200)
        end = series(self.receiver)
        moved = {name: value - start[name] for name, value in end.items() if value > start[name]}
        self.assertEqual([value for name, value in moved.items() if "bytes" in name], [len(body)])
        times = [name for name in moved if end[name] > 10**9]
        self.assertEqual(len(times), 1, times)
        self.assertIn('webhook="first"', times[0])
        self.assertTrue(before - 1 <= end[times[0]] <= time.time() + 1)

    def test_requests_in_flight_are_a_gauge(self):
        with self.receiver.connect() as connection:
            flight = [name for name in series(self.receiver) if "flight" in name]
            self.assertEqual(len(flight), 1)
            before = series(self.receiver)[flight[0]]
            connection.send(good(path="/first")[:-1])
            deadline_poll(lambda: series(self.receiver)[flight[0]] == before + 1)
        deadline_poll(lambda: series(self.receiver)[flight[0]] == before)

    def test_head_has_no_body(self):
        with self.receiver.connect() as connection:
            connection.send(raw_request("HEAD", "/metrics", length=False) + good(path="/first"))
            self.assertEqual(connection.read(head_only=True).status, 200)
            self.assertEqual(connection.read().status, 200)


# ---- Webhooks, paths, tokens -----------------------------------------------------------------


class Webhooks(Served):
    config = config_of(
        webhook=[
            {"name": "one", "path": "/shared", "token": "token-1"},
            {"name": "two", "path": "/shared", "token": ["token-2", "token-2-old"]},
            {"name": "fabric", "path": "/shared", "type": "ip-fabric", "token": "token-3"},
            {"name": "alone", "path": "/alone", "token": "token-4"},
            {"name": "strange", "path": "/a/%2f!$&'()*+,;=:@~", "token": "token-5"},
            {
                "name": "half an hour",
                "path": "/half-an-hour",
                "token": "token-6",
                "replay_window_hours": 0.5,
            },
            {"name": "any path, any age", "token": TOKEN, "replay_window_hours": 0},
        ],
        max_body_bytes=100,
    )

    def named(self, body, headers, path):
        """Deliver; return the webhook that is named on stdout."""
        answer = self.receiver.post(body, headers, path)
        self.assert_reply(answer, 200)
        lines = deadline_poll(
            lambda: [one for one in self.receiver.stdout_lines if body.decode() in one]
        )
        return json.loads(lines[0])["webhook"]

    def test_the_webhook_whose_checks_pass_names_the_delivery(self):
        for token, path, name in (
            ("token-1", "/shared", "one"),
            ("token-2", "/shared", "two"),
            ("token-2-old", "/shared", "two"),
            ("token-4", "/alone", "alone"),
            ("token-5", "/a/%2f!$&'()*+,;=:@~", "strange"),
        ):
            body = new_body()
            with self.subTest(name, token=token):
                self.assertEqual(self.named(body, central_headers(body, token=token), path), name)

    def test_senders_of_different_types_may_share_a_path(self):
        body = new_body()
        digest = hmac.new(b"token-3", body, hashlib.sha256).hexdigest()
        self.assertEqual(self.named(body, {"X-IPF-Signature": digest}, "/shared"), "fabric")

    def test_a_token_is_valid_on_its_own_path_only(self):
        for token, path in (("token-1", "/alone"), ("token-4", "/shared"), ("token-5", "/alone")):
            body = new_body()
            self.assert_reply(
                self.receiver.post(body, central_headers(body, token=token), path), 401
            )

    def test_each_webhook_has_its_own_memory(self):
        body = new_body()
        for token, path in (("token-1", "/shared"), ("token-4", "/alone")):
            answer = self.receiver.post(
                body, central_headers(body, token=token, delivery_id="same"), path
            )
            self.assertEqual(answer.json, {"status": "ok"})

    def test_a_webhook_without_a_path_takes_any_but_our_own(self):
        for path in ("/", "/centralwebhook", "/a/b/c", "/healthz", "/x?y=z"):
            with self.subTest(path):
                self.assert_status(good(path=path), 200)
                self.assert_status(raw_request("GET", path, length=False), 405)
        for path in ("/health", "/metrics"):
            with self.subTest(path):
                self.assert_status(good(path=path), 405)
                self.assertEqual(
                    self.receiver.request(raw_request("GET", path, length=False)).status, 200
                )

    def test_with_a_window_of_0_the_time_is_not_looked_at(self):
        for stamp in (
            now_stamp(-(10**8)),
            now_stamp(10**8),
            "yesterday",
            "0",
            "2016-99-99T00:00:00Z",
        ):
            body = new_body()
            with self.subTest(stamp):
                self.assert_status(
                    raw_request(headers=central_headers(body, timestamp=stamp), body=body), 200
                )

    def test_the_window_can_be_configured(self):
        for minutes, status in ((-29, 200), (-31, 401), (14, 200), (16, 401)):
            body = new_body()
            headers = central_headers(body, "token-6", timestamp=now_stamp(minutes * 60))
            with self.subTest(minutes):
                self.assertEqual(self.receiver.post(body, headers, "/half-an-hour").status, status)

    def test_a_smaller_limit_can_be_configured(self):
        for size, status in ((100, 200), (101, 413)):
            body = b"x" * size
            self.assertEqual(self.receiver.request(good(body)).status, status)
            longer = body + b"y"
            self.assertEqual(self.receiver.request(chunked(chunks(longer, 30), longer)).status, 413)
            body = b"y" * size
            self.assertEqual(self.receiver.request(chunked(chunks(body, 30), body)).status, status)


# ---- Recent and new --------------------------------------------------------------------------


class RecentAndNew(Served):
    def status(self, body, headers):
        answer = self.receiver.post(body, headers)
        return answer.json["status"] if answer.status == 200 else answer.status

    def test_a_repetition_is_answered_but_not_written_again(self):
        body = new_body()
        headers = central_headers(body)
        self.assertEqual(self.status(body, headers), "ok")
        for _ in range(3):
            self.assertEqual(self.status(body, headers), "duplicate")
        last = new_body()
        self.assertEqual(self.status(last, central_headers(last)), "ok")
        deadline_poll(lambda: any(last.decode() in line for line in self.receiver.stdout_lines))
        self.assertEqual(
            len([line for line in self.receiver.stdout_lines if body.decode() in line]), 1
        )

    def test_a_retry_that_is_signed_anew_is_a_repetition(self):
        body = new_body()
        for offset, expected in ((-60, "ok"), (-30, "duplicate"), (0, "duplicate")):
            headers = central_headers(body, delivery_id="retried", timestamp=now_stamp(offset))
            self.assertEqual(self.status(body, headers), expected)

    def test_another_id_with_the_same_body_is_another_delivery(self):
        body = new_body()
        for delivery_id in ("x-1", "x-2"):
            self.assertEqual(
                self.status(body, central_headers(body, delivery_id=delivery_id)), "ok"
            )

    def test_the_same_id_with_another_body_is_another_delivery(self):
        for _ in range(2):
            body = new_body()
            self.assertEqual(self.status(body, central_headers(body, delivery_id="y")), "ok")

    def test_a_replay_with_bytes_moved_between_headers_is_a_repetition(self):
        body = new_body()
        headers = central_headers(body, service="Alerts", delivery_id="72d3")
        self.assertEqual(self.status(body, headers), "ok")
        for service, delivery_id in (("Alert", "s72d3"), ("Alerts7", "2d3"), ("A", "lerts72d3")):
            moved = {**headers, "X-Central-Service": service, "X-Central-Delivery-ID": delivery_id}
            with self.subTest(service):
                self.assertEqual(self.status(body, moved), "duplicate")
        moved = {**headers, "X-Central-Event": "another", "X-Central-Customer-ID": "another"}
        self.assertEqual(self.status(body, moved), "duplicate")

    def test_what_was_refused_is_not_remembered(self):
        body = new_body()
        headers = central_headers(body)
        self.assertEqual(self.status(body, {**headers, "X-Central-Signature": "x"}), 401)
        stale = central_headers(body, delivery_id="z", timestamp=now_stamp(-50 * 3600))
        self.assertEqual(self.status(body, stale), 401)
        self.assertEqual(self.status(body, headers), "ok")
        self.assertEqual(self.status(body, central_headers(body, delivery_id="z")), "ok")

    def test_the_age_is_limited_in_both_directions(self):
        for hours, expected in ((0, "ok"), (-47.9, "ok"), (-27, "ok"), (-48.1, 401), (-1000, 401)):
            body = new_body()
            with self.subTest(hours=hours):
                headers = central_headers(body, timestamp=now_stamp(hours * 3600))
                self.assertEqual(self.status(body, headers), expected)
        for minutes, expected in ((1, "ok"), (14, "ok"), (16, 401), (10**5, 401)):
            body = new_body()
            with self.subTest(minutes=minutes):
                headers = central_headers(body, timestamp=now_stamp(minutes * 60))
                self.assertEqual(self.status(body, headers), expected)

    def test_odd_time_stamps(self):
        now = time.time()
        utc = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        pacific = time.strftime("%Y-%m-%dT%H:%M:%S-07:00", time.gmtime(now - 7 * 3600))
        india = time.strftime("%Y-%m-%dT%H:%M:%S+05:30", time.gmtime(now + 5.5 * 3600))
        forms = (
            utc,
            utc + "Z",
            utc + ".123Z",
            utc + ".123456+00:00",
            pacific,
            india,
            f"{now:.0f}",
            f"{now * 1000:.0f}",
        )
        for text in forms:
            body = new_body()
            with self.subTest(text):
                self.assertEqual(self.status(body, central_headers(body, timestamp=text)), "ok")
        wrong_hour = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now + 7 * 3600))
        for text in (
            "yesterday",
            "0",
            "-1",
            "nan",
            "1e9",
            "9" * 300,
            "2016-99-99T00:00:00Z",
            utc + "+99:00",
            wrong_hour,
        ):
            body = new_body()
            with self.subTest(text[:30]):
                self.assertEqual(self.status(body, central_headers(body, timestamp=text)), 401)

    def test_the_time_stamp_is_in_the_output_as_it_was_sent(self):
        body, stamp = (
            new_body(),
            time.strftime("%Y-%m-%dT%H:%M:%S-07:00", time.gmtime(time.time() - 7 * 3600)),
        )
        self.assertEqual(
            self.status(body, central_headers(body, timestamp=stamp, delivery_id="as-sent")), "ok"
        )
        lines = deadline_poll(
            lambda: [line for line in self.receiver.stdout_lines if body.decode() in line]
        )
        found = json.loads(lines[0])
        self.assertEqual((found["sent_at"], found["delivery_id"]), (stamp, "as-sent"))


if __name__ == "__main__":
    unittest.main()
