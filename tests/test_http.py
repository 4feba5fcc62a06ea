"""HTTP: raw requests in, statuses out; framing, pipelining, kept connections, /health, /metrics."""

from __future__ import annotations

import contextlib
import re
import socket
import time

from tests.support import (
    DUPLICATE,
    HEALTH,
    METRICS,
    OK,
    PATH,
    RESET,
    ReceiverTest,
    central_headers,
    config_of,
    deadline_poll,
    hook,
    new_body,
    now_stamp,
    raw_request,
    signed,
    signed_request,
)

CODING = b"Transfer-Encoding: chunked"
EXPECT = b"Expect: 100-continue"


def with_lines(*lines, body=None, length=True):
    """Return a signed request with these header lines, as they are, at the end."""
    body = new_body() if body is None else body
    head = raw_request(headers=central_headers(body), length=False)[:-2]
    if length:
        head += b"Content-Length: %d\r\n" % len(body)
    return head + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


def chunked(raw, body, *lines):
    """Return a signed request for `body` whose bytes on the wire are `raw`."""
    head = with_lines(CODING, *lines, body=body, length=False)
    return head[: len(head) - len(body)] + raw


def chunks(body, size):
    """Encode a body in chunks of `size` bytes."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


class HttpTest(ReceiverTest):
    config = config_of(max_connections=512, request_timeout_seconds=20)

    def assert_reply(self, answer, status, head_only=False):
        """Check what is true of every reply."""
        self.assertEqual(answer.status, status)
        self.assertTrue({"server", "x-powered-by"}.isdisjoint(answer.headers))
        self.assertNotIn("python", str(answer.headers).lower())
        self.assertTrue(answer.headers["content-length"].isdigit())
        if not head_only:
            self.assertEqual(answer.headers["content-type"].partition(";")[0], "application/json")
            self.assertEqual(list(answer.json), ["status"] if status == 200 else ["error"])
            if status == 401:
                self.assertEqual(answer.json, {"error": "unauthorized"})
        self.assertEqual("www-authenticate" in answer.headers, status == 401)
        self.assertEqual("allow" in answer.headers, status == 405)

    def assert_status(self, raw, status):
        """Send a request; after 200 and 401 the connection goes on, after all others it ends."""
        with self.receiver.connect() as connection:
            connection.send(raw)
            answer = connection.read()
            self.assert_reply(answer, status)
            if status in (200, 401):
                self.assert_goes_on(connection, answer)
            else:
                self.assert_ends(connection, answer)

    def assert_goes_on(self, connection, answer):
        self.assertEqual(answer.headers["connection"], "keep-alive")
        connection.send(signed_request())
        self.assert_reply(connection.read(), 200)

    def assert_ends(self, connection, answer):
        self.assertEqual(answer.headers["connection"], "close")
        self.assertTrue(connection.is_closed())

    def assert_statuses(self, status, table):
        for what, raw in table.items():
            with self.subTest(what):
                self.assert_status(raw, status)


class Requests(HttpTest):
    """One request and its status."""

    def test_well_formed_requests_are_accepted(self):
        body, headers = signed()
        lower_case = {name.lower(): value for name, value in headers.items()}
        zeros = with_lines(b"Content-Length: 0005", body=b"12345", length=False)
        table = {
            "as Central sends it": signed_request(),
            "header names in lower case": raw_request(headers=lower_case, body=body),
            "a query": signed_request(path=PATH + "?a=b"),
            "an empty query": signed_request(path=PATH + "?"),
            "an empty body": signed_request(b""),
            "any bytes": signed_request(bytes(range(256))),
            "white space around a value": with_lines(b"X-Space: \t value \t "),
            "no white space before a value": with_lines(b"X-Space:value"),
            "a tab within a value": with_lines(b"X-Tab: a\tb"),
            "an empty value": with_lines(b"X-Empty:"),
            "bytes above ASCII in a value": with_lines(b"X-Latin: \xe9\xff\x80"),
            "a field name of all characters": with_lines(b"!#$%&'*+-.^_`|~09azAZ: 1"),
            "a repeated header": with_lines(b"Accept: a", b"Accept: b"),
            "a Host with a port": signed_request(host="central.example.com:8443"),
            "a Host that is an IPv6 address": signed_request(host="[::1]:8010"),
            "leading zeros of Content-Length": zeros,
            "the absolute form": signed_request(path="http://localhost" + PATH),
            "it with a query": signed_request(path=f"HTTP://[::1]:80{PATH}?http://x"),
        }
        self.assert_statuses(200, table)

    def test_a_malformed_request_line_is_refused(self):
        request, path = signed_request(), PATH.encode()
        line = b"POST %b HTTP/1.1" % path

        def replaced(old, new):
            return request.replace(old, new, 1)

        table = {
            "no version": replaced(line, b"POST " + path),
            "no target": replaced(line, b"POST HTTP/1.1"),
            "two spaces": replaced(line, line.replace(b" ", b"  ", 1)),
            "a tab for a space": replaced(line, line.replace(b" ", b"\t", 1)),
            "a space at the end": replaced(line, line + b" "),
            "a space at the start": b" " + request,
            "the version in lower case": replaced(b"HTTP/1.1", b"http/1.1"),
            "a version of letters": replaced(b"HTTP/1.1", b"HTTP/x.y"),
            "another protocol": replaced(b"HTTP/1.1", b"SPDY/1.1"),
            "a method of wrong characters": replaced(b"POST", b"PO(ST"),
            "a space within the target": replaced(path, b"/central webhook"),
            "a control character in the target": replaced(path, path + b"\x01"),
            "a byte above ASCII in the target": replaced(path, path + b"\xe9"),
            "a fragment": signed_request(path=PATH + "#frag"),
            "a fragment in the absolute form": signed_request(path=f"http://z{PATH}#frag"),
            "a scheme of wrong characters": signed_request(path="a/b://z" + PATH),
            "a scheme with a query": signed_request(path="x?y://z" + PATH),
            "the absolute form without an authority": signed_request(path="http://" + PATH),
            "the absolute form with a user": signed_request(path="http://u:p@z" + PATH),
            "bare LF everywhere": signed_request(b"").replace(b"\r\n", b"\n"),
            "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n",
        }
        self.assert_statuses(400, table)

    def test_malformed_header_fields_are_refused(self):
        lines = [b"X-Header", b": value", b"X-Header : value", b"X-Header\t: value"]
        lines += [b"X Header: value", b" X-Header: value", b"X(Header): value", b'X"Header: value']
        lines += [b"X-H\xe9ader: value", b"X-\0: value", b"X-Header: a\0b", b"X-Header: a\rb"]
        lines += [b"X-Header: a\r\n b", b"X-Header: a\r\n\tb", b"X-Header: a\r\n "]  # folded
        lines += [b"X-Header: a\r", b"X-Header: a\nX-Other: b", b"X-Header: a\x01b"]
        lines += [b"X-Header: a\x0bb", b"X-Header: a\x1b[2Jb", b"X-Header: a\x7fb"]
        lines += [b"Host: localhost", b"Host: other"]  # the second one
        table = {line: with_lines(*line.split(b"\r\n")) for line in lines}
        for host in (None, "a, b", "a/b", "user@a"):
            table[f"Host: {host}"] = signed_request(host=host)
        self.assert_statuses(400, table)

    def test_a_wrong_length_is_refused(self):
        body = b"12345"
        one_chunk = chunks(body, 5)

        def length(*values):
            lines = [b"Content-Length: " + value for value in values]
            return with_lines(*lines, body=body, length=False)

        def framed(*lines):
            return with_lines(*lines, body=one_chunk, length=False)

        values = [b"+5", b"-5", b"-0", b"5_0", b"0x5", b"5.0", b"5e0", b"5, 5", b"5,5", b"5 5"]
        values += [b"5;", b"five", b'"5"', b"\xd9\xa5", b"\xb2", b",5", b"5,", b""]
        table = {
            **{value: length(value) for value in values},
            "an empty one, no body": with_lines(b"Content-Length:", body=b"", length=False),
            "two different": length(b"5", b"4"),
            "two equal": length(b"5", b"5"),
            "two, one empty": length(b"5", b""),
            "of a GET": raw_request("GET", "/health", {"Content-Length": "+0"}, length=False),
            "length and chunked": framed(b"Content-Length: 5", CODING),
            "chunked and length": framed(CODING, b"Content-Length: 5"),
            "chunked and length 0": framed(CODING, b"Content-Length: 0"),
            "chunked twice": framed(CODING, CODING),
            "chunked, chunked": framed(CODING + b", chunked"),
            "space before the colon": framed(b"Transfer-Encoding : chunked"),
        }
        self.assert_statuses(400, table)

    def test_no_length_an_unknown_coding_or_version_is_refused(self):
        body, headers = signed()
        raw = raw_request(headers=headers, length=False)
        self.assert_statuses(411, {"1.1": raw, "1.0": raw.replace(b"HTTP/1.1", b"HTTP/1.0")})
        codings = (b"gzip", b"gzip, chunked", b"identity", b"chunked, gzip", b"xchunked", b"x")
        lines = [b"Transfer-Encoding: " + coding for coding in codings]
        table = {line: with_lines(line, body=chunks(body, 5), length=False) for line in lines}
        self.assert_statuses(501, table)
        versions = ("HTTP/2.0", "HTTP/3.0", "HTTP/9.9")
        self.assert_statuses(505, {one: signed_request(version=one) for one in versions})

    def test_an_unknown_path_is_404_for_any_method(self):
        paths = "/ /other /centralwebhook/ /centralwebhoo /CentralWebhook //centralwebhook".split()
        paths += "/./centralwebhook /x/../centralwebhook /%63entralwebhook".split()
        paths += "/centralwebhook;x /?/centralwebhook /centralwebhook%3F /healthz /Health".split()
        for path in paths:
            for method in ("POST", "GET", "DELETE"):
                with self.subTest(path, method=method):
                    self.assert_status(signed_request(path=path, method=method), 404)

    def test_another_method_is_405_and_allow_names_the_right_ones(self):
        methods = "GET PUT PATCH DELETE OPTIONS TRACE PROPFIND BREW post POSTS".split()
        for path, allowed in ((PATH, "POST"), ("/health", "GET, HEAD"), ("/metrics", "GET, HEAD")):
            for method in methods if path == PATH else ("POST", "PUT", "DELETE"):
                with self.subTest(path, method=method):
                    raw = signed_request(path=path, method=method)
                    self.assert_status(raw, 405)
                    self.assertEqual(self.receiver.request(raw).headers["allow"], allowed)

    def test_the_request_line_has_at_most_8_kib(self):
        query = PATH + "?" + "x" * 8000
        self.assert_status(signed_request(path=query), 200)
        long = [signed_request(path=query + "x" * 300), signed_request(path="/" + "x" * 60000)]
        unfinished = [b"POST /" + b"x" * 20000, b"x" * 20000]
        self.assert_statuses(414, {raw[:20]: raw for raw in (*long, *unfinished)})

    def test_a_limit_is_the_same_however_the_bytes_arrive(self):
        line = f"POST {PATH}? HTTP/1.1"
        raw = signed_request(path=PATH + "?" + "x" * (8192 - len(line)))
        for end in (raw.index(b"\r\n") + 1, raw.index(b"\r\n\r\n") + 3, 1):
            with self.subTest(end), self.receiver.connect() as connection:
                connection.send(raw[:end])
                time.sleep(0.05)  # so that they probably arrive apart
                connection.send(raw[end:])
                self.assertEqual(connection.read().status, 200)

    def test_the_header_section_has_at_most_64_kib_and_100_fields(self):
        present = signed_request().partition(b"\r\n\r\n")[0].count(b"\r\n")
        large = with_lines(b"X-Large: " + b"x" * 66000)
        numbered = [b"X-%d: 1" % number for number in range(2000)]
        table = {
            "60 000 bytes": with_lines(b"X-Large: " + b"x" * 60000),
            "100 fields": with_lines(*numbered[: 100 - present]),
        }
        self.assert_statuses(200, table)
        table = {
            "66 000 bytes": large,
            "many fields": with_lines(*(b"X-%d: " % n + b"x" * 1000 for n in range(70))),
            "without an end": large[:66500],
            "no colon": with_lines(b"x" * 70000),
            "101 fields": with_lines(*numbered[: 101 - present]),
            "2000 fields": with_lines(*numbered),
        }
        self.assert_statuses(431, table)

    def test_nothing_of_a_refused_request_nor_what_follows_it_is_accepted(self):
        for raw in (
            with_lines(b"X-Header : value", body=b'"refused"'),
            with_lines(b"Content-Length: 5", body=b'"refused"'),
            signed_request(b'"refused"', path="/other"),
            signed_request(b'"refused"', method="PUT"),
            signed_request(b'"refused"', version="HTTP/2.0"),
        ):
            with self.receiver.connect() as connection:
                connection.send(raw + signed_request(b'"refused"'))
                self.assertGreaterEqual(connection.read().status, 400)
                self.assertTrue(connection.is_closed())
        self.assert_not_on_stdout("refused")


class Bodies(HttpTest):
    """Large, chunked and broken bodies."""

    def padded(self, size):
        body = new_body()
        return body[:-1] + b" " * (size - len(body)) + b"}"

    def test_a_body_of_1_mib_is_accepted_and_one_byte_more_refused(self):
        for extra, status in ((0, 200), (1, 413)):
            largest, chunky = self.padded((1 << 20) + extra), self.padded((1 << 20) + extra)
            self.assert_status(signed_request(largest), status)
            self.assert_status(chunked(chunks(chunky, 50000), chunky), status)

    def test_too_large_a_length_or_chunk_is_refused_before_the_data(self):
        lengths = ("1048577", "99999999999", "9" * 400, "9" * 5000)
        table = {
            length[:12]: raw_request(headers={"Content-Length": length}, length=False)
            for length in lengths
        }
        for size in (b"100001", b"ffffffff", b"7fffffffffffffff", b"ffffffffffffffff"):
            table[size] = chunked(size + b"\r\n", b"")
        self.assert_statuses(413, table)

    def test_a_sender_that_sends_all_of_a_refused_body_can_still_read_the_answer(self):
        large, body = bytes(4 << 20), bytes(1 << 20)
        for status, raw in (
            (413, signed_request(large)),
            (413, chunked(chunks(large, 100000), large)),
            (404, signed_request(body, path="/other")),
            (405, signed_request(body, method="PUT")),
            (400, with_lines(b"X-Header : value", body=body)),
            (501, with_lines(b"Transfer-Encoding: gzip", body=body, length=False)),
        ):
            with self.subTest(status), self.receiver.connect() as connection:
                connection.send(raw)
                self.assert_reply(connection.read(), status)

    def test_well_formed_chunks_are_accepted(self):
        body = new_body()
        one = b"%x" % len(body) + b"%b\r\n" + body + b"\r\n"
        table = {
            "one chunk": chunks(body, 1000),
            "chunks of one byte": chunks(body, 1),
            "the size in upper case": chunks(body, 27).replace(b"1b\r\n", b"1B\r\n"),
            "leading zeros": b"000" + one % b"" + b"0000\r\n\r\n",
            "an extension": one % b";name=value" + b"0\r\n\r\n",
            "an extension in quotes": one % b';name="a;b\\"c"' + b"0;x\r\n\r\n",
            "a trailer": one % b"" + b"0\r\nX-Trailer: 1\r\n\r\n",
            "two trailers": one % b"" + b"0\r\nX-A: 1\r\nX-B:\r\n\r\n",
        }
        requests = {what: chunked(raw, body) for what, raw in table.items()}
        for coding in (b"CHUNKED", b"Chunked"):
            requests[coding] = requests["one chunk"].replace(b"chunked", coding, 1)
        requests["no chunk"] = chunked(b"0\r\n\r\n", b"")
        self.assert_statuses(200, requests)

    def test_malformed_chunks_are_refused(self):
        tail = b"\r\n12345\r\n0\r\n\r\n"
        sizes = [b"", b"-5", b"+5", b"0x5", b"5 ", b" 5", b"5\t", b"g", b"5g", b"5.0", b"5_", b"5,"]
        sizes += [b"\xd9\xa5", b"5\0", b"5;\0", b"5;a\x7f", b"5;=x", b'5;a="b', b"5;a=\xe9"]
        sizes += [b"5; a = (", b"5 x", b"5;a\rb", b"0" * 5000, b"5;" + b"x" * 65536]
        whole = b"5\r\n12345\r\n0\r\n"
        table = {
            **{size[:9]: size + tail for size in sizes},
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
            "a malformed trailer": whole + b"no colon\r\n\r\n",
            "white space before the colon of a trailer": whole + b"X-A : 1\r\n\r\n",
            "a folded trailer": whole + b"X-A: 1\r\n 2\r\n\r\n",
            "a trailer with NUL": whole + b"X-A: \0\r\n\r\n",
            "a trailer with a bare LF": whole + b"X-A: 1\nX-B: 2\r\n\r\n",
        }
        self.assert_statuses(400, {what: chunked(raw, b"12345") for what, raw in table.items()})

    def test_trailers_are_not_headers(self):
        body, headers = signed()
        trailer = f"X-Central-Signature: {headers.pop('X-Central-Signature')}\r\n".encode()
        head = raw_request(headers={**headers, "Transfer-Encoding": "chunked"}, length=False)
        self.assert_status(head + chunks(body, 10)[:-2] + trailer + b"\r\n", 401)
        self.assert_status(head[:-2] + trailer + b"\r\n" + chunks(body, 10), 200)

    def test_endless_trailers_are_refused(self):
        raw = b"5\r\n12345\r\n0\r\n" + b"X-A: %b\r\n" % (b"x" * 1000) * 100
        with self.receiver.connect() as connection:
            connection.send(chunked(raw, b"12345"))
            self.assertIn(connection.read().status, (400, 413, 431))

    def test_a_body_that_ends_early_is_not_accepted(self):
        body = b'{"marker":"early"}'
        for raw in (signed_request(body)[:-1], chunked(b"12\r\n" + body, body)):
            with self.receiver.connect() as connection:
                connection.send(raw)
                connection.socket.shutdown(socket.SHUT_WR)
                with contextlib.suppress(EOFError, ConnectionError):
                    self.assertGreaterEqual(connection.read().status, 400)
        self.assert_not_on_stdout("early")

    def test_a_sender_that_resets_its_connection_does_no_harm(self):
        request = signed_request()
        for raw in (b"", b"POST", request[:50], request[:-5], request):
            connection = self.receiver.connect()
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.send(raw)
            connection.socket.close()
        self.assert_status(signed_request(), 200)


class Expect(HttpTest):
    """Expect: 100-continue."""

    def test_100_comes_before_the_body_and_the_status_after_it(self):
        body = b'{"a":1}'
        forged = raw_request(headers={"Expect": "100-continue"}, body=body)
        for what, raw, sent, status in (
            ("length", with_lines(EXPECT, body=body), body, 200),
            ("other case", with_lines(b"expect: 100-Continue", body=body), body, 200),
            ("chunked", chunked(chunks(body, 3), body, EXPECT), chunks(body, 3), 200),
            ("forged", forged, body, 401),
        ):
            with self.subTest(what), self.receiver.connect() as connection:
                connection.send(raw[: -len(sent)])
                self.assertEqual(connection.read().status, 100)
                connection.send(sent)
                answer = connection.read()
                self.assert_reply(answer, status)
                self.assert_goes_on(connection, answer)

    def test_a_status_that_is_known_before_the_body_comes_without_100(self):
        head = with_lines(EXPECT, body=b"", length=False)[:-2]
        other_path = head.replace(PATH.encode(), b"/other")
        length = b"Content-Length: 5\r\n\r\n"
        self.assert_statuses(404, {"another path": other_path + length})
        self.assert_statuses(405, {"another method": head.replace(b"POST", b"PUT") + length})
        self.assert_statuses(413, {"too large": head + b"Content-Length: 1048577\r\n\r\n"})
        self.assert_statuses(411, {"no length": head + b"\r\n"})
        self.assert_statuses(501, {"a coding": head + b"Transfer-Encoding: gzip\r\n\r\n"})
        self.assert_statuses(400, {"malformed": head + b"X : y\r\n" + length})

    def test_a_client_of_http_1_0_gets_no_100(self):
        raw = with_lines(EXPECT).replace(b"HTTP/1.1", b"HTTP/1.0")
        self.assertEqual(self.receiver.request(raw).status, 200)


class Connections(HttpTest):
    """Requests in pieces, several requests, and whether the connection goes on."""

    def connect(self):
        """Return a connection on which each piece is sent at once."""
        connection = self.receiver.connect()
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def test_a_request_may_come_byte_by_byte(self):
        body = new_body()
        for status, raw in (
            (200, signed_request()),
            (200, chunked(chunks(body, 7), body)),
            (401, raw_request(body=b"12345")),
            (400, raw_request(headers={"X-Header ": "1"})),
            (404, signed_request(path="/other")),
            (200, HEALTH),
        ):
            with self.subTest(raw[:30]), self.connect() as connection:
                with contextlib.suppress(ConnectionError):  # it may be refused before its end
                    for number in range(len(raw)):
                        connection.send(raw[number : number + 1])
                self.assert_reply(connection.read(), status)

    def test_a_request_may_be_cut_in_two_around_the_ends_of_lines(self):
        raw = signed_request()
        ends = [match.start() for match in re.finditer(b"\r\n", raw)]
        with self.connect() as connection:
            for end in ends[-3:]:
                for cut in (end, end + 1, end + 2):
                    connection.send(raw[:cut])
                    time.sleep(0.005)
                    connection.send(raw[cut:])
                    self.assert_reply(connection.read(), 200)

    def test_an_empty_line_before_a_request_is_passed_over(self):
        with self.connect() as connection:
            for first, second in ((b"", b"\r\n"), (b"\r\n\r\n", b""), (b"\r", b"\n")):
                connection.send(first)
                self.assertEqual(self.receiver.health(), 200)  # meanwhile the first part arrives
                connection.send(second + HEALTH)
                self.assertEqual(connection.read().status, 200)

    def test_pipelined_requests_are_answered_in_order(self):
        twice = signed_request()
        requests = [
            (signed_request(), 200, OK),
            (raw_request(body=b"x"), 401, {"error": "unauthorized"}),
            (twice, 200, OK),
            (HEALTH, 200, OK),
            (twice, 200, DUPLICATE),
            (chunked(chunks(b"chunked", 3), b"chunked"), 200, OK),
            (raw_request(body=b""), 401, {"error": "unauthorized"}),
            (signed_request(b""), 200, OK),
            (signed_request(path="/other"), 404, {"error": "not found"}),
        ]
        with self.receiver.connect() as connection:
            connection.send(b"".join(raw for raw, _, _ in requests))
            for number, (_, status, answer) in enumerate(requests):
                with self.subTest(number):
                    found = connection.read()
                    self.assertEqual((found.status, found.json), (status, answer))
            self.assertTrue(connection.is_closed())

    def test_a_connection_carries_fifty_deliveries(self):
        with self.receiver.connect() as connection:
            for _ in range(50):
                connection.send(signed_request())
                answer = connection.read()
                self.assertEqual((answer.status, answer.json), (200, OK))

    def test_connection_is_a_list_of_tokens(self):
        kept, closed = "keep-alive", "close"
        for version, values, expected in (
            ("1.1", [], kept),
            ("1.1", ["keep-alive"], kept),
            ("1.1", ["x-closed"], kept),
            ("1.1", ["close-notify, not-close"], kept),
            ("1.1", ["close"], closed),
            ("1.1", ["Close"], closed),
            ("1.1", ["TE, close"], closed),
            ("1.1", ["keep-alive,close"], closed),
            ("1.1", ["TE", "close"], closed),
            ("1.0", [], closed),
            ("1.0", ["close"], closed),
            ("1.0", ["not-keep-alive"], closed),
            ("1.0", ["keep-alive, close"], closed),
            ("1.0", ["keep-alive"], kept),
            ("1.0", ["Keep-Alive"], kept),
            ("1.0", ["TE , keep-alive"], kept),
        ):
            raw = with_lines(*(f"Connection: {value}".encode() for value in values))
            with self.subTest(version, values=values), self.receiver.connect() as connection:
                connection.send(raw.replace(b"HTTP/1.1", b"HTTP/" + version.encode()))
                answer = connection.read()
                self.assert_reply(answer, 200)
                if expected == kept:
                    self.assert_goes_on(connection, answer)
                else:
                    self.assert_ends(connection, answer)

    def test_http_1_0_needs_no_host(self):
        request = signed_request(version="HTTP/1.0", host=None)
        self.assertEqual(self.receiver.request(request).status, 200)

    def test_every_401_is_the_same_and_keeps_the_connection(self):
        body, headers = signed()
        answers = []
        with self.receiver.connect() as connection:
            for refused in (
                {**headers, "X-Central-Signature": "x"},
                {name: "" for name in headers},
                central_headers(body, timestamp=now_stamp(-50 * 3600)),
                central_headers(body, token="another"),
            ):
                connection.send(raw_request(headers=refused, body=body))
                answers.append(connection.read())
                self.assert_reply(answers[-1], 401)
            self.assert_goes_on(connection, answers[-1])
        self.assertEqual(len({(one.body, one.headers["www-authenticate"]) for one in answers}), 1)

    def test_head_is_answered_without_a_body(self):
        def head(path):
            return raw_request("HEAD", path, length=False)

        with self.receiver.connect() as connection:
            connection.send(HEALTH + head("/health") + head("/metrics") + signed_request())
            full = connection.read()
            self.assert_reply(full, 200)
            self.assertEqual(full.json, OK)
            answer = connection.read(head_only=True)
            self.assert_reply(answer, 200, head_only=True)
            self.assertEqual(answer.headers["content-length"], full.headers["content-length"])
            self.assertEqual(connection.read(head_only=True).status, 200)
            self.assert_reply(connection.read(), 200)
            connection.send(head(PATH))
            self.assert_reply(connection.read(head_only=True), 405, head_only=True)
            self.assertTrue(connection.is_closed())


class Metrics(HttpTest):
    config = config_of(webhook=[hook("first"), {**hook("second"), "name": 'a "quote" \\ back'}])

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.at_start = cls.receiver.metrics()

    def find(self, metrics, *labels):
        """Return the one series with these in its name."""
        names = [name for name in metrics if all(label in name for label in labels)]
        self.assertEqual(len(names), 1, (labels, names))
        return metrics[names[0]]

    def test_metrics_are_plain_text(self):
        headers = self.receiver.request(METRICS).headers
        self.assertTrue(headers["content-type"].startswith("text/plain"))
        self.assertNotIn("server", headers)

    def test_all_series_exist_at_0_from_the_start_and_no_sender_adds_one(self):
        for name, value in self.at_start.items():
            self.assertLessEqual(value, 1 if "flight" in name else 0, name)
        for result in ("accepted", "duplicate", "signature", "stale"):
            self.find(self.at_start, 'webhook="first"', f'"{result}"')
            self.find(self.at_start, r'webhook="a \"quote\" \\ back"', f'"{result}"')
        body = new_body()
        stale = central_headers(body, timestamp=now_stamp(-(10**6)))
        evil = {"X-Evil": "evil"}
        start = self.receiver.metrics()
        once = signed_request(body, path="/first")
        for raw in (
            *(once, once, signed_request(path="/second"), signed_request(path="/evil-label")),
            raw_request(path="/first", headers=stale, body=body),
            signed_request(path="/first", method="EVILMETHOD"),
            raw_request(path="/first", headers=evil, body=b"forged"),
            with_lines(b"X-Evil : x"),
            signed_request(version="HTTP/2.0"),
            raw_request(path="/first", length=False),
            raw_request(path="/first", headers={"Content-Length": "9" * 12}, length=False),
            raw_request(path="/first", headers={"Transfer-Encoding": "evil"}, length=False),
            b"x" * 9000,
            with_lines(b"X-Evil: " + b"x" * 70000),
        ):
            self.receiver.request(raw)
        end = self.receiver.metrics()
        self.assertEqual(set(self.at_start), set(end))
        self.assertFalse([name for name in end if "evil" in name.lower()])
        moved = {name: end[name] - start[name] for name in end}
        for result in ("accepted", "duplicate", "stale", "signature"):
            self.assertEqual(self.find(moved, 'webhook="first"', f'"{result}"'), 1, result)
        self.assertEqual(self.find(moved, 'webhook="a', '"accepted"'), 1)
        for reason in "not_found method malformed version length large long coding".split():
            with self.subTest(reason):
                self.assertTrue([name for name in moved if reason in name and moved[name]], moved)

    def test_bytes_and_the_time_of_the_last_delivery_are_there(self):
        body = new_body()
        before, start = time.time(), self.receiver.metrics()
        request = signed_request(body, path="/first")
        self.assertEqual(self.receiver.request(request).status, 200)
        end = self.receiver.metrics()
        moved = {name: value - start[name] for name, value in end.items() if value > start[name]}
        self.assertEqual([value for name, value in moved.items() if "bytes" in name], [len(body)])
        ((name, moment),) = ((name, end[name]) for name in moved if end[name] > 10**9)
        self.assertIn('webhook="first"', name)
        self.assertTrue(before - 1 <= moment <= time.time() + 1)

    def test_requests_in_flight_are_a_gauge(self):
        deadline_poll(lambda: self.receiver.in_flight() == 0)  # those before may be ending
        with self.receiver.connect() as connection:
            connection.send(signed_request(path="/first")[:-1])
            deadline_poll(lambda: self.receiver.in_flight() == 1)
        deadline_poll(lambda: self.receiver.in_flight() == 0)
