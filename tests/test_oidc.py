"""OIDC access tokens: claims, algorithms and keys; the provider and the HTTP client for it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import logging
import math
import os
import queue
import socketserver
import threading
import time
import unittest
from unittest import mock

import central_webhook_client as product
from tests.support import deadline_poll, in_parallel

ISSUER = "https://login.example.com/tenant"
NOW = 1754963403  # epoch seconds
# The primes of a 2048-bit key made with OpenSSL for these tests alone. Eight instead of the usual
# two make a signature cost a sixteenth, and a verifier sees no difference.
PRIMES = [
    int(prime, 16)
    for prime in """
        F92FB004C7586B2269BAEFFDB65F7582A3809D1652E0F4BF432017B3109D7CFB
        FA1107B3AD16582289F5A9AC134A6AFE6A1EDEBF798F6F2B3DB142348B9091B1
        F56980B56D69A58E214E51D8B10FDCE3F4F95F6425DC75A787BEC701802FE5AD
        FDFA29A152EEE01E09A44556F096D72CA783963DDB171E38B8860961A36E3D9B
        FAB7F9647F66584B4DDF4684CCA881E2A8AC17F9DBA479B87E83EC180B9267CF
        F548FEBE3B5C301315624B8A2AFB95DD5AD29F37264A682EB2555604E32A29EF
        FB9F819567F7DF1F658978EDC0BD2562317558AD132BAF37FA526ECEE56AADEB
        F4C169065F9A11724AFC59C243EB10A84A2AB12A575676925AC68A726A2DCB87
    """.split()
]
N, D = math.prod(PRIMES), pow(65537, -1, math.prod(prime - 1 for prime in PRIMES))
DIGEST_INFO = {  # RFC 8017 section 9.2, note 1
    "RS256": ("sha256", "3031300d060960864801650304020105000420"),
    "RS384": ("sha384", "3041300d060960864801650304020205000430"),
    "RS512": ("sha512", "3051300d060960864801650304020305000440"),
}
RSA_KEY = product.RsaKey(kid="k1", algorithm="", n=N, e=65537)
A2_N = (  # RFC 7515 appendix A.2
    "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4Ql"
    "L-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUs"
    "LA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoud"
    "F8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"
)
A2_SIGNED = (
    "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9"
    "pc19yb290Ijp0cnVlfQ"
)
A2_SIGNATURE = (
    "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujG"
    "bds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K"
    "0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6"
    "LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw"
)


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def encoded_block(signed, algorithm="RS256"):
    """Return the PKCS#1 v1.5 block of a 2048-bit key, as bytes."""
    name, prefix = DIGEST_INFO[algorithm]
    tail = b"\0" + bytes.fromhex(prefix) + hashlib.new(name, signed).digest()
    return b"\0\1" + b"\xff" * (254 - len(tail)) + tail


def rsa_private(block):
    """Apply the private key to a block (RFC 8017 section 5.1.2)."""
    number, power = int.from_bytes(block, "big"), 0
    for prime in PRIMES:
        rest = N // prime
        power += pow(number, D % (prime - 1), prime) * rest * pow(rest, -1, prime)
    return (power % N).to_bytes(256, "big")


def rsa_sign(signed, algorithm="RS256"):
    return rsa_private(encoded_block(signed, algorithm))


def jwt(claims=None, header=None, signature=rsa_sign, raw_header=None, raw_claims=None, **changes):
    """Return a good token, or one with something changed; None leaves a claim or field out."""
    claims = {"iss": ISSUER, "aud": "receiver", "exp": NOW + 600, **(claims or {}), **changes}
    header = {"alg": "RS256", "typ": "at+jwt", "kid": "k1", **(header or {})}
    parts = []
    for raw, fields in ((raw_header, header), (raw_claims, claims)):
        fields = {name: value for name, value in fields.items() if value is not None}
        parts.append(base64url(json.dumps(fields).encode() if raw is None else raw))
    signed = ".".join(parts)
    return f"{signed}.{base64url(signature(signed.encode()))}"


def signer(algorithm):
    """Return a function that signs with an algorithm."""
    return lambda signed: rsa_sign(signed, algorithm)


