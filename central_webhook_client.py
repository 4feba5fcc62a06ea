#!/usr/bin/env python3
"""Receive webhook alerts of HPE Aruba Networking Central: prove that they are authentic, keep them, answer.

    python3 central_webhook_client.py -i=input_info.json

One file, Python 3.9 or newer, standard library only. It runs behind an HTTPS reverse proxy (nginx/centralwebhook.conf).
A delivery is one POST. It is checked in this order: well-formed HTTP, path, signature over the raw body, age, not seen
before: `Handler.serve_request`, `Receiver.keep`. Then it is written (stdout, log_file to the disk): `Outputs.write`.
Only then it is answered with 200. Your own code goes into `handle_alert`.

The sections, pure functions first, sockets late (grep '^# ----' prints this map):

    Constants and limits
    Errors
    Signature of classic Central: the part to copy
    Signatures of the other senders
    JSON, kept as it was written
    HTTP message signatures of new Central (RFC 9421)
    OIDC access tokens
    Recent and new
    Your own code: the function to edit
    Output
    Configuration
    The way of a delivery: checks in their order, hints for the operator
    HTTP: strict parsing of a request
    HTTP server
    The OIDC provider's keys
    Life: signals, systemd
    Command line
"""

from __future__ import annotations

import argparse
import base64
import binascii
import collections
import contextlib
import email.utils
import errno
import functools
import hashlib
import hmac
import http.client
import ipaddress
import itertools
import json
import os
import re
import select
import selectors
import shutil
import signal
import socket
import socketserver
import stat
import sys
import threading
import time
import urllib.parse
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import (
    Any,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    TypeVar,
)

if sys.platform != "win32":
    import fcntl
    import resource

# ---- Constants and limits ---------------------------------------------------

VERSION = "1.0.0"
PROGRAM = "central_webhook_client.py"
EX_CANNOT_SERVE, EX_USAGE, EX_CONFIG = 1, 2, 78  # exit codes; 78 is that of sysexits.h
STDOUT, STDERR = 1, 2
JSON = "application/json"
_TOKEN = (
    r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # of RFC 9110 section 5.6.2: methods, names of header fields
)
_HEADER_NAME = re.compile(_TOKEN)

MAX_REQUEST_LINE_BYTES = 8 * 1024  # nginx's own limit
MAX_HEADER_BYTES = 64 * 1024  # all header fields of a request
MAX_HEADER_FIELDS = 100
MAX_CHUNK_LINE_BYTES = 256  # a chunk's size and its extensions, which nobody uses
RECEIVE_BYTES = (
    16 * 1024
)  # one recv takes a whole usual request: headers and body; then others have their turn
KEEP_ALIVE_SECONDS = (
    75.0  # above nginx's 60, so that nginx closes first and never meets a closed connection
)
LISTEN_QUEUE = 1024  # socketserver's 5 loses most of a burst of connections
ACCEPTED_AT_ONCE = (
    4  # connections, before they are answered: a proxy works on these answers while we do on others
)
LINGER_SECONDS = 2.0  # a refused sender is read from this long, so that it can read the answer
MAX_LINGERING = (
    200 if sys.platform == "win32" else 1024
)  # of those at once; select takes 512 sockets on Windows
DRAIN_SECONDS = 10.0  # after SIGTERM: for requests in flight
DRAIN_QUIET_SECONDS = (
    0.5  # after SIGTERM: for what is already on its way on a connection kept alive
)
IDLE_THREADS = 16  # threads that are kept for jobs to come
MAX_FUTURE_SECONDS = 15 * 60  # a sender's clock may be this much ahead
REMEMBERED_DELIVERIES = 100_000  # of each webhook
REJECTION_LINES_PER_SECOND = 10
MAX_SIGNATURE_FIELD_BYTES = (
    8 * 1024
)  # Signature and Signature-Input, each: parsed before anything is proved
MAX_LABELS = 4  # signatures tried in one Signature header
MAX_COMPONENTS = 32  # covered by one of them
MAX_QUERY_PARAMETERS = 100  # looked through for a covered one
SAMPLE_SECONDS = 30.0  # for the answer to --send-sample
PROVIDER_SECONDS = (
    5.0  # an OIDC provider's answer, and the pause between two questions is twice that
)
MAX_ANSWER_BYTES = 512 * 1024  # of a provider, or of who gets a sample
PROVIDER_KEYS_SECONDS = (
    3600.0  # after this the provider is asked again, in case it has withdrawn a key
)
MAX_KEYS_TRIED = 16
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 16384
TOKEN_LEEWAY_SECONDS = 60

# ---- Errors -----------------------------------------------------------------

_REASONS = """
    400 bad request: malformed
    401 unauthorized: signature api_key oidc stale
    404 not found: not_found
    405 method not allowed: method
    408 request timeout: timeout
    411 length required: no_length
    413 body too large: body_too_large
    414 request line too long: target_too_long
    431 header fields too large: headers_too_large
    501 transfer coding not implemented: coding
    503 unavailable: in_progress output handler provider overload
    505 http version not supported: version
"""  # status, error in the answer, reasons in the log and the metrics
REFUSALS = {
    reason: (int(status), error)
    for status, error, reasons in re.findall("([0-9]+) (.+): (.+)", _REASONS)
    for reason in reasons.split()
}


class Refusal(Exception):
    """A request is not accepted. `reason` is a key of REFUSALS; the detail is for the log, never for the sender."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.webhook = (
            reason,
            "",
        )  # the name of the webhook, where it is not that of the path


class OutputError(Exception):
    """Something accepted could not be written; the message says where and why."""


class ConfigError(Exception):
    """The configuration is wrong; one argument for each mistake."""


# ---- Signature of classic Central: the part to copy -------------------------
# Needs base64, hmac and typing. Source: Central's "Webhooks" help page and the vendor's sample.


class SignatureError(Exception):
    """The sender did not prove that it knows the token. The message names the cause and holds no secret."""


class HeaderSignature(NamedTuple):
    """How a sender signs with HMAC-SHA256 into one header. Names in lower case."""

    header: str
    prefix: str
    encode: Callable[[bytes], bytes]
    signed_headers: Sequence[
        str
    ]  # their values follow the body in the signed bytes, nothing between


CENTRAL = HeaderSignature(
    "x-central-signature",
    "",
    base64.b64encode,
    ("x-central-service", "x-central-delivery-id", "x-central-delivery-timestamp"),
)


def verify_signature(
    body: bytes,
    headers: Mapping[str, str],
    tokens: Sequence[str],
    scheme: HeaderSignature = CENTRAL,
) -> int:
    """Verify that `body` and the signed headers come from somebody who knows one of the `tokens`.

    `body` is the raw body, before anything decoded it. `headers` finds values by lower-case name, decoded as ISO-8859-1
    (what WSGI and http.server do); make sure that none of them occurred twice. A normal return is the position of the
    token that matched. It proves neither that the delivery is new nor recent: the signature can be replayed, and as
    nothing separates the signed values, bytes can be moved from one header to its neighbour.

    Raises:
        SignatureError: a header is missing or empty, or no token matches.
        ValueError: a token is empty, so that anybody could sign.
    """
    names = (scheme.header, *scheme.signed_headers)
    values = [headers.get(name, "") for name in names]
    if "" in values:
        raise SignatureError(
            "missing or empty: " + ", ".join(name for name in names if not headers.get(name))
        )
    try:
        received, signed = values[0].encode("latin-1"), body + "".join(values[1:]).encode("latin-1")
    except UnicodeEncodeError:
        raise SignatureError("a signed header is not ISO-8859-1") from None
    for position, token in enumerate(tokens):
        if not token:
            raise ValueError("an empty token")
        digest = hmac.digest(token.encode(), signed, "sha256")
        # Security: compare in constant time, in the encoded form, and as bytes. `==` leaks how many characters are
        # right, decoding first accepts other spellings, and compare_digest raises TypeError for non-ASCII str.
        if hmac.compare_digest(scheme.prefix.encode() + scheme.encode(digest), received):
            return position
    raise SignatureError(scheme.header + " does not match")


# ---- Signatures of the other senders ----------------------------------------

HEADER_SIGNATURES = {  # a sender of this kind is one line: header, prefix, encoding, signed headers
    "central": CENTRAL,
    "ip-fabric": HeaderSignature("x-ipf-signature", "", binascii.hexlify, ()),
    "mist": HeaderSignature(
        "x-mist-signature-v2", "", binascii.hexlify, ()
    ),  # X-Mist-Signature is SHA-1: ignored
    "bracken": HeaderSignature("authorization", "HMACSHA256 ", base64.b64encode, ()),
    "entrupy": HeaderSignature("entrupy-signature", "SHA256:", base64.b64encode, ()),
}
TYPES = (*HEADER_SIGNATURES, "new-central")
UNTOLD = ("bracken", "entrupy")  # nothing tells a replay of theirs from an event that happens again


class Request:
    """One HTTP request, its framing checked and nothing else: not yet trusted. No tuple, since the body comes last.

    `headers` has lower-case names; values of a name that occurs several times are joined with ", " (RFC 9110 section
    5.3), and the name is in `repeated` too. `query` is what follows "?", None without "?". Text is decoded as
    ISO-8859-1, so that it encodes back.
    """

    def __init__(
        self,
        method: str,
        path: str,
        query: Optional[str],
        version: str,
        headers: dict[str, str],
        repeated: frozenset[str],
        body: bytes = b"",
    ) -> None:
        self.method, self.path, self.query, self.version = method, path, query, version
        self.headers, self.repeated, self.body = headers, repeated, body


UNREAD = Request(
    "", "", None, "HTTP/1.1", {"connection": "close"}, frozenset()
)  # for one that could not be read


class ApiKey(NamedTuple):
    """A shared secret demanded besides the signature, in a header or in a top-level field of the JSON body."""

    place: str  # "header" or "field"
    name: str  # of the header in lower case, or of the field
    values: tuple[str, ...]


def check_api_key(request: Request, api_key: ApiKey) -> None:
    """Check one of the API keys: in the header, bare or after a scheme word, or in the field of the body.

    Raises:
        Refusal: the key is missing, there twice, or another one.
    """
    if api_key.place == "header":
        value = (
            b""
            if api_key.name in request.repeated
            else request.headers.get(api_key.name, "").encode("latin-1")
        )
        received = [value, value.partition(b" ")[2]]
    else:
        text = json_text(request.body) or ""
        found = [text[start:end] for start, end in find_top_level_field(text, api_key.name)]
        string = json.loads(found[0]) if len(found) == 1 and found[0].startswith('"') else ""
        received = [string.encode(errors="replace")]
    if not received[0]:
        raise Refusal(
            "api_key", f"the {api_key.place} {api_key.name!r} is missing, empty or there twice"
        )
    pairs = itertools.product(api_key.values, received)
    if not any([hmac.compare_digest(ours.encode(), theirs) for ours, theirs in pairs]):
        raise Refusal("api_key", f"the {api_key.place} {api_key.name!r} holds another key")


# ---- JSON, kept as it was written -------------------------------------------

quote = (
    json.encoder.encode_basestring_ascii
)  # a str as a JSON string in ASCII; json.dumps takes ten times as long


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Numbers stay text: the decoder only has to tell whether it is JSON, and int() refuses numbers of 4300 digits.
_VALIDATOR = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse_constant)
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')
# Control characters, and those that reorder, hide or break text: bidi controls, zero-width, separators, surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def json_text(body: bytes) -> Optional[str]:
    """Return the body as text if it is JSON in UTF-8 (RFC 8259), None otherwise."""
    try:
        text = body.decode("utf-8-sig")  # a BOM is not part of the JSON, RFC 8259 section 8.1
        json_only = text.strip(" \t\r\n")
        return text if _VALIDATOR.raw_decode(json_only)[1] == len(json_only) else None
    except (ValueError, RecursionError):
        return None


def duplicates(values: Iterable[str]) -> list[str]:
    """Return the values that are there more than once, sorted."""
    return sorted(value for value, count in collections.Counter(values).items() if count > 1)


def load_json(text: str) -> tuple[Any, list[str]]:
    """Return the value of a JSON text, and the keys that an object in it has twice. Raises ValueError if it is none."""
    twice: list[str] = []

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice.extend(duplicates(name for name, _ in pairs))
        return value

    def to_integer(
        digits: str,
    ) -> Any:  # of numbers so long that Python refuses to make an int of them, a float
        return int(digits) if len(digits) < 4000 else float(digits)

    try:
        hooks: Any = {
            "object_pairs_hook": to_object,
            "parse_int": to_integer,
            "parse_constant": _refuse_constant,
        }
        return json.loads(text, **hooks), twice
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly. Raises ValueError for everything else, a key given twice included."""
    value, twice = load_json(data.decode())
    if twice or not isinstance(value, dict):
        raise ValueError("expected a JSON object, each key once")
    return value


def find_top_level_field(text: str, name: str) -> list[tuple[int, int]]:
    """Return where in a JSON text the plain values of the top-level fields called `name` stand: (start, end) each."""
    spans, depth, before = [], 0, ["", ""]
    for match in _JSON_TOKEN.finditer(text):
        token = match[0]
        if depth == 1 and before[1] == ":" and json.loads(before[0]) == name:
            spans.append(match.span())
        depth += (token in "{[") - (token in "}]")
        before = [before[1], token]
    return spans


def ascii_line(text: str) -> str:
    """Bring a JSON text into one line of ASCII; numbers, order and spelling stay. Outside strings white space only."""
    if not text.isascii():
        text = re.sub("[^\x00-\x7f]+", lambda run: quote(run[0])[1:-1], text)
    return text.replace("\n", " ").replace("\r", " ").replace("\t", " ").replace("\x7f", "\\u007f")


def escape_text(text: str) -> str:
    r"""Escape what could move the cursor of a terminal, reorder its text or begin a line, as JSON does: \u202e."""
    return _UNSAFE.sub(lambda match: quote(match[0])[1:-1].replace("\x7f", "\\u007f"), text)


def indent_json(text: str) -> str:
    """Indent a JSON text by 2, non-ASCII readable, control characters escaped; numbers, order and spelling stay."""
    pieces, depth, before = [], 0, ""
    for token in _JSON_TOKEN.findall(text):
        depth -= token in "}]"
        if before and (
            before in "{[," and token not in "}]" or token in "}]" and before not in "{["
        ):
            pieces.append("\n" + "  " * min(depth, 30))
        depth += token in "{["
        if token.startswith('"'):
            token = escape_text(json.dumps(json.loads(token), ensure_ascii=False))
        pieces.append(": " if token == ":" else token)
        before = token
    return "".join(pieces)


# ---- HTTP message signatures of new Central (RFC 9421) ----------------------

# Security: these are the grammars of RFC 8941 section 3, nothing laxer. A string that may hold a line feed lets an
# attacker write lines of the signature base (RFC 9421 section 7.5.3).
_SF_KEY = r"[a-z*][a-z0-9_.*-]*"
_SF_BARE_ITEM = (
    r'(?:"(?:[ !#-\[\]-~]|\\["\\])*"|-?[0-9]{1,15}(?![0-9.])|-?[0-9]{1,12}\.[0-9]{1,3}(?![0-9.])|\?[01]'
    r"|:(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?:|[A-Za-z*][!#$%&'*+\-.^_`|~0-9A-Za-z:/]*)"
)
_SF_PARAMETER = f"; *({_SF_KEY})(?:=({_SF_BARE_ITEM}))?"
_SF_PARAMETERS = f"(?:; *{_SF_KEY}(?:={_SF_BARE_ITEM})?)*"
_SF_ITEM = f"({_SF_BARE_ITEM})({_SF_PARAMETERS})"
_SF_INNER_LIST = (
    rf"\( *(?:{_SF_BARE_ITEM}{_SF_PARAMETERS}(?: +{_SF_BARE_ITEM}{_SF_PARAMETERS})* *)?\)"
)
_SF_MEMBER = f"({_SF_KEY})(?:=({_SF_INNER_LIST}|{_SF_BARE_ITEM}))?({_SF_PARAMETERS})"
_SF_DICTIONARY = rf"{_SF_MEMBER}(?:[ \t]*,[ \t]*{_SF_MEMBER})*[ \t]*"


