"""Signatures of new Central (RFC 9421), made by PyPI's http-message-signatures."""

from __future__ import annotations

import base64
import datetime
import email.utils
import hashlib
import re
import time
import unittest
from types import SimpleNamespace

from central_webhook_client import (
    Request,
    SignatureError,
    parse_public_url,
    verify_message_signature,
)

from ..support import PATH, Receiver, config_of, new_body, raw_request
from . import parts

KEY = "5e175c081f53ca19894cbb6d541560f5c5e9a0754ae69639ef4d56b774b4e04e"
URL = "https://hooks.example.com" + PATH
VENDOR = (
    "@method",
    "@target-uri",
    "@authority",
    "@scheme",
    "@path",
    "date",
)  # what new Central covers
NOW = 1754963403


def setUpModule():
    parts.need_module("http_message_signatures")


def sign(url, headers, covered=VENDOR, key=KEY, created=NOW, method="POST", **options):
    """Sign with the library; return the headers with the signature among them."""
    from http_message_signatures import HTTPMessageSigner, algorithms
    from http_message_signatures.resolvers import MappingKeyResolver

    resolver = MappingKeyResolver(
        public_keys={}, private_keys={"webhook-1": key.encode() if isinstance(key, str) else key}
    )
    signer = HTTPMessageSigner(signature_algorithm=algorithms.HMAC_SHA256, key_resolver=resolver)
    message = SimpleNamespace(method=method, url=url, headers=dict(headers))
    moment = datetime.datetime.fromtimestamp(created, datetime.timezone.utc)
    signer.sign(
        message, key_id="webhook-1", created=moment, covered_component_ids=covered, **options
    )
    return message.headers


def http_date(moment):
    return email.utils.formatdate(moment, usegmt=True)


def request_of(headers, url=URL, method="POST", body=b"{}"):
    """Return the request as a receiver behind a proxy sees it, with another Host."""
    path, mark, query = url.partition("//")[2].partition("/")[2].partition("?")
    fields = {name.lower(): value for name, value in headers.items()}
    fields["host"] = "127.0.0.1:8010"
    return Request(method, "/" + path, query if mark else None, "1.1", fields, frozenset(), body)


def moment_in(seconds):
    return datetime.datetime.fromtimestamp(NOW + seconds, datetime.timezone.utc)


