"""OIDC access tokens: claims, algorithms and keys."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import math
import unittest

import central_webhook_client as product

ISSUER = "https://login.example.com/tenant"
NOW = 1754963403  # epoch seconds
# The primes of a 2048-bit key made with OpenSSL for these tests alone. Who verifies cannot tell eight from the usual
# two, and with eight a signature costs a sixteenth.
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
    """Apply the private key to a block (RFC 8017 section 5.1.2, with the Chinese remainder theorem)."""
    number, power = int.from_bytes(block, "big"), 0
    for prime in PRIMES:
        rest = N // prime
        power += pow(number, D % (prime - 1), prime) * rest * pow(rest, -1, prime)
    return (power % N).to_bytes(256, "big")


def rsa_sign(signed, algorithm="RS256"):
    return rsa_private(encoded_block(signed, algorithm))


def jwt(claims=None, header=None, signature=None, raw_header=None, raw_claims=None, **changes):
    """Return a good token, or one with something changed; None as a claim's value leaves it out."""
    claims = {"iss": ISSUER, "aud": "receiver", "exp": NOW + 600, **(claims or {}), **changes}
    header = {"alg": "RS256", "typ": "at+jwt", "kid": "k1", **(header or {})}
    parts = [
        json.dumps({name: value for name, value in part.items() if value is not None}).encode()
        for part in (header, claims)
    ]
    parts = [
        raw_header if raw_header is not None else parts[0],
        raw_claims if raw_claims is not None else parts[1],
    ]
    signed = ".".join(map(base64url, parts))
    algorithm = header["alg"] if str(header["alg"]) in DIGEST_INFO else "RS256"
    signature = (
        rsa_sign(signed.encode(), algorithm) if signature is None else signature(signed.encode())
    )
    return f"{signed}.{base64url(signature)}"