class Item(NamedTuple):
    """A member of a structured field. `value` is an int, a str, a list of items (an inner list), or None: another type.
    `text` is its canonical form without parameters; bytes are not decoded, since they are compared encoded."""

    value: Any
    text: str
    parameters: dict[str, Item]

    def __str__(self) -> str:
        """Serialise canonically (RFC 8941 section 4.1)."""
        return self.text + "".join(
            f";{k}" if v.text == "?1" else f";{k}={v.text}" for k, v in self.parameters.items()
        )


def parse_item(text: str, parameters: str = "") -> Item:
    """Return an item or an inner list. Both texts match the grammar; of a parameter given twice the last one counts."""
    found = {
        name: parse_item(value or "?1") for name, value in re.findall(_SF_PARAMETER, parameters)
    }
    if text[0] == "(":
        items = [parse_item(*pair) for pair in re.findall(_SF_ITEM, text)]
        return Item(items, f"({' '.join(map(str, items))})", found)
    if text[0] == '"':
        return Item(re.sub(r"\\(.)", r"\1", text[1:-1]), text, found)
    integer = int(text) if re.fullmatch("-?[0-9]+", text) else None
    return Item(integer, text if integer is None else str(integer), found)


@functools.lru_cache(
    maxsize=8
)  # webhooks that share a path, and the search for a hint, ask for the same again
def parse_dictionary(text: str) -> dict[str, Item]:
    """Parse a structured field that is a dictionary (section 4.2.2). A key that occurs twice is an error, unlike there.

    Raises:
        SignatureError: the field is malformed.
    """
    text = text.strip(" ")
    match = re.match(_SF_DICTIONARY, text)  # takes as much as is well-formed
    end = match.end() if match else 0
    if not match or end < len(text):
        raise SignatureError(f"a structured field is malformed after character {end}")
    found = re.findall(_SF_MEMBER, text)
    for key in duplicates(key for key, _, _ in found):
        raise SignatureError(f"{key!r} occurs twice in a structured field")
    return {key: parse_item(value or "?1", parameters) for key, value, parameters in found}


class PublicUrl(NamedTuple):
    """The parts of the URL as typed into Central that RFC 9421 section 2.2 signs."""

    targets: tuple[
        str, ...
    ]  # the URL without its query; without a path, signers differ on whether they add the "/"
    scheme: str
    authority: str
    path: str


def split_url(url: str) -> tuple[urllib.parse.SplitResult, str]:
    """Split an absolute http or https URL; return its host as well. Raises ValueError with what is wrong with it."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an http or https URL")
    return parts, parts.hostname  # which urlsplit has made lower case


def bracket(host: str) -> str:
    """Write a host as it stands in a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def parse_public_url(url: str) -> PublicUrl:
    """Return the parts of a public URL. Raises ValueError with what is wrong with it."""
    parts, hostname = split_url(url)
    if not re.fullmatch(r"[\x21-\x7e]+", url) or "@" in parts.netloc or "#" in url:
        raise ValueError("expected an http or https URL in ASCII without user and fragment")
    default_port = {"http": 80, "https": 443}[parts.scheme]
    authority = bracket(hostname) + ("" if parts.port in (None, default_port) else f":{parts.port}")
    target = url.partition("?")[0]
    targets = (target,) if parts.path else (target, target + "/")
    return PublicUrl(targets, parts.scheme, authority, parts.path or "/")


def encode_query(text: str) -> str:
    """Percent-encode a parameter of the query (RFC 9421 section 2.2.8)."""
    return urllib.parse.quote(text, safe="*-._").replace("~", "%7E")


def component_value(request: Request, component: Item, url: PublicUrl, target: str) -> str:
    """Return the value of a covered component (RFC 9421 sections 2.1, 2.2). Raises SignatureError without one."""
    name, query = component.value, "" if request.query is None else "?" + request.query
    values: dict[str, Optional[str]] = {
        "@method": request.method,
        "@target-uri": target + query,
        "@authority": url.authority,
        "@scheme": url.scheme,
        "@request-target": url.path + query,
        "@path": url.path,
        "@query": query or "?",
    }
    value = values.get(name) if name.startswith("@") else request.headers.get(name)
    if component.parameters:
        value = None
        if name == "@query-param" and list(component.parameters) == ["name"]:
            with contextlib.suppress(ValueError):  # more than so many parameters
                pairs = urllib.parse.parse_qsl(
                    query[1:], keep_blank_values=True, max_num_fields=MAX_QUERY_PARAMETERS
                )
                found = [
                    encode_query(v)
                    for k, v in pairs
                    if encode_query(k) == component.parameters["name"].value
                ]
                value = found[0] if len(found) == 1 else None
    if value is None:
        raise SignatureError(f"the covered component {component} is missing or not supported")
    return value


def signature_base(request: Request, covered: Item, url: PublicUrl, target: str) -> bytes:
    """Return the bytes to sign (RFC 9421 section 2.5): a line for each component, and the re-serialised list."""
    lines = [f"{item}: {component_value(request, item, url, target)}" for item in covered.value]
    return "\n".join([*lines, f'"@signature-params": {covered}']).encode("latin-1")


_SIGNATURE_PARAMETERS = {
    "created": int,
    "expires": int,
    "nonce": str,
    "alg": str,
    "keyid": str,
    "tag": str,
}


def check_coverage(covered: Item, now: float) -> None:
    """Check what a signature covers and claims; `now` is in epoch seconds.

    Raises:
        SignatureError: it leaves out the method, the target or a time; has a parameter of the wrong type, another
            algorithm or a component twice; or has expired.
    """
    if not isinstance(covered.value, list) or not all(
        isinstance(item.value, str) for item in covered.value
    ):
        raise SignatureError("a member of signature-input is no list of strings")
    if len(covered.value) > MAX_COMPONENTS:
        raise SignatureError(f"more than {MAX_COMPONENTS} components are covered")
    names, values = (
        {str(item)[1:-1] for item in covered.value},
        {k: v.value for k, v in covered.parameters.items()},
    )
    if len(names) < len(covered.value):
        raise SignatureError("a component is covered twice")
    for name, value in values.items():
        if not isinstance(
            value, _SIGNATURE_PARAMETERS.get(name, object)
        ):  # unknown ones are part of the base
            raise SignatureError(f"the signature parameter {name!r} is of the wrong type")
    if values.get("alg", "hmac-sha256") != "hmac-sha256":
        raise SignatureError(f"the algorithm is {values['alg']!r}, expected 'hmac-sha256'")
    if values.get("expires", now) < now:
        raise SignatureError(f"the signature expired {now - values['expires']:.0f} s ago")
    if "@method" not in names or not ("@target-uri" in names or {"@authority", "@path"} <= names):
        raise SignatureError(
            "the signature does not cover @method, and @target-uri or @authority and @path"
        )
    if "date" not in names and "created" not in values:
        raise SignatureError("the signature covers no time: neither date nor created")


def check_content_digest(request: Request) -> None:
    """Check the body against its Content-Digest (RFC 9530): every sha-256 and sha-512 in it, at least one of them."""
    digests = parse_dictionary(request.headers["content-digest"])
    known = [name for name in ("sha-256", "sha-512") if name in digests]
    for name in known:
        digest = hashlib.new(name.replace("-", ""), request.body).digest()
        if not hmac.compare_digest(b":%b:" % base64.b64encode(digest), digests[name].text.encode()):
            known = []
    if not known:
        raise SignatureError(
            "content-digest does not match the body, or has neither sha-256 nor sha-512"
        )


def sign_base(token: str, base: bytes) -> list[bytes]:
    """Return the signatures that a token may make, as structured bytes: of its text, and of its bytes where it is
    hexadecimal, since nobody has published which of both new Central means."""
    is_hex = re.fullmatch(r"(?:[0-9a-fA-F]{2})+", token)
    keys = [token.encode(), bytes.fromhex(token)] if is_hex else [token.encode()]
    return [b":%b:" % base64.b64encode(hmac.digest(key, base, "sha256")) for key in keys]


def verify_message_signature(
    request: Request, tokens: Sequence[str], url: PublicUrl, now: float
) -> tuple[int, Optional[float]]:
    """Verify an hmac-sha256 signature over an HTTP message (RFC 9421) as new Central makes it.

    Scheme, authority and path are those of `url`, never of the request. A normal return is the position of the token
    that matched, and the signed time in epoch seconds (None: not understood). It proves nothing of the body unless the
    signature covers content-digest.

    Raises:
        SignatureError: a header is missing or malformed, or no label has a good signature: then why the last has none.
    """
    fields = [request.headers.get(name, "") for name in ("signature-input", "signature")]
    if not all(fields):
        raise SignatureError("missing or empty: signature or signature-input")
    if max(map(len, fields)) > MAX_SIGNATURE_FIELD_BYTES:
        raise SignatureError(
            f"signature or signature-input is above {MAX_SIGNATURE_FIELD_BYTES} bytes"
        )
    inputs, signatures = map(parse_dictionary, fields)
    if max(len(inputs), len(signatures)) > MAX_LABELS:
        raise SignatureError(f"more than {MAX_LABELS} signatures")
    failure = SignatureError("no label stands in both signature and signature-input")
    for label in [label for label in inputs if label in signatures]:
        covered, received = inputs[label], signatures[label].text.encode()
        try:
            check_coverage(covered, now)
            bases = [signature_base(request, covered, url, target) for target in url.targets]
            for position, token in enumerate(tokens):
                if any(
                    [
                        hmac.compare_digest(s, received)
                        for base in bases
                        for s in sign_base(token, base)
                    ]
                ):
                    if any(item.value == "content-digest" for item in covered.value):
                        check_content_digest(request)
                    created = covered.parameters.get("created")
                    return position, created.value if created else parse_http_date(
                        request.headers["date"]
                    )
            raise SignatureError("signature does not match")
        except (
            SignatureError
        ) as error:  # RFC 9421 section 7.2.6: a bad signature beside a good one does no harm
            failure = error
    raise failure


# ---- OIDC access tokens -----------------------------------------------------


class Oidc(NamedTuple):
    """What an access token must say, as configured."""

    well_known_url: str
    audience: Optional[str]
    client_id: Optional[str]
    issuer: Optional[str]


class RsaKey(NamedTuple):
    """A provider's public key: key ID and algorithm ("" = any) where it names them, modulus, exponent."""

    kid: Optional[str]
    algorithm: str
    n: int
    e: int


RSA_ALGORITHMS = {  # RFC 7518 section 3.3; the DigestInfo prefixes are those of RFC 8017 section 9.2, note 1
    "RS256": ("sha256", bytes.fromhex("3031300d060960864801650304020105000420")),
    "RS384": ("sha384", bytes.fromhex("3041300d060960864801650304020205000430")),
    "RS512": ("sha512", bytes.fromhex("3051300d060960864801650304020305000440")),
}


def decode_base64url(text: str) -> bytes:
    """Decode base64url without padding (RFC 7515 section 2), strictly. Raises ValueError."""
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64.urlsafe_b64encode(data).rstrip(b"=") != text.encode():
        raise ValueError("not base64url")
    return data


def is_rsa_signature(signed: bytes, signature: bytes, algorithm: str, key: RsaKey) -> bool:
    """Tell whether `signature` is that of `key` over `signed` (RSASSA-PKCS1-v1_5, RFC 8017 section 8.2.2)."""
    digest, prefix = RSA_ALGORITHMS[algorithm]
    size, number = (key.n.bit_length() + 7) // 8, int.from_bytes(signature, "big")
    if len(signature) != size or number >= key.n:
        return False
    # Security: build the one block that is right and compare it whole. Parsing the padding of what came in is how
    # forged signatures for small exponents got through (Bleichenbacher 2006).
    tail = b"\x00" + prefix + hashlib.new(digest, signed).digest()
    expected = b"\x00\x01" + b"\xff" * (size - len(tail) - 2) + tail
    return hmac.compare_digest(expected, pow(number, key.e, key.n).to_bytes(size, "big"))


def parse_rsa_keys(jwks: dict[str, Any]) -> list[RsaKey]:
    """Return the RSA signing keys of a JWK set (RFC 7517) that are safe to use. Raises ValueError if it is none."""
    if not isinstance(jwks.get("keys"), list):
        raise ValueError("the answer is no JWK set")
    keys = []
    for jwk in jwks["keys"]:
        if not isinstance(jwk, dict) or jwk.get("kty") != "RSA" or jwk.get("use", "sig") != "sig":
            continue
        operations = jwk.get("key_ops", ["verify"])  # RFC 7517 section 4.3
        if not isinstance(operations, list) or "verify" not in operations:
            continue
        try:
            n, e = (
                int.from_bytes(decode_base64url(str(jwk.get(name, ""))), "big")
                for name in ("n", "e")
            )
        except ValueError:
            continue
        if MIN_RSA_BITS <= n.bit_length() <= MAX_RSA_BITS and n % 2 and e % 2 and 3 <= e < 2**64:
            keys.append(RsaKey(jwk.get("kid"), str(jwk.get("alg", "")), n, e))
    return keys


