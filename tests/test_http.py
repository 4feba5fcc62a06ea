"""HTTP as section 7 of the contract has it, and the way of a delivery: raw requests in, statuses
out.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
import unittest

import central_webhook_client as product
from tests.support import (
    PATH,
    Receiver,
    ServedTest,
    central_headers,
    config_of,
    deadline_poll,
    good,
    new_body,
    now_stamp,
    raw_request,
    share_receiver,
)

setUpModule = share_receiver


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


# ---- One request and its status ---------------------------------------------------


class Statuses(ServedTest):
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
                "the PROXY protocol, version 1": b"PROXY TCP4 192.0.2.7 192.0.2.8 5 80\r\n"
                + request,
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


class Pieces(ServedTest):
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


class Bodies(ServedTest):
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


class Expect(ServedTest):
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


class Connections(ServedTest):
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


class Timeouts(ServedTest):
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


# ---- Webhooks, paths, tokens -----------------------------------------------------------------


# ---- Recent and new --------------------------------------------------------------------------


class LineEnds(unittest.TestCase):
    def test_a_line_end_after_a_request_is_no_request(self):
        with Receiver(config_of(request_timeout_seconds=0.2)) as receiver:
            ends = {
                b"\r\n": b"",
                b"\r\n\r\n": b"",
                b"\r": b"\n",
            }  # and what goes before the next request
            with contextlib.ExitStack() as stack:
                connections = [stack.enter_context(receiver.connect()) for _ in ends]
                for connection, end in zip(connections, ends):
                    connection.send(good() + end)
                    self.assertEqual(connection.read().status, 200)
                time.sleep(0.4)  # more than a request may take
                for connection, (end, rest) in zip(connections, ends.items()):
                    with self.subTest(end):
                        connection.send(rest + good())
                        self.assertEqual(connection.read().status, 200)
            self.assertEqual(receiver.post(new_body(), {}, PATH).status, 401)
            receiver.wait_for_log("WARNING")
            self.assertEqual(sum("WARNING" in line for line in receiver.stderr_lines), 1)


class Hostile(unittest.TestCase):
    """Far above every limit of size, so that anything but linear time takes for ever."""

    def test_header_fields_are_read_in_linear_time(self):
        for shape in (b"X:%b\0", b"X:%b\r", b"X: a%b\0", b"%b\0:", b"X%b\n", b"X: \t%b\x7f"):
            for piece in (b" ", b"\t", b" a", b"a", b"a:", b"a: "):
                with self.subTest(shape=shape, piece=piece):
                    with self.assertRaises(product.Refusal):
                        product.parse_fields(shape % (piece * 500_000) + b"\r\n")

    def test_signatures_are_bounded_before_they_are_parsed(self):
        url = product.parse_public_url("https://www.example.com/hook")
        for given, signature in (
            ("a=(" + "b " * 5000 + ")", "a=:AAAA:"),
            ("a=()", "a=:AAAA:" + ";b" * 5000),
        ):
            headers = {"signature-input": given, "signature": signature}
            request = product.Request("POST", "/hook", None, "HTTP/1.1", headers, frozenset())
            with self.assertRaisesRegex(product.SignatureError, "above"):
                product.verify_message_signature(request, ["token"], url, 0)