class AccessTokens(unittest.TestCase):
    AUDIENCE = {"well_known_url": "https://login.example.com/w", "audience": "receiver"}
    CLIENT = {"well_known_url": "https://login.example.com/w", "client_id": "central"}

    def verify(
        self,
        token,
        authorization=None,
        keys=(RSA_KEY,),
        issuer=ISSUER,
        repeated=(),
        now=NOW,
        oidc=None,
    ):
        settings = {"audience": None, "client_id": None, "issuer": None, **(oidc or self.AUDIENCE)}
        headers = {"authorization": f"Bearer {token}" if authorization is None else authorization}
        request = product.Request(
            method="POST",
            path="/",
            query=None,
            version="HTTP/1.1",
            headers=headers,
            repeated=frozenset(repeated),
            body=b"",
        )
        asked = []

        def keys_for(kid, algorithm):
            asked.append((kid, algorithm))
            return issuer, list(keys)

        product.verify_access_token(request, product.Oidc(**settings), keys_for, now)
        return asked

    def refusal(self, token, **arguments):
        """Return the message of the refusal, which must be there and be one of the access token."""
        with self.assertRaises(product.Refusal) as raised:
            self.verify(token, **arguments)
        self.assertEqual(raised.exception.reason, "oidc")
        return str(raised.exception)

    def test_a_good_token_passes_and_its_kid_and_algorithm_choose_the_key(self):
        for algorithm in DIGEST_INFO:
            for kid in ("k1", None):
                with self.subTest(algorithm, kid=kid):
                    self.assertEqual(
                        self.verify(jwt(header={"alg": algorithm, "kid": kid})), [(kid, algorithm)]
                    )

    def test_the_signature_of_the_rfc_verifies_so_that_its_claims_are_looked_at(self):
        """RFC 7515 appendix A.2: it has no audience, so it gets as far as a token of ours without one."""
        key = product.RsaKey(
            None, "", int.from_bytes(base64.urlsafe_b64decode(A2_N + "=="), "big"), 65537
        )
        arguments = {"keys": [key], "issuer": "joe", "now": 1300819000}
        reached = self.refusal(f"{A2_SIGNED}.{A2_SIGNATURE}", **arguments)
        self.assertEqual(reached, self.refusal(jwt(aud=None)))
        broken = self.refusal(f"{A2_SIGNED}.{A2_SIGNATURE.replace('cC4', 'cC5')}", **arguments)
        self.assertNotEqual(reached, broken)
        self.assertEqual(
            broken, self.refusal(f"{A2_SIGNED}.{A2_SIGNATURE}", issuer="joe", now=1300819000)
        )
        expired = self.refusal(f"{A2_SIGNED}.{A2_SIGNATURE}", **{**arguments, "now": NOW})
        self.assertIn("exp", expired)

    def test_the_scheme_word_is_bearer_in_any_case(self):
        for word in ("Bearer", "bearer", "BEARER"):
            self.verify("", authorization=f"{word} {jwt()}")
        for authorization in (
            "",
            jwt(),
            f"Basic {jwt()}",
            f"Bearer{jwt()}",
            f"Bearer,{jwt()}",
            "Bearer",
            "Bearer ",
        ):
            with self.subTest(authorization[:12]):
                self.refusal("", authorization=authorization)

    def test_a_header_that_occurs_twice_is_refused(self):
        self.refusal(jwt(), repeated=["authorization"])
        self.refusal("", authorization=f"Bearer {jwt()}, Bearer {jwt()}")

    def test_other_algorithms_are_refused_and_named(self):
        public = N.to_bytes(256, "big")
        cases = {
            "none": lambda signed: b"",
            "None": lambda signed: b"",
            "HS256": lambda signed: hmac.new(public, signed, hashlib.sha256).digest(),
            "HS512": lambda signed: hmac.new(public, signed, hashlib.sha512).digest(),
            "ES256": lambda signed: b"\1" * 64,
            "PS256": rsa_sign,
            "RS1": rsa_sign,
            "rs256": rsa_sign,
            "RS256 ": rsa_sign,
            "EdDSA": rsa_sign,
        }
        for name, signature in cases.items():
            with self.subTest(name):
                self.assertIn(
                    name.strip(), self.refusal(jwt(header={"alg": name}, signature=signature))
                )
        for value in (None, 5, True, [], ["RS256"], {}, "", "x" * 5000):
            with self.subTest(value=str(value)[:9]):
                self.refusal(jwt(header={"alg": value}, signature=rsa_sign))

    def test_the_algorithm_of_the_token_is_the_one_that_is_verified(self):
        for header, signed in (("RS256", "RS512"), ("RS384", "RS256"), ("RS512", "RS384")):
            with self.subTest(header):
                self.refusal(
                    jwt(
                        header={"alg": header},
                        signature=lambda data, name=signed: rsa_sign(data, name),
                    )
                )

    def test_critical_extensions_are_refused(self):
        for crit in ([], ["exp"], ["b64"], "x", {}, False):
            with self.subTest(crit):
                self.refusal(jwt(header={"crit": crit}))

    def test_a_kid_that_is_no_string_is_refused(self):
        for kid in (5, 1.5, True, [], ["k1"], {}, {"k1": 1}):
            with self.subTest(kid):
                self.refusal(jwt(header={"kid": kid}))

    def test_keys_within_the_token_are_not_used(self):
        jwk = {"kty": "RSA", "n": base64url(N.to_bytes(256, "big")), "e": "AQAB", "kid": "k1"}
        other = product.RsaKey("k1", "", N - 2, 65537)
        for header in (
            {"jwk": jwk},
            {"jku": "https://evil.example/keys"},
            {"x5u": "https://evil.example/c"},
        ):
            with self.subTest(list(header)):
                self.refusal(jwt(header=header), keys=[other])

    def test_a_changed_token_is_refused(self):
        token = jwt()
        head, claims, signature = token.split(".")
        raw = base64.urlsafe_b64decode(signature + "==")
        number = int.from_bytes(raw, "big")
        others = {
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
        }
        for what, changed in others.items():
            with self.subTest(what):
                self.refusal(f"{head}.{claims}.{base64url(changed)}")
        for what, changed in {
            "claims": base64url(
                json.dumps({"iss": ISSUER, "aud": "receiver", "exp": NOW + 601}).encode()
            ),
            "claims of another spelling": base64url(
                base64.urlsafe_b64decode(claims + "==").replace(b" ", b"")
            ),
        }.items():
            with self.subTest(what):
                self.refusal(f"{head}.{changed}.{signature}")

    def test_a_signature_that_is_not_below_the_modulus_is_refused(self):
        """RFC 8017 section 5.2.2: the modulus added makes another spelling of the same signature."""

        def add(signed):
            return (int.from_bytes(rsa_sign(signed), "big") + N).to_bytes(256, "big")

        for seconds in range(100):
            with contextlib.suppress(OverflowError):  # the sum must fit into as many bytes
                self.refusal(jwt(exp=NOW + 600 + seconds, signature=add))
                return
        self.fail("no signature is small enough")

    def test_a_signature_block_with_other_padding_is_refused(self):
        def signer(change):
            return lambda signed: rsa_private(change(encoded_block(signed)))

        self.verify(jwt(signature=signer(lambda block: block)))
        for what, change in {
            "type 2": lambda block: b"\0\2" + block[2:],
            "a zero within": lambda block: block[:10] + b"\0" + block[11:],
            "another fill": lambda block: block[:10] + b"\xfe" + block[11:],
            "the hash alone": lambda block: bytes(224) + block[-32:],
            "no separator": lambda block: block.replace(b"\xff\0", b"\xff\xff"),
            "no NULL in the identifier": lambda block: (
                block[:2]
                + b"\xff\xff"
                + block[2:].replace(
                    bytes.fromhex("3031300d06096086480165030402010500"),
                    bytes.fromhex("302f300b0609608648016503040201"),
                )
            ),
            "another identifier": lambda block: block.replace(b"\x04\x02\x01", b"\x04\x02\x02"),
        }.items():
            with self.subTest(what):
                self.refusal(jwt(signature=signer(change)))

    def test_a_forgery_for_exponent_three_is_refused(self):
        """Bleichenbacher 2006: a cube whose first bytes look right, with rubbish behind the hash."""

        def forge(signed):
            block = b"\0\1" + b"\xff" * 8 + encoded_block(signed)[-52:]
            low, high = 0, 1 << 800
            target = int.from_bytes(block.ljust(256, b"\0"), "big")
            while low < high:  # the smallest number whose cube is not below the target
                middle = (low + high) // 2
                low, high = (low, middle) if middle**3 >= target else (middle + 1, high)
            assert (low**3).to_bytes(256, "big").startswith(block)
            return low.to_bytes(256, "big")

        self.refusal(jwt(signature=forge), keys=[product.RsaKey("k1", "", N, 3)])

    def test_all_of_sixteen_keys_are_tried(self):
        others = [product.RsaKey(None, "", N - 2 * number, 65537) for number in range(1, 17)]
        self.verify(jwt(header={"kid": None}), keys=[*others[:15], RSA_KEY])
        self.refusal(jwt(header={"kid": None}), keys=others)
        self.refusal(jwt(header={"kid": None}), keys=[])
        self.refusal(jwt(header={"kid": None}), keys=[*others, RSA_KEY])

    def test_times_are_checked_with_a_minute_of_leeway(self):
        good = [
            {"exp": NOW - 58},
            {"exp": NOW - 30.5},
            {"exp": NOW + 10**8},
            {"exp": NOW + 600.25},
            {"nbf": NOW + 58},
            {"nbf": NOW - 10**8},
            {"nbf": 0},
            {"nbf": NOW + 0.5},
            {"iat": NOW + 10, "auth_time": "x"},
        ]
        bad = [
            {"exp": None},
            {"exp": NOW - 62},
            {"exp": 0},
            {"exp": -1},
            {"exp": str(NOW + 600)},
            {"exp": True},
            {"exp": [NOW + 600]},
            {"exp": {}},
            {"nbf": NOW + 62},
            {"nbf": NOW + 10**8},
            {"nbf": "0"},
            {"nbf": True},
            {"nbf": []},
        ]
        for claims in good:
            with self.subTest(claims):
                self.verify(jwt(claims))
        for claims in bad:
            with self.subTest(claims):
                self.refusal(jwt(claims))

    def test_the_issuer_must_be_the_expected_one(self):
        for issuer in (None, "", ISSUER + "/", ISSUER.upper(), ISSUER[:-1], "joe", 5, [ISSUER], {}):
            with self.subTest(issuer):
                self.refusal(jwt(iss=issuer))

    def test_a_configured_issuer_overrides_the_discovered_one(self):
        configured = "https://sts.windows.net/tenant/"
        settings = {**self.AUDIENCE, "issuer": configured}
        self.verify(jwt(iss=configured), oidc=settings)
        self.refusal(jwt(iss=ISSUER), oidc=settings)

    def test_the_audience_must_be_ours(self):
        for audience in ("receiver", ["receiver"], ["other", "receiver"], ["receiver", 5, None]):
            with self.subTest(audience):
                self.verify(jwt(aud=audience))
        for audience in (
            None,
            "",
            "other",
            "receiver2",
            "Receiver",
            [],
            ["other"],
            [["receiver"]],
            {"receiver": 1},
            5,
        ):
            with self.subTest(audience):
                self.refusal(jwt(aud=audience))

    def test_the_client_must_be_ours(self):
        for name in ("azp", "client_id", "appid"):
            with self.subTest(name):
                self.verify(jwt({name: "central"}, aud=None), oidc=self.CLIENT)
                for value in ("other", "", "Central", 5, True, ["central"], {"central": 1}):
                    self.refusal(jwt({name: value}), oidc=self.CLIENT)
        self.refusal(jwt(), oidc=self.CLIENT)
        self.refusal(jwt(sub="central"), oidc=self.CLIENT)

    def test_audience_and_client_are_both_demanded_where_both_are_configured(self):
        both = {"oidc": {**self.AUDIENCE, **self.CLIENT}}
        self.verify(jwt(azp="central"), **both)
        self.refusal(jwt(), **both)
        self.refusal(jwt(azp="central", aud="other"), **both)
        self.refusal(jwt(azp="other"), **both)

    def test_malformed_tokens_raise_nothing_but_a_refusal(self):
        head, claims, signature = jwt().split(".")
        deep = b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}"
        tokens = [
            "",
            ".",
            "..",
            "...",
            "a.b.c",
            f"{head}.{claims}",
            f"{head}.{claims}.",
            f".{claims}.{signature}",
            f"{head}..{signature}",
            f"{head}.{claims}.{signature}.",
            f"{head}.{claims}.{signature}.{signature}",
            f"{head}.{claims}.{signature}=",
            f"{head}.{claims}.{signature}==",
            f"{head} .{claims}.{signature}",
            f" {head}.{claims}.{signature}",
            f"{head}.{claims}.{signature} ",
            f"{head}.{claims}.{signature[:-1]}",
            f"{head}.{claims}.{signature[:100]}!{signature[100:]}",
            f"{head}.{claims}.{signature[:100]}+{signature[101:]}",
            f"{head}.{claims}.{signature}\xe9",
            f"{head}.{claims}.\u20ac",
            f"\ud800.{claims}.{signature}",
            f"{head}.{claims}.{'A' * 100000}",
            "A" * 100000,
            "." * 100000,
        ]
        for token in tokens:
            with self.subTest(token[:20]):
                self.refusal(token)
        raws = [
            b"",
            b"{",
            b"[]",
            b"null",
            b"5",
            b'"x"',
            b"\xff",
            b"{}",
            b'{"exp":NaN}',
            b'{"alg":"RS256","exp":Infinity}',
            b"\xef\xbb\xbf{}",
            "{}".encode("utf-16"),
            deep,
            b'{"exp":' + b"9" * 5000 + b"}",
            b'{"exp":1e400,"iss":"' + ISSUER.encode() + b'","aud":"receiver"}',
            b'{"exp":-1e400,"iss":"' + ISSUER.encode() + b'","aud":"receiver"}',
        ]
        for raw in raws:
            with self.subTest(raw[:20]):
                self.refusal(jwt(raw_claims=raw))
                self.refusal(jwt(raw_header=raw))

    def test_a_claim_or_header_that_occurs_twice_is_refused(self):
        claims = f'"iss":"{ISSUER}","aud":"receiver","exp":{NOW + 600}'
        self.verify(jwt(raw_claims=f"{{{claims}}}".encode()))
        self.refusal(jwt(raw_claims=f'{{"aud":"other",{claims}}}'.encode()))
        self.refusal(jwt(raw_header=b'{"alg":"none","alg":"RS256"}'))

    def test_no_message_shows_the_token(self):
        for token in (
            jwt(aud="other"),
            jwt(exp=NOW - 600),
            jwt(signature=lambda signed: b"x" * 256),
            "a.b.c",
        ):
            text = self.refusal(token)
            for part in token.split("."):
                self.assertFalse(len(part) > 3 and part in text)