def verify_access_token(
    request: Request,
    oidc: Oidc,
    keys_for: Callable[[Optional[str], str], tuple[str, Sequence[RsaKey]]],
    now: float,
) -> None:
    """Verify `Authorization: Bearer` with a JWT signed RS256, RS384 or RS512 (RFC 6750, 7519, 8725, 9068).

    `keys_for(kid, algorithm)` returns the provider's issuer and keys; `now` is in epoch seconds.

    Raises:
        Refusal: the token is missing, not valid, not for us or not now.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    parts = token.split(".")
    try:
        if scheme.lower() != "bearer" or len(parts) != 3 or "authorization" in request.repeated:
            raise ValueError
        header, claims = map(parse_json_object, map(decode_base64url, parts[:2]))
        signature = decode_base64url(parts[2])
    except ValueError:
        raise Refusal("oidc", "authorization is missing, there twice, or no bearer JWT") from None
    algorithm, kid = header.get("alg"), header.get("kid")
    # Security: the algorithm is one of ours, whatever the token says: "none" and HS256 with the public key as secret
    # are the classic forgeries (RFC 8725 section 3.1). Keys come from the provider only, never from jku, x5u or jwk.
    if not isinstance(algorithm, str) or algorithm not in RSA_ALGORITHMS:
        raise Refusal(
            "oidc",
            f"the access token's alg is {str(algorithm)[:20]!r}, expected RS256, RS384 or RS512",
        )
    if "crit" in header or not isinstance(header.get("kid", ""), str):
        raise Refusal(
            "oidc", "the access token has critical extensions, or a kid that is not a string"
        )
    issuer, keys = keys_for(kid, algorithm)
    signed = f"{parts[0]}.{parts[1]}".encode()
    if not keys:
        raise Refusal(
            "oidc", f"unknown kid: the provider has no {algorithm} key called {describe_claim(kid)}"
        )
    if len(keys) > MAX_KEYS_TRIED or not any(
        is_rsa_signature(signed, signature, algorithm, key) for key in keys
    ):
        raise Refusal(
            "oidc",
            f"the access token's signature fits none of {len(keys)} keys (at most {MAX_KEYS_TRIED})",
        )
    check_claims(claims, oidc, oidc.issuer or issuer, now)


def check_claims(claims: dict[str, Any], oidc: Oidc, issuer: str, now: float) -> None:
    """Check expiry, issuer, audience and client of a verified token (RFC 7519 section 4.1). Raises Refusal."""
    for name, default in (("exp", None), ("nbf", now)):
        value = claims.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e12:
            raise Refusal("oidc", f"the access token's {name} is missing or no time")
        late = now - value if name == "exp" else value - now
        if late > TOKEN_LEEWAY_SECONDS:
            raise Refusal("oidc", f"the access token's {name} is off by {late:.0f} s")
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    clients = [
        claims[name] for name in ("azp", "client_id", "appid", "cid") if name in claims
    ]  # cid: Okta
    if claims.get("iss") != issuer:
        raise Refusal(
            "oidc",
            f"the access token's iss is {describe_claim(claims.get('iss'))}, expected {issuer!r}",
        )
    if oidc.audience is not None and oidc.audience not in audiences:
        found = describe_claim(audience)
        raise Refusal(
            "oidc", f"the access token's aud (audience) is {found}, expected {oidc.audience!r}"
        )
    if oidc.client_id is not None and oidc.client_id not in clients:
        found = describe_claim(clients)
        raise Refusal("oidc", f"the access token's client is {found}, expected {oidc.client_id!r}")


def describe_claim(value: Any) -> str:
    """Show a claim of a token whose signature is verified, shortened."""
    return json.dumps(value)[:200]


# ---- Recent and new ---------------------------------------------------------

_ISO_8601 = re.compile(
    r"([0-9]{4})-?([0-9]{2})-?([0-9]{2})[Tt ]([01][0-9]|2[0-3]):?([0-5][0-9]):?([0-5][0-9]|60)"  # 60: a leap second
    r"(?:[.,]([0-9]{1,20}))? ?(?:[Zz]|([+-])([01][0-9]|2[0-3]):?([0-5][0-9])?)?"
)
_EPOCH = re.compile(r"[0-9]{9,11}(?:\.[0-9]{1,9})?|[0-9]{12,20}")


@functools.lru_cache(maxsize=64)  # the alerts of a burst share their seconds
def parse_delivery_timestamp(text: str) -> Optional[float]:
    """Return the epoch seconds of an X-Central-Delivery-Timestamp, None if it is not understood.

    The vendor documents ISO 8601 with an offset; a fraction, `Z`, no offset (UTC), epoch seconds and milliseconds are
    accepted too, and so are microseconds, nanoseconds, an HTTP-date and Go's `2016-07-12 13:14:19 +0000 UTC`, since
    nobody has published what is on the wire.
    """
    if _EPOCH.fullmatch(text):
        digits = len(
            text.partition(".")[0]
        )  # seconds have 9 to 11, ms 12 to 14, us 15 to 17, ns 18 to 20
        return float(text) / 1000.0 ** ((digits - 9) // 3)
    match = _ISO_8601.fullmatch(re.sub(" UTC$", "", text))  # Go writes "+0000 UTC"
    if not match:
        return parse_http_date(text)
    year, month, day, hour, minute, second, fraction, sign, hours, minutes = match.groups("0")
    try:
        moment = datetime(
            int(year), int(month), int(day), int(hour), int(minute), tzinfo=timezone.utc
        )
    except ValueError:
        return None
    offset = (int(hours) * 3600 + int(minutes) * 60) * (-1 if sign == "-" else 1)
    return moment.timestamp() + int(second) + float("0." + fraction) - offset


def parse_http_date(text: str) -> Optional[float]:
    """Return the epoch seconds of a Date header (RFC 9110 section 5.6.7), None if it is not understood."""
    try:
        moment = email.utils.parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def check_age(sent: Optional[float], window_seconds: float, now: float) -> None:
    """Check that a delivery was sent at most `window_seconds` ago; a window of 0 switches the check off.

    Raises:
        Refusal: it is older, too far in the future, or its time was not understood.
    """
    if not window_seconds:
        return
    if sent is None:
        raise Refusal("stale", "its time stamp is not understood")
    age = now - sent
    if age > window_seconds:
        allowed = window_seconds / 3600
        raise Refusal(
            "stale", f"sent {age / 3600:.1f} hours ago, allowed are {allowed:g}; is a clock off?"
        )
    if age < -MAX_FUTURE_SECONDS:
        raise Refusal("stale", f"sent {-age / 60:.0f} minutes in the future; is a clock off?")


def short_digest(*parts: bytes) -> bytes:
    """Return 128 bits that identify the parts. They are joined with NUL, which no header can hold."""
    return hashlib.sha256(b"\0".join(parts)).digest()[:16]


Keys = tuple[bytes, ...]  # what identifies a delivery: any one of them


class Memory:
    """What a webhook has accepted, so that nothing is accepted twice. A class because it is the state of section 6.

    Always true: a key is in at most one of `seen` and `pending`; `seen` holds the keys of `order`, which forgets the
    oldest. Each delivery has the keys that `identify` finds, and is known if any of them is.
    """

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self.order: collections.deque[Keys] = collections.deque()
        self.pending: set[bytes] = set()
        self.last_token = (
            0  # position of the token of the last delivery: tried first, so that many cost no more
        )

    def claim(self, keys: Keys) -> bool:
        """Begin to keep a delivery: True if it is new, False if it has been kept already.

        Raises:
            Refusal: its twin is being kept right now.
        """
        if not self.seen.isdisjoint(keys):
            return False
        if not self.pending.isdisjoint(keys):
            raise Refusal("in_progress", "the same delivery is being written at this moment")
        self.pending.update(keys)
        return True

    def settle(self, keys: Keys, *, kept: bool) -> None:
        """End what `claim` began: remember the delivery if it was kept."""
        self.pending.difference_update(keys)
        if kept and keys and self.seen.isdisjoint(keys):
            self.seen.update(keys)
            self.order.append(keys)
            if len(self.order) > REMEMBERED_DELIVERIES:
                self.seen.difference_update(self.order.popleft())

    def recall(self, keys: Keys) -> None:
        """Remember a delivery that was kept before all others that are known."""
        if self.seen.isdisjoint(keys):
            self.seen.update(keys)
            self.order.appendleft(keys)


# ---- Your own code: the function to edit ------------------------------------


class Delivery(NamedTuple):
    """One verified, recent, new delivery."""

    received_at: float  # epoch seconds
    webhook: str  # the name in the configuration
    type: str
    delivery_id: Optional[str]  # X-Central-Delivery-ID; None for other senders
    sent_at: Optional[str]  # the sender's own time stamp, as it wrote it, or ISO 8601
    body: bytes  # raw, as it was signed
    text: Optional[str]  # the JSON text, API key masked; None where the body is not JSON
    key: Optional[
        str
    ]  # identifies the delivery, also across machines; None where a repetition cannot be told

    @property
    def payload(self) -> Any:
        """The alert as Python objects; None where the body is not JSON, or nested too deeply."""
        try:
            return None if self.text is None else load_json(self.text)[0]
        except ValueError:
            return None


def handle_alert(delivery: Delivery) -> None:
    """Do your own work with one alert: edit this function, or replace it by importing this file as a module.

    Called for every verified, recent and new delivery, from several threads, before it is written and answered: be
    quick, or hand over to a queue. An exception refuses the delivery with 503, so that it is sent again; if writing
    fails afterwards, the same delivery comes a second time.
    """


# ---- Output -----------------------------------------------------------------


class Log:
    """stderr: time, level, message; one line each, whatever a sender has written into it.

    A class because a thread of its own writes: a reader of stderr that stalls must hold up nobody. Beyond 1000, lines
    are lost.
    """

    def __init__(self) -> None:
        self.is_verbose = False
        self.lines: collections.deque[str] = collections.deque()  # the first is being written
        self.added = threading.Semaphore(0)
        self.second, self.rejections = 0, 0

    def start(self, is_verbose: bool) -> None:
        """Begin to write what is and will be logged."""
        self.is_verbose = is_verbose
        threading.Thread(target=self.write_lines, name="log", daemon=True).start()

    def add(self, level: str, text: str, error: Optional[BaseException] = None) -> None:
        """Log a message and an error with its place; --verbose adds messages of level DEBUG, and the traceback."""
        if level == "DEBUG" and not self.is_verbose:
            return
        text = f"{format_utc(time.time())} {level} {escape_text(text)}"
        if error:
            import traceback  # costs memory, and only a bug needs it

            frames = traceback.extract_tb(error.__traceback__)
            text += escape_text(f": {error!r} (line {frames[-1].lineno})")
            text += "\n" + "".join(frames.format()).rstrip() if self.is_verbose else ""
        if len(self.lines) < 1000:
            self.lines.append(text)
            self.added.release()

    def admits_rejection(self) -> bool:
        """Tell whether one more rejection may have its line: so many a second, the others are summed up."""
        self.rejections += 1
        return self.rejections <= REJECTION_LINES_PER_SECOND

    def sum_up_rejections(self) -> None:
        """Write the line for those of the last second that had none; to be called several times a second."""
        second = int(time.monotonic())
        if second != self.second:
            if self.rejections > REJECTION_LINES_PER_SECOND:
                self.add(
                    "WARNING",
                    f"{self.rejections - REJECTION_LINES_PER_SECOND} more rejections within a second",
                )
            self.second, self.rejections = second, 0

    def write_lines(self) -> None:
        """Write what was logged."""
        while self.added.acquire():
            print_error(self.lines[0])
            self.lines.popleft()

    def flush(self) -> None:
        """Wait until all is written, for a second at most."""
        deadline = time.monotonic() + 1
        while self.lines and time.monotonic() < deadline:
            time.sleep(0.005)


def print_error(text: str) -> None:
    """Write a line to stderr. Ignore errors: a closed stderr must not stop the receiver.

    Written past the buffer of sys.stderr: a thread that waits for a stalled reader would hold the lock of that buffer,
    and the interpreter waits for the lock at exit.
    """
    data = (text + "\n").encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        while sys.stderr and data:
            data = data[os.write(STDERR, data) :]


LOG = Log()


@functools.lru_cache(maxsize=4)
def _utc_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def format_utc(moment: float) -> str:
    """Write epoch seconds as ISO 8601 in UTC with milliseconds."""
    milliseconds = int(moment * 1000)
    return f"{_utc_second(milliseconds // 1000)}.{milliseconds % 1000:03}Z"


def render_json(delivery: Delivery) -> str:
    """Render a delivery as one line of ASCII: a JSON object that still lacks its key, closing brace and line feed."""
    if delivery.text is not None:
        alert = ascii_line(delivery.text)
    else:
        try:
            alert = f'null, "body": {ascii_line(quote(delivery.body.decode()))}'
        except ValueError:
            alert = f'null, "body_base64": "{base64.b64encode(delivery.body).decode()}"'
    sent = delivery.delivery_id, delivery.sent_at
    delivery_id, sent_at = ["null" if text is None else quote(text) for text in sent]
    return (
        f'{{"received_at": "{format_utc(delivery.received_at)}", "webhook": {quote(delivery.webhook)}, '
        f'"type": "{delivery.type}", "delivery_id": {delivery_id}, "sent_at": {sent_at}, "alert": {alert}'
    )


_COLOURS = {
    "critical": "1;31",
    "major": "31",
    "minor": "33",
    "warning": "33",
    "info": "36",
    "close": "32",
    "cleared": "32",
}


def render_pretty(delivery: Delivery, columns: int, colour: bool, name_width: int) -> str:
    """Render a delivery for a person: a header line, cut to `columns` (0: not), then the alert, indented."""
    payload = delivery.payload
    alert = payload if isinstance(payload, dict) else {}
    sources = [alert, alert["details"]] if isinstance(alert.get("details"), dict) else [alert]

    def first(*names: str) -> str:
        values = (source.get(name) for source in sources for name in names)
        return next(
            (
                escape_text(str(value))
                for value in values
                if isinstance(value, (str, int)) and value != ""
            ),
            "",
        )

    severity, state = first("severity") or "-", first("state", "status") or "-"
    where = [first("device_id", "serial", "deviceType"), first("site", "siteId")]
    about = [*(f"[{text}]" for text in where if text), first("description", "summary", "reason")]
    narrow = 0 < columns < 100
    fields = [  # text, width, colour
        (
            time.strftime(
                "%H:%M:%S" if narrow else "%Y-%m-%d %H:%M:%S", time.localtime(delivery.received_at)
            ),
            0,
            "2",
        ),
        (escape_text(delivery.webhook), name_width, "1"),
        (severity.upper(), 8, _COLOURS.get(severity.lower(), "")),
        (state, 7, _COLOURS.get(state.lower(), "")),
        (
            first("alert_type", "name", "event", "type", "text") or "(no name)",
            0 if narrow else 24,
            "1",
        ),
        (" ".join(filter(None, about)), 0, ""),
    ]
    header, left = [], columns or sys.maxsize
    for text, width, code in fields:
        text = text.ljust(width) if len(text.ljust(width)) <= left else text[: left - 1] + "…"
        if left > 0 and text:
            header.append(f"\x1b[{code}m{text}\x1b[0m" if colour and code else text)
            left -= len(text) + 2
    body = escape_text(delivery.body.decode(errors="backslashreplace"))
    shown = body if delivery.text is None else indent_json(delivery.text)
    return "  ".join(header).rstrip() + "\n  " + shown.replace("\n", "\n  ") + "\n"


Render = Optional[Callable[[Delivery], str]]  # how stdout shows a delivery; None: as JSON Lines


class Entry(NamedTuple):
    """An accepted delivery on its way to the outputs."""

    line: str  # as `render_json` makes it
    key: Optional[str]
    shown: bytes  # what stdout gets
    deadline: float  # monotonic seconds: as long may stdout take


class Outputs:
    """stdout and the log file. A class because a write can end in the middle of a line.

    Always true: the log ends with a whole line, or `cut_to` says where the last whole one ends; `unwritten` is what
    stdout gets before anything else, and completes a line of which it has taken half if `is_torn`.
    """

    def __init__(self, log_file: Optional[str], patience_seconds: float) -> None:
        """Open the log. Raises OutputError."""
        self.patience_seconds, self.log_path = patience_seconds, log_file
        self.unwritten, self.is_torn = b"", False
        self.failing = ""  # why, while the last attempt has failed
        self.started: Optional[float] = None  # monotonic seconds, while one is under way
        self.is_gone = False  # nobody reads stdout any more
        try:
            is_file = stat.S_ISREG(os.fstat(STDOUT).st_mode)
        except OSError as error:
            raise OutputError(f"stdout: {error.strerror}") from None
        self.stdout = STDOUT
        if os.isatty(STDOUT) and hasattr(os, "ttyname"):
            # "Ready" says little of a terminal. Opened anew it can be non-blocking, which the shell's own must not be.
            with contextlib.suppress(OSError):
                self.stdout = os.open(os.ttyname(STDOUT), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
        self.poll = select.poll() if not is_file and hasattr(select, "poll") else None
        if self.poll:
            self.poll.register(self.stdout, select.POLLOUT)
        self.may_hang = not is_file and (
            not self.poll or os.isatty(STDOUT) and self.stdout == STDOUT
        )
        self.cut_to: Optional[int] = None
        self.log = open_log(log_file) if log_file else None

    def has_failed(self) -> bool:
        """Tell whether the last attempt has failed, or the present one takes too long."""
        started = self.started  # which a thread that writes may take away
        return bool(self.failing or started and time.monotonic() - started > self.patience_seconds)

    def write(self, entries: Sequence[Entry], *, may_wait: bool) -> Optional[str]:
        """Write a batch to stdout, and then to the log, there on disk; return "", or why the log does not have it.

        It succeeds or fails as a whole; stdout may have it all the same. None: it would have to wait, and must be
        called once more, with `may_wait`, before anything else.
        """
        failure = ""
        try:
            if self.started is None:
                self.started = time.monotonic()
                self.unwritten += b"".join([entry.shown for entry in entries])
            if not may_wait and (self.may_hang or self.log is not None):
                return None
            if not self.write_stdout(entries[0].deadline if may_wait else 0):
                return None
            if self.log is not None:
                keys = [quote(entry.key) if entry.key else "null" for entry in entries]
                lines = [f'{entry.line}, "key": {key}}}\n' for entry, key in zip(entries, keys)]
                self.append_log(self.log, "".join(lines).encode())
        except Exception as error:
            failure = str(error) if isinstance(error, OutputError) else repr(error)
            # Keep only what completes a line that is half out: what has not begun is answered 503 and comes again.
            self.unwritten = (
                self.unwritten[: self.unwritten.find(b"\n") + 1] if self.is_torn else b""
            )
        if failure != self.failing:
            LOG.add("ERROR" if failure else "INFO", f"output: {failure or 'works again'}")
        self.failing, self.started = failure, None
        return failure

    def write_stdout(self, deadline: float) -> bool:
        """Write what is `unwritten` to stdout; return False if its reader has not taken all and `deadline` is 0.

        Raises:
            OutputError: its reader has not taken all until `deadline` (monotonic seconds), or is gone.
        """
        data, start = self.unwritten, 0
        size = (
            select.PIPE_BUF if self.poll else len(data)
        )  # as much never blocks once poll says "ready"
        slow = OutputError(f"stdout: its reader has not taken all in {self.patience_seconds:g} s")
        try:
            while start < len(data):
                left = 1000 * (deadline - time.monotonic()) if deadline else 0
                with contextlib.suppress(BlockingIOError):  # "ready", but not for as much
                    if not self.poll or self.poll.poll(max(0, int(left))):
                        start += os.write(self.stdout, data[start : start + size])
                        continue
                if left > 0:
                    time.sleep(0.01)
                elif deadline:
                    raise slow
                else:
                    return False
            return True
        except OSError as error:
            gone = (errno.EPIPE, errno.EIO, errno.ECONNRESET) if self.poll else (errno.EPIPE,)
            self.is_gone = self.is_gone or error.errno in gone
            raise OutputError(f"stdout: {error.strerror}") from None
        finally:
            self.unwritten = data[start:]
            self.is_torn = data[start - 1 : start] != b"\n" if start else self.is_torn

    def append_log(self, log: int, data: bytes) -> None:
        """Append to the log, synced; on failure cut it back to its last whole line and raise OutputError."""
        try:
            self.cut_log(log)
            self.cut_to = os.fstat(log).st_size
            while data:
                data = data[os.write(log, data) :]
            getattr(os, "fdatasync", os.fsync)(log)  # macOS and Windows have no fdatasync
            self.cut_to = None
        except OSError as error:
            with contextlib.suppress(
                OSError
            ):  # cut_to stays, so the next append tries again before it writes
                self.cut_log(log)
            raise OutputError(f"{self.log_path}: {error.strerror}") from None

    def cut_log(self, log: int) -> None:
        """Cut off what a failed append has left."""
        if self.cut_to is not None:
            os.ftruncate(log, min(self.cut_to, os.fstat(log).st_size))
            self.cut_to = None

    def reopen(self, log_file: Optional[str], patience_seconds: float) -> None:
        """Open the log again (logrotate has moved it), or another one; raise OutputError and keep the old one."""
        is_same = False
        with contextlib.suppress(OSError):
            if log_file and self.log is not None:
                is_same = os.path.samestat(os.stat(log_file), os.fstat(self.log))
        if not is_same:
            log = open_log(log_file) if log_file else None
            if self.log is not None:
                with contextlib.suppress(OSError):
                    self.cut_log(self.log)
                os.close(self.log)
            self.log, self.log_path, self.cut_to = log, log_file, None
        self.patience_seconds = patience_seconds


_LOG_START = b'{"received_at": "'
_LOG_LINE = re.compile(
    rb'\{"received_at": "[^"]*", "webhook": ("(?:[^"\\]|\\.)*"), .*"key": "([0-9a-f.]+)"\}'
)


def open_log(path: str) -> int:
    """Open a log file to append to, for this process alone, and return its descriptor.

    A half line at its end (power loss) was never answered with 200: it is cut off, and reported.

    Raises:
        OutputError: it cannot be opened, is no regular file, or another receiver writes to it.
    """
    log = -1
    try:
        log = os.open(
            path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o640
        )
        if not stat.S_ISREG(os.fstat(log).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if sys.platform != "win32":
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(
                PermissionError
            ):  # a new file's name has to survive a power loss too
                directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
                os.fsync(directory)
                os.close(directory)
        half, *lines = itertools.islice(lines_from_end(path), 2)
        if half and not lines and not half.startswith(_LOG_START[: len(half)]):
            raise OSError(
                errno.EINVAL, "holds something else than deliveries, so nothing is appended to it"
            )
        if half:
            os.ftruncate(log, os.fstat(log).st_size - len(half))
            LOG.add("WARNING", f"{path}: cut off a half line of {len(half)} bytes at its end")
        return log
    except OSError as error:
        if log >= 0:
            os.close(log)
        reason = (
            "another receiver writes to it"
            if isinstance(error, BlockingIOError)
            else error.strerror
        )
        raise OutputError(f"{path}: {reason}") from None


def lines_from_end(path: str) -> Iterator[bytes]:
    """Yield the lines of a file from the last to the first, without line feeds; first what follows the last one."""
    with open(path, "rb") as file:
        position = file.seek(0, os.SEEK_END)
        parts: list[bytes] = []  # of the line that began before `position`, last part first
        while position:
            size = min(position, 1 << 20)
            position -= size
            file.seek(position)
            head, *lines = file.read(size).split(b"\n")
            if lines:
                yield lines.pop() + b"".join(reversed(parts))
                yield from reversed(lines)
                parts = []
            parts.append(head)
        yield b"".join(reversed(parts))


def load_memories(path: Optional[str], webhooks: Sequence[Webhook]) -> None:
    """Fill the memories of webhooks with what the end of a log says that they have accepted.

    Reads back until each has its REMEMBERED_DELIVERIES, or only older ones than its replay window lets through.

    Raises:
        OutputError: the log is there and cannot be read.
    """
    by_name = {quote(one.name).encode(): one for one in webhooks if one.type not in UNTOLD}
    since = {}  # the webhooks that still want more, and from when on (as in received_at)
    for name, webhook in by_name.items():
        window = webhook.replay_window_seconds
        since[name] = (
            format_utc(time.time() - window - MAX_FUTURE_SECONDS).encode() if window else b""
        )
    try:
        for line in lines_from_end(path) if path and since else ():
            match, moment = _LOG_LINE.fullmatch(line), line[17:41]
            if line.startswith(_LOG_START) and moment < max(since.values()):
                since = {name: first for name, first in since.items() if moment >= first}
            if match and match[1] in since:
                memory = by_name[match[1]].memory
                with contextlib.suppress(ValueError):
                    memory.recall(tuple(map(bytes.fromhex, match[2].decode().split("."))))
                if len(memory.order) >= REMEMBERED_DELIVERIES:
                    del since[match[1]]
            if not since:
                break
        if path and by_name:
            count = sum(len(webhook.memory.order) for webhook in by_name.values())
            LOG.add("INFO", f"{count} deliveries remembered from {path}")
    except FileNotFoundError:
        pass  # it will be made
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from None


# ---- Configuration ----------------------------------------------------------


class Webhook(NamedTuple):
    """One configured sender, and what is remembered of it."""

    name: str
    type: str
    path: Optional[str]  # None: any
    tokens: tuple[str, ...]
    replay_window_seconds: float
    public_url: Optional[PublicUrl]
    api_key: Optional[ApiKey]
    provider: Optional[Provider]
    memory: Memory
    former_tokens: tuple[
        str, ...
    ] = ()  # valid before the last reloads: only for the hint that one was used


class Config(NamedTuple):
    """A whole, valid configuration."""

    host: str
    port: int
    log_file: Optional[str]
    max_body_bytes: int
    request_timeout_seconds: float
    max_connections: int
    webhooks: tuple[Webhook, ...]


OWN_PATHS = ("/health", "/metrics")


def is_text(value: Any) -> bool:
    """Tell whether `value` is a string, not empty, no white space around it, no control characters in it."""
    return (
        isinstance(value, str)
        and bool(value)
        and value == value.strip()
        and not _UNSAFE.search(value)
    )


def is_number(low: float, high: float, kind: Any = (int, float)) -> Callable[[Any], bool]:
    """Make a test for numbers of a JSON file within bounds; true and false are none."""
    return lambda value: (
        isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
    )


def is_port(value: Any) -> bool:
    """Tell whether `value` is a port, as a number or as its digits."""
    digits = isinstance(value, str) and re.fullmatch("[0-9]{1,5}", value)
    return is_number(0, 65535, int)(int(value) if digits else value)


def is_path(value: Any) -> bool:
    """Tell whether `value` is the path of a request that is not one of our own."""
    return (
        isinstance(value, str)
        and bool(re.fullmatch(r"/[!-\"$->@-~]*", value))
        and value not in OWN_PATHS
    )


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine's own."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_provider_url(value: Any) -> bool:
    """Tell whether `value` is an https URL, or an http one of this machine."""
    try:
        parts, host = split_url(value if isinstance(value, str) else "")
    except ValueError:
        return False
    return parts.scheme == "https" or is_loopback(host)


def is_present(value: Any) -> bool:
    """Accept everything: code of its own checks it."""
    return True


class Key(NamedTuple):
    """What a key of the configuration may hold, and its default; `...` stands for "required"."""

    expected: str
    accept: Callable[[Any], bool]
    default: Any = None


TEXT, FILE = Key("a string", is_text), Key("a path", is_text)
OBJECT, SECRETS = Key("an object", is_present), Key("a string or an array of strings", is_present)
TOP_KEYS = {
    "webclient_info": OBJECT._replace(default={}),
    "central_info": OBJECT._replace(default={}),
}
CENTRAL_KEYS = {"webhook": Key("an object or an array of objects", is_present, {})}
WEBCLIENT_KEYS = {
    "host": Key("an address to bind", is_text, ...),
    "port": Key("a port from 0 to 65535", is_port, ...),
    "log_file": FILE,
    "max_body_bytes": Key("a whole number from 1 to 2^30", is_number(1, 2**30, int), 1 << 20),
    "request_timeout_seconds": Key("a number from 0.1 to 3600", is_number(0.1, 3600), 10),
    "max_connections": Key("a whole number from 1 to 65535", is_number(1, 65535, int), 256),
}
WEBHOOK_KEYS = {
    "name": TEXT,
    "type": Key("one of " + ", ".join(TYPES), lambda value: value in TYPES, "central"),
    "path": Key("a path that begins with /, no query, not " + " or ".join(OWN_PATHS), is_path),
    "token": SECRETS,
    "token_file": FILE,
    "replay_window_hours": Key("a number from 0 to 87600", is_number(0, 87600), 48),
    "public_url": Key("the URL as typed into Central", is_text),
    "api_key": OBJECT,
    "oidc": OBJECT,
}
API_KEY_KEYS = {
    "header": Key(
        "the name of a header",
        lambda value: isinstance(value, str) and bool(_HEADER_NAME.fullmatch(value)),
    ),
    "field": Key("the name of a field", is_text),
    "value": SECRETS,
}
OIDC_KEYS = {
    "well_known_url": Key("an https URL (http only to this machine)", is_provider_url, ...),
    "audience": TEXT,
    "client_id": TEXT,
    "issuer": TEXT,
}


_PLACEHOLDER = re.compile(  # what templates and examples leave where a secret belongs
    r"<.*>|\$\{.*\}|\$[a-z_]\w*|\{\{.*\}\}|%\w+%|(?:change|replace)[-_ ]?(?:me|this|it)|(?:your|my|the)[_ ].*[_ ]here"
    r"|(?:insert|enter|put)[_ ].*[_ ]here|your[_ ](?:\w+[_ ])*(?:token|secret|key|password)|to-?do|fixme|x{3,}",
    re.IGNORECASE | re.ASCII,
)


class ConfigReader:
    """Reads typed values out of a parsed configuration. A class because it gathers every mistake instead of raising."""

    def __init__(self, folder: str) -> None:
        self.folder, self.has_secret = folder, False
        self.mistakes: list[str] = []

    def section(self, found: Any, where: str, keys: Mapping[str, Key]) -> dict[str, Any]:
        """Return the values of all `keys`, the default where one is missing, None where it is wrong."""
        if not isinstance(found, dict):
            self.mistakes.append(
                f"{where or 'the file'}: expected an object, found {describe_value(found, True)}"
            )
            return dict.fromkeys(keys)
        prefix = f"{where}." if where else ""
        for name in found.keys() - keys.keys():
            import difflib  # costs memory, and only a mistake needs it

            (nearest,) = difflib.get_close_matches(name, keys, 1, 0.0) or list(keys)[:1]
            self.mistakes.append(
                f"{prefix}{name}: unknown key, the nearest known one is {nearest!r}"
            )
        values = {}
        for name, key in keys.items():
            value = found.get(name, key.default)
            if value is ... or name in found and not key.accept(value):
                shown = "nothing" if value is ... else describe_value(value)
                self.mistakes.append(f"{prefix}{name}: expected {key.expected}, found {shown}")
                value = None
            values[name] = value
        return values

    def secrets(self, found: Any, where: str) -> tuple[str, ...]:
        """Check a secret or an array of secrets; the mistakes do not show them."""
        values = found if isinstance(found, list) and found else [found]
        for index, value in enumerate(values):
            problem = ""
            if not isinstance(value, str) or not value:
                shown = "an empty one" if value == "" else describe_value(value, True)
                problem = f"a string that is not empty, found {shown}"
            elif value != value.strip():
                problem = "no white space around it, found some"
            elif _PLACEHOLDER.fullmatch(value):
                problem = "the real value, found a placeholder"
            elif re.search("[\x00-\x1f\x7f\ud800-\udfff]", value):
                problem = "text, found a control character or a surrogate"
            if problem:
                self.mistakes.append(
                    f"{where}{f'[{index}]' if found is values else ''}: expected {problem}"
                )
        return tuple(values)

    def warn_if_readable(self, path: str) -> None:
        """Warn if others than its owner can read a file with secrets."""
        if os.name == "posix" and os.stat(path).st_mode & (stat.S_IRGRP | stat.S_IROTH):
            LOG.add(
                "WARNING", f"{path}: holds a secret, but group or others can read it (chmod 600)"
            )

    def tokens(self, read: dict[str, Any], given: Mapping[str, Any], where: str) -> tuple[str, ...]:
        """Return the tokens, from the configuration or from a file, one a line; ${VARIABLE} in its path is expanded."""
        if ("token" in given) == ("token_file" in given):
            both = "both" if "token" in given else "neither"
            self.mistakes.append(
                f"{where}.token: expected one of token and token_file, found {both}"
            )
            return ()
        if "token" in given:
            return self.secrets(given["token"], f"{where}.token")
        where, path = f"{where}.token_file", read["token_file"]
        if path is None:  # a mistake that has been named
            return ()
        unset = [name for name in re.findall(r"\$\{(\w+)\}", path) if name not in os.environ]
        if unset:
            self.mistakes.append(
                f"{where}: expected a path, found {path}: the variable {unset[0]} is not set"
            )
            return ()
        path = re.sub(r"\$\{(\w+)\}", lambda match: os.environ.get(match[1], match[0]), path)
        path = os.path.join(self.folder, path)
        try:
            with open(path, encoding="utf-8-sig") as file:
                lines = [line for line in file.read(1 << 20).split("\n") if line and line[0] != "#"]
            self.warn_if_readable(path)
            return self.secrets(lines or "", where)
        except (OSError, ValueError) as error:
            self.mistakes.append(
                f"{where}: {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}"
            )
        return ()

    def api_key(self, given: Any, where: str) -> ApiKey:
        """Read an API key."""
        keys = self.section(given, where, API_KEY_KEYS)
        values: tuple[str, ...] = ()
        if isinstance(given, dict):
            values = self.secrets(keys["value"], f"{where}.value")
            if ("header" in given) == ("field" in given):
                self.mistakes.append(f"{where}: expected one of header and field")
        header = str(keys["header"] or "").lower()
        return ApiKey("header" if header else "field", header or keys["field"], values)

    def webhook(self, found: Any, where: str, several: bool) -> Webhook:
        """Read one webhook."""
        read, mistakes = self.section(found, where, WEBHOOK_KEYS), self.mistakes
        kind, given = read["type"], found if isinstance(found, dict) else {}
        if several and "name" not in given:
            mistakes.append(
                f"{where}.name: expected a string, found nothing: several webhooks need names"
            )
        tokens = self.tokens(read, given, where)
        self.has_secret = self.has_secret or "token" in given or "api_key" in given
        url = api_key = provider = None
        if (kind == "new-central") != ("public_url" in given):
            mistakes.append(f"{where}.public_url: expected with type new-central, and only there")
        elif read["public_url"]:
            try:
                url = parse_public_url(read["public_url"])
            except ValueError as error:
                mistakes.append(
                    f"{where}.public_url: {error}, found {describe_value(read['public_url'])}"
                )
        if "api_key" in given:
            api_key = self.api_key(given["api_key"], f"{where}.api_key")
        if "oidc" in given:
            provider = Provider(Oidc(**self.section(given["oidc"], f"{where}.oidc", OIDC_KEYS)))
            if not (provider.oidc.audience or provider.oidc.client_id):
                mistakes.append(
                    f"{where}.oidc: expected audience or client_id or both, found neither"
                )
        scheme = HEADER_SIGNATURES.get(kind)
        demanded = (
            [scheme.header, *scheme.signed_headers] if scheme else ["signature", "signature-input"]
        )
        demanded += ["authorization"] if provider else []
        demanded += [api_key.name] if api_key and api_key.place == "header" else []
        for header in duplicates(demanded):
            mistakes.append(f"{where}: two demands on the header {header}, which can hold only one")
        window = (
            (read["replay_window_hours"] or 0) * 3600 if kind in ("central", "new-central") else 0
        )
        path = read["path"] or (url.path if url else None)
        if path in OWN_PATHS:
            mistakes.append(
                f"{where}.path: expected with this public_url, since {path} is the receiver's own"
            )
        return Webhook(
            read["name"] or kind, kind, path, tokens, window, url, api_key, provider, Memory()
        )


def describe_value(value: Any, secret: bool = False) -> str:
    """Say what was found: a plain value as JSON, of others and of secrets only the type."""
    if not secret and not isinstance(value, (dict, list)):
        return escape_text(json.dumps(value))[:100]
    kinds = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        type(None): "nothing",
    }
    return kinds.get(type(value), "a number")


def read_config(text: bytes, path: str = "") -> Config:
    """Parse and check the configuration that `path` holds: relative paths are relative to it. Reads token files.

    Raises:
        ConfigError: one argument for each mistake.
    """
    reader = ConfigReader(os.path.dirname(path))
    try:
        parsed, twice = load_json(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"line {error.lineno} column {error.colno}: not JSON: {error.msg}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"not JSON in UTF-8: {error}") from None
    reader.mistakes.extend(f"{name}: the key occurs twice" for name in twice)
    top = reader.section(parsed, "", TOP_KEYS)
    web = reader.section(top["webclient_info"], "webclient_info", WEBCLIENT_KEYS)
    found, where = (
        reader.section(top["central_info"], "central_info", CENTRAL_KEYS)["webhook"],
        "central_info.webhook",
    )
    if isinstance(found, list) and found:
        webhooks = [
            reader.webhook(one, f"{where}[{index}]", len(found) > 1)
            for index, one in enumerate(found)
        ]
    else:
        webhooks = [reader.webhook(found, where, False)]
    for name in duplicates(webhook.name for webhook in webhooks if webhook.name):
        reader.mistakes.append(
            f"{where}: expected a different name for each, found {json.dumps(name)} twice"
        )
    if reader.has_secret and path:
        reader.warn_if_readable(path)
    if reader.mistakes:
        raise ConfigError(*reader.mistakes)
    web["port"], web["log_file"] = (
        int(web["port"]),
        web["log_file"] and os.path.join(reader.folder, web["log_file"]),
    )
    return Config(**web, webhooks=tuple(webhooks))


def load_config(path: str) -> Config:
    """Read and check a configuration file. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            return read_config(file.read(), path)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None