class FunctionTest(unittest.TestCase):
    """verify_message_signature, called directly."""

    def verify(self, headers, url=URL, public_url=None, tokens=(KEY,), now=NOW, **options):
        public_url = parse_public_url(public_url or url.partition("?")[0])
        return verify_message_signature(
            request_of(headers, url, **options), tokens, public_url, now
        )

    def setUp(self):
        self.headers = {"Date": http_date(NOW), "Content-Type": "application/json", "X-Empty": ""}

    def test_what_the_library_signs_is_verified(self):
        query = URL + "?b=%20a+c&a=&pet=dog%2Fcat&x~y=%7E"
        rows = [
            ("as the vendor documents", URL, VENDOR, {}),
            ("with a query", query, VENDOR, {}),
            (
                "with an empty query",
                URL + "?",
                ("@method", "@target-uri", "@request-target", "date"),
                {},
            ),
            ("the query of a URL without", URL, (*VENDOR, "@query"), {}),
            ("in another order", URL, tuple(reversed(VENDOR)), {}),
            ("authority and path", URL, ("@method", "@authority", "@path"), {}),
            (
                "the whole of section 2.2",
                query,
                (*VENDOR, "@request-target", "@query"),
                {},
            ),
            ("header fields", URL, (*VENDOR, "content-type", "x-empty"), {}),
            ("without date", URL, VENDOR[:-1], {}),
            ("without alg", URL, VENDOR, {"include_alg": False}),
            (
                "all parameters",
                URL,
                VENDOR,
                {"expires": moment_in(60), "nonce": 'n"o\\nce', "tag": "central", "label": "hpe-1"},
            ),
            ("a port", "https://hooks.example.com:8443/a/b", VENDOR, {}),
            (
                "a default port",
                "https://hooks.example.com:443/a/b",
                ("@method", "@authority", "@path"),
                {},
            ),
            (
                "an upper-case host",
                "https://Hooks.Example.COM/a/b",
                ("@method", "@authority", "@path"),
                {},
            ),
            ("an IPv6 address", "https://[2001:db8::1]:8443/a", VENDOR, {}),
            ("no path", "https://hooks.example.com/", VENDOR, {}),
            ("an encoded path", "https://hooks.example.com/a%2Fb//c;d=e", VENDOR, {}),
        ]
        for what, url, covered, options in rows:
            with self.subTest(what):
                position, created = self.verify(sign(url, self.headers, covered, **options), url)
                self.assertEqual((0, NOW), (position, created))

    def test_a_url_typed_without_a_path_is_verified_whether_or_not_the_signer_adds_the_slash(self):
        for signed in ("https://hooks.example.com", "https://hooks.example.com/"):
            with self.subTest(signed):
                headers = sign(signed, self.headers)
                self.verify(
                    headers, "https://hooks.example.com/", public_url="https://hooks.example.com"
                )

    def test_a_key_that_is_hexadecimal_is_tried_as_text_and_decoded(self):
        for key in (KEY, bytes.fromhex(KEY)):
            with self.subTest(type(key)):
                self.assertEqual(0, self.verify(sign(URL, self.headers, key=key))[0])

    def test_the_position_of_the_token_that_matched_is_returned(self):
        self.assertEqual(2, self.verify(sign(URL, self.headers), tokens=("a", "b", KEY))[0])

    def test_any_change_to_what_is_signed_is_refused(self):
        url = URL + "?site=1"
        covered = (*VENDOR, "@query", "content-type")
        signed = sign(url, self.headers, covered, expires=moment_in(60))
        self.verify(signed, url)
        rows = [
            ("method", {"method": "PUT"}, {}),
            ("query", {"url": URL + "?site=2", "public_url": URL}, {}),
            ("no query", {"url": URL, "public_url": URL}, {}),
            ("scheme", {"public_url": URL.replace("https", "http")}, {}),
            ("authority", {"public_url": URL.replace("hooks", "evil")}, {}),
            ("port", {"public_url": URL.replace(".com", ".com:8443")}, {}),
            ("path", {"public_url": URL + "x"}, {}),
            ("token", {"tokens": (KEY[:-1] + "f",)}, {}),
            ("expired", {"now": NOW + 61}, {}),
            ("date", {}, {"Date": http_date(NOW + 1)}),
            ("content type", {}, {"Content-Type": "text/plain"}),
            (
                "created",
                {},
                {
                    "Signature-Input": signed["Signature-Input"].replace(
                        f"created={NOW}", f"created={NOW + 1}"
                    )
                },
            ),
            (
                "algorithm",
                {},
                {
                    "Signature-Input": signed["Signature-Input"].replace(
                        "hmac-sha256", "hmac-sha512"
                    )
                },
            ),
            (
                "keyid",
                {},
                {"Signature-Input": signed["Signature-Input"].replace("webhook-1", "webhook-2")},
            ),
            (
                "a component less",
                {},
                {"Signature-Input": signed["Signature-Input"].replace(' "content-type"', "")},
            ),
            ("label", {}, {"Signature": signed["Signature"].replace("pyhms", "other")}),
        ]
        for what, options, headers in rows:
            with self.subTest(what):
                self.assertTrue(
                    options or any(signed[name] != value for name, value in headers.items())
                )
                with self.assertRaises(SignatureError):
                    self.verify({**signed, **headers}, **{"url": url, **options})

    def test_a_good_signature_without_method_or_target_is_refused(self):
        for covered in (
            VENDOR[1:],
            ("@method", "@authority", "date"),
            ("@method", "@path", "date"),
            ("@method", "@query", "date"),
        ):
            with self.subTest(covered), self.assertRaises(SignatureError):
                self.verify(sign(URL, self.headers, covered))

    def test_a_content_digest_that_is_covered_protects_the_body(self):
        body = b'{"summary": "AP down"}'
        for algorithm in ("sha-256", "sha-512"):
            digest = base64.b64encode(
                hashlib.new(algorithm.replace("-", ""), body).digest()
            ).decode()
            headers = {**self.headers, "Content-Digest": f"{algorithm}=:{digest}:"}
            headers = sign(URL, headers, (*VENDOR, "content-digest"), use_existing_digest=True)
            with self.subTest(algorithm):
                self.verify(headers, body=body)
                with self.assertRaises(SignatureError):
                    self.verify(headers, body=body.replace(b"down", b"over"))

    def test_the_digest_that_the_library_makes_of_the_body_is_verified(self):
        body = b'{"summary": "AP down"}'
        headers = sign(URL, self.headers, body=body)
        self.assertIn("content-digest", headers["Signature-Input"])
        self.verify(headers, body=body)
        with self.assertRaises(SignatureError):
            self.verify(headers, body=body + b" ")

    def test_one_good_signature_among_bad_ones_is_enough_and_all_bad_are_not(self):
        headers = sign(URL, self.headers, key=b"wrong", label="first")
        headers = sign(URL, headers, label="second", append_if_signature_exists=True)
        headers = sign(URL, headers, key=b"wrong", label="third", append_if_signature_exists=True)
        self.assertEqual(
            ["first", "second", "third"], re.findall(r"(?:^|, )(\w+)=:", headers["Signature"])
        )
        self.verify(headers)
        with self.assertRaises(SignatureError):
            self.verify(headers, tokens=("another",))

    def test_vector_b_2_5_of_the_rfc_is_reproduced_by_the_library_and_refused_only_for_its_coverage(
        self,
    ):
        key = base64.b64decode(
            "uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ=="
        )
        headers = {"Date": "Tue, 20 Apr 2021 02:07:55 GMT", "Content-Type": "application/json"}
        url, covered = (
            "https://example.com/foo?param=Value&Pet=dog",
            ("date", "@authority", "content-type"),
        )
        options = {"key": key, "created": 1618884473, "label": "sig-b25", "include_alg": False}
        signed = sign(url, headers, covered, **options)
        parameters = signed["Signature-Input"].replace("webhook-1", "test-shared-secret")
        self.assertEqual(
            'sig-b25=("date" "@authority" "content-type");created=1618884473'
            ';keyid="test-shared-secret"',
            parameters,
        )
        base = (
            b'"date": Tue, 20 Apr 2021 02:07:55 GMT\n"@authority": example.com\n'
            b'"content-type": application/json\n'
            b'"@signature-params": ' + parameters.partition("=")[2].encode()
        )
        from http_message_signatures import algorithms

        signature = base64.b64encode(algorithms.HMAC_SHA256(private_key=key).sign(base)).decode()
        self.assertEqual("pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=", signature)
        # The key as a token: the one of the RFC in hexadecimal, which the receiver decodes.
        vector = {**headers, "Signature-Input": parameters, "Signature": f"sig-b25=:{signature}:"}
        with self.assertRaises(SignatureError) as caught:
            self.verify(vector, url, tokens=(key.hex(),), now=1618884473)
        self.assertRegex(str(caught.exception), "cover")
        # The same key, library and message with the coverage that is demanded: verified.
        options["covered"] = ("@method", "@path", *covered)
        self.verify(sign(url, headers, **options), url, tokens=(key.hex(),), now=1618884473)


