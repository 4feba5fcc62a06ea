"""Whatever comes in: a parser returns or raises its own error, nothing else, and never hangs.

The inputs are those of PyPI's hypothesis: random ones, and pieces of good input in random order,
which get further into a parser. With CI set they are the same in every run.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import time
import unittest
from datetime import datetime, timezone

from central_webhook_client import (
    ConfigError,
    Oidc,
    Refusal,
    Request,
    RsaKey,
    SignatureError,
    StructuredField,
    diagnose_message_signature,
    escape_text,
    parse_public_url,
    parse_timestamp,
    read_config,
    verify_access_token,
    verify_message_signature,
    verify_signature,
)

from ..support import PATH, Receiver, central_headers, config_of, new_body, raw_request
from . import parts

parts.need("hypothesis", lambda: importlib.util.find_spec("hypothesis"))

from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# No database of examples beside the sources; the deadline is what "never hangs" means.
QUICK = settings(
    max_examples=200,
    deadline=1000,
    database=None,
    derandomize=parts.is_set("CI"),
    suppress_health_check=list(HealthCheck),
)
OVER_HTTP = settings(QUICK, max_examples=100, deadline=5000)
NOW = 1754963403.0

latin = st.text(st.characters(max_codepoint=255))
any_text = st.text()


def mixed(pieces, other=latin, size=20):
    """Return a strategy for texts put together from pieces of good input and from random ones."""
    return st.lists(st.one_of(st.sampled_from(pieces), other), max_size=size).map("".join)


FIELD_PIECES = [
    "sig1",
    "sig2",
    "a",
    "*",
    "=",
    ";",
    ",",
    " ",
    "\t",
    "(",
    ")",
    ":",
    "::",
    ":YQ==:",
    ":YQ:",
    ":=:",
    '"',
    "\\",
    '"a"',
    '"\\""',
    '"@method"',
    '"@target-uri"',
    '"@authority"',
    '"@path"',
    '"date"',
    '"@query-param";name="a"',
    "sig1=",
    "?1",
    "?0",
    "?",
    "0",
    "1",
    "-1",
    "-",
    "999999999999999",
    "1000000000000000",
    "1.5",
    "1.2345",
    "tok/en",
    ";created=1754963403",
    ";created",
    ";expires=1",
    ';alg="hmac-sha256"',
    ';keyid="x"',
    "\n",
    "\r",
    "\x00",
    "\x7f",
    "\u00e9",
    "((",
    "A",
]
fields = mixed(FIELD_PIECES)


def serialise(member):
    """Write a member of a dictionary as RFC 8941 section 4.1 says."""
    items, parameters = member
    return f"({' '.join(items)}){parameters}"


class StructuredFieldTest(unittest.TestCase):
    """StructuredField (RFC 8941)."""

    @QUICK
    @given(fields)
    def test_any_text_is_parsed_or_refused_with_its_own_error(self, text):
        try:
            found = StructuredField(text).parse_dictionary()
        except SignatureError:
            return
        self.assertTrue(found)
        # What was accepted has a canonical form that parses to the same again.
        canonical = ", ".join(f"{name}={member}" for name, member in found.items())
        again = StructuredField(canonical).parse_dictionary()
        self.assertEqual(list(map(str, found.values())), list(map(str, again.values())))

    @QUICK
    @given(
        st.dictionaries(
            st.from_regex(r"[a-z*][a-z0-9_.*-]{0,6}", fullmatch=True),
            st.tuples(
                st.lists(
                    st.from_regex(r'"(?:[ !#-\[\]-~]|\\["\\]){0,8}"', fullmatch=True), max_size=4
                ),
                st.sampled_from(
                    [
                        "",
                        ";created=1754963403",
                        ';keyid="a\\"b"',
                        ";flag",
                        ";a=:YQ==:;b=?0;c=1.5;d=tok/en",
                    ]
                ),
            ),
            min_size=1,
            max_size=3,
        )
    )
    def test_what_is_well_formed_is_accepted_and_serialised_to_the_same_text(self, wanted):
        texts = {name: serialise(member) for name, member in wanted.items()}
        field = " , \t".join(f"{name}={text}" for name, text in texts.items())
        found = StructuredField(field).parse_dictionary()
        self.assertEqual(texts, {name: str(member) for name, member in found.items()})

    @QUICK
    @given(
        fields,
        fields,
        st.text(st.characters(max_codepoint=31, exclude_characters=["\t"]), min_size=1, max_size=2),
    )
    def test_a_control_character_within_a_string_is_never_accepted(self, before, after, control):
        for text in (
            f'sig1=("{control}")',
            f'sig1=("a{control}b");keyid="x"',
            f'sig1="{control}"',
            f'{before}"{control}"{after}',
        ):
            try:
                found = StructuredField(text).parse_dictionary()
            except SignatureError:
                continue
            self.assertFalse(re.search("[\x00-\x08\x0a-\x1f]", "".join(map(str, found.values()))))

    def test_long_repetitions_are_read_in_linear_time(self):
        for piece in (
            '"',
            "(",
            "a=",
            ";a",
            "a,",
            '"\\',
            ":A",
            "1",
            " ",
            "a=( ",
            "a=()",
            "(" * 50 + '"x"',
        ):
            for prefix in ("", "a=", "a=(", 'a=("'):
                with self.subTest(prefix=prefix, piece=piece):
                    started = time.monotonic()
                    try:
                        text = prefix + piece * (60000 // len(piece))
                        StructuredField(text).parse_dictionary()
                    except SignatureError:
                        pass
                    self.assertLess(time.monotonic() - started, 2)


HEADER_VALUES = st.one_of(fields, latin)
URLS = [
    "https://www.example.com/centralwebhook",
    "https://example.com",
    "http://[::1]:8080/a//b?",
    "https://EXAMPLE.com:443/",
]


class SignatureTest(unittest.TestCase):
    """verify_message_signature and verify_signature."""

    @QUICK
    @given(
        st.fixed_dictionaries(
            {"signature-input": fields, "signature": fields},
            optional={"date": HEADER_VALUES, "content-digest": HEADER_VALUES, "host": latin},
        ),
        st.one_of(st.none(), latin),
        st.sampled_from(URLS),
        st.lists(
            any_text.filter(bool).filter(lambda text: text.isprintable()), min_size=1, max_size=3
        ),
        st.binary(max_size=20),
    )
    def test_no_random_signature_is_accepted_or_raises_anything_else(
        self, headers, query, url, tokens, body
    ):
        request = Request("POST", "/centralwebhook", query, "1.1", headers, frozenset(), body)
        with self.assertRaises(SignatureError):
            verify_message_signature(request, tokens, parse_public_url(url), NOW)
        hint = diagnose_message_signature(request, tokens, parse_public_url(url), NOW)
        self.assertEqual(escape_text(hint), hint)

    @QUICK
    @given(
        covered=st.lists(
            st.sampled_from(
                [piece for piece in FIELD_PIECES if piece.startswith('"@')]
                + ['"date"', '"x";sf', '"x";key="a"']
            ),
            max_size=6,
        ),
        parameters=mixed(
            [piece for piece in FIELD_PIECES if piece.startswith(";")] + [";nonce=1", ";tag=?1"],
            st.just(""),
        ),
        date=st.one_of(st.just("Tue, 12 Aug 2025 01:50:03 GMT"), latin),
    )
    def test_well_formed_lists_with_a_wrong_signature_are_refused(self, covered, parameters, date):
        value = f"sig1=({' '.join(covered)}){parameters}"
        headers = {
            "signature-input": value,
            "signature": "sig1=:" + "A" * 43 + "=:",
            "date": date,
            "x": "a=1",
        }
        request = Request("POST", "/x", "a=1", "1.1", headers, frozenset(), b"")
        with self.assertRaises(SignatureError):
            verify_message_signature(request, ["token"], parse_public_url(URLS[0]), NOW)
        hint = diagnose_message_signature(request, ["token"], parse_public_url(URLS[0]), NOW)
        self.assertEqual("", hint)

    @QUICK
    @given(
        st.dictionaries(st.sampled_from([name.lower() for name in central_headers(b"")]), any_text),
        st.binary(max_size=50),
        any_text.filter(bool).filter(lambda text: text.isprintable()),
    )
    def test_no_random_classic_signature_is_accepted_or_raises_anything_else(
        self, headers, body, token
    ):
        with self.assertRaises(SignatureError):
            verify_signature(body, headers, token)

    @QUICK
    @given(st.binary(max_size=50), st.integers(min_value=0), st.integers(1, 255))
    def test_one_changed_byte_of_the_body_or_the_signature_is_refused(self, body, place, change):
        headers = {name.lower(): value for name, value in central_headers(body).items()}
        self.assertIsNone(verify_signature(body, headers, "webhook-secret-token"))
        signature = bytearray(headers["x-central-signature"].encode())
        signature[place % len(signature)] ^= change
        with self.assertRaises(SignatureError):
            verify_signature(
                body,
                {**headers, "x-central-signature": signature.decode("latin-1")},
                "webhook-secret-token",
            )
        if body:
            changed = bytearray(body)
            changed[place % len(body)] ^= change
            with self.assertRaises(SignatureError):
                verify_signature(bytes(changed), headers, "webhook-secret-token")

    @QUICK
    @given(
        st.one_of(
            any_text,
            mixed(
                [
                    "https",
                    "http",
                    "://",
                    ":",
                    "/",
                    "[",
                    "]",
                    "::1",
                    "@",
                    "#",
                    "?",
                    "a.example",
                    "99999",
                ]
            ),
        )
    )
    @example("https://[")
    @example("https://a:99999/")
    @example("https://a:x/")
    @example("https://[::1")
    @example("https://\u2100/")
    def test_any_text_is_a_public_url_or_a_value_error(self, text):
        try:
            url = parse_public_url(text)
        except ValueError:
            return
        self.assertTrue(url.path.startswith("/"))
        for spelling in url.spellings:
            self.assertIn(spelling.scheme.lower(), ("http", "https"))
            self.assertTrue(spelling.authority and spelling.target)


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), any_text),
    lambda children: st.one_of(
        st.lists(children, max_size=4), st.dictionaries(any_text, children, max_size=4)
    ),
    max_leaves=10,
)


def objects(names, values=json_values):
    """Return a strategy for JSON objects with some of these keys."""
    return st.dictionaries(st.one_of(st.sampled_from(names), any_text), values, max_size=8)


class AccessTokenTest(unittest.TestCase):
    """verify_access_token."""

    OIDC = Oidc("https://issuer.example.com/.well-known", "audience", "client", None)
    KEYS = [RsaKey("one", "", (1 << 2047) + 1, 65537), RsaKey(None, "RS256", (1 << 2048) - 1, 3)]

    def refuse(self, value):
        request = Request("POST", PATH, None, "1.1", {"authorization": value}, frozenset(), b"{}")
        with self.assertRaises(Refusal) as caught:
            verify_access_token(
                request,
                self.OIDC,
                lambda kid, algorithm: ("https://issuer.example.com", self.KEYS),
                NOW,
            )
        self.assertEqual("oidc", caught.exception.reason)

    @QUICK
    @given(
        st.one_of(
            latin,
            mixed(["Bearer ", "bearer", ".", "e30", "eyJhbGciOiJSUzI1NiJ9", "=", "-_", "AAAA"]),
        )
    )
    def test_any_header_is_refused_with_its_own_error(self, value):
        self.refuse(value)

    @QUICK
    @given(
        objects(
            ["alg", "kid", "crit", "typ"],
            st.one_of(json_values, st.sampled_from(["RS256", "RS384", "RS512", "none", "one"])),
        ),
        objects(["iss", "aud", "exp", "nbf", "client_id", "azp"]),
        st.binary(max_size=300),
    )
    def test_any_json_web_token_is_refused_with_its_own_error(self, header, claims, signature):
        encoded = [
            base64url(json.dumps(value).encode("utf-8", "surrogatepass"))
            for value in (header, claims)
        ]
        self.refuse("Bearer " + ".".join([*encoded, base64url(signature)]))

    @QUICK
    @given(
        st.binary(max_size=60), st.binary(max_size=60), st.sampled_from([0, 1, 255, 256, 257, 300])
    )
    def test_any_bytes_for_header_claims_and_signature_are_refused(self, header, claims, size):
        self.refuse("Bearer " + ".".join(map(base64url, (header, claims, b"\xff" * size))))
        self.refuse(
            "Bearer " + ".".join(map(base64url, (b'{"alg": "RS256"}', claims, b"\x00" * size)))
        )


class TextTest(unittest.TestCase):
    """parse_timestamp and escape_text."""

    TIME_PIECES = [
        "2016",
        "07",
        "12",
        "-",
        ":",
        "T",
        "t",
        " ",
        "13",
        "14",
        "19",
        "60",
        "24",
        "00",
        ".",
        ",",
        "123",
        "Z",
        "+",
        "0",
    ]

    @QUICK
    @given(
        st.one_of(
            any_text,
            mixed(
                [*TIME_PIECES, "2016-07-12T13:14:19", "-07:00", "\u0662", "9" * 30, "99:99"],
                any_text,
                8,
            ),
        )
    )
    def test_any_time_stamp_is_understood_or_none(self, text):
        moment = parse_timestamp(text)
        self.assertIsInstance(moment, (float, type(None)))
        if moment is not None:
            self.assertTrue(-1e12 < moment < 1e12, moment)

    @QUICK
    @given(st.datetimes(datetime(1000, 1, 1), timezones=st.just(timezone.utc)))
    def test_what_python_writes_as_iso_8601_is_understood_to_the_microsecond(self, moment):
        for text in (
            moment.isoformat(),
            moment.isoformat().replace("+00:00", "Z"),
            moment.isoformat().replace("+00:00", ""),
        ):
            self.assertAlmostEqual(moment.timestamp(), parse_timestamp(text), delta=2e-5)

    @QUICK
    @given(st.integers(-23 * 60 - 59, 23 * 60 + 59), st.integers(0, 4 * 10**9))
    def test_an_offset_moves_the_time_by_itself(self, minutes, moment):
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))
        offset = f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}"
        self.assertEqual(moment - 60 * minutes, parse_timestamp(text + offset))

    @QUICK
    @given(st.one_of(any_text, st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"]))))
    @example("\u202e\u2066\x1b[2J\r\n\x85\u2028\ud800\U000e0001")
    def test_escaped_text_has_no_control_bidi_or_line_separator_and_loses_nothing(self, text):
        escaped = escape_text(text)
        self.assertNotRegex(
            escaped, "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
        )
        self.assertEqual(1, len(escaped.splitlines() or [""]))
        if "\\" not in text and '"' not in text:
            self.assertEqual(json.loads(json.dumps(text)), json.loads(f'"{escaped}"'))


CONFIG_VALUES = st.one_of(
    json_values,
    st.sampled_from(
        [
            "localhost",
            "8010",
            8010,
            0,
            -1,
            65536,
            True,
            10**400,
            1e999,
            float("nan"),
            "/path",
            "/health",
            "central",
            "new-central",
            "https://a.example/b",
            "https://[",
            "http://127.0.0.1/x",
            "<token>",
            " t ",
            "",
            [],
            {},
            ["a", ""],
            ["a", 1],
            "\ud800",
        ]
    ),
)
api_keys = st.one_of(CONFIG_VALUES, objects(["header", "field", "value"], CONFIG_VALUES))
oidcs = st.one_of(
    CONFIG_VALUES, objects(["well_known_url", "audience", "client_id", "issuer"], CONFIG_VALUES)
)


def some_of(**values):
    """Return a strategy for objects with some of these keys, and now and then another one."""
    known = st.fixed_dictionaries({}, optional=values)
    return st.one_of(
        known,
        st.builds(
            lambda one, two: {**one, **two}, known, objects(["typo", "tokne"], CONFIG_VALUES)
        ),
    )


webhooks = some_of(
    name=CONFIG_VALUES,
    type=CONFIG_VALUES,
    path=CONFIG_VALUES,
    token=CONFIG_VALUES,
    token_file=st.one_of(
        CONFIG_VALUES,
        st.sampled_from(["${NO_SUCH_VARIABLE}/x", "/dev/null", "\x00", "/", "a" * 5000]),
    ),
    replay_window_hours=CONFIG_VALUES,
    public_url=CONFIG_VALUES,
    api_key=api_keys,
    oidc=oidcs,
)
configs = some_of(
    webclient_info=st.one_of(
        CONFIG_VALUES,
        some_of(
            host=CONFIG_VALUES,
            port=CONFIG_VALUES,
            log_file=CONFIG_VALUES,
            max_body_bytes=CONFIG_VALUES,
            request_timeout_seconds=CONFIG_VALUES,
            max_connections=CONFIG_VALUES,
        ),
    ),
    central_info=st.one_of(
        CONFIG_VALUES,
        some_of(webhook=st.one_of(CONFIG_VALUES, webhooks, st.lists(webhooks, max_size=3))),
    ),
)


class ConfigTest(unittest.TestCase):
    """read_config."""

    def read(self, data):
        try:
            read_config(data)
        except ConfigError as error:
            self.assertTrue(error.args)
            for mistake in error.args:
                self.assertIsInstance(mistake, str)

    @QUICK
    @given(
        st.one_of(
            st.binary(),
            mixed(['{"', '"', "{", "}", "[", "]", ":", ",", "1", "webclient_info", "\ufeff"]).map(
                str.encode
            ),
        )
    )
    @example(b"[" * 200000)
    @example(b'{"a":' * 100000)
    @example(b"9" * 5000)
    @example(b'{"a": 1e999999}')
    def test_any_bytes_are_read_or_refused_with_its_own_error(self, data):
        self.read(data)

    @settings(QUICK, max_examples=400)
    @given(configs)
    @example({"webclient_info": 8010, "central_info": {"webhook": [None, None, {}, {}]}})
    def test_any_json_is_read_or_refused_with_its_own_error(self, value):
        self.read(json.dumps(value).encode())

    @QUICK
    @given(
        any_text.filter(lambda text: text.isprintable()).map(
            lambda text: f"zSMrzuYr{text}blgBfByy2JrM"
        )
    )
    def test_no_mistake_shows_a_token(self, token):
        shown = json.dumps(token)[1:-1]
        for name, value in (
            ("token", token + " "),
            ("token", [token, " " + token]),
            ("token", [[token]]),
            ("token", {token: 1}),
        ):
            config = config_of(webhook={name: value, "public_url": "x"})
            with self.assertRaises(ConfigError) as caught:
                read_config(json.dumps(config).encode())
            for mistake in caught.exception.args:
                self.assertNotIn(token, mistake)
                self.assertNotIn(shown, mistake)


HEAD_PIECES = [
    "POST",
    "GET",
    "HEAD",
    " ",
    "/centralwebhook",
    "/health",
    "/metrics",
    "/",
    "*",
    "?",
    "HTTP/1.1",
    "HTTP/1.0",
    "HTTP/2.0",
    "\r\n",
    "\n",
    "\r",
    "\r\n\r\n",
    "Host: a",
    "Host:",
    "Content-Length: ",
    "0",
    "5",
    "-1",
    "+5",
    "99999999999999999999",
    ":",
    "\t",
    "\x00",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked",
    "Connection: close",
    "Connection: keep-alive",
    ";",
    ",",
    "Expect: 100-continue",
    "X-Central-Signature: x",
    "Authorization: Bearer a.b.c",
    "\u00e9",
    "%",
    "http://a",
    "x" * 300,
    "5\r\nhello\r\n",
]
ANSWER = re.compile(
    rb"HTTP/1\.1 (?P<status>[0-9]{3}) [A-Za-z -]+\r\n(?:[A-Za-z-]+: [^\r\n]*\r\n)+\r\n"
)


class HttpTest(unittest.TestCase):
    """A receiver that gets anything."""

    @classmethod
    def setUpClass(cls):
        cls.receiver = Receiver(config_of(request_timeout_seconds=2)).__enter__()
        cls.addClassCleanup(cls.receiver.__exit__)

    def exchange(self, data):
        """Send all bytes and the end of the stream; return all bytes that come back."""
        received = b""
        with self.receiver.connect(timeout=8) as connection:
            try:
                connection.send(data)
                connection.socket.shutdown(1)
                while True:
                    part = connection.socket.recv(65536)
                    if not part:
                        break
                    received += part
            except ConnectionError:
                pass
        return received

    def check(self, data):
        received = self.exchange(data)
        if received:
            self.assertTrue(ANSWER.match(received), received)
        statuses = {int(match["status"]) for match in ANSWER.finditer(received)}
        # 501 and 505 are what HTTP has for a coding and a version that are not implemented.
        self.assertLessEqual({status for status in statuses if status >= 500}, {501, 505})
        return statuses

    def tearDown(self):
        body = new_body()
        answer = self.receiver.request(raw_request("POST", PATH, central_headers(body), body))
        self.assertEqual(200, answer.status)
        self.assertEqual(
            [],
            [
                line
                for line in self.receiver.stderr_lines
                if "Traceback" in line or "internal" in line
            ],
        )
        self.assertEqual(
            [],
            [
                line
                for line in self.receiver.stderr_lines
                if not re.match(r"\d{4}-\d\d-\d\dT", line)
            ],
        )

    @OVER_HTTP
    @given(st.binary(max_size=200))
    def test_any_bytes_get_a_well_formed_answer_and_no_200(self, data):
        self.assertNotIn(200, self.check(data))

    @OVER_HTTP
    @given(mixed(HEAD_PIECES, size=40))
    def test_pieces_of_requests_get_well_formed_answers(self, text):
        self.check(text.encode("latin-1"))

    @OVER_HTTP
    @given(
        st.sampled_from(["POST", "GET", "HEAD", "PUT", "post", "P\u00d6ST", ""]),
        st.one_of(
            st.sampled_from(
                [PATH, "/health", "/metrics", "*", "//", PATH + "?a", "http://a" + PATH]
            ),
            latin,
        ),
        st.lists(
            st.tuples(
                mixed(["Content-Length", "Transfer-Encoding", "X-A", "Host", " "], latin, 2), latin
            ),
            max_size=6,
        ),
        st.binary(max_size=50),
    )
    def test_any_request_gets_a_well_formed_answer(self, method, path, headers, body):
        self.check(raw_request(method, path, headers, body))

    @OVER_HTTP
    @given(
        st.lists(
            st.tuples(
                mixed(["5", "0", "a", "A", "ff", ";", "x=", '"', "g", "-"], latin, 3),
                st.binary(max_size=20),
            ),
            max_size=5,
        )
    )
    def test_any_chunked_body_gets_a_well_formed_answer_and_no_200_without_a_signature(
        self, chunks
    ):
        body = b"".join(size.encode("latin-1") + b"\r\n" + data + b"\r\n" for size, data in chunks)
        head = raw_request("POST", PATH, {"Transfer-Encoding": "chunked"}, length=False)
        self.assertNotIn(200, self.check(head + body + b"0\r\n\r\n"))

    @OVER_HTTP
    @given(st.lists(st.integers(0, 500), max_size=6))
    def test_a_signed_delivery_cut_into_any_pieces_is_accepted(self, cuts):
        body = new_body()
        request = raw_request("POST", PATH, central_headers(body), body)
        cuts = sorted(min(cut, len(request)) for cut in cuts)
        with self.receiver.connect() as connection:
            for start, end in zip([0, *cuts], [*cuts, len(request)]):
                connection.send(request[start:end])
            self.assertEqual(200, connection.read().status)

    @OVER_HTTP
    @given(st.binary(max_size=300))
    def test_any_signed_body_is_kept_in_one_line_of_ascii(self, body):
        before = len(self.receiver.stdout_lines)
        answer = self.receiver.request(raw_request("POST", PATH, central_headers(body), body))
        self.assertEqual((200, {"status": "ok"}), (answer.status, answer.json))
        line = self.receiver.wait_for_stdout(before + 1)[-1]
        self.assertTrue(line.isascii() and line.isprintable())
        kept = json.loads(line)
        if "body_base64" in kept:
            self.assertEqual(body, base64.b64decode(kept["body_base64"]))
        elif "body" in kept:
            self.assertEqual(body, kept["body"].encode())
        else:
            self.assertEqual(json.loads(body), kept["alert"])

    @OVER_HTTP
    @given(json_values)
    def test_any_json_that_is_signed_is_kept_with_the_same_value(self, value):
        try:
            body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except ValueError:  # NaN, and half a surrogate pair
            return
        before = len(self.receiver.stdout_lines)
        self.assertEqual(
            200,
            self.receiver.request(raw_request("POST", PATH, central_headers(body), body)).status,
        )
        self.assertEqual(value, json.loads(self.receiver.wait_for_stdout(before + 1)[-1])["alert"])