def describe_webhook(webhook: Webhook) -> str:
    """Say in one line what a webhook demands of its sender, and what that does not protect."""
    scheme = HEADER_SIGNATURES.get(webhook.type)
    signed = " + ".join(["body", *scheme.signed_headers]) if scheme else "method, URL and time"
    demands = [
        f"{scheme.header if scheme else 'signature, signature-input'} (HMAC-SHA256 over {signed})"
    ]
    if webhook.api_key:
        demands.append(f"API key in {webhook.api_key.place} {webhook.api_key.name}")
    if webhook.provider:
        demands.append(f"OIDC access token by {webhook.provider.oidc.well_known_url}")
    hours = webhook.replay_window_seconds / 3600
    return "; ".join(
        [
            f"{webhook.name}: {webhook.type} at {webhook.path or 'any path'}: {', '.join(demands)}",
            f"tokens: {len(webhook.tokens)}",
            f"at most {hours:g} h old" if hours else "of any age",
            "body protected"
            if scheme
            else "BODY NOT PROTECTED, unless the sender covers content-digest",
            "repetitions are not told" if webhook.type in UNTOLD else "repetitions are told",
        ]
    )


# ---- The way of a delivery: checks in their order, hints for the operator ---


def check_signature(webhook: Webhook, request: Request, now: float) -> tuple[int, Optional[float]]:
    """Check the signature; return the token's position and the signed time (epoch seconds). Raises SignatureError."""
    if webhook.public_url:
        return verify_message_signature(request, webhook.tokens, webhook.public_url, now)
    headers, scheme = request.headers, HEADER_SIGNATURES[webhook.type]
    for name in request.repeated:
        if name == scheme.header or scheme is CENTRAL and name.startswith("x-central-"):
            raise SignatureError(name + " occurs more than once")
    tokens, first = webhook.tokens, min(webhook.memory.last_token, len(webhook.tokens))
    found = verify_signature(request.body, headers, tokens[first:] + tokens[:first], scheme)
    sent = (
        parse_delivery_timestamp(headers[scheme.signed_headers[2]]) if scheme is CENTRAL else None
    )
    return (first + found) % len(tokens), sent