class OverHttpTest(unittest.TestCase):
    """A receiver with a webhook of new Central."""

    def setUp(self):
        webhook = {
            "name": "new",
            "type": "new-central",
            "token": ["old-token", KEY],
            "public_url": URL,
        }
        self.receiver = Receiver(config_of(webhook=webhook))
        self.receiver.__enter__()
        self.addCleanup(self.receiver.__exit__)

    def post(self, headers, body, query=""):
        return self.receiver.post(body, headers, PATH + query).status

    def signed(self, query="", **options):
        now = int(time.time())
        headers = {"Date": http_date(now), "Content-Type": "application/json"}
        return sign(URL + query, headers, **{"created": now, **options})

    def test_a_delivery_signed_by_the_library_is_accepted_and_a_changed_one_is_not(self):
        self.assertEqual(200, self.post(self.signed(), new_body()))
        self.assertEqual(200, self.post(self.signed("?site=%20a+b"), new_body(), "?site=%20a+b"))
        self.assertEqual(401, self.post(self.signed("?site=1"), new_body(), "?site=2"))
        self.assertEqual(401, self.post(self.signed(key=b"wrong"), new_body()))
        self.assertEqual(
            401, self.post({**self.signed(), "Date": http_date(time.time() - 5)}, new_body())
        )

    def test_two_alerts_under_one_signature_are_both_kept_and_a_repeated_one_is_a_duplicate(self):
        headers, first, second = self.signed(), new_body(), new_body()
        answers = [self.receiver.post(body, headers) for body in (first, second, first)]
        self.assertEqual(
            [(200, "ok"), (200, "ok"), (200, "duplicate")],
            [(a.status, a.json["status"]) for a in answers],
        )

    def test_a_signature_that_is_too_old_is_refused_although_it_is_good(self):
        old = int(time.time()) - 49 * 3600
        headers = sign(URL, {"Date": http_date(old)}, created=old)
        self.assertEqual(401, self.post(headers, new_body()))
        self.receiver.wait_for_log("stale")

    def test_fields_that_span_several_lines_are_joined(self):
        body, now = new_body(), int(time.time())
        headers = {"Date": http_date(now), "X-Several": "a, b"}
        headers = sign(URL, headers, (*VENDOR, "x-several"), created=now, label="one")
        headers = sign(
            URL, headers, key=b"wrong", created=now, label="two", append_if_signature_exists=True
        )
        pairs = [("Date", headers["Date"]), ("X-Several", "a"), ("X-Several", "b")]
        for name in ("Signature-Input", "Signature"):
            one, two = headers[name].split(", two=")
            pairs += [(name, one), (name, "two=" + two)]
        self.assertEqual(200, self.receiver.request(raw_request("POST", PATH, pairs, body)).status)
        pairs[2] = ("X-Several", "c")
        self.assertEqual(401, self.receiver.request(raw_request("POST", PATH, pairs, body)).status)
