"""OIDC access tokens of npm's oidc-provider and of a provider that misbehaves; a proxy."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import http.server
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
import urllib.request
from pathlib import Path

from ..support import (
    PATH,
    PROGRAM,
    TOKEN,
    Receiver,
    central_headers,
    config_of,
    deadline_poll,
    new_body,
    raw_request,
)
from . import parts

AUDIENCE, CLIENT, SECRET = "https://hooks.example.com/api", "central-client", "client-secret"
PAUSE_SECONDS = 10  # between two questions to the provider


def setUpModule():
    parts.need_module("cryptography")


def receiver_for(well_known_url, environment=None, **oidc):
    """Return a receiver (not started) whose webhook demands an access token."""
    oidc = {"well_known_url": well_known_url, "audience": AUDIENCE, "client_id": CLIENT, **oidc}
    oidc = {name: value for name, value in oidc.items() if value}
    webhook = {"name": "noc", "path": PATH, "token": TOKEN, "oidc": oidc}
    return Receiver(config_of(webhook=webhook), environment=environment)


def deliver(receiver, *tokens, scheme="Bearer"):
    """Send a delivery with a good signature and the given access tokens; return the answer."""
    body = new_body()
    pairs = [
        *central_headers(body).items(),
        *(("Authorization", f"{scheme} {token}") for token in tokens),
    ]
    return receiver.request(raw_request("POST", PATH, pairs, body), timeout=20)


# ---- A real provider ----


class RealProvider:
    """A running oidc-provider, with a key of its own."""

    def __init__(self, kid, port=0):
        node, packages = need_provider()
        script = Path(__file__).with_name("oidc_provider.mjs")
        self.process = subprocess.Popen(
            [node, str(script), packages, str(port), kid, CLIENT, SECRET],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self):
        lines = []
        for line in self.process.stdout:
            lines.append(line.decode())
            if lines[-1].startswith("ready "):
                self.port = int(lines[-1].split()[1])
                self.well_known_url = (
                    f"http://127.0.0.1:{self.port}/.well-known/openid-configuration"
                )
                threading.Thread(target=self.process.stdout.read, daemon=True).start()
                return self
        self.__exit__()
        raise AssertionError("the provider does not start: " + "".join(lines))

    def __exit__(self, *exc):
        self.process.stdin.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(10)
        self.process.stdout.close()

    def token(self, audience=AUDIENCE):
        """Get an access token as a client does (RFC 6749 section 4.4, RFC 8707)."""
        data = urllib.parse.urlencode(
            {"grant_type": "client_credentials", "resource": audience}
        ).encode()
        credentials = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/token", data, {"Authorization": f"Basic {credentials}"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=10
        ) as answer:
            return json.load(answer)["access_token"]


def need_provider():
    """Return the paths of node and of the folder with oidc-provider in it."""
    node = parts.need_program("node")
    return node, parts.need("npm's oidc-provider (INTEROP_NODE_MODULES)", find_packages)


@functools.lru_cache(maxsize=1)
def find_packages():
    folder = os.environ.get("INTEROP_NODE_MODULES", "")
    return folder if folder and (Path(folder) / "oidc-provider" / "package.json").exists() else ""


class RealProviderTest(unittest.TestCase):
    """With tokens that a real provider has issued."""

    def setUp(self):
        need_provider()

    def test_a_token_of_the_provider_is_accepted_and_none_or_one_for_others_is_not(self):
        with RealProvider("one") as provider, receiver_for(provider.well_known_url) as receiver:
            token = provider.token()
            self.assertEqual(200, deliver(receiver, token).status)
            answer = deliver(receiver)
            self.assertEqual((401, {"error": "unauthorized"}), (answer.status, answer.json))
            self.assertRegex(answer.headers["www-authenticate"], "^Bearer")
            self.assertEqual(
                401, deliver(receiver, provider.token("https://other.example.com")).status
            )
            self.assertEqual(401, deliver(receiver, token[:-8] + token[-4:] + token[-8:-4]).status)
            self.assertEqual(401, deliver(receiver, token, token).status)
            body = new_body()
            headers = {
                **central_headers(body, token="another-token"),
                "Authorization": f"Bearer {token}",
            }
            self.assertEqual(401, receiver.post(body, headers).status)
            with receiver_for(provider.well_known_url, client_id="another-client") as other:
                self.assertEqual(401, deliver(other, token).status)

    def test_send_sample_carries_a_token_in_a_header(self):
        with RealProvider("one") as provider, receiver_for(provider.well_known_url) as receiver:
            url = f"http://127.0.0.1:{receiver.port}{PATH}"
            command = [
                sys.executable,
                str(PROGRAM),
                f"-i={receiver.config_path}",
                "--send-sample",
                url,
            ]
            for extra, code in (
                ([], 1),
                (["--header", f"Authorization: Bearer {provider.token()}"], 0),
            ):
                with self.subTest(code):
                    done = subprocess.run(
                        [*command, *extra], capture_output=True, text=True, timeout=60
                    )
                    self.assertEqual(code, done.returncode, done.stderr)

    def test_keys_stay_while_the_provider_is_down_and_are_replaced_when_it_returns(
        self,
    ):
        with RealProvider("one") as provider:
            receiver = receiver_for(provider.well_known_url)
            receiver.__enter__()
            self.addCleanup(receiver.__exit__)
            old, port = provider.token(), provider.port
            self.assertEqual(200, deliver(receiver, old).status)
        self.assertEqual(200, deliver(receiver, old).status)
        with RealProvider("two", port) as provider:
            new = provider.token()
            deadline_poll(
                lambda: deliver(receiver, new).status == 200,
                PAUSE_SECONDS + 5,
                "the new key is never fetched",
            )
            self.assertEqual(401, deliver(receiver, old).status)  # its key has been withdrawn

    def test_without_a_provider_from_the_start_it_is_503_until_there_is_one(self):
        (port,) = parts.free_ports(1)
        with receiver_for(f"http://127.0.0.1:{port}/.well-known/openid-configuration") as receiver:
            token = FakeProvider.mint(new_key(), "one")
            answer = deliver(receiver, token)
            self.assertEqual((503, ["error"]), (answer.status, list(answer.json)))
            self.assertIn("retry-after", answer.headers)
            with RealProvider("one", port) as provider:
                token = provider.token()
                statuses = []
                deadline_poll(
                    lambda: statuses.append(deliver(receiver, token).status) or 200 in statuses,
                    PAUSE_SECONDS + 5,
                )
                self.assertLessEqual(set(statuses), {503, 200})
        self.assertEqual(0, sum("Traceback" in line for line in receiver.stderr_lines))


# ---- A provider of our own ----


@functools.lru_cache(maxsize=None)
def new_key(name="", bits=2048):
    """Return an RSA key; the same one for the same name."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(65537, bits)


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def encode(value):
    return base64url(json.dumps(value).encode())