def check_webhook(webhook: Webhook, request: Request, now: float) -> tuple[int, Optional[float]]:
    """Check everything that a webhook demands of its sender, in this order; return what `check_signature` does.

    Raises:
        Refusal: something does not pass.
    """
    try:
        proof = check_signature(webhook, request, now)
    except SignatureError as error:
        raise Refusal("signature", str(error)) from None
    if webhook.api_key:
        check_api_key(request, webhook.api_key)
    if webhook.provider:
        verify_access_token(request, webhook.provider.oidc, webhook.provider.keys_for, now)
    return proof


def check_webhooks(
    webhooks: Sequence[Webhook], request: Request, now: float
) -> tuple[Webhook, tuple[int, Optional[float]]]:
    """Return the first webhook whose checks all pass, and the proof. Raises the Refusal of who got furthest."""
    refusals = []
    for webhook in webhooks:
        try:
            return webhook, check_webhook(webhook, request, now)
        except Refusal as refusal:
            refusal.webhook = webhook.name
            refusals.append(refusal)
    raise max(
        refusals,
        key=lambda refusal: ("signature", "api_key", "oidc", "provider").index(refusal.reason),
    )


def identify(webhook: Webhook, request: Request) -> Keys:
    """Return the keys that an authentic delivery is remembered by."""
    if webhook.type in UNTOLD:
        return ()
    if webhook.type != "central":
        return (short_digest(request.body),)
    # Security: bytes can be moved between the signed headers, so the signature names the delivery, not its ID; a retry
    # that is signed anew has another signature, so its ID with the body names it as well.
    signature, delivery_id = (
        request.headers[CENTRAL.header],
        request.headers[CENTRAL.signed_headers[1]],
    )
    return short_digest(signature.encode()), short_digest(
        delivery_id.encode("latin-1"), request.body
    )


def make_delivery(
    webhook: Webhook, request: Request, sent: Optional[float], keys: Keys, now: float
) -> Delivery:
    """Put together what is kept and handed on; an API key in a field of the body is masked."""
    text = json_text(request.body)
    if text is not None and webhook.api_key and webhook.api_key.place == "field":
        (start, end), *_ = find_top_level_field(text, webhook.api_key.name)
        text = f'{text[:start]}"***"{text[end:]}'
    delivery_id, sent_at = [request.headers.get(name) for name in CENTRAL.signed_headers[1:]]
    if webhook.type != "central":
        delivery_id, sent_at = (
            None,
            format_utc(sent) if sent is not None and abs(sent) < 1e11 else None,
        )
    key = ".".join([key.hex() for key in keys]) or None
    return Delivery(now, webhook.name, webhook.type, delivery_id, sent_at, request.body, text, key)


def has_own_code() -> bool:
    """Tell whether `handle_alert` is no longer as it was: then it may take long."""

    def as_it_was(delivery: Delivery) -> None:
        """Do nothing."""

    code = getattr(handle_alert, "__code__", None)
    return not code or code.co_code != as_it_was.__code__.co_code


def run_own_code(delivery: Delivery) -> str:
    """Call `handle_alert`; return why it failed, "" if it did not."""
    try:
        handle_alert(delivery)
    except BaseException as error:  # whatever it raises, SystemExit too, concerns this one delivery
        LOG.add("DEBUG", "handle_alert has failed", error)
        return f"{type(error).__name__}: {error}"
    return ""


def respell(body: bytes) -> Iterator[bytes]:
    """Yield how a body may have been spelled before a proxy changed it: trimmed, or as other JSON writers do."""
    yield from (body.strip(), body.strip() + b"\n")
    with contextlib.suppress(ValueError, RecursionError):
        payload = load_json(body.decode())[0]
        for separators, only_ascii in itertools.product(((",", ":"), (", ", ": ")), (False, True)):
            yield json.dumps(payload, separators=separators, ensure_ascii=only_ascii).encode(
                errors="replace"
            )


def explain(request: Request, webhooks: Sequence[Webhook], everywhere: Sequence[Webhook]) -> str:
    """Return a hint why the signature of a request was not accepted, "" without one. It names no secret."""
    is_classic, is_new = CENTRAL.header in request.headers, "signature-input" in request.headers
    body, is_small = (
        request.body,
        len(request.body) < 1 << 16,
    )  # otherwise hints would cost too much
    spellings = [*respell(body)] if is_small else []
    for webhook in webhooks:
        if is_new and not is_classic and webhook.type == "central":
            return 'looks like new Central, which needs "type": "new-central"'
        if is_classic and not is_new and webhook.type == "new-central":
            return 'looks like classic Central, which needs "type": "central"'
        spaced = [token + end for token in webhook.tokens for end in ("\n", "\r\n", " ")]
        attempts = [
            (
                "an older token would match, which a reload has removed",
                webhook.former_tokens,
                [body],
            ),
            (
                "the token with white space behind it would match: mend it at the sender",
                spaced,
                [body],
            ),
            (
                "the body would match if spelled otherwise: a proxy changed it",
                webhook.tokens,
                spellings,
            ),
            *(
                (f"the token of webhook {one.name!r} would match", one.tokens, [body])
                for one in everywhere
                if is_small
            ),
        ]
        for hint, tokens, bodies in attempts:
            for spelling in bodies:
                with contextlib.suppress(SignatureError):
                    changed = Request(**{**vars(request), "body": spelling})
                    check_signature(webhook._replace(tokens=tuple(tokens)), changed, time.time())
                    return hint
        with contextlib.suppress(SignatureError):
            verify_signature(
                body, request.headers, webhook.tokens, CENTRAL._replace(signed_headers=())
            )
            return "the body alone would match: a proxy dropped the X-Central headers, or the sender leaves them out"
        if is_classic and not all(request.headers.get(name) for name in CENTRAL.signed_headers):
            return "does a proxy drop these headers?"
    return "wrong token, or something was changed on the way" if is_classic or is_new else ""


# ---- HTTP: strict parsing of a request --------------------------------------

_REQUEST_LINE = re.compile(rf"{_TOKEN} [!-~]+ HTTP/[0-9]\.[0-9]".encode())
_FIELD = re.compile(rf"^({_TOKEN}):([\t -~\x80-\xff]*)\r\n", re.MULTILINE)
_BARE_LF = re.compile(rb"(?<!\r)\n")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z\-._~!$&'()*+,;=%]*)(?::[0-9]*)?")
_ABSOLUTE_FORM = re.compile(
    r"[A-Za-z][A-Za-z0-9+.\-]*://([^/?#]+)/?((?<=/).*|\?.*)?"
)  # RFC 9112 section 3.2.2
_CHUNK_EXTENSION = (
    rf'[ \t]*;[ \t]*{_TOKEN}(?:[ \t]*=[ \t]*(?:{_TOKEN}|"(?:[\t !#-\[\]-~]|\\[\t -~])*"))?'
)
_CHUNK_LINE = f"([0-9A-Fa-f]{{1,16}})(?:{_CHUNK_EXTENSION})*".encode()  # RFC 9112 section 7.1


def parse_fields(fields: bytes) -> tuple[dict[str, str], frozenset[str]]:
    """Parse lines of fields, each ended with CRLF, into values by lower-case name, and the names that came again.

    Raises:
        Refusal: malformed, headers_too_large.
    """
    text = fields.decode("latin-1")
    found = _FIELD.findall(text)
    # Security: nothing but text and whole line ends. Bare CR or LF, NUL, folded lines and white space before the colon
    # are read differently by different programs: that is how requests are smuggled past a proxy.
    if len(found) != text.count("\n"):
        raise Refusal(
            "malformed",
            "a header field is malformed: its name, a control character, or a line without CRLF",
        )
    if len(found) > MAX_HEADER_FIELDS:
        raise Refusal("headers_too_large", f"more than {MAX_HEADER_FIELDS} header fields")
    values = {name.lower(): value.strip(" \t") for name, value in found}
    again = duplicates(name.lower() for name, _ in found) if len(values) < len(found) else []
    for name in again:
        values[name] = ", ".join(
            value.strip(" \t") for other, value in found if other.lower() == name
        )
    return values, frozenset(again)


@functools.lru_cache(maxsize=64)
def parse_request_line(line: bytes) -> tuple[str, str, Optional[str], str]:
    """Return method, path, query and version of a request line (RFC 9112 section 3).

    Raises:
        Refusal: malformed, version.
    """
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise Refusal("malformed", "the request line is malformed")
    method, target, version = match[0].decode().split(" ")
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise Refusal("version", f"{version}, expected HTTP/1.0 or HTTP/1.1")
    if target[0] != "/" and "://" in target:  # section 3.2.2: the absolute form must be accepted
        absolute = _ABSOLUTE_FORM.fullmatch(target)
        target = "/" + (absolute[2] or "") if absolute and _HOST.fullmatch(absolute[1]) else ""
    if target[:1] != "/" or "#" in target:
        raise Refusal(
            "malformed",
            "the target of the request is neither a path nor an absolute URL without fragment",
        )
    path, mark, query = target.partition("?")
    return method, path, query if mark else None, version


def parse_head(head: bytes) -> Request:
    """Parse a request line and the header fields, each ended with CRLF, without the empty line (RFC 9112).

    Raises:
        Refusal: malformed, version, headers_too_large.
    """
    line, _, fields = head.partition(b"\r\n")
    method, path, query, version = parse_request_line(line)
    headers, repeated = parse_fields(fields)
    host = headers.get("host")
    if (
        host is None
        and version == "HTTP/1.1"
        or "host" in repeated
        or not _HOST.fullmatch(host or "")
    ):
        raise Refusal("malformed", "Host is missing, malformed or there twice")
    return Request(method, path, query, version, headers, repeated)