class AccessTokens(unittest.TestCase):
    AUDIENCE = {"audience": "receiver"}
    CLIENT = {"client_id": "central"}

    def verify(self, token, keys=(RSA_KEY,), issuer=ISSUER, repeated=(), now=NOW, oidc=AUDIENCE):
        """Verify a token, or a whole header if it has a space; return what keys were asked for."""
        settings = {"audience": None, "client_id": None, "issuer": None, **oidc}
        value = token if " " in token else f"Bearer {token}"
        request = product.Request(
            "POST", "/", None, "HTTP/1.1", {"authorization": value}, frozenset(repeated)
        )
        asked = []

        def signing_keys(kid, algorithm):
            asked.append((kid, algorithm))
            return issuer, list(keys)

        oidc = product.Oidc("https://login.example.com/w", **settings)
        product.verify_access_token(request, oidc, signing_keys, now)
        return asked

    def assert_refused(self, token, *texts, **arguments):
        """Assert that a token is refused, with these texts and no part of it in the message."""
        with self.assertRaises(product.Refusal) as raised:
            self.verify(token, **arguments)
        self.assertEqual(raised.exception.reason, "oidc")
        message = str(raised.exception)
        for text in texts:
            self.assertIn(text, message)
        for part in token.split("."):
            self.assertFalse(len(part) > 3 and part in message, message)

    def test_a_good_token_passes_and_its_kid_and_algorithm_choose_the_key(self):
        for algorithm in DIGEST_INFO:
            for kid in ("k1", None):
                with self.subTest(algorithm, kid=kid):
                    token = jwt(header={"alg": algorithm, "kid": kid}, signature=signer(algorithm))
                    self.assertEqual(self.verify(token), [(kid, algorithm)])

    def test_the_signature_of_the_rfc_verifies_so_that_its_claims_are_checked(self):
        """RFC 7515 appendix A.2: it has no audience."""
        modulus = int.from_bytes(base64.urlsafe_b64decode(A2_N + "=="), "big")
        arguments = {"keys": [product.RsaKey(None, "", modulus, 65537)], "issuer": "joe"}
        token, now = f"{A2_SIGNED}.{A2_SIGNATURE}", 1300819000
        self.assert_refused(token, "aud", "null", "'receiver'", now=now, **arguments)
        self.assert_refused(token, "exp", **arguments)
        self.assert_refused(token.replace("cC4", "cC5"), "signature", now=now, **arguments)
        self.assert_refused(token, "signature", issuer="joe", now=now)

    def test_the_scheme_word_is_bearer_in_any_case(self):
        for word in ("Bearer", "bearer", "BEARER"):
            self.verify(f"{word} {jwt()}")
        for value in (" ", f"Basic {jwt()}", f"Bearer,{jwt()} ", "Bearer ", f"{jwt()} "):
            with self.subTest(value[:12]):
                self.assert_refused(value)

    def test_a_repeated_header_is_refused(self):
        self.assert_refused(jwt(), repeated=["authorization"])
        self.assert_refused(f"Bearer {jwt()}, Bearer {jwt()}")

    def test_other_algorithms_are_refused_and_named(self):
        public = N.to_bytes(256, "big")
        for name, signature in {
            "none": lambda signed: b"",
            "None": lambda signed: b"",
            "HS256": lambda signed: hmac.new(public, signed, hashlib.sha256).digest(),
            "HS512": lambda signed: hmac.new(public, signed, hashlib.sha512).digest(),
            **dict.fromkeys(("ES256", "PS256", "RS1", "rs256", "RS256 ", "EdDSA", ""), rsa_sign),
        }.items():
            with self.subTest(name):
                self.assert_refused(jwt(header={"alg": name}, signature=signature), f'"{name}"')
        for value in (None, 5, True, [], ["RS256"], {}, "x" * 5000):
            with self.subTest(str(value)[:9]):
                self.assert_refused(jwt(header={"alg": value}), json.dumps(value)[:200])

    def test_an_algorithm_that_is_nested_deeply_is_refused(self):
        for depth in range(800, 1000):  # from what Python parses to what it does not
            nested = b"[" * depth + b"]" * depth
            self.assert_refused(
                jwt(raw_header=b'{"alg":%b}' % nested, signature=lambda signed: b"")
            )

    def test_the_algorithm_of_the_token_is_the_one_that_is_verified(self):
        for header, signed in (("RS256", "RS512"), ("RS384", "RS256"), ("RS512", "RS384")):
            with self.subTest(header):
                self.assert_refused(jwt(header={"alg": header}, signature=signer(signed)), "match")

    def test_critical_extensions_are_refused(self):
        for crit in ([], ["exp"], ["b64"], "x", {}, False):
            with self.subTest(crit):
                self.assert_refused(jwt(header={"crit": crit}), "crit")

    def test_a_kid_that_is_not_a_string_is_refused(self):
        for kid in (5, 1.5, True, [], ["k1"], {}, {"k1": 1}):
            with self.subTest(kid):
                self.assert_refused(jwt(header={"kid": kid}), "kid")
        self.assert_refused(jwt(raw_header=b'{"alg":"RS256","kid":null}'), "kid")

    def test_an_unknown_kid_is_reported_as_such(self):
        token = jwt(header={"kid": "\u202e" + "k" * 999})
        shown = json.dumps("\u202e" + "k" * 999)[:200]
        self.assert_refused(
            token, f"unknown kid: the provider has no RS256 key with kid {shown}", keys=[]
        )

    def test_keys_within_the_token_are_not_used(self):
        jwk = {"kty": "RSA", "n": base64url(N.to_bytes(256, "big")), "e": "AQAB", "kid": "k1"}
        other = product.RsaKey("k1", "", N - 2, 65537)
        evil = "https://evil.example/"
        for header in ({"jwk": jwk}, {"jku": evil}, {"x5u": evil}):
            with self.subTest(list(header)):
                self.assert_refused(jwt(header=header), "signature", keys=[other])

    def test_a_changed_token_is_refused(self):
        token = jwt()
        head, claims, signature = token.split(".")
        raw = base64.urlsafe_b64decode(signature + "==")
        number = int.from_bytes(raw, "big")
        for what, changed in {
            "no signature": b"",
            "one bit": raw[:-1] + bytes([raw[-1] ^ 1]),
            "a byte less": raw[:-1],
            "a byte more": raw + b"\0",
            "a zero before": b"\0" + raw,
            "plus the modulus": (number + N).to_bytes(257, "big"),
            "zero": bytes(256),
            "one": bytes(255) + b"\1",
            "the modulus less one": (N - 1).to_bytes(256, "big"),
            "all ones": b"\xff" * 256,
            "negative": (N - number).to_bytes(256, "big"),
        }.items():
            with self.subTest(what):
                self.assert_refused(f"{head}.{claims}.{base64url(changed)}", "signature")
        compact = base64.urlsafe_b64decode(claims + "==").replace(b" ", b"")
        for changed in (jwt(exp=NOW + 601).split(".")[1], base64url(compact)):
            self.assert_refused(f"{head}.{changed}.{signature}", "signature")

    def test_a_signature_that_is_not_below_the_modulus_is_refused(self):
        """RFC 8017 section 5.2.2: the modulus added makes another spelling of one signature."""

        def add(signed):
            return (int.from_bytes(rsa_sign(signed), "big") + N).to_bytes(256, "big")

        for seconds in range(100):
            with contextlib.suppress(OverflowError):  # the sum must fit into as many bytes
                self.assert_refused(jwt(exp=NOW + 600 + seconds, signature=add))
                return
        self.fail("no signature is small enough")

    def test_a_signature_block_with_other_padding_is_refused(self):
        def changed(change):
            return jwt(signature=lambda signed: rsa_private(change(encoded_block(signed))))

        self.verify(changed(lambda block: block))
        null = bytes.fromhex("3031300d06096086480165030402010500")
        no_null = bytes.fromhex("302f300b0609608648016503040201")
        for what, change in {
            "type 2": lambda block: b"\0\2" + block[2:],
            "a zero within": lambda block: block[:10] + b"\0" + block[11:],
            "another fill": lambda block: block[:10] + b"\xfe" + block[11:],
            "the hash alone": lambda block: bytes(224) + block[-32:],
            "no separator": lambda block: block.replace(b"\xff\0", b"\xff\xff"),
            "no NULL": lambda block: b"\0\1\xff\xff" + block[2:].replace(null, no_null),
            "another identifier": lambda block: block.replace(b"\x04\x02\x01", b"\x04\x02\x02"),
        }.items():
            with self.subTest(what):
                self.assert_refused(changed(change))

    def test_a_forgery_for_exponent_three_is_refused(self):
        """Bleichenbacher 2006: a cube whose first bytes look right, with rubbish after the hash."""

        def forge(signed):
            block = b"\0\1" + b"\xff" * 8 + encoded_block(signed)[-52:]
            low, high = 0, 1 << 800
            target = int.from_bytes(block.ljust(256, b"\0"), "big")
            while low < high:  # the smallest number whose cube is not below the target
                middle = (low + high) // 2
                low, high = (low, middle) if middle**3 >= target else (middle + 1, high)
            assert (low**3).to_bytes(256, "big").startswith(block)
            return low.to_bytes(256, "big")

        self.assert_refused(jwt(signature=forge), keys=[product.RsaKey("k1", "", N, 3)])

    def test_all_of_sixteen_keys_are_tried_and_no_more(self):
        others = [product.RsaKey(None, "", N - 2 * number, 65537) for number in range(1, 17)]
        token = jwt(header={"kid": None})
        self.verify(token, keys=[*others[:15], RSA_KEY])
        self.assert_refused(token, "none of 16 keys", keys=others)
        self.assert_refused(token, "17", "at most 16", keys=[RSA_KEY, *others])

    def test_times_are_checked_with_a_minute_of_leeway(self):
        for claims in (
            *({"exp": NOW + seconds} for seconds in (-58, -30.5, 600.25, 10**8)),
            *({"nbf": NOW + seconds} for seconds in (58, 0.5, -NOW, -(10**8))),
            {"iat": NOW + 10, "auth_time": "x"},
        ):
            with self.subTest(claims):
                self.verify(jwt(claims))
        for name, values in {
            "exp": (None, NOW - 62, 0, -1, str(NOW + 600), True, [NOW + 600], {}),
            "nbf": (NOW + 62, NOW + 10**8, "0", True, []),
        }.items():
            for value in values:
                with self.subTest(name, value=value):
                    self.assert_refused(jwt({name: value}), name)

    def test_the_issuer_must_be_the_expected_one(self):
        for issuer in (None, "", ISSUER + "/", ISSUER.upper(), ISSUER[:-1], 5, [ISSUER], {}):
            with self.subTest(issuer):
                self.assert_refused(jwt(iss=issuer), "iss", json.dumps(issuer), repr(ISSUER))

    def test_a_configured_issuer_overrides_the_discovered_one(self):
        configured = "https://sts.windows.net/tenant/"
        settings = {**self.AUDIENCE, "issuer": configured}
        self.verify(jwt(iss=configured), oidc=settings)
        self.assert_refused(jwt(iss=ISSUER), ISSUER, configured, oidc=settings)

    def test_the_audience_must_be_ours(self):
        for audience in ("receiver", ["receiver"], ["other", "receiver"], ["receiver", 5, None]):
            with self.subTest(audience):
                self.verify(jwt(aud=audience))
        wrong = (
            "",
            "other",
            "receiver2",
            "Receiver",
            [],
            ["other"],
            [["receiver"]],
            {"receiver": 1},
        )
        for audience in (None, *wrong, 5, "\x1b\u202e", "x" * 999):
            with self.subTest(audience):
                shown = json.dumps(audience)[:200]
                self.assert_refused(jwt(aud=audience), f"aud (audience) is {shown}, ", "'receiver'")

    def test_the_client_must_be_ours(self):
        for name in ("azp", "client_id", "appid", "cid"):
            with self.subTest(name):
                self.verify(jwt({name: "central"}, aud=None), oidc=self.CLIENT)
                for value in ("other", "", "Central", 5, True, ["central"], {"central": 1}):
                    shown = f"client is {json.dumps([value])}, expected 'central'"
                    self.assert_refused(jwt({name: value}), shown, oidc=self.CLIENT)
        self.assert_refused(jwt(sub="central"), "client", oidc=self.CLIENT)

    def test_audience_and_client_are_both_demanded_if_both_are_configured(self):
        both = {"oidc": {**self.AUDIENCE, **self.CLIENT}}
        self.verify(jwt(azp="central"), **both)
        self.assert_refused(jwt(), "client", **both)
        self.assert_refused(jwt(azp="central", aud="other"), "aud", **both)
        self.assert_refused(jwt(azp="other"), "client", **both)

    def test_claims_are_not_shown_before_the_signature_is_verified(self):
        with self.assertRaises(product.Refusal) as raised:
            self.verify(jwt(aud="unverified", signature=lambda signed: b"x" * 256))
        self.assertNotIn("unverified", str(raised.exception))

    def test_malformed_tokens_raise_only_a_refusal(self):
        head, claims, signature = jwt().split(".")
        signed = f"{head}.{claims}"
        for token in (
            *("", ".", "..", "...", "a.b.c", "A" * 100000, "." * 100000),
            *(signed, f"{signed}.", f".{claims}.{signature}", f"{head}..{signature}"),
            *(f"{signed}.{signature}.", f"{signed}.{signature}.{signature}"),
            *(f"{signed}.{signature}=", f"{signed}.{signature}==", f"{signed}.{signature[:-1]}"),
            f"Bearer {head} .{claims}.{signature}",
            f"Bearer {signed}.{signature} ",
            *(f"{signed}.{signature[:100]}{mark}{signature[101:]}" for mark in "!+/\xe9"),
            *(f"{signed}.\u20ac", f"\ud800.{claims}.{signature}", f"{signed}.{'A' * 100000}"),
        ):
            with self.subTest(token[:20]):
                self.assert_refused(token)
        claims = f'"iss":"{ISSUER}","aud":"receiver"'
        for raw in (
            *(b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff", b"{}", b'{"exp":NaN}'),
            *(b'{"alg":"RS256","exp":Infinity}', b"\xef\xbb\xbf{}", "{}".encode("utf-16")),
            b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}",
            b'{"exp":' + b"9" * 5000 + b"}",
            *(f'{{"exp":{number},{claims}}}'.encode() for number in ("1e400", "-1e400")),
        ):
            with self.subTest(raw[:20]):
                self.assert_refused(jwt(raw_claims=raw))
                self.assert_refused(jwt(raw_header=raw))

    def test_a_repeated_claim_or_header_field_is_refused(self):
        claims = f'"iss":"{ISSUER}","aud":"receiver","exp":{NOW + 600}'
        self.verify(jwt(raw_claims=f"{{{claims}}}".encode()))
        self.assert_refused(jwt(raw_claims=f'{{"aud":"other",{claims}}}'.encode()))
        self.assert_refused(jwt(raw_header=b'{"alg":"none","alg":"RS256"}'))