def jwk_of(key, kid):
    numbers = key.public_key().public_numbers()
    n, e = (
        base64url(number.to_bytes((number.bit_length() + 7) // 8, "big"))
        for number in (numbers.n, numbers.e)
    )
    return {"kty": "RSA", "use": "sig", "kid": kid, "n": n, "e": e}


class FakeProvider:
    """A provider on loopback whose two documents are whatever the test wants.

    `answers` maps a path to (status, headers, body), or to a function that gets the handler.
    """

    DISCOVERY, JWKS = "/.well-known/openid-configuration", "/jwks"
    issuer = "https://issuer.example.com/"  # need not be where the documents are

    def __init__(self, tls=None, host="localhost"):
        provider = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                provider.asked.append(self.path)
                answer = provider.answers.get(self.path, (404, {}, b""))
                if callable(answer):
                    return answer(self)
                status, headers, body = answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.asked = []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *arguments: (
            None
        )  # a receiver that hangs up is what some tests want
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.base = f"{'https' if tls else 'http'}://{host}:{self.server.server_address[1]}"
        self.well_known_url = self.base + self.DISCOVERY
        self.answers = {}
        self.publish(jwk_of(new_key(), "one"))

    def publish(self, *keys, **changes):
        """Publish these keys, and a discovery document with these changes."""
        document = {"issuer": self.issuer, "jwks_uri": self.base + self.JWKS, **changes}
        self.answers[self.DISCOVERY] = (200, {}, json.dumps(document).encode())
        self.answers[self.JWKS] = (200, {}, json.dumps({"keys": keys}).encode())

    def __enter__(self):
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()

    @classmethod
    def claims(cls, **changes):
        claims = {
            "iss": cls.issuer,
            "aud": AUDIENCE,
            "client_id": CLIENT,
            "exp": int(time.time()) + 300,
            **changes,
        }
        return {name: value for name, value in claims.items() if value is not ...}

    @classmethod
    def mint(cls, key, kid=..., header=(), **changes):
        """Return a token signed with an RSA key; `...` leaves something out."""
        header = {"alg": "RS256", "typ": "at+jwt", "kid": kid, **dict(header)}
        return sign_rsa(
            {name: value for name, value in header.items() if value is not ...},
            cls.claims(**changes),
            key,
        )


def sign_rsa(header, claims, key):
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    signed = f"{encode(header)}.{encode(claims)}"
    digest = {"384": hashes.SHA384, "512": hashes.SHA512}.get(header["alg"][2:], hashes.SHA256)()
    pad = padding.PKCS1v15()
    if header["alg"].startswith("PS"):
        pad = padding.PSS(padding.MGF1(digest), digest.digest_size)
    return f"{signed}.{base64url(key.sign(signed.encode(), pad, digest))}"


def sign_hmac(header, claims, secret):
    signed = f"{encode(header)}.{encode(claims)}"
    return f"{signed}.{base64url(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"


def sign_ecdsa(header, claims):
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    signed = f"{encode(header)}.{encode(claims)}"
    der = ec.generate_private_key(ec.SECP256R1()).sign(signed.encode(), ec.ECDSA(hashes.SHA256()))
    numbers = utils.decode_dss_signature(der)
    return f"{signed}.{base64url(b''.join(number.to_bytes(32, 'big') for number in numbers))}"


def make_context(test, name="DNS:localhost"):
    """Return a TLS context for a server, and the environment in which clients trust it."""
    parts.need_program("openssl")
    folder = Path(tempfile.mkdtemp(prefix="certificates-"))
    test.addCleanup(shutil.rmtree, folder)
    parts.make_certificates(folder, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "fullchain.pem", folder / "privkey.pem")
    return context, {"SSL_CERT_FILE": str(folder / "authority.pem")}


class MintedTokenTest(unittest.TestCase):
    """Tokens that differ in one thing from one that is accepted."""

    def setUp(self):
        self.provider = FakeProvider().__enter__()
        self.addCleanup(self.provider.__exit__)
        self.receiver = receiver_for(self.provider.well_known_url).__enter__()
        self.addCleanup(self.receiver.__exit__)

    def test_what_is_allowed_is_accepted(self):
        key, mint, now = new_key(), self.provider.mint, time.time()
        rows = [
            ("the token that all others are made of", mint(key, "one")),
            ("RS384", mint(key, "one", {"alg": "RS384"})),
            ("RS512", mint(key, "one", {"alg": "RS512"})),
            ("no kid", mint(key)),
            ("typ JWT", mint(key, "one", {"typ": "JWT"})),
            ("no typ", mint(key, "one", {"typ": ...})),
            ("several audiences", mint(key, "one", aud=["x", AUDIENCE])),
            ("the client as azp", mint(key, "one", client_id=..., azp=CLIENT)),
            ("the client as cid", mint(key, "one", client_id=..., cid=CLIENT)),
            ("the client as appid", mint(key, "one", client_id=..., appid=CLIENT)),
            ("expired within the leeway", mint(key, "one", exp=int(now) - 30)),
            ("not yet valid within the leeway", mint(key, "one", nbf=int(now) + 30)),
            ("a time with a fraction", mint(key, "one", exp=now + 30.5, nbf=now - 0.25)),
            ("unknown claims", mint(key, "one", scope="a b", roles=[{"x": None}])),
        ]
        for what, token in rows:
            with self.subTest(what):
                self.assertEqual(200, deliver(self.receiver, token).status)
        with self.subTest("a scheme in lower case"):
            self.assertEqual(200, deliver(self.receiver, rows[0][1], scheme="bearer").status)

    def test_what_is_not_allowed_is_401(self):
        from cryptography.hazmat.primitives import serialization

        key, attacker, mint, now = (
            new_key(),
            new_key("attacker"),
            self.provider.mint,
            int(time.time()),
        )
        weak = new_key("weak", 1024)
        self.provider.publish(
            jwk_of(key, "one"),
            jwk_of(weak, "weak"),
            {**jwk_of(attacker, "encryption"), "use": "enc"},
        )
        encoding, form = serialization.Encoding, serialization.PublicFormat
        pem = key.public_key().public_bytes(encoding.PEM, form.SubjectPublicKeyInfo)
        der = key.public_key().public_bytes(encoding.DER, form.SubjectPublicKeyInfo)
        claims, good = self.provider.claims(), mint(key, "one")
        head, payload, signature = good.split(".")
        hs256 = {"alg": "HS256", "kid": "one"}
        rows = [
            ("none", f"{encode({'alg': 'none'})}.{payload}."),
            (
                "none with a signature",
                f"{encode({'alg': 'none', 'kid': 'one'})}.{payload}.{signature}",
            ),
            ("None", f"{encode({'alg': 'None', 'kid': 'one'})}.{payload}."),
            ("HS256 with the public key in PEM", sign_hmac(hs256, claims, pem)),
            ("HS256 with the public key in DER", sign_hmac(hs256, claims, der)),
            ("HS256 with the modulus", sign_hmac(hs256, claims, jwk_of(key, "")["n"].encode())),
            ("HS256 with the token", sign_hmac(hs256, claims, TOKEN.encode())),
            ("PS256", mint(key, "one", {"alg": "PS256"})),
            ("ES256", sign_ecdsa({"alg": "ES256", "kid": "one"}, claims)),
            ("RS256 and ES256's signature", sign_ecdsa({"alg": "RS256", "kid": "one"}, claims)),
            ("alg is a list", f"{encode({'alg': ['RS256'], 'kid': 'one'})}.{payload}.{signature}"),
            ("alg is missing", f"{encode({'kid': 'one'})}.{payload}.{signature}"),
            (
                "a kid that is null",
                sign_rsa({"alg": "RS256", "kid": None}, self.provider.claims(), key),
            ),
            (
                "another hash than it says",
                f"{encode({'alg': 'RS512', 'kid': 'one'})}.{payload}.{signature}",
            ),
            ("another key", mint(attacker, "one")),
            ("another key without kid", mint(attacker)),
            ("another key ID", mint(key, "two")),
            ("a key ID that is not a string", mint(key, 1)),
            ("a key for encryption", mint(attacker, "encryption")),
            ("a key of 1024 bits", mint(weak, "weak")),
            ("a key of 1024 bits without kid", mint(weak)),
            (
                "a key embedded in the token",
                mint(attacker, "one", {"jwk": jwk_of(attacker, "one")}),
            ),
            ("an unknown critical extension", mint(key, "one", {"crit": ["b64"], "b64": False})),
            ("an empty list of critical extensions", mint(key, "one", {"crit": []})),
            ("expired", mint(key, "one", exp=now - 120)),
            ("exp missing", mint(key, "one", exp=...)),
            ("exp is a string", mint(key, "one", exp=str(now + 300))),
            ("exp is true", mint(key, "one", exp=True)),
            ("exp is null", mint(key, "one", exp=None)),
            ("exp is an object", mint(key, "one", exp={})),
            ("not yet valid", mint(key, "one", nbf=now + 120)),
            ("nbf is a string", mint(key, "one", nbf="0")),
            ("nbf is true", mint(key, "one", nbf=True)),
            ("another issuer", mint(key, "one", iss=self.provider.issuer + "x")),
            ("no issuer", mint(key, "one", iss=...)),
            ("another audience", mint(key, "one", aud=AUDIENCE + "/x")),
            ("other audiences", mint(key, "one", aud=["x", AUDIENCE + "/x"])),
            ("the audience in an object", mint(key, "one", aud={AUDIENCE: 1})),
            ("no audience", mint(key, "one", aud=...)),
            ("another client", mint(key, "one", client_id="other")),
            ("no client", mint(key, "one", client_id=...)),
            ("the payload changed", f"{head}.{encode({**claims, 'admin': True})}.{signature}"),
            (
                "the header changed",
                f"{encode({'alg': 'RS256', 'kid': 'one', 'typ': 'x'})}.{payload}.{signature}",
            ),
            ("no signature", f"{head}.{payload}."),
            ("no third part", f"{head}.{payload}"),
            ("a fourth part", f"{good}.{signature}"),
            ("a longer signature", f"{head}.{payload}.AAAA{signature}"),
            ("padding", f"{good}=="),
            ("a character that base64url has not", f"{good[:-1]}+"),
            ("a JSON array as payload", f"{head}.{encode([1])}.{signature}"),
            ("not base64url at all", "%.%.%"),
            ("deep nesting", f"{base64url(b'[' * 20000)}.{payload}.{signature}"),
            ("an empty token", ""),
        ]
        for what, token in rows:
            with self.subTest(what):
                self.assertEqual(401, deliver(self.receiver, token).status)
        with self.subTest("another scheme"):
            self.assertEqual(401, deliver(self.receiver, good, scheme="Basic").status)
        with self.subTest("the header repeated"):
            self.assertEqual(401, deliver(self.receiver, good, good).status)
        self.assertEqual(200, deliver(self.receiver, good).status)
        self.assertEqual(
            [],
            [
                line
                for line in self.receiver.stderr_lines
                if "Traceback" in line or " ERROR " in line
            ],
        )

    def test_the_log_names_an_algorithm_that_is_not_accepted_and_never_the_token(self):
        for header in ({"alg": "ES256", "kid": "one"}, {"alg": "none"}, {"alg": "EdDSA"}):
            with self.subTest(header):
                token = sign_ecdsa(header, self.provider.claims())
                self.assertEqual(401, deliver(self.receiver, token).status)
                line = self.receiver.wait_for_log(f"401 .*{header['alg']}")
                self.assertNotIn(token.split(".")[2], line)

    def test_a_configured_issuer_takes_the_place_of_the_discovered_one(self):
        token = self.provider.mint(new_key(), "one", iss="https://sts.example.com/tenant/")
        self.assertEqual(401, deliver(self.receiver, token).status)
        with receiver_for(
            self.provider.well_known_url, issuer="https://sts.example.com/tenant/"
        ) as receiver:
            self.assertEqual(200, deliver(receiver, token).status)
            self.assertEqual(401, deliver(receiver, self.provider.mint(new_key(), "one")).status)

    def test_what_is_not_configured_is_not_demanded(self):
        for changes, token in (
            ({"audience": None}, self.provider.mint(new_key(), "one", aud=...)),
            ({"client_id": None}, self.provider.mint(new_key(), "one", client_id=...)),
        ):
            with (
                self.subTest(changes),
                receiver_for(self.provider.well_known_url, **changes) as receiver,
            ):
                self.assertEqual(200, deliver(receiver, token).status)

    def test_tokens_with_unknown_key_ids_cause_no_more_than_one_question(self):
        for number in range(20):
            self.assertEqual(
                401,
                deliver(self.receiver, self.provider.mint(new_key("attacker"), str(number))).status,
            )
        self.assertEqual([FakeProvider.DISCOVERY, FakeProvider.JWKS], self.provider.asked)

    def test_a_delivery_with_a_bad_signature_asks_the_provider_nothing(self):
        body = new_body()
        headers = {
            **central_headers(body, token="x"),
            "Authorization": f"Bearer {self.provider.mint(new_key(), 'one')}",
        }
        self.assertEqual(401, self.receiver.post(body, headers).status)
        self.assertEqual([], self.provider.asked)

    def test_keys_once_obtained_stay_when_the_provider_breaks(self):
        good = self.provider.mint(new_key(), "one")
        self.assertEqual(200, deliver(self.receiver, good).status)
        self.provider.answers.clear()
        self.assertEqual(
            401, deliver(self.receiver, self.provider.mint(new_key("attacker"), "two")).status
        )
        self.assertEqual(200, deliver(self.receiver, good).status)


class BadProviderTest(unittest.TestCase):
    """A provider whose keys cannot be had: 503, since the sender may be in the right."""

    def assert_unavailable(self, provider, seconds=4.0):
        """Assert that a good token is 503 within `seconds`; return what the provider was asked."""
        with provider, receiver_for(provider.well_known_url) as receiver:
            started = time.monotonic()
            answer = deliver(receiver, provider.mint(new_key(), "one"))
            self.assertLess(time.monotonic() - started, seconds)
            self.assertEqual((503, ["error"]), (answer.status, list(answer.json)))
            self.assertIn("retry-after", answer.headers)
            receiver.wait_for_log("503 ")
            self.assertEqual(
                [],
                [
                    line
                    for line in receiver.stderr_lines
                    if "Traceback" in line or "internal" in line
                ],
            )
            return list(provider.asked)

    def test_redirects_are_not_followed(self):
        for path in (FakeProvider.DISCOVERY, FakeProvider.JWKS):
            for status in (301, 302, 307, 308):
                with self.subTest(path=path, status=status):
                    provider = FakeProvider()
                    provider.answers["/elsewhere"] = provider.answers[path]
                    provider.answers[path] = (
                        status,
                        {"Location": provider.base + "/elsewhere"},
                        b"",
                    )
                    self.assertNotIn("/elsewhere", self.assert_unavailable(provider))

    def test_documents_that_are_not_what_they_should_be_give_no_keys(self):
        for path in (FakeProvider.DISCOVERY, FakeProvider.JWKS):
            for what, status, change in [
                ("500", 500, lambda body: body),
                ("404", 404, lambda body: body),
                ("not JSON", 200, lambda body: b"<html>"),
                ("an array", 200, lambda body: b"[]"),
                ("an empty object", 200, lambda body: b"{}"),
                ("wrong types", 200, lambda body: b'{"issuer": 1, "jwks_uri": 2, "keys": 3}'),
                ("cut off", 200, lambda body: body[:-1]),
                ("deep nesting", 200, lambda body: b'{"x":' + b"[" * 100000),
                ("not UTF-8", 200, lambda body: b'{"\xff": 1, ' + body[1:]),
            ]:
                with self.subTest(path=path, what=what):
                    provider = FakeProvider()
                    _, _, body = provider.answers[path]
                    provider.answers[path] = (
                        status,
                        {"Content-Length": str(len(body))} if what == "cut off" else {},
                        change(body),
                    )
                    self.assert_unavailable(provider)

    def test_a_discovery_document_cannot_lead_to_plain_http_elsewhere_or_to_other_schemes(
        self,
    ):
        keys = json.dumps({"keys": [jwk_of(new_key(), "one")]})
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(keys)
            file.flush()
            for url in (
                "http://0.0.0.0:{port}/jwks",  # leads here, but is no loopback address
                f"file://{file.name}",
                "data:application/json," + urllib.parse.quote(keys),
                "//localhost:{port}/jwks",
                "/jwks",
            ):
                with self.subTest(url[:20]):
                    provider = FakeProvider()
                    port = provider.server.server_address[1]
                    provider.publish(
                        jwk_of(new_key(), "one"), jwks_uri=url.replace("{port}", str(port))
                    )
                    self.assertEqual([FakeProvider.DISCOVERY], self.assert_unavailable(provider))

    def test_a_document_without_end_is_given_up_in_time(self):
        for pause, part in ((0.2, b" "), (0, b" " * 65536)):
            with self.subTest(pause=pause):
                stop, given_up = threading.Event(), threading.Event()
                self.addCleanup(stop.set)

                def write(handler, stop=stop, given_up=given_up, pause=pause, part=part):
                    handler.send_response(200)
                    handler.end_headers()
                    try:
                        while not stop.wait(pause):
                            handler.wfile.write(part)
                    except OSError:
                        given_up.set()

                with FakeProvider() as provider, receiver_for(provider.well_known_url) as receiver:
                    provider.answers[FakeProvider.DISCOVERY] = write
                    answer = deliver(receiver, provider.mint(new_key(), "one"))
                    self.assertEqual(503, answer.status)
                    self.assertTrue(given_up.wait(PAUSE_SECONDS), "the receiver still reads")

    def test_a_slow_provider_delays_only_deliveries_that_need_its_keys(self):
        stop = threading.Event()
        self.addCleanup(stop.set)
        with FakeProvider() as provider, receiver_for(provider.well_known_url) as receiver:
            good, statuses = provider.answers[FakeProvider.JWKS], []
            provider.answers[FakeProvider.JWKS] = lambda handler: (
                stop.wait(10) and handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + good[2])
            )
            token = provider.mint(new_key(), "one")
            waiting = threading.Thread(
                target=lambda: statuses.append(deliver(receiver, token).status)
            )
            waiting.start()
            deadline_poll(lambda: FakeProvider.JWKS in provider.asked)
            self.assertEqual(401, deliver(receiver).status)
            self.assertEqual([], statuses)
            stop.set()
            waiting.join(10)
            self.assertEqual([200], statuses)

    def test_a_provider_that_accepts_and_says_nothing_is_given_up_in_time(self):
        stop = threading.Event()
        provider = FakeProvider()
        provider.answers[FakeProvider.JWKS] = lambda handler: stop.wait(15)
        self.addCleanup(stop.set)
        self.assert_unavailable(provider, seconds=8.0)

    def test_over_https_a_certificate_that_is_trusted_is_needed(self):
        context, environment = make_context(self)
        self.assert_unavailable(FakeProvider(context))
        with FakeProvider(context) as provider:
            with receiver_for(provider.well_known_url, environment) as receiver:
                self.assertEqual(200, deliver(receiver, provider.mint(new_key(), "one")).status)


# ---- A real proxy ----


class TinyProxy:
    """A running tinyproxy on loopback; `lines` returns its log."""

    def __init__(self, program):
        self.folder = Path(tempfile.mkdtemp(prefix="tinyproxy-"))
        (self.port,) = parts.free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.folder / "log"
        configuration = self.folder / "tinyproxy.conf"
        configuration.write_text(
            f'Port {self.port}\nListen 127.0.0.1\nAllow 127.0.0.1\nLogFile "{self.log}"\n'
            "LogLevel Connect\nTimeout 30\nMaxClients 20\n"
        )
        self.process = subprocess.Popen(
            [program, "-d", "-c", str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self):
        def is_open():
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return True

        deadline_poll(is_open, message="tinyproxy does not start")
        return self

    def __exit__(self, *exc):
        self.process.terminate()
        self.process.wait(10)
        shutil.rmtree(self.folder)

    def requests(self):
        """Return the request lines of its log."""
        return re.findall(r"Request \(file descriptor \d+\): (.*)", self.log.read_text())


class ProxyTest(unittest.TestCase):
    """A provider over https that is reached through tinyproxy.

    Its host is 0.0.0.0, which leads to this machine but is not a loopback address, since those
    are never reached through a proxy.
    """

    HOST = "0.0.0.0"

    def setUp(self):
        proxy = TinyProxy(parts.need_program("tinyproxy"))
        self.proxy = proxy.__enter__()
        self.addCleanup(proxy.__exit__)
        context, self.environment = make_context(self, f"IP:{self.HOST}")
        self.provider = FakeProvider(context, self.HOST).__enter__()
        self.addCleanup(self.provider.__exit__)
        self.environment["HTTPS_PROXY"] = self.proxy.url
        self.connect = f"CONNECT {self.HOST}:{self.provider.server.server_address[1]} HTTP/1."

    def deliver(self, **environment):
        """Return the status of a delivery with a good token."""
        environment = {**self.environment, **environment}
        with receiver_for(self.provider.well_known_url, environment) as receiver:
            token = self.provider.mint(new_key(), "one")
            status = deliver(receiver, token).status
            receiver.wait_for_log("OIDC keys")  # that they were obtained, or why not
            return status, list(receiver.stderr_lines)

    def test_the_keys_are_fetched_through_the_proxy(self):
        status, log = self.deliver()
        self.assertEqual(200, status, log)
        self.assertEqual([FakeProvider.DISCOVERY, FakeProvider.JWKS], self.provider.asked)
        requests = self.proxy.requests()
        self.assertEqual([self.connect] * 2, [line[: len(self.connect)] for line in requests])

    def test_no_proxy_names_hosts_that_are_reached_without_it(self):
        status, log = self.deliver(NO_PROXY=f"example.com,{self.HOST}")
        self.assertEqual(200, status, log)
        self.assertEqual([], self.proxy.requests())

    def test_a_proxy_that_is_down_is_503_and_named_in_the_log(self):
        (port,) = parts.free_ports(1)
        status, log = self.deliver(HTTPS_PROXY=f"http://127.0.0.1:{port}")
        self.assertEqual(503, status)
        self.assertTrue(any("Connection refused" in line for line in log), log)
        self.assertEqual([], self.provider.asked)

    def test_a_sample_is_sent_through_the_proxy_but_not_to_a_loopback_address(self):
        with Receiver(config_of(), environment=self.environment) as receiver:
            for scheme, host, expected in (
                ("https", self.HOST, [self.connect]),
                ("http", self.HOST, [f"POST http://{self.HOST}:{receiver.port}{PATH} HTTP/1."]),
                ("http", "127.0.0.1", []),
            ):
                port = receiver.port if scheme == "http" else self.provider.server.server_port
                url = f"{scheme}://{host}:{port}{PATH}"
                before = len(self.proxy.requests())
                command = [sys.executable, str(PROGRAM), f"-i={receiver.config_path}"]
                done = subprocess.run(
                    [*command, "--send-sample", url],
                    capture_output=True,
                    text=True,
                    timeout=60,
                    env={**os.environ, **self.environment, "HTTP_PROXY": self.proxy.url},
                )
                status = "501" if scheme == "https" else "200"  # FakeProvider has no POST
                with self.subTest(url):
                    self.assertEqual(status, done.stdout[:3], done.stderr)
                    requests = self.proxy.requests()[before:]
                    self.assertEqual(len(expected), len(requests))
                    for request, start in zip(requests, expected):
                        self.assertEqual(start, request[: len(start)])