def parse_framing(request: Request, max_body_bytes: int) -> Optional[int]:
    """Return the length of the body in bytes, None where it is chunked (RFC 9112 section 6).

    Raises:
        Refusal: malformed, coding, no_length, body_too_large.
    """
    length, coding = request.headers.get("content-length"), request.headers.get("transfer-encoding")
    if coding is not None:
        codings = {part.strip().lower() for part in coding.split(",")}
        twice = codings <= {"chunked", ""} and coding.lower() != "chunked"
        if length is not None or request.version == "HTTP/1.0" or twice:
            raise Refusal(
                "malformed", "Transfer-Encoding twice, with Content-Length or in HTTP/1.0"
            )
        if codings != {"chunked"}:
            raise Refusal("coding", f"Transfer-Encoding is {coding[:40]!r}, expected chunked")
        return None
    if length is None and request.method == "POST":
        raise Refusal("no_length", "neither Content-Length nor Transfer-Encoding")
    # Security: ASCII digits alone. int() also takes "+10", "1_0" and other scripts' digits, where a proxy sees others.
    length = "0" if length is None else length
    if not (length.isascii() and length.isdigit()):
        raise Refusal("malformed", "Content-Length is not one number")
    size = int(length.lstrip("0")[:20] or "0")  # Python refuses very long numbers
    if size > max_body_bytes:
        raise Refusal("body_too_large", f"Content-Length is above max_body_bytes, {max_body_bytes}")
    return size


@functools.lru_cache(maxsize=16)
def encode_reply(
    second: int, status: int, kind: str, body: bytes, head_only: bool, close: bool, *extra: str
) -> bytes:
    """Return a whole reply, so that one send sends it: small writes cost 40 ms each with Nagle's algorithm.

    `second` is the Date, in epoch seconds: within one, the replies are mostly the same.
    """
    lines = [
        f"HTTP/1.1 {status} {http.client.responses[status]}",
        f"Date: {email.utils.formatdate(second, usegmt=True)}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        f"Connection: {'close' if close else 'keep-alive'}",
        *extra,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if head_only else body)


# ---- HTTP server ------------------------------------------------------------

T = TypeVar("T")
Steps = Generator[
    Any, Any, T
]  # a part of a conversation: what it waits for, what it is brought, what it returns
Job = Callable[[], Any]


class Handler(BaseHTTPRequestHandler):
    """One connection, from its first byte to its last: `converse` reads requests and answers them, one after the other.

    It reads from top to bottom as if it had a thread of its own, and is a generator: at each `yield` it waits while
    others are served, for bytes (`yield`), for a delivery to be kept (`yield entry`) or for a job that may take long
    (`yield job`); `Receiver.go_on` brings it what it waits for. BaseHTTPRequestHandler's own reading is not used: it is
    lenient where we must be strict, has no total deadline, and costs four times the time.
    """

    server: Receiver
    buffer, start = b"", 0  # what was received and, from `start` on, not consumed
    unsent = b""  # replies that the sender has not taken yet
    wanted: Any = None  # what it waits for; None: bytes
    is_busy = is_watched = lingers = False

    def __init__(self, request: socket.socket, client_address: Any, server: Receiver) -> None:
        """Begin to serve the connection, instead of serving it to its end as BaseRequestHandler does."""
        self.request, self.client_address, self.server = request, client_address, server
        request.setblocking(False)
        self.deadline = time.monotonic() + server.config.request_timeout_seconds
        self.steps = self.converse()
        server.connections.add(self)
        server.go_on(self)

    def receive(self) -> None:
        """Take what has arrived, and go on."""
        if self.wanted is not None:
            self.server.watch(self, False)  # it waits for something else first
            return
        try:
            data = self.request.recv(RECEIVE_BYTES)
        except BlockingIOError:
            self.server.watch(self, True)
        except OSError:
            self.server.close_connection(self)
        else:
            self.server.go_on(self, data)

    def converse(self) -> Steps[None]:
        """Serve the connection."""
        server, is_first, goes_on = self.server, True, True
        if len(server.connections) > server.config.max_connections:
            overload = Refusal(
                "overload", f"more than max_connections, {server.config.max_connections}"
            )
            goes_on = self.refuse(overload)
        while goes_on:
            ahead = self.buffer[self.start : self.start + 2]
            if (
                ahead == b"\r\n"
            ):  # RFC 9112 section 2.2: an empty line before a request is passed over
                self.start += 2
            elif ahead in (b"", b"\r"):
                try:
                    yield from self.receive_more()
                except Refusal as refusal:
                    goes_on = False
                    if is_first and refusal.reason == "timeout":
                        self.refuse(refusal)
            else:
                if not is_first:
                    self.deadline = time.monotonic() + server.config.request_timeout_seconds
                is_first, self.is_busy = False, True
                goes_on = yield from self.serve_request()
                if self.unsent:
                    yield self.send_rest
                self.is_busy = False
        if self.lingers:
            yield from self.linger()

    def serve_request(self) -> Steps[bool]:
        """Read one request and answer it; return whether another may follow."""
        server, request = self.server, UNREAD
        webhooks: Sequence[Webhook] = ()
        try:
            request = yield from self.read_head()
            length = parse_framing(request, server.config.max_body_bytes)
            webhooks = server.route(request)
            expects = (
                request.version == "HTTP/1.1"
                and request.headers.get("expect", "").lower() == "100-continue"
            )
            if expects and length != 0:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.body = (
                yield from self.read_chunked() if length is None else self.read_bytes(length)
            )
            if not webhooks:
                return self.reply(request, *server.own_answer(request.path))
            check = functools.partial(check_webhooks, webhooks, request, time.time())
            may_wait = any([webhook.provider for webhook in webhooks])
            webhook, (token, sent) = (yield check) if may_wait else check()  # authentic
            webhooks = [webhook]
            is_new = yield from server.keep(webhook, request, token, sent)
            return self.reply(
                request, 200, b'{"status": "ok"}' if is_new else b'{"status": "duplicate"}'
            )
        except Refusal as refusal:
            return self.refuse(refusal, request, webhooks)

    def receive_more(self) -> Steps[None]:
        """Wait for more bytes. Raises Refusal when their time (timeout) or the stream (malformed) is over."""
        data = yield
        if not data:
            raise Refusal("malformed", "the connection ended within the request")
        self.buffer, self.start = self.buffer[self.start :] + data, 0

    def read_head(self) -> Steps[Request]:
        """Read up to the empty line and parse it."""
        known = 0  # bytes that were looked through before: a sender may send them one by one
        while True:
            start = self.start
            end = self.buffer.find(b"\r\n\r\n", start + max(0, known - 3))
            if len(self.buffer) - start > MAX_REQUEST_LINE_BYTES + 1:
                line_end = self.buffer.find(b"\r\n", start)
                if not 0 <= line_end - start <= MAX_REQUEST_LINE_BYTES:
                    raise Refusal(
                        "target_too_long",
                        f"the request line is above {MAX_REQUEST_LINE_BYTES} bytes",
                    )
                if (end if end >= 0 else len(self.buffer)) - line_end > MAX_HEADER_BYTES:
                    raise Refusal(
                        "headers_too_large", f"the header fields are above {MAX_HEADER_BYTES} bytes"
                    )
            if end >= 0:
                self.start = end + 4
                return parse_head(self.buffer[start : end + 2])
            if _BARE_LF.search(self.buffer, start + known):
                raise Refusal("malformed", "a line ends without CR")
            known = len(self.buffer) - start
            yield from self.receive_more()

    def read_bytes(self, length: int) -> Steps[bytes]:
        """Read `length` bytes."""
        parts = []
        while True:
            parts.append(self.buffer[self.start : self.start + length])
            self.start += len(parts[-1])
            length -= len(parts[-1])
            if not length:
                return b"".join(parts)
            yield from self.receive_more()

    def read_line(self, limit: int) -> Steps[bytes]:
        """Read a line of a chunked body, without its CRLF; at most `limit` bytes."""
        while True:
            end = self.buffer.find(b"\r\n", self.start, self.start + limit + 2)
            if end >= 0:
                line, self.start = self.buffer[self.start : end], end + 2
                return line
            if len(self.buffer) - self.start >= limit + 2:
                raise Refusal("malformed", f"a line of the chunked body is above {limit} bytes")
            yield from self.receive_more()

    def read_chunked(self) -> Steps[bytes]:
        """Read and decode a chunked body (RFC 9112 section 7.1); trailers are checked and dropped."""
        parts, total, limit, size = [], 0, self.server.config.max_body_bytes, -1
        while size:
            match = re.fullmatch(_CHUNK_LINE, (yield from self.read_line(MAX_CHUNK_LINE_BYTES)))
            if not match:
                raise Refusal("malformed", "the size of a chunk is malformed")
            size = int(match[1], 16)
            total += size
            if total > limit:
                raise Refusal(
                    "body_too_large", f"the chunked body is above max_body_bytes, {limit}"
                )
            if size:
                parts.append((yield from self.read_bytes(size)))
                if (yield from self.read_bytes(2)) != b"\r\n":
                    raise Refusal("malformed", "a chunk is longer than its size")
        trailers = b""
        while line := (yield from self.read_line(MAX_REQUEST_LINE_BYTES)):
            trailers += line + b"\r\n"
            if len(trailers) > MAX_HEADER_BYTES:
                raise Refusal("headers_too_large", "the trailer fields are too large")
        parse_fields(trailers)
        return b"".join(parts)

    def send(self, data: bytes) -> None:
        """Send, as far as the sender reads its answers: the rest is for `send_rest`."""
        sent = 0
        with contextlib.suppress(BlockingIOError):
            sent = 0 if self.unsent else self.request.send(data)
        self.unsent += data[sent:]

    def send_rest(self) -> None:
        """Wait for a sender that is slow to read its answers; a job."""
        self.request.settimeout(self.server.config.request_timeout_seconds)
        self.request.sendall(self.unsent)
        self.request.setblocking(False)
        self.unsent = b""

    def reply(
        self, request: Request, status: int, body: bytes, kind: str = JSON, *extra: str
    ) -> bool:
        """Send a reply; return whether another request may follow."""
        options = [
            option.strip() for option in request.headers.get("connection", "").lower().split(",")
        ]
        close = "close" in options or self.server.stopping or status >= 400 and status != 401
        close = close or request.version == "HTTP/1.0" and "keep-alive" not in options
        if LOG.is_verbose:
            LOG.add(
                "DEBUG",
                f"{status} to {self.server.peer_of(self.client_address, request)}: {body[:100].decode()}",
            )
        self.send(
            encode_reply(
                int(time.time()), status, kind, body, request.method == "HEAD", close, *extra
            )
        )
        self.deadline = time.monotonic() + KEEP_ALIVE_SECONDS
        self.lingers = close and (status != 200 or self.server.stopping)
        return not close

    def refuse(
        self, refusal: Refusal, request: Request = UNREAD, webhooks: Sequence[Webhook] = ()
    ) -> bool:
        """Log, count and answer a refusal; return whether the connection goes on, which it does after a 401."""
        server, (status, error) = self.server, REFUSALS[refusal.reason]
        name = refusal.webhook or (webhooks[0].name if len(webhooks) == 1 else "")
        server.metrics.count(name, refusal.reason, len(request.body))
        if LOG.admits_rejection():
            hint = (
                explain(request, webhooks, server.config.webhooks)
                if refusal.reason == "signature"
                else ""
            )
            peer, shown = (
                server.peer_of(self.client_address, request),
                f" for {name!r}" if name else "",
            )
            LOG.add(
                "WARNING",
                f"{status} to {peer}{shown}: {refusal.reason}: {refusal}{hint and f' ({hint})'}",
            )
        scheme = (
            'Bearer realm="central webhook"'
            if any(webhook.provider for webhook in webhooks)
            else "HMAC-SHA256"
        )
        allow = "GET, HEAD" if request.path in OWN_PATHS else "POST"
        extra = {
            401: [f"WWW-Authenticate: {scheme}"],
            405: [f"Allow: {allow}"],
            503: ["Retry-After: 1"],
        }
        return self.reply(
            request, status, json.dumps({"error": error}).encode(), JSON, *extra.get(status, ())
        )

    def linger(self) -> Steps[None]:
        """Read and drop what still comes, for a while, and no longer count: to close with unread data is to reset the
        connection, which loses the answer."""
        self.server.connections.discard(self)
        if len(self.server.lingering) < MAX_LINGERING:
            self.server.lingering.add(self)
            self.request.shutdown(socket.SHUT_WR)
            self.deadline = time.monotonic() + LINGER_SECONDS
            with contextlib.suppress(Refusal):  # its time is over
                while (yield):
                    pass


class Metrics:
    """Counters in Prometheus' text format. A class because they outlive a configuration; labels are names of ours."""

    def __init__(self) -> None:
        self.results: collections.Counter[tuple[str, str]] = (
            collections.Counter()
        )  # by webhook ("": none) and result
        self.last_accepted: dict[str, float] = {}
        self.body_bytes = 0

    def count(self, name: str, result: str, body_bytes: int) -> None:
        """Count a request."""
        self.results[name, result] += 1
        self.body_bytes += body_bytes

    def render(self, names: Sequence[str], in_flight: int) -> bytes:
        """Return the text that Prometheus reads; all series of the webhooks called `names` exist."""
        label = functools.partial(
            json.dumps, ensure_ascii=False
        )  # quotes and escapes as is done there
        series = (
            "central_webhook_deliveries_total",
            "central_webhook_last_accepted_timestamp_seconds",
        )
        every = itertools.product(["", *names], [*REFUSALS, "accepted", "duplicate"])
        counts = sorted({**dict.fromkeys(every, 0), **self.results}.items())
        accepted = sorted({**dict.fromkeys(names, 0.0), **self.last_accepted}.items())
        lines = [
            f"# HELP {series[0]} Requests by webhook and result; an empty webhook is none of those configured.",
            f"# TYPE {series[0]} counter",
            *(
                f'{series[0]}{{webhook={label(name)},result="{result}"}} {count}'
                for (name, result), count in counts
            ),
            f"# HELP {series[1]} Time of the last accepted delivery, 0 before the first.",
            f"# TYPE {series[1]} gauge",
            *(f"{series[1]}{{webhook={label(name)}}} {moment:.3f}" for name, moment in accepted),
            "# HELP central_webhook_body_bytes_total Bytes of the bodies received.",
            "# TYPE central_webhook_body_bytes_total counter",
            f"central_webhook_body_bytes_total {self.body_bytes}",
            "# HELP central_webhook_requests_in_flight Requests that are being handled.",
            "# TYPE central_webhook_requests_in_flight gauge",
            f"central_webhook_requests_in_flight {in_flight}\n",
        ]
        return "\n".join(lines).encode()