def jwk(**changes):
    """Return the public key as a JWK, or one with something changed."""
    return {
        "kty": "RSA",
        "kid": "k1",
        "n": base64url(N.to_bytes(256, "big")),
        "e": "AQAB",
        **changes,
    }


class KeySets(unittest.TestCase):
    def test_keys_that_may_not_verify_or_are_not_safe_are_passed_over(self):
        big = base64url(b"\xff" * (product.MAX_RSA_BITS // 8 + 1))
        for change, passes in (
            ({}, True),
            ({"use": "sig", "alg": "RS256", "key_ops": ["sign", "verify"]}, True),
            ({"use": "enc"}, False),
            ({"key_ops": ["encrypt"]}, False),
            ({"key_ops": []}, False),
            ({"key_ops": "verify"}, False),
            ({"kty": "EC"}, False),
            ({"n": base64url(b"\xff" * 128)}, False),
            ({"n": big}, False),
            ({"n": base64url((N - 1).to_bytes(256, "big"))}, False),
            ({"n": "not base64url!"}, False),
            ({"n": None}, False),
            *(({"e": value}, False) for value in ("AQ", "Ag", "AQAA", "", 65537, "A" * 100)),
        ):
            with self.subTest(change):
                found = product.parse_rsa_keys({"keys": ["x", None, jwk(**change)]})
                self.assertEqual(len(found), passes)
        self.assertEqual(product.parse_rsa_keys({"keys": [jwk()]}), [RSA_KEY])

    def test_another_document_is_an_error(self):
        for document in ({}, {"keys": {}}, {"keys": None}):
            with self.subTest(document):
                self.assertRaises(ValueError, product.parse_rsa_keys, document)


class Server(socketserver.ThreadingTCPServer):
    """A server on loopback: `respond(connection, request)` writes the answers.

    `requests` has what was received, `ended` one item for each connection that ended.
    """

    daemon_threads = True

    def __init__(self, test, respond):
        super().__init__(("127.0.0.1", 0), None)
        self.requests, self.ended = [], queue.SimpleQueue()
        self.respond = respond
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        test.addCleanup(self.server_close)
        test.addCleanup(self.shutdown)

    def finish_request(self, connection, address):
        with contextlib.suppress(OSError):
            self.requests.append(connection.recv(1 << 16))
            self.respond(connection, self.requests[-1])
        self.ended.put(address)


def answer_of(document, status="200 OK", header=""):
    """Return an HTTP answer."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    head = f"HTTP/1.1 {status}\r\n{header}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Providers(unittest.TestCase):
    """JwksClient, and a provider on loopback."""

    def setUp(self):
        silence = mock.patch.object(product.log, "handlers", [logging.NullHandler()])
        silence.start()
        self.addCleanup(silence.stop)
        self.gate = threading.Event()  # the provider answers while it is set
        self.gate.set()
        self.addCleanup(self.gate.set)
        self.server = Server(self, self.respond)
        self.documents = {}
        self.publish(jwk())
        well_known_url = self.server.url + "discovery"
        self.client = product.JwksClient(product.Oidc(well_known_url, "receiver", None, None))

    def respond(self, connection, request):
        self.gate.wait(10)
        path = request.split()[1].decode()
        connection.sendall(self.documents.get(path, answer_of({}, "404 Not Found")))

    def publish(self, *keys, **changes):
        discovery = {"issuer": ISSUER, "jwks_uri": self.server.url + "keys", **changes}
        self.documents["/discovery"] = answer_of(discovery)
        self.documents["/keys"] = answer_of({"keys": keys})

    def ask(self, kid="k1", seconds_later=0, algorithm="RS256"):
        """Return the kids of the keys for a token, as if asked so much later."""
        self.client.attempted_at -= seconds_later
        self.client.refreshed_at -= seconds_later
        issuer, keys = self.client.signing_keys(kid, algorithm)
        self.assertEqual(issuer, ISSUER)
        return [key.kid for key in keys]

    def assert_unavailable(self, seconds_later=0):
        with self.assertRaises(product.Refusal) as raised:
            self.ask(seconds_later=seconds_later)
        self.assertEqual(raised.exception.reason, "provider")
        self.assertIn(self.client.oidc.well_known_url, str(raised.exception))

    def test_keys_are_fetched_when_they_are_needed_and_cached(self):
        self.assertEqual(self.server.requests, [])
        for _ in range(3):
            self.assertEqual(self.ask(), ["k1"])
        self.assertEqual(len(self.server.requests), 2)

    def test_keys_are_chosen_by_kid_and_algorithm(self):
        self.publish(jwk(), jwk(kid="k2", alg="RS512"), jwk(kid="k3", alg="RS256"))
        self.assertEqual(self.ask(None), ["k1", "k3"])
        self.assertEqual(self.ask(None, algorithm="RS512"), ["k1", "k2"])
        self.assertEqual(self.ask("k2"), [])
        self.assertEqual(self.ask("k2", algorithm="RS512"), ["k2"])

    def test_an_unknown_kid_is_fetched_but_not_more_than_once_in_ten_seconds(self):
        self.ask()
        self.publish(jwk(), jwk(kid="k2"))
        self.assertEqual(self.ask("k2", 9), [])
        self.assertEqual(len(self.server.requests), 2)
        self.assertEqual(self.ask("k2", 1), ["k2"])
        self.assertEqual(self.ask("k3", 9), [])
        self.assertEqual(len(self.server.requests), 4)

    def test_a_provider_that_never_answered_is_unavailable_and_failures_count(self):
        self.documents.clear()
        self.assert_unavailable()
        self.publish(jwk())
        self.assert_unavailable(9)
        self.assertEqual(len(self.server.requests), 1)
        self.assertEqual(self.ask("k1", 1), ["k1"])

    def test_keys_stay_if_the_provider_breaks(self):
        self.ask()
        self.documents.clear()
        self.assertEqual(self.ask("k2", 10), [])
        self.assertEqual(self.ask("k1", 10), ["k1"])

    def test_keys_are_fetched_again_after_an_hour_since_one_may_be_withdrawn(self):
        self.ask()
        self.publish(jwk(kid="k2"))
        self.assertEqual(self.ask("k1", 3599), ["k1"])
        self.assertEqual(self.ask("k1", 2), [])

    def test_one_thread_fetches_and_only_those_without_a_known_key_wait(self):
        self.ask()
        self.publish(jwk(), jwk(kid="k2"))
        self.client.attempted_at -= 10
        self.gate.clear()
        found = queue.SimpleQueue()
        for _ in range(5):
            threading.Thread(target=lambda: found.put(self.ask("k2")), daemon=True).start()
        deadline_poll(lambda: len(self.server.requests) == 3)
        self.assertEqual(self.ask("k1"), ["k1"])
        self.assertTrue(found.empty())
        self.gate.set()
        self.assertEqual([found.get(timeout=10) for _ in range(5)], [["k2"]] * 5)
        self.assertEqual(len(self.server.requests), 4)

    def test_documents_that_are_not_as_expected_give_no_keys(self):
        for document in (
            answer_of({}, "500 Error"),
            *map(answer_of, (b"<html>", [], {}, b"\xff{}", b'{"x":' + b"[" * 100000)),
            answer_of({"issuer": 1, "jwks_uri": 2, "keys": 3}),
            answer_of({"keys": [], "issuer": ISSUER, "jwks_uri": "x" * product.MAX_ANSWER_BYTES}),
            b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
            b"SSH-2.0-OpenSSH\r\n",
            b"",
        ):
            for path in ("/discovery", "/keys"):
                with self.subTest(document[:60], path=path):
                    self.publish(jwk())
                    self.documents[path] = document
                    self.assert_unavailable(10)

    def test_keys_are_fetched_only_over_https_or_from_this_machine(self):
        for url in ("http://192.0.2.1/", "file:///etc/passwd", "data:application/json,{}", "/keys"):
            with self.subTest(url):
                self.publish(jwk(), jwks_uri=url)
                self.assert_unavailable(10)


class HttpRequests(unittest.TestCase):
    """The HTTP client for samples and providers."""

    def setUp(self):
        without = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        environment = mock.patch.dict(os.environ, without, clear=True)
        environment.start()
        self.addCleanup(environment.stop)

    def get(self, url, seconds=10.0, **headers):
        return product.http_request("GET", url, headers, None, seconds)

    def serve(self, answer):
        return Server(self, lambda connection, request: connection.sendall(answer))

    def test_the_request_is_sent_as_it_is(self):
        def respond(connection, request):
            while not request.endswith(b"{}"):
                request += connection.recv(1 << 16)
            server.requests[0] = request
            connection.sendall(answer_of(b"", "204 No Content"))

        server = Server(self, respond)
        headers = {"content-type": "application/json", "signature": "sig1=:AAAA:"}
        status, data = product.http_request("POST", server.url + "a%2Fb?c=+", headers, b"{}", 10)
        self.assertEqual((status, data), (204, b""))
        head, _, body = server.requests[0].decode().partition("\r\n\r\n")
        lines = head.split("\r\n")
        self.assertEqual((lines[0], body), ("POST /a%2Fb?c=+ HTTP/1.1", "{}"))
        fields = dict(line.lower().split(": ") for line in lines[1:])
        expected = {"content-type": "application/json", "signature": "sig1=:aaaa:"}
        expected.update({"host": server.url[7:-1], "connection": "close", "content-length": "2"})
        self.assertEqual({**fields, **expected}, fields)
        self.assertTrue(fields["user-agent"].startswith("central_webhook_client.py/"))

    def test_every_status_is_returned_and_no_redirect_is_followed(self):
        for status in (200, 301, 302, 303, 307, 308, 401, 404, 500):
            server = self.serve(b"")
            location = f"Location: {server.url}elsewhere\r\n"
            answer = answer_of(b"body", f"{status} X", location)
            server.respond = lambda connection, request, data=answer: connection.sendall(data)
            with self.subTest(status):
                self.assertEqual(self.get(server.url), (status, b"body"))
                self.assertEqual(len(server.requests), 1)

    def test_of_a_long_answer_the_beginning_is_returned(self):
        most = product.MAX_ANSWER_BYTES
        server = self.serve(b"HTTP/1.1 500 X\r\nContent-Length: 9999999\r\n\r\n" + b"x" * most * 2)
        self.assertEqual(self.get(server.url), (500, b"x" * (most + 1)))

    def test_an_answer_that_ends_early_is_an_error(self):
        server = self.serve(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}")
        with self.assertRaisesRegex(product.HTTP_ERRORS, "98 more"):
            self.get(server.url)

    def drip(self, start, piece):
        """Return a server that sends `start` and then a piece again and again."""
        stopped = threading.Event()
        self.addCleanup(stopped.set)

        def respond(connection, request):
            connection.sendall(start)
            while not stopped.wait(0.02):
                connection.sendall(piece)

        return Server(self, respond)

    def assert_given_up(self, url):
        """Assert that a request ends in time."""
        started = time.monotonic()
        with self.assertRaisesRegex(OSError, "no whole answer within 0.1 s|timed out"):
            self.get(url, 0.1)
        self.assertLess(time.monotonic() - started, 3)

    def test_a_server_that_drips_or_is_silent_is_given_up_in_time(self):
        head = b"HTTP/1.1 200 OK\r\n"
        chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
        answers = (
            (b"", b""),
            (b"", b"H"),
            (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
            (head, b"X: y\r\n"),
            (head + b"X: ", b"x"),
            (head + b"Content-Length: 10000\r\n\r\n", b"x"),
            (chunked, b"0"),
        )
        in_parallel(self.assert_given_up, [self.drip(*answer).url for answer in answers])

    def test_a_body_without_end_is_not_read_for_ever(self):
        head = b"HTTP/1.1 200 OK\r\n"
        for start, piece in (
            (head + b"\r\n", b"x"),
            (head + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        ):
            server = self.drip(start, piece)
            with self.subTest(start):
                self.assert_given_up(server.url)
                server.ended.get(timeout=10)

    def test_a_server_that_drips_over_tls_or_behind_a_proxy_is_given_up_in_time(self):
        record = b"\x16\x03\x03\x40\x00\x02\x00\x3f\x00"  # of a handshake, 16 KiB long
        server = self.drip(record, b"\0")
        self.assert_given_up(server.url.replace("http:", "https:"))
        for start, piece in ((b"", b"H"), (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")):
            os.environ["HTTPS_PROXY"] = self.drip(start, piece).url
            with self.subTest(start):
                self.assert_given_up("https://provider.example/")

    def test_errors_have_plain_messages(self):
        server = self.serve(b"")
        server.shutdown()
        server.server_close()
        with self.assertRaisesRegex(ConnectionRefusedError, "^[^<]*refused"):
            self.get(server.url)
        for url in ("", "ftp://127.0.0.1/", "http://", "http://[::1/"):
            with self.subTest(url), self.assertRaises(ValueError):
                self.get(url)
        for url in ("http://127.0.0.1:x/", "http://127.0.0.1/a b", "http://127.0.0.1/\xe9"):
            with self.subTest(url), self.assertRaises((ValueError, http.client.HTTPException)):
                self.get(url)

    def test_proxies_of_the_environment_are_used(self):
        proxy = self.serve(answer_of(b"", "403 Forbidden"))
        for name in ("HTTP_PROXY", "https_proxy"):
            os.environ[name] = proxy.url
        self.assertEqual(self.get("http://provider.example/keys?x"), (403, b""))
        with self.assertRaisesRegex(OSError, "403 Forbidden"):
            self.get("https://provider.example/keys")
        lines = [request.split(b"\r\n")[0] for request in proxy.requests]
        self.assertEqual(lines[0], b"GET http://provider.example/keys?x HTTP/1.1")
        self.assertRegex(lines[1], rb"CONNECT provider\.example:443 HTTP/1\.[01]")

    def test_a_loopback_address_is_never_reached_through_a_proxy(self):
        proxy, server = self.serve(answer_of(b"", "403 X")), self.serve(answer_of(b"{}"))
        for name in ("HTTP_PROXY", "ALL_PROXY"):
            os.environ[name] = proxy.url
        for host in ("127.0.0.1", "localhost"):
            self.assertEqual(self.get(server.url.replace("127.0.0.1", host)), (200, b"{}"))
        self.assertEqual(proxy.requests, [])

    @unittest.skipUnless(os.name == "posix", "0.0.0.0 is not a destination there")
    def test_no_proxy_is_honoured(self):
        proxy, server = self.serve(answer_of(b"", "403 X")), self.serve(answer_of(b"{}"))
        url = server.url.replace("127.0.0.1", "0.0.0.0")  # this machine, but not a loopback address
        os.environ["HTTP_PROXY"] = proxy.url
        self.assertEqual(self.get(url)[0], 403)
        os.environ["NO_PROXY"] = "example.com,0.0.0.0"
        self.assertEqual(self.get(url), (200, b"{}"))