def listen_on(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError where the address cannot be bound."""
    host = "127.0.0.1" if host == "localhost" else host
    family, _, _, _, address = socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)[0]
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # "::" stands for IPv4 as well
    return socket.create_server(address, family=family, backlog=LISTEN_QUEUE, dualstack_ipv6=both)


class Receiver(ThreadingHTTPServer):
    """The server: one thread serves whichever connection is ready, since to hand a delivery to another thread costs
    more than the delivery; other threads do for it what may take long: disk, full pipe, code of your own, provider.

    Always true: only the thread of `serve_forever` changes anything here, so nothing is locked; others take `jobs` and
    leave `calls`. A handler is in `connections`, or in `lingering`, until it is closed.
    """

    def __init__(
        self, config: Config, outputs: Outputs, render: Render, inherited: Optional[int] = None
    ) -> None:
        """Bind the configured address, or use an inherited descriptor. `render` is for stdout; None: JSON Lines.

        Raises:
            OSError: the address cannot be bound.
        """
        self.config, self.outputs, self.render = config, outputs, render
        self.connections: set[Handler] = set()
        self.lingering: set[Handler] = set()
        self.waiting: list[tuple[Handler, Entry]] = []  # to be written
        self.unwatched: list[Handler] = []  # where more may have come
        self.reload_wanted: Optional[Callable[[], None]] = None
        self.is_writing = self.is_accepting = self.stopping = False
        self.jobs: collections.deque[Optional[tuple[Job, Callable[[Any], None]]]] = (
            collections.deque()
        )
        self.has_jobs, self.running, self.threads = threading.Semaphore(0), 0, 0
        self.calls: collections.deque[Callable[[], None]] = collections.deque()
        self.metrics, self.next_look = Metrics(), 0.0
        self.has_own_code = has_own_code()
        self.old_tokens_named: dict[tuple[str, int], float] = {}
        self.selector = selectors.DefaultSelector()
        self.waker, woken = socket.socketpair()
        self.waker.setblocking(False)
        self.selector.register(
            woken, selectors.EVENT_READ, functools.partial(woken.recv, RECEIVE_BYTES)
        )
        self.socket = (
            listen_on(config.host, config.port)
            if inherited is None
            else socket.socket(fileno=inherited)
        )
        if inherited is not None and not self.socket.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        ):
            raise OSError(errno.EINVAL, "the inherited socket does not listen")
        # HTTPServer's own way to bind looks up the host's name, which can hang.
        socketserver.BaseServer.__init__(self, self.socket.getsockname(), Handler)
        if self.socket.family in (socket.AF_INET, socket.AF_INET6):
            self.socket.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
            )  # what is accepted inherits it
        self.socket.setblocking(False)

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Serve until `shutdown` is called, and then until what is in flight has been answered."""
        self.watch_listener(True)
        while not self.stopping:
            self.serve_ready(poll_interval)
        deadline = time.monotonic() + DRAIN_SECONDS
        self.watch_listener(False)
        self.accept_connections(LISTEN_QUEUE)  # they have been told that they are connected
        self.server_close()
        now = quiet = (
            time.monotonic()
        )  # a proxy may be sending on a connection kept alive at this moment
        while (self.connections or self.lingering) and now < min(
            deadline, quiet + DRAIN_QUIET_SECONDS
        ):
            self.serve_ready(0.02)
            now = time.monotonic()
            quiet = now if self.in_flight() else quiet

    def shutdown(self) -> None:
        """End `serve_forever`, which finishes what is in flight. Callable from any thread, and by a signal."""
        self.stopping = True
        self.call(lambda: None)

    def serve_ready(self, poll_interval: float) -> None:
        """Wait until connections are ready, serve what has arrived on them, and write what was accepted."""
        try:
            for key, _ in self.selector.select(0 if self.unwatched else poll_interval):
                key.data()
            while self.calls:
                self.calls.popleft()()
            unwatched, self.unwatched = self.unwatched, []
            for handler in (
                unwatched
            ):  # a request has often come with its connection, and the end with the answer
                handler.receive()
            self.write_waiting()
            now = time.monotonic()
            if now >= self.next_look:
                self.next_look = now + poll_interval
                self.look_after(now)
        except Exception as bug:
            LOG.add("ERROR", "internal error", bug)

    def look_after(self, now: float) -> None:
        """Do what is due several times a second."""
        self.stopping = self.stopping or self.outputs.is_gone
        self.watch_listener(not self.stopping)
        self.add_thread()
        LOG.sum_up_rejections()
        while self.waiting and self.waiting[0][1].deadline <= now:
            self.go_on(self.waiting.pop(0)[0], f"stuck for {self.outputs.patience_seconds:g} s")
        for handler in [*self.connections, *self.lingering]:
            if handler.deadline <= now and handler.wanted is None:
                self.go_on(handler, Refusal("timeout", "the request was not complete in time"))

    def go_on(self, handler: Handler, outcome: Any = None) -> None:
        """Bring a connection what it waited for, or raise it there, and let it go on until it has to wait or ends."""
        steps = handler.steps
        try:
            wanted = (
                steps.throw(outcome) if isinstance(outcome, BaseException) else steps.send(outcome)
            )
            handler.wanted = wanted
        except (StopIteration, OSError):  # OSError: the sender is gone, nobody to tell
            self.close_connection(handler)
        except Exception as bug:
            LOG.add("ERROR", "internal error", bug)
            self.close_connection(handler)
        else:
            if type(wanted) is Entry:
                self.waiting.append((handler, wanted))
            elif wanted:
                self.run_aside(wanted, functools.partial(self.go_on, handler))
            elif not handler.is_watched:
                self.unwatched.append(handler)

    def write_waiting(self) -> None:
        """Have written what was accepted, and answered. Deliveries that are ready together share one write and one sync
        (group commit): while one batch goes to the disk, the next one gathers."""
        if self.reload_wanted and not self.is_writing:
            reload, self.reload_wanted = self.reload_wanted, None
            reload()
        while self.waiting and not self.is_writing:
            batch, self.waiting, self.is_writing = self.waiting, [], True
            entries = [entry for _, entry in batch]
            failure = self.outputs.write(entries, may_wait=False)
            if failure is not None:
                self.end_writing(batch, failure)
            else:
                job = functools.partial(self.outputs.write, entries, may_wait=True)
                self.run_aside(job, functools.partial(self.end_writing, batch))

    def end_writing(self, batch: Sequence[tuple[Handler, Entry]], failure: str) -> None:
        """Let those go on whose deliveries have been written (`failure` is ""), or have not."""
        self.is_writing = False
        for handler, _ in batch:
            self.go_on(handler, failure)

    def run_aside(self, job: Job, then: Callable[[Any], None]) -> None:
        """Have another thread do a job; `then` gets what it returns or raises, back in this thread."""
        self.running += 1
        self.jobs.append((job, then))
        self.has_jobs.release()
        self.add_thread()

    def add_thread(self) -> None:
        """Start a thread where a job has none."""
        if self.running > self.threads:
            with contextlib.suppress(RuntimeError):  # no more threads now: `look_after` tries again
                threading.Thread(target=self.do_jobs, daemon=True).start()
                self.threads += 1

    def do_jobs(self) -> None:
        """Do jobs, in a thread of its own."""
        while self.has_jobs.acquire() and (task := self.jobs.popleft()):
            job, then = task
            try:
                outcome = job()
            except BaseException as error:
                outcome = error
            self.call(functools.partial(self.end_job, then, outcome))

    def end_job(self, then: Callable[[Any], None], outcome: Any) -> None:
        """Take the outcome of a job, and let a thread end where too many are idle."""
        self.running -= 1
        if self.threads > self.running + IDLE_THREADS:
            self.threads -= 1
            self.jobs.append(None)
            self.has_jobs.release()
        then(outcome)

    def call(self, function: Callable[[], None]) -> None:
        """Have a function called by the thread of `serve_forever`. Callable from any thread, and by a signal."""
        self.calls.append(function)
        with contextlib.suppress(BlockingIOError):  # then it has been woken already
            self.waker.send(b"\0")

    def watch_listener(self, wanted: bool) -> None:
        """Watch the listening socket for new connections, or not."""
        if wanted and not self.is_accepting:
            self.selector.register(self.socket, selectors.EVENT_READ, self.accept_connections)
        elif self.is_accepting and not wanted:
            self.selector.unregister(self.socket)
        self.is_accepting = wanted

    def accept_connections(self, most: int = ACCEPTED_AT_ONCE) -> None:
        """Accept and begin to serve connections, a few at once: those that are open have their turn in between."""
        try:
            for _ in range(most):
                self.finish_request(*self.get_request())
        except OSError as error:  # mostly that there are no more
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                if LOG.admits_rejection():
                    LOG.add("ERROR", f"cannot accept a connection: {error.strerror}")
                self.watch_listener(False)  # for a moment, or the loop would spin

    def watch(self, handler: Handler, wanted: bool) -> None:
        """Watch a connection for what arrives, or not."""
        if wanted and not handler.is_watched:
            self.selector.register(handler.request, selectors.EVENT_READ, handler.receive)
        elif handler.is_watched and not wanted:
            self.selector.unregister(handler.request)
        handler.is_watched = wanted

    def close_connection(self, handler: Handler) -> None:
        """Close a connection."""
        self.watch(handler, False)
        self.connections.discard(handler)
        self.lingering.discard(handler)
        handler.request.close()

    def in_flight(self) -> int:
        """Return how many requests are in hand."""
        return sum(handler.is_busy for handler in self.connections)

    def peer_of(self, client_address: Any, request: Request) -> str:
        """Return who sent a request: behind a proxy on this machine, the last address in X-Forwarded-For."""
        peer = str(client_address[0]) if client_address else "localhost"
        if is_loopback(peer):
            with contextlib.suppress(ValueError):
                forwarded = (
                    request.headers.get("x-forwarded-for", "")
                    .rpartition(",")[2]
                    .partition("%")[0]
                    .strip()
                )
                return str(ipaddress.ip_address(forwarded))
        return peer

    def route(self, request: Request) -> Sequence[Webhook]:
        """Return the webhooks that a request may be for, none for a path of our own. Raises Refusal: 404, 405."""
        own, paths = request.path in OWN_PATHS, (None, request.path)
        webhooks = [] if own else [one for one in self.config.webhooks if one.path in paths]
        if not own and not webhooks:
            raise Refusal("not_found", f"no webhook at {request.path[:200]!r}")
        if request.method not in (("GET", "HEAD") if own else ("POST",)):
            raise Refusal("method", f"{request.method[:20]} on {request.path[:200]!r}")
        return webhooks

    def own_answer(self, path: str) -> tuple[int, bytes, str]:
        """Answer /health or /metrics: status, body, media type."""
        if path == "/metrics":
            text = self.metrics.render(
                [webhook.name for webhook in self.config.webhooks], self.in_flight()
            )
            return 200, text, "text/plain; version=0.0.4; charset=utf-8"
        if self.outputs.has_failed() or self.stopping:
            return 503, b'{"error": "unavailable"}', JSON
        return 200, b'{"status": "ok"}', JSON

    def keep(
        self, webhook: Webhook, request: Request, token: int, sent: Optional[float]
    ) -> Steps[bool]:
        """Take what is authentic along the way of a delivery, to its end; return whether it was new. It is kept now.

        Raises:
            Refusal: it is not accepted, and nothing is lost: whoever gets no 200 may send again.
        """
        now, memory, keys = time.time(), webhook.memory, identify(webhook, request)
        check_age(sent, webhook.replay_window_seconds, now)  # recent
        is_new = memory.claim(keys)  # new
        memory.last_token = token
        if token:
            self.name_old_token(webhook, token)
        if not is_new:
            self.metrics.count(webhook.name, "duplicate", len(request.body))
            return False
        failure = "not written"
        try:
            delivery = make_delivery(webhook, request, sent, keys, now)
            problem = (yield functools.partial(run_own_code, delivery)) if self.has_own_code else ""
            if problem:
                raise Refusal("handler", problem)
            line = render_json(delivery)
            shown = (self.render(delivery) if self.render else line + "}\n").encode()
            failure = yield Entry(
                line, delivery.key, shown, time.monotonic() + self.outputs.patience_seconds
            )  # kept
        finally:
            memory.settle(keys, kept=not failure)
        if failure:
            raise Refusal("output", failure)
        self.metrics.count(webhook.name, "accepted", len(request.body))
        self.metrics.last_accepted[webhook.name] = time.time()
        return True

    def name_old_token(self, webhook: Webhook, position: int) -> None:
        """Log that a token other than the first is still in use, at most once a minute each."""
        now = time.monotonic()
        if now - self.old_tokens_named.get((webhook.name, position), -1e9) > 60:
            self.old_tokens_named[webhook.name, position] = now
            LOG.add(
                "INFO",
                f"webhook {webhook.name!r}: token {position + 1} of {len(webhook.tokens)} still matches",
            )

    def prepare_reload(self, path: str) -> Config:
        """Return the configuration to go on with, its memories filled from its log where they are new; a job.

        Raises:
            ConfigError, OutputError: it is wrong, or its log cannot be read.
        """
        config, present = load_config(path), self.config
        known = {
            (one.name, one.type) for one in present.webhooks if config.log_file == present.log_file
        }
        load_memories(
            config.log_file, [one for one in config.webhooks if (one.name, one.type) not in known]
        )
        return config

    def reload(self, config: Config) -> None:
        """Swap in a new configuration in the middle of traffic, but between two writes: memories and counters stay.

        Raises:
            OutputError: its log file cannot be opened; the old configuration stays whole.
        """
        if (config.host, config.port) != (self.config.host, self.config.port):
            LOG.add("WARNING", "host and port change with a restart only")
        self.outputs.reopen(config.log_file, config.request_timeout_seconds)
        before, webhooks = (
            {(webhook.name, webhook.type): webhook for webhook in self.config.webhooks},
            [],
        )
        for webhook in config.webhooks:
            old = before.get((webhook.name, webhook.type), webhook)
            for keys in tuple(webhook.memory.order):
                old.memory.settle(keys, kept=True)
            former = [
                token for token in old.tokens + old.former_tokens if token not in webhook.tokens
            ]
            same = webhook.provider and old.provider and webhook.provider.oidc == old.provider.oidc
            provider = old.provider if same else webhook.provider
            webhooks.append(
                webhook._replace(
                    memory=old.memory, former_tokens=tuple(former[:4]), provider=provider
                )
            )
        self.config = config._replace(
            host=self.config.host, port=self.config.port, webhooks=tuple(webhooks)
        )


# ---- The OIDC provider's keys -----------------------------------------------


class Provider:
    """The keys of one OIDC provider, asked for when they are needed. A class because the answer is remembered.

    Always true: ten seconds lie between two questions, failed ones included, and none takes longer than five.
    """

    def __init__(self, oidc: Oidc) -> None:
        self.oidc, self.lock, self.failure, self.issuer = (
            oidc,
            threading.Lock(),
            "no answer yet",
            "",
        )
        self.keys: Optional[list[RsaKey]] = None
        self.asked = self.answered = -1e9

    def keys_for(self, kid: Optional[str], algorithm: str) -> tuple[str, list[RsaKey]]:
        """Return the issuer, and the keys that a token with this key ID and algorithm may be signed with.

        Raises:
            Refusal: the provider has never given its keys.
        """
        if self.lock.acquire(
            blocking=not self.fitting(kid, algorithm)
        ):  # others wait for who asks, if they must
            try:
                now = time.monotonic()
                wanted = (
                    not self.fitting(kid, algorithm) or now - self.answered > PROVIDER_KEYS_SECONDS
                )
                if wanted and now - self.asked >= 2 * PROVIDER_SECONDS:
                    self.asked = now
                    self.ask()
            finally:
                self.lock.release()
        if self.keys is None:
            raise Refusal("provider", f"no keys of the OIDC provider: {self.failure}")
        return self.issuer, self.fitting(kid, algorithm)

    def fitting(self, kid: Optional[str], algorithm: str) -> list[RsaKey]:
        """Return the known keys that fit."""
        return [
            key
            for key in self.keys or ()
            if kid in (None, key.kid) and key.algorithm in ("", algorithm)
        ]

    def ask(self) -> None:
        """Fetch the discovery document and the keys that it names."""
        try:
            document = self.fetch(self.oidc.well_known_url)
            issuer, url = document.get("issuer"), str(document.get("jwks_uri"))
            if not isinstance(issuer, str) or not is_provider_url(url):
                raise ValueError("the discovery document has no issuer, or no jwks_uri over https")
            keys = parse_rsa_keys(self.fetch(url))
            self.issuer, self.keys, self.answered = issuer, keys, time.monotonic()
            LOG.add("INFO", f"{len(keys)} OIDC keys of {issuer}")
        except (OSError, ValueError, RuntimeError, http.client.HTTPException) as error:
            self.failure = f"{self.oidc.well_known_url}: {error}"
            LOG.add("WARNING", f"no OIDC keys: {self.failure}")

    def fetch(self, url: str) -> dict[str, Any]:
        """Fetch a JSON object."""
        status, data = exchange("GET", url, {"Accept": JSON}, None, PROVIDER_SECONDS / 2)
        if status != 200 or len(data) > MAX_ANSWER_BYTES:
            raise ValueError(
                f"status {status} and {len(data)} bytes, expected 200 and at most {MAX_ANSWER_BYTES}"
            )
        return parse_json_object(data)


def exchange(
    method: str, url: str, headers: Mapping[str, str], body: Optional[bytes], seconds: float
) -> tuple[int, bytes]:
    """Send a request; return status and body of the answer, of which it reads MAX_ANSWER_BYTES and one. No redirects.

    Raises:
        OSError, ValueError, http.client.HTTPException: there is no answer, or none in time.
    """
    parts, host = split_url(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(host, parts.port, timeout=seconds)
    with contextlib.closing(connection):
        connection.connect()
        opened, is_late = connection.sock, threading.Event()

        def hang_up() -> None:  # the socket's own time-out begins anew with every byte
            is_late.set()
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

        watchdog = threading.Timer(seconds, hang_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            connection.request(
                method,
                (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
                body,
                headers,
            )
            answer = connection.getresponse()
            data = answer.read(MAX_ANSWER_BYTES + 1)
        finally:
            watchdog.cancel()
            if is_late.is_set():
                raise TimeoutError(f"no whole answer in {seconds:g} s") from None
    return answer.status, data


# ---- Life: signals, systemd -------------------------------------------------

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALS = {*STOP_SIGNALS, getattr(signal, "SIGHUP", signal.SIGINT)}  # Windows has no SIGHUP


def notify(*lines: str) -> None:
    """Tell systemd about our state, where it asks for it (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
                messenger.setblocking(False)
                messenger.sendto(
                    "\n".join(lines).encode(), "\0" + address[1:] if address[0] == "@" else address
                )
        except OSError as error:
            LOG.add("WARNING", f"NOTIFY_SOCKET: {error.strerror}")


def inherited_descriptor() -> Optional[int]:
    """Return the listening socket that systemd has passed (sd_listen_fds(3)), None without one."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        LOG.add("WARNING", f"LISTEN_FDS is {count}, and only the first socket is used")
    return 3


def reload_config(receiver: Receiver, path: str) -> None:
    """Do what SIGHUP asks for: the new configuration as a whole, or the old one and an error in the log."""

    def swap(outcome: Any) -> None:
        kept = f"configuration not reloaded, the old one stays: {path}"
        try:
            if isinstance(outcome, Exception):
                raise outcome
            receiver.reload(outcome)
            LOG.add(
                "INFO", f"configuration reloaded: {', '.join(one.name for one in outcome.webhooks)}"
            )
        except (ConfigError, OutputError) as error:
            for mistake in error.args:
                LOG.add("ERROR", f"{kept}: {mistake}")
        except Exception as error:  # a bug of ours must not stop a receiver that works
            LOG.add("ERROR", kept, error)
        notify("READY=1")

    def wait_for_writes(outcome: Any) -> None:
        receiver.reload_wanted = functools.partial(swap, outcome)
        if receiver.is_writing and receiver.outputs.has_failed():
            LOG.add(
                "WARNING",
                f"the output is stuck, and the configuration is reloaded when it is no longer: {path}",
            )

    if receiver.stopping:
        return
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    receiver.run_aside(functools.partial(receiver.prepare_reload, path), wait_for_writes)


def serve(receiver: Receiver, path: str) -> int:
    """Serve until a signal says stop, or nobody reads stdout; finish what is in flight; return the exit code."""
    outputs, stops = receiver.outputs, []

    def on_signal(number: int, frame: Any) -> None:
        if number not in STOP_SIGNALS:
            receiver.call(functools.partial(reload_config, receiver, path))
            return
        stops.append(number)
        if len(stops) > 1:
            os._exit(EX_CANNOT_SERVE if outputs.is_gone else 0)
        receiver.shutdown()
        receiver.call(lambda: notify("STOPPING=1"))

    for number in SIGNALS:
        signal.signal(number, on_signal)
    notify("READY=1")
    receiver.serve_forever()
    if outputs.is_gone:
        LOG.add("ERROR", "stopped: nobody reads stdout any more")
        return EX_CANNOT_SERVE
    if not receiver.is_writing:
        with contextlib.suppress(OutputError):
            outputs.write_stdout(time.monotonic() + 1)  # what completes a line
    LOG.add("INFO", f"stopped, {receiver.in_flight()} requests unanswered")
    return 0


# ---- Command line -----------------------------------------------------------

SAMPLES = """{
    "central": {
        "id": "AWsample0001", "nid": 4, "alert_type": "AP disconnected", "state": "Open", "severity": "Critical",
        "setting_id": "sample-customer-4", "description": "AP sample-ap-1 disconnected", "device_id": "CNSAMPLE01",
        "details": {"hostname": "sample-ap-1", "serial": "CNSAMPLE01", "site": "Sample site"},
        "operation": "create", "text": "This is a sample, sent with --send-sample", "webhook": "sample"
    },
    "new-central": {
        "id": "sample-event", "alertId": "sample-alert", "name": "AP Down", "category": "Availability",
        "deviceType": "ACCESS_POINT", "severity": "Critical", "operation": "Add", "state": "Active", "siteId": "1",
        "summary": "This is a sample, sent with --send-sample"
    },
    "ip-fabric": {"type": "snapshot", "action": "discover", "status": "completed", "requester": "sample", "test": true},
    "mist": {"topic": "alarms", "events": [{"type": "device_down", "site_id": "sample-site", "severity": "critical"}]},
    "bracken": {"event": "Module_Complete", "username": "sample-user"},
    "entrupy": {"event": "session.completed", "id": "sample"}
}"""  # shaped like what the vendors document; times are added when sent


def sign_sample(
    webhook: Webhook, query: Optional[str], number: int, now: float
) -> tuple[dict[str, str], bytes]:
    """Return the headers and the body of a sample alert, signed with the first token as the sender would."""
    times = {"timestamp": int(now), "time": format_utc(now)}
    payload = {**json.loads(SAMPLES)[webhook.type], **times, "sample": number}
    headers = {"content-type": JSON, "date": email.utils.formatdate(now, usegmt=True)}
    if webhook.api_key:
        (payload if webhook.api_key.place == "field" else headers)[webhook.api_key.name] = (
            webhook.api_key.values[0]
        )
    body, token, scheme = (
        json.dumps(payload).encode(),
        webhook.tokens[0],
        HEADER_SIGNATURES.get(webhook.type),
    )
    if scheme:
        values = ("Alerts", f"sample-{int(now * 1000)}-{number}", format_utc(now))[
            : len(scheme.signed_headers)
        ]
        headers.update(zip(scheme.signed_headers, values))
        digest = hmac.digest(token.encode(), body + "".join(values).encode(), "sha256")
        headers[scheme.header] = scheme.prefix + scheme.encode(digest).decode()
    elif webhook.public_url:
        text = f'sig1=("@method" "@target-uri" "@authority" "@scheme" "@path" "date");created={int(now)}'
        covered = parse_dictionary(text)["sig1"]
        request = Request("POST", "", query, "HTTP/1.1", headers, frozenset())
        base = signature_base(request, covered, webhook.public_url, webhook.public_url.targets[0])
        headers.update(
            {"signature-input": text, "signature": "sig1=" + sign_base(token, base)[0].decode()}
        )
    return headers, body


def send_sample(config: Config, url: str, name: Optional[str], header_lines: Sequence[str]) -> int:
    """Send a signed sample to `url` ("": the configured address) and print what comes back."""
    matching = [webhook for webhook in config.webhooks if name in (None, webhook.name)]
    if len(matching) != 1:
        return fail(
            "--webhook: expected one of " + ", ".join(webhook.name for webhook in config.webhooks),
            EX_USAGE,
        )
    if not url and not config.port:
        return fail("--send-sample: port 0 is any free port, so give the URL", EX_USAGE)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    url = url or f"http://{bracket(host)}:{config.port}{matching[0].path or '/centralwebhook'}"
    headers, body = sign_sample(matching[0], url.partition("?")[2] or None, 1, time.time())
    for line in header_lines:
        field, colon, value = line.partition(":")
        if not colon or not _HEADER_NAME.fullmatch(field) or _UNSAFE.search(value):
            return fail("--header: expected 'Name: value'", EX_USAGE)
        headers[field.lower()] = value.strip()
    started = time.monotonic()
    try:
        status, data = exchange("POST", url, headers, body, SAMPLE_SECONDS)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return fail(f"{url}: {error or type(error).__name__}", EX_CANNOT_SERVE)
    answer = escape_text(data[:500].decode(errors="replace").strip())
    print(f"{status} {answer} {1000 * (time.monotonic() - started):.0f} ms")
    return 0 if status == 200 else EX_CANNOT_SERVE


def run_demo(render: Render) -> int:
    """Start a receiver on a free port of this machine, send it samples and a forgery, show what a user would see."""
    settings = b"""{
        "webclient_info": {"host": "localhost", "port": 0},
        "central_info": {"webhook": {"name": "demo", "token": "%b"}}
    }"""
    config = read_config(settings % base64.b64encode(os.urandom(15)))
    receiver = Receiver(config, Outputs(None, config.request_timeout_seconds), render)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{receiver.server_address[1]}/centralwebhook"
    print_error(f"a receiver with a throw-away token listens on {url}")
    passed = True
    for number in range(1, 5):
        headers, body = sign_sample(config.webhooks[0], None, number, time.time())
        kind, expected = f"signed alert {number}", 200
        if number == 4:
            kind, expected = "forged alert, one word of its body changed", 401
            body = body.replace(b"Critical", b"Harmless")
        status, data = exchange("POST", url, headers, body, SAMPLE_SECONDS)
        LOG.flush()
        print_error(f"{kind}: {status} {data.decode()}")
        passed = passed and status == expected
    return 0 if passed else EX_CANNOT_SERVE


def check_config(config: Config) -> int:
    """Say what each webhook demands, and whether the log can be written."""
    print(
        *[ascii(describe_webhook(webhook))[1:-1] for webhook in config.webhooks],
        sep="\n",
        flush=True,
    )
    path = config.log_file or os.devnull
    is_writable = os.access(path if os.path.exists(path) else os.path.dirname(path) or ".", os.W_OK)
    return (
        0
        if is_writable and not os.path.isdir(path)
        else fail(f"{path}: cannot be written", EX_CANNOT_SERVE)
    )


def fail(message: str, code: int) -> int:
    """Say in one line why the program ends, after what was logged before, and return its exit code."""
    LOG.flush()
    print_error(f"{PROGRAM}: error: {escape_text(message)}")
    return code


def parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line; exits with 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        PROGRAM, description="Receive, verify and hand on alerts of Aruba Central."
    )
    add, mode = parser.add_argument, parser.add_mutually_exclusive_group()
    add("-i", "--input", metavar="FILE", help="the configuration, see input_info.json.example")
    mode.add_argument(
        "-t", "--check-config", action="store_true", help="check the configuration and exit"
    )
    sample = "send a signed sample alert to URL (default: the configured address) and exit"
    mode.add_argument("--send-sample", nargs="?", const="", metavar="URL", help=sample)
    mode.add_argument("--demo", action="store_true", help="show it at work; needs no configuration")
    add("--webhook", metavar="NAME", help="with --send-sample: which of several webhooks")
    add(
        "--header",
        metavar="'NAME: VALUE'",
        action="append",
        default=[],
        help="with --send-sample: a header to add",
    )
    add(
        "--format",
        choices=("auto", "pretty", "json"),
        default="auto",
        help="of stdout; auto: pretty on a terminal",
    )
    add("-v", "--verbose", action="store_true", help="log more")
    add("--version", action="version", version=f"{PROGRAM} {VERSION}")
    options = parser.parse_args(argv)
    if bool(options.input) == options.demo:
        parser.error("--demo takes no -i" if options.demo else "-i FILE is needed, or --demo")
    if options.send_sample is None and (options.webhook or options.header):
        parser.error("--webhook and --header go with --send-sample")
    return options


def choose_render(form: str, names: Sequence[str]) -> Render:
    """Return how stdout shows a delivery; None: as JSON Lines."""
    terminal = os.isatty(STDOUT)
    if form == "json" or form == "auto" and not terminal:
        return None
    colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = max(map(len, names))

    def render(delivery: Delivery) -> str:
        columns = shutil.get_terminal_size().columns if terminal else 0
        return render_pretty(delivery, columns, colour, width)

    return render


def start(config: Config, path: str, render: Render) -> int:
    """Open the outputs, rebuild the memories, bind, and serve until told to stop."""
    for number in SIGNALS:  # until it serves
        signal.signal(number, lambda number, frame: os._exit(0) if number in STOP_SIGNALS else None)
    if sys.platform != "win32":
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[
            1
        ]  # connections above max_connections need descriptors too
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    if has_lock and not has_own_code() and hasattr(os, "sched_setaffinity"):
        # One thread at a time runs Python, and to hand the interpreter lock to another processor is slow: with a log
        # file a fifth of the processor time, also beside a busy neighbour. Without, it keeps out of its sender's way.
        with contextlib.suppress(OSError):  # where that is not allowed, it is slower
            processors = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {processors[os.getpid() % len(processors)]})
    outputs = Outputs(config.log_file, config.request_timeout_seconds)
    load_memories(config.log_file, config.webhooks)
    try:
        receiver = Receiver(config, outputs, render, inherited_descriptor())
    except (OSError, UnicodeError) as error:
        reason, *_ = str(getattr(error, "strerror", None) or error).split(
            " ("
        )  # what follows repeats the address
        return fail(f"{config.host} port {config.port}: {reason}", EX_CANNOT_SERVE)
    address: Any = receiver.server_address
    shown = (
        os.fsdecode(address) if isinstance(address, (str, bytes)) else "{} port {}".format(*address)
    )
    shown += f" (http://{bracket(address[0])}:{address[1]})" if isinstance(address, tuple) else ""
    webhooks = ", ".join(
        f"{one.name} ({one.type}, {one.path or 'any path'})" for one in config.webhooks
    )
    log_file = f", {config.log_file}" if config.log_file else ""
    LOG.add(
        "INFO",
        f"{PROGRAM} {VERSION} listens on {shown}; webhooks: {webhooks}; output: stdout{log_file}",
    )
    return serve(receiver, path)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the program; return its exit code: 0 stopped on request, 1 cannot serve, 2 usage, 78 configuration."""
    options = parse_arguments(argv)
    LOG.start(options.verbose)
    try:
        if options.demo:
            return run_demo(choose_render(options.format, ["demo"]))
        config = load_config(options.input)
        if options.send_sample is not None:
            return send_sample(config, options.send_sample, options.webhook, options.header)
        if options.check_config:
            return check_config(config)
        return start(
            config,
            options.input,
            choose_render(options.format, [one.name for one in config.webhooks]),
        )
    except ConfigError as error:
        return max(fail(f"{options.input}: {mistake}", EX_CONFIG) for mistake in error.args)
    except OutputError as error:
        return fail(str(error), EX_CANNOT_SERVE)
    except OSError as error:
        return fail(f"stdout: {error.strerror}", EX_CANNOT_SERVE)
    except KeyboardInterrupt:
        return EX_CANNOT_SERVE if options.send_sample is not None else 0
    finally:
        LOG.flush()


if __name__ == "__main__":
    sys.exit(main())
