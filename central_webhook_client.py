#!/usr/bin/env python3
"""Receive webhook alerts of HPE Aruba Networking Central, verify them, store them, then answer.

    python3 central_webhook_client.py -i=input_info.json

One file, Python 3.9 or newer, standard library only. It runs behind an HTTPS reverse proxy
(nginx/centralwebhook.conf). A delivery is one POST. It is handled in five steps, which
`WebhookHandler.do_POST` takes one after the other:

    1. read     well-formed HTTP, a known path, the raw body   WebhookHandler.parse_request
    2. verify   signature, API key, access token               check_webhooks
    3. check    recent, and not accepted before                check_age, ReplayCache.reserve
    4. store    stdout, then log_file, synced to the disk      Output.write
    5. answer   200, and only now `handle_alert` is called     WebhookHandler.reply

The sections (`grep '^# ----'` prints this map):

    Constants and limits
    Errors
    Verify a signature of classic Central: the part to copy
    Your own code
    Signatures of the other senders, API key
    JSON
    HTTP message signatures (RFC 9421)
    OIDC access tokens
    Replay protection
    Output
    Configuration
    Checking a delivery
    HTTP parsing
    HTTP server
    Metrics
    Signals and systemd
    Command line
"""

from __future__ import annotations

import argparse
import base64
import binascii
import collections
import contextlib
import difflib
import email.utils
import errno
import functools
import hashlib
import hmac
import html
import http.client
import inspect
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import mmap
import os
import queue
import random
import re
import select
import signal
import socket
import stat
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

if sys.platform != "win32":
    import fcntl
    import resource

# ---- Constants and limits -------------------------------------------------------------------

VERSION = "1.0.0"
PROGRAM = "central_webhook_client.py"
EX_CANNOT_SERVE = 1
EX_USAGE = 2
EX_CONFIG = 78  # of sysexits.h
STDOUT = 1  # file descriptors
STDERR = 2
JSON = "application/json"
RESERVED_PATHS = ("/health", "/metrics")

MAX_REQUEST_LINE_BYTES = 8 * 1024  # nginx's own limit
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADER_FIELDS = 100
MAX_CHUNK_LINE_BYTES = 256  # the size of a chunk and its extensions
KEEP_ALIVE_SECONDS = 75.0  # above nginx's 60, so that nginx closes first
LISTEN_QUEUE = 1024  # connections; the 5 of socketserver lose most of a burst
LINGER_SECONDS = 2.0  # a refused sender is read from this long, so that it can read the answer
DRAIN_SECONDS = 10.0  # after SIGTERM: for requests in flight, and for `handle_alert`
DRAIN_QUIET_SECONDS = 0.5  # after SIGTERM: for requests on their way on idle connections
MAX_FUTURE_SECONDS = 15 * 60  # the clock of a sender may be this much ahead
REMEMBERED_DELIVERIES = 100_000  # for each webhook
MAX_WAITING_ALERTS = 10_000  # for `handle_alert`
REJECTION_LINES_PER_SECOND = 10
MAX_SIGNATURE_FIELD_BYTES = 8 * 1024  # Signature and Signature-Input, each
MAX_LABELS = 4  # signatures tried in one Signature header
MAX_COMPONENTS = 32  # covered by one of them
SAMPLE_SECONDS = 30.0  # for the answer to --send-sample
PROVIDER_SECONDS = 5.0  # for the answer of an OIDC provider; twice that between two requests
MAX_ANSWER_BYTES = 512 * 1024  # of a provider, or to a sample
PROVIDER_KEYS_SECONDS = 3600.0  # then keys are fetched again, in case one was withdrawn
MAX_KEYS_TRIED = 16
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 16384
TOKEN_LEEWAY_SECONDS = 60

# ---- Errors ---------------------------------------------------------------------------------

REFUSALS = {  # reason, in the log and the metrics: status
    "malformed": 400,
    "signature": 401,
    "api_key": 401,
    "oidc": 401,
    "stale": 401,
    "not_found": 404,
    "method": 405,
    "timeout": 408,
    "no_length": 411,
    "body_too_large": 413,
    "target_too_long": 414,
    "headers_too_large": 431,
    "coding": 501,
    "in_progress": 503,
    "output": 503,
    "provider": 503,
    "version": 505,
}
ERRORS = {  # status: the error in the answer
    400: "bad request",
    401: "unauthorized",
    404: "not found",
    405: "method not allowed",
    408: "request timeout",
    411: "length required",
    413: "body too large",
    414: "request line too long",
    431: "header fields too large",
    501: "transfer coding not implemented",
    503: "unavailable",
    505: "http version not supported",
}

log = logging.getLogger("central_webhook_client")


class Refusal(Exception):
    """A request is not accepted. The detail is for the log, never for the sender."""

    def __init__(self, reason: str, detail: str, webhook: str = "") -> None:
        """`reason` is a key of REFUSALS; `webhook` a name, where it is not that of the path."""
        super().__init__(detail)
        self.reason = reason
        self.webhook = webhook


class OutputError(Exception):
    """A delivery could not be written; the message says where and why."""


class ConfigError(Exception):
    """The configuration is wrong; one argument for each error."""


# ---- Verify a signature of classic Central: the part to copy --------------------------------
# Needs base64, hmac and typing. Source: Central's "Webhooks" help page and the vendor's sample.


class SignatureError(Exception):
    """The sender did not prove that it knows the token. The message holds no secret."""


def verify_signature(body: bytes, headers: Mapping[str, str], token: str) -> None:
    """Verify that a delivery of classic Central was signed with `token`.

    `body` is the raw body, before anything decoded it. `headers` maps names, in any case, to
    values decoded as ISO-8859-1, as WSGI and http.server do. A normal return proves that the
    sender knows the token. It does not prove that the delivery is new or recent: it can be a
    replay. Nothing separates the signed values, so bytes can be moved between neighbours.

    Raises:
        SignatureError: a header is missing, empty or repeated, or the signature does not match.
        TypeError, ValueError: the token is not a str, or empty, so that anybody could sign.
    """
    if not isinstance(token, str):
        raise TypeError("token: expected one str")
    if not token:
        raise ValueError("token: expected a str that is not empty")
    values = []
    for name in ("signature", "service", "delivery-id", "delivery-timestamp"):
        found = [value for key, value in headers.items() if key.lower() == f"x-central-{name}"]
        if len(found) != 1 or not found[0]:
            raise SignatureError(f"x-central-{name} is missing, empty or repeated")
        values.append(found[0])
    try:
        signature, service, delivery_id, timestamp = [value.encode("latin-1") for value in values]
    except UnicodeEncodeError:
        raise SignatureError("a signed header is not ISO-8859-1") from None
    signed = body + service + delivery_id + timestamp
    expected = base64.b64encode(hmac.digest(token.encode(), signed, "sha256"))
    # Security: compare in constant time, in the encoded form, and as bytes. `==` leaks how many
    # characters are right, decoding first accepts other spellings, and compare_digest raises
    # TypeError for a str that is not ASCII.
    if not hmac.compare_digest(expected, signature):
        raise SignatureError("x-central-signature does not match")


# ---- Your own code --------------------------------------------------------------------------


class Delivery(NamedTuple):
    """One delivery that was verified, recent and new."""

    received_at: float  # epoch seconds
    webhook: str  # the name in the configuration
    type: str
    delivery_id: Optional[str]  # X-Central-Delivery-ID; None for other senders
    sent_at: Optional[str]  # the signed time, as the sender wrote it, or ISO 8601
    body: bytes  # raw, as it was signed
    text: Optional[str]  # the body as JSON text, an API key in it masked; None if it is not JSON
    key: Optional[str]  # identifies the delivery, on every machine; None if nothing does

    @property
    def payload(self) -> Any:
        """The body as Python objects; None if it is not JSON, or nested too deeply."""
        try:
            return None if self.text is None else parse_json(self.text)[0]
        except ValueError:
            return None


def post_to_slack(delivery: Delivery) -> None:
    """Post an alert to the incoming webhook whose URL is in the environment variable CHAT_URL.

    An example, for Slack and Mattermost. Set `handle_alert = post_to_slack` to use it.
    """
    alert = summarize(delivery.payload)
    text = f"{alert.severity} {alert.state}: {alert.name} {alert.place} {alert.description}"
    message = {"text": html.escape(f"[{delivery.webhook}] {text}", quote=False)}
    headers = {"Content-Type": JSON}
    request = urllib.request.Request(os.environ["CHAT_URL"], json.dumps(message).encode(), headers)
    urllib.request.urlopen(request, timeout=10).close()


# Set this to a function, here or from a module that imports this file. It is called with each
# delivery after it was stored, one after the other, in a thread of its own.
handle_alert: Optional[Callable[[Delivery], None]] = None


class Summary(NamedTuple):
    """What the alerts of all senders have in common, as text; "" where an alert does not say."""

    severity: str
    state: str
    name: str
    place: str  # device and site, each in brackets
    description: str


def summarize(payload: Any) -> Summary:
    """Summarize an alert of any sender; `payload` is parsed JSON of any type."""
    alert = payload if isinstance(payload, dict) else {}
    events = alert.get("events")  # Juniper Mist: several in one delivery
    extra = alert.get("additionalDetails")  # new Central: an array of objects
    nested = [alert.get("details"), alert.get("impactedEntities")]
    for found in (events, extra):
        nested.extend(found[:1] if isinstance(found, list) else [])
    sources = [alert, *(source for source in nested if isinstance(source, dict))]

    def first(*names: str) -> str:
        for name in names:
            for source in sources:
                value = source.get(name)
                if isinstance(value, list) and value:
                    value = value[0]
                if isinstance(value, (str, int)) and value != "":
                    return str(value)
        return ""

    name = first("alert_type", "name", "event", "type", "text")
    if isinstance(events, list):
        name = f"{first('topic')} {first('type')} ({len(events)} events)"
    device = first("device_id", "serial", "deviceSerial", "device_name", "mac", "deviceType")
    site = first("site", "siteName", "siteId", "site_name", "site_id")
    return Summary(
        severity=first("severity"),
        state=first("state", "status"),
        name=name,
        place=" ".join(f"[{text}]" for text in (device, site) if text),
        description=first("description", "summary", "reason"),
    )


# ---- Signatures of the other senders, API key -----------------------------------------------


class HeaderSignature(NamedTuple):
    """How a sender signs the body with HMAC-SHA256 into one header."""

    header: str  # lower case
    prefix: str
    encode: Callable[[bytes], bytes]


HEADER_SIGNATURES = {  # to add a sender of this kind, add a row
    "ip-fabric": HeaderSignature("x-ipf-signature", "", binascii.hexlify),
    "mist": HeaderSignature("x-mist-signature-v2", "", binascii.hexlify),
    "bracken": HeaderSignature("authorization", "HMACSHA256 ", base64.b64encode),
    "entrupy": HeaderSignature("entrupy-signature", "SHA256:", base64.b64encode),
}
TYPES = ("central", "new-central", *HEADER_SIGNATURES)
NO_DEDUP = ("bracken", "entrupy")  # nothing distinguishes a replay from an event that recurs


@dataclass
class Request:
    """One HTTP request whose framing was checked, and nothing else: it is not yet trusted.

    Text is decoded as ISO-8859-1. Mutable: the body is read after the headers.
    """

    method: str
    path: str
    query: Optional[str]  # what follows "?"; None without "?"
    version: str
    headers: dict[str, str]  # by lower-case name; repeated ones joined with ", " (RFC 9110, 5.3)
    repeated: frozenset[str]  # names that occurred more than once
    body: bytes = b""


EMPTY_REQUEST = Request("", "", None, "HTTP/1.1", {}, frozenset())  # while none has been read


def verify_header_signature(request: Request, scheme: HeaderSignature, token: str) -> None:
    """Verify that the body was signed with `token`; see `verify_signature` for what that proves.

    Raises:
        SignatureError: the header is missing, empty or repeated, or does not match.
    """
    received = request.headers.get(scheme.header, "").encode("latin-1")
    if not received or scheme.header in request.repeated:
        raise SignatureError(f"{scheme.header} is missing, empty or repeated")
    digest = hmac.digest(token.encode(), request.body, "sha256")
    if not hmac.compare_digest(scheme.prefix.encode() + scheme.encode(digest), received):
        raise SignatureError(f"{scheme.header} does not match")


@dataclass(frozen=True)
class ApiKey:
    """A shared secret demanded besides the signature."""

    header: str  # its name in lower case; "" if the key is in a field
    field: str  # the name of a top-level field of the JSON body; "" if the key is in a header
    values: tuple[str, ...]  # all are valid


def check_api_key(request: Request, api_key: ApiKey) -> None:
    """Check the API key of a request: in a header, bare or after a scheme word, or in a field.

    Raises:
        Refusal: the key is missing, empty, repeated or wrong.
    """
    if api_key.header:
        place = f"the header {api_key.header!r}"
        value = request.headers.get(api_key.header, "").encode("latin-1")
        received = [value, value.partition(b" ")[2]]
        is_repeated = api_key.header in request.repeated
    else:
        place = f"the field {api_key.field!r}"
        payload, repeated_names = parse_json_or_none(request.body)
        text = payload.get(api_key.field) if isinstance(payload, dict) else None
        received = [text.encode(errors="replace") if isinstance(text, str) else b""]
        is_repeated = api_key.field in repeated_names
    if is_repeated or not received[0]:
        raise Refusal("api_key", f"{place} is missing, empty or repeated")
    # Security: compare with all keys, each in constant time, so that time tells nothing.
    pairs = itertools.product(api_key.values, received)
    if not any([hmac.compare_digest(valid.encode(), found) for valid, found in pairs]):
        raise Refusal("api_key", f"{place} holds another key")


# ---- JSON -----------------------------------------------------------------------------------


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Numbers stay text: this only has to find out whether a text is JSON.
_VALIDATOR = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse_constant)
# Control characters, and those that reorder, hide or break text: bidi controls, zero-width
# characters, line separators, surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def json_text(body: bytes) -> Optional[str]:
    """Return the body as text if it is JSON in UTF-8 (RFC 8259), without a BOM; else None."""
    try:
        text = body.decode("utf-8-sig")
        stripped = text.strip(" \t\r\n")
        return text if _VALIDATOR.raw_decode(stripped)[1] == len(stripped) else None
    except (ValueError, RecursionError):
        return None


def find_repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, sorted."""
    return sorted(name for name, count in collections.Counter(names).items() if count > 1)


def parse_json(text: str) -> tuple[Any, list[str]]:
    """Parse JSON; return the value, and the keys that are repeated in one of its objects.

    Numbers that Python cannot hold (10,000 digits, 1e999) become strings.

    Raises:
        ValueError: the text is not JSON (NaN and Infinity included), or nested too deeply.
    """
    repeated: list[str] = []

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            repeated.extend(find_repeated(name for name, _ in pairs))
        return value

    def to_integer(digits: str) -> Any:
        return int(digits) if len(digits) < 4000 else digits

    def to_float(digits: str) -> Any:
        return float(digits) if abs(float(digits)) < float("inf") else digits

    try:
        value = json.loads(
            text,
            object_pairs_hook=to_object,
            parse_int=to_integer,
            parse_float=to_float,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, repeated


def parse_json_or_none(body: bytes) -> tuple[Any, list[str]]:
    """Parse a body as `parse_json` does; return None for the value if it is not JSON."""
    try:
        return parse_json(body.decode("utf-8-sig"))
    except ValueError:
        return None, []


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError for everything else, a repeated key included."""
    value, repeated = parse_json(data.decode())
    if repeated or not isinstance(value, dict):
        raise ValueError("expected a JSON object, each key once")
    return value


def to_ascii_line(text: str) -> str:
    """Put a JSON text on one line of ASCII; numbers, order and spelling stay."""
    if not text.isascii():
        text = re.sub("[^\x00-\x7f]+", lambda run: json.dumps(run[0])[1:-1], text)
    return text.replace("\n", " ").replace("\r", " ").replace("\t", " ").replace("\x7f", "\\u007f")


def escape_text(text: str) -> str:
    r"""Escape what could move a cursor, reorder text or begin a line, as JSON does: \u202e."""
    return _UNSAFE.sub(lambda match: json.dumps(match[0])[1:-1].replace("\x7f", "\\u007f"), text)


def guess_format(body: bytes) -> str:
    """Say what a body that is not JSON seems to be, for the log."""
    start = body.lstrip()[:200]
    if not start:
        return "empty"
    if body.startswith(b"\x1f\x8b"):
        return "gzip: the sender must not compress"
    if start.startswith(b"<"):
        return "XML or HTML"
    if re.match(rb"[\w.%+\-\[\]]+=[^{\[]*", start):
        return "a form: choose JSON as the content type at the sender"
    if start[:1] in b'{["':
        return "almost JSON: truncated, nested too deeply, or with NaN, comments or the like"
    try:
        body.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return "plain text"


# ---- HTTP message signatures (RFC 9421) -----------------------------------------------------


class Item(NamedTuple):
    """A member of a structured field: an item or an inner list (RFC 8941 section 3)."""

    value: Any  # an int, a str, or the items of an inner list; None: another type
    text: str  # canonical, without the parameters
    parameters: dict[str, Item]

    def __str__(self) -> str:
        """Serialize canonically (RFC 8941 section 4.1)."""
        text = self.text
        for name, item in self.parameters.items():
            text += f";{name}" if item.text == "?1" else f";{name}={item.text}"
        return text


_BARE_ITEM = (
    r'"(?:[ !#-\[\]-~]|\\["\\])*"'  # a string: RFC 8941 section 4.2.5
    r"|-?[0-9]{1,15}(?![0-9.])"  # an integer: 4.2.4
    r"|-?[0-9]{1,12}\.[0-9]{1,3}(?![0-9.])"  # a decimal: 4.2.4
    r"|[A-Za-z*][!#$%&'*+\-.^_`|~0-9A-Za-z:/]*"  # a token: 4.2.6
    r"|:(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?:"  # bytes: 4.2.7
    r"|\?[01]"  # a Boolean: 4.2.8
)


class StructuredField:
    """A scanner with the steps of RFC 8941 section 4.2. Each step raises SignatureError."""

    # Security: these are the grammars of RFC 8941 section 3, nothing laxer. A string with a line
    # feed in it would let an attacker write lines of the signature base (RFC 9421 section 7.5.3).

    def __init__(self, text: str) -> None:
        self.text = text.strip(" ")
        self.position = 0

    def scan(self, pattern: str) -> str:
        """Consume and return what matches at the position."""
        match = re.compile(pattern).match(self.text, self.position)
        if not match:
            raise SignatureError(f"a structured field is malformed at character {self.position}")
        self.position = match.end()
        return match[0]

    def parse_dictionary(self) -> dict[str, Item]:
        """Section 4.2.2, but a repeated key is an error (RFC 9421 section 4)."""
        members: dict[str, Item] = {}
        while True:
            key = self.parse_key()
            if key in members:
                raise SignatureError(f"{key[:40]!r} is repeated in a structured field")
            if not self.scan("=?"):
                members[key] = Item(None, "?1", self.parse_parameters())
            elif self.text.startswith("(", self.position):
                members[key] = self.parse_inner_list()
            else:
                members[key] = self.parse_item()
            self.scan("[ \t]*")
            if self.position == len(self.text):
                return members
            self.scan(",[ \t]*")

    def parse_inner_list(self) -> Item:
        """Section 4.2.1.2."""
        self.scan(r"\( *")
        items = []
        while not self.scan(r"\)?"):
            items.append(self.parse_item())
            self.scan(r" +|(?=\))")
        return Item(items, f"({' '.join(map(str, items))})", self.parse_parameters())

    def parse_item(self) -> Item:
        """Section 4.2.3."""
        return self.parse_bare_item()._replace(parameters=self.parse_parameters())

    def parse_bare_item(self) -> Item:
        """Section 4.2.3.1. Bytes are not decoded, since they are compared in their encoded form."""
        text = self.scan(_BARE_ITEM)
        if text[0] == '"':
            return Item(re.sub(r"\\(.)", r"\1", text[1:-1]), text, {})
        if text[0] not in "-0123456789":
            return Item(None, text, {})
        if "." in text:
            return Item(None, str(float(text) or 0.0), {})  # exact: it has at most 15 digits
        return Item(int(text), str(int(text)), {})

    def parse_parameters(self) -> dict[str, Item]:
        """Section 4.2.3.2: if a parameter is repeated, the last value wins."""
        parameters = {}
        while self.scan("(?:; *)?"):
            key = self.parse_key()
            parameters[key] = self.parse_bare_item() if self.scan("=?") else Item(None, "?1", {})
        return parameters

    def parse_key(self) -> str:
        """Section 4.2.3.3."""
        return self.scan("[a-z*][a-z0-9_.*-]*")


class UrlParts(NamedTuple):
    """What RFC 9421 section 2.2 signs of a URL, in one spelling."""

    target: str  # the URL without its query
    scheme: str
    authority: str
    path: str


class PublicUrl(NamedTuple):
    """The URL as typed into Central."""

    path: str  # "/" if it is empty
    spellings: tuple[UrlParts, ...]  # those that a signer may use: as typed, ..., normalized


def split_url(url: str) -> tuple[urllib.parse.SplitResult, str]:
    """Split an absolute URL; return its host in lower case as well.

    Raises:
        ValueError: it is not an http or https URL.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an http or https URL")
    return parts, parts.hostname


def format_host(host: str) -> str:
    """Return a host as it is written in a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def parse_public_url(url: str) -> PublicUrl:
    """Parse the URL as typed into Central.

    Signers differ on whether they normalize it (scheme and host in lower case, no default port,
    "/" for an empty path), and may do so in `@authority` but not in `@target-uri`.

    Raises:
        ValueError: it is not an http or https URL in ASCII, or it has a user or a fragment.
    """
    parts, hostname = split_url(url)
    if not re.fullmatch(r"[\x21-\x7e]+", url) or "@" in parts.netloc or "#" in url:
        raise ValueError("expected an http or https URL in ASCII without user and fragment")
    target = url.partition("?")[0]
    path = parts.path or "/"
    authority = format_host(hostname)
    if parts.port not in (None, {"http": 80, "https": 443}[parts.scheme]):
        authority += f":{parts.port}"
    with_slash = target if parts.path else target + "/"
    spellings = itertools.product(
        dict.fromkeys([target, with_slash, f"{parts.scheme}://{authority}{path}"]),
        dict.fromkeys([url.partition(":")[0], parts.scheme]),
        dict.fromkeys([parts.netloc, authority]),
        dict.fromkeys([parts.path, path]),
    )
    return PublicUrl(path, tuple(UrlParts(*spelling) for spelling in spellings))


def signature_base(request: Request, covered: Item, url: UrlParts) -> bytes:
    """Return the bytes to sign (RFC 9421 section 2.5): a line for each component, and `covered`.

    Raises:
        SignatureError: a component is missing, or not supported: `@query-param`, those of
            responses, and all with parameters.
    """
    query = "" if request.query is None else "?" + request.query
    # Security: scheme, authority and path are configured. Host and X-Forwarded-* are whatever the
    # sender writes, so a signature made for another receiver would pass.
    derived = {  # section 2.2
        "@method": request.method,
        "@target-uri": url.target + query,
        "@authority": url.authority,
        "@scheme": url.scheme,
        "@request-target": url.path + query,
        "@path": url.path,
        "@query": query or "?",
    }
    lines = []
    for item in covered.value:
        values = derived if item.value.startswith("@") else request.headers
        if item.parameters or item.value not in values:
            shown = str(item)[:80]
            raise SignatureError(f"the covered component {shown} is missing or not supported")
        lines.append(f"{item}: {values[item.value]}")
    return "\n".join([*lines, f'"@signature-params": {covered}']).encode("latin-1")


# RFC 9421 section 2.3. Other parameters are part of the base, so they are accepted.
_PARAMETERS = {"created": int, "expires": int, "nonce": str, "alg": str, "keyid": str, "tag": str}


def check_coverage(covered: Item, now: float) -> None:
    """Check what a signature covers and claims; `now` is in epoch seconds.

    Raises:
        SignatureError: it leaves out the method, the target or a time; covers a component twice;
            has a parameter of the wrong type or another algorithm; or has expired.
    """
    items = covered.value
    if not isinstance(items, list) or not all(isinstance(item.value, str) for item in items):
        raise SignatureError("a member of signature-input is not a list of strings")
    names = [item.value for item in items]
    if len(names) > MAX_COMPONENTS:
        raise SignatureError(f"more than {MAX_COMPONENTS} components are covered")
    if len(set(names)) < len(names):
        raise SignatureError("a component is covered twice")
    parameters = {name: item.value for name, item in covered.parameters.items()}
    for name, value in parameters.items():
        if not isinstance(value, _PARAMETERS.get(name, object)):
            raise SignatureError(f"the signature parameter {name!r} is of the wrong type")
    algorithm = parameters.get("alg", "hmac-sha256")
    if algorithm != "hmac-sha256":
        raise SignatureError(f"the algorithm is {algorithm[:40]!r}, expected 'hmac-sha256'")
    expires = parameters.get("expires", now)
    if expires < now:
        raise SignatureError(f"the signature expired {now - expires:.0f} s ago")
    has_target = "@target-uri" in names or ("@authority" in names and "@path" in names)
    if "@method" not in names or not has_target:
        raise SignatureError(
            "the signature does not cover @method, and @target-uri or @authority and @path"
        )
    if "date" not in names and "created" not in parameters:
        raise SignatureError("the signature covers no time: neither date nor created")


def check_content_digest(request: Request) -> None:
    """Check that each sha-256 and sha-512 of Content-Digest (RFC 9530) is that of the body.

    Raises:
        SignatureError: one is not, or there is neither.
    """
    digests = StructuredField(request.headers["content-digest"]).parse_dictionary()
    known = [name for name in ("sha-256", "sha-512") if name in digests]
    if not known:
        raise SignatureError("content-digest has neither sha-256 nor sha-512")
    for name in known:
        digest = hashlib.new(name.replace("-", ""), request.body).digest()
        if digests[name].text != f":{base64.b64encode(digest).decode()}:":
            raise SignatureError(f"the {name} of content-digest does not match the body")


def hmac_keys(token: str) -> list[bytes]:
    """Return the keys that a token may stand for: its text, and its bytes if it is hexadecimal.

    The vendor's documentation does not say which of both new Central uses.
    """
    keys = [token.encode()]
    if re.fullmatch(r"(?:[0-9a-fA-F]{2})+", token):
        keys.append(bytes.fromhex(token))
    return keys


def sign_base(key: bytes, base: bytes) -> bytes:
    """Return the hmac-sha256 signature of a base, encoded as in a structured field."""
    return b":%b:" % base64.b64encode(hmac.digest(key, base, "sha256"))


def is_message_signature(received: bytes, keys: Sequence[bytes], bases: Iterable[bytes]) -> bool:
    """Return True if `received` is the signature of one of the bases with one of the keys."""
    expected = [sign_base(key, base) for base in bases for key in keys]
    return any([hmac.compare_digest(signature, received) for signature in expected])


def parse_message_signatures(request: Request) -> list[tuple[Item, bytes]]:
    """Return what each signature of a request covers, and the signature in its encoded form.

    Labels that are in only one of `signature-input` and `signature` are passed over.

    Raises:
        SignatureError: a header is missing, malformed or too long, or there are too many labels.
    """
    fields = []
    for name in ("signature-input", "signature"):
        text = request.headers.get(name, "")
        if not text:
            raise SignatureError(f"{name} is missing or empty")
        if len(text) > MAX_SIGNATURE_FIELD_BYTES:
            raise SignatureError(f"{name} is above {MAX_SIGNATURE_FIELD_BYTES} bytes")
        fields.append(StructuredField(text).parse_dictionary())
        if len(fields[-1]) > MAX_LABELS:
            raise SignatureError(f"{name} has more than {MAX_LABELS} labels")
    inputs, signatures = fields
    labels = [label for label in inputs if label in signatures]
    if not labels:
        raise SignatureError("no label is in both signature-input and signature")
    return [(inputs[label], signatures[label].text.encode()) for label in labels]


def verify_message_signature(
    request: Request, tokens: Sequence[str], url: PublicUrl, now: float
) -> Verified:
    """Verify an hmac-sha256 signature over an HTTP message (RFC 9421) as new Central makes it.

    `now` is in epoch seconds. A normal return proves that the sender knows the token and signed
    the method, the URL and the time. It proves nothing of the body unless the signature covers
    content-digest.

    Raises:
        SignatureError: no signature is good; then why the last one is not.
    """
    failure = SignatureError("no signature was tried")
    for covered, received in parse_message_signatures(request):
        try:
            check_coverage(covered, now)
            bases = {signature_base(request, covered, spelling) for spelling in url.spellings}
            for index, token in enumerate(tokens):
                if not is_message_signature(received, hmac_keys(token), bases):
                    continue
                if any(item.value == "content-digest" for item in covered.value):
                    check_content_digest(request)
                created = covered.parameters.get("created")
                if created:
                    return Verified(index, created.value)
                return Verified(index, parse_http_date(request.headers["date"]))
            raise SignatureError("signature does not match")
        except SignatureError as error:  # a bad one beside a good one does no harm: section 7.2.6
            failure = error
    raise failure


def diagnose_message_signature(
    request: Request, tokens: Sequence[str], url: PublicUrl, now: float
) -> str:
    """Return a hint why a signature does not match, for the log alone; "" without one.

    Tries the ways in which signers deviate from RFC 9421, since nobody has published what new
    Central really signs. Costs a few signatures for each label and token, and raises nothing.
    """
    try:
        signatures = parse_message_signatures(request)
    except SignatureError:
        return ""
    usual = url.spellings
    scheme, authority = usual[-1].scheme, usual[-1].authority
    host = request.headers.get("host", "")
    host_name, public_name = (re.sub(":[0-9]*$", "", name) for name in (host, authority))

    def respell(scheme: str, authority: str) -> list[UrlParts]:
        paths = {parts.path for parts in usual}
        return [UrlParts(f"{scheme}://{authority}{p}", scheme, authority, p) for p in paths]

    lower = replace(request, method=request.method.lower())
    last = b'\n"@signature-params": '
    bare = b'\n"signature-params": '
    keys = [key for token in tokens for key in hmac_keys(token)]
    decoded = []
    for token in tokens:
        with contextlib.suppress(ValueError):
            decoded.append(base64.b64decode(token, validate=True))
    deviations = [  # request, URL, start of the last line (b"": there is none), keys
        ("the method in lower case", lower, usual, last, keys),
        ('"signature-params" without @', request, usual, bare, keys),
        ('the method in lower case and "signature-params" without @', lower, usual, bare, keys),
        ('no line "@signature-params"', request, usual, b"", keys),
        ("http instead of https", request, respell("http", authority), last, keys),
        ("the received Host as authority", request, respell(scheme, host), last, keys),
        ("the received Host without its port", request, respell(scheme, host_name), last, keys),
        ("the token decoded from base64", request, usual, last, decoded),
    ]
    for covered, received in signatures:
        with contextlib.suppress(SignatureError):
            check_coverage(covered, now)
            for name, variant, spellings, start, variant_keys in deviations:
                bases = []
                for parts in spellings:
                    lines, _, end = signature_base(variant, covered, parts).partition(last)
                    bases.append(lines + start + end if start else lines)
                if is_message_signature(received, variant_keys, bases):
                    return f"would match with {name}"
    if host and host_name.lower() != public_name:
        return f"Host is '{escape_text(host[:80])}', but public_url says '{authority}'"
    return ""


# ---- OIDC access tokens ---------------------------------------------------------------------


class Oidc(NamedTuple):
    """What an access token must say, as configured: `audience`, `client_id` or both are set."""

    well_known_url: str
    audience: Optional[str]
    client_id: Optional[str]
    issuer: Optional[str]  # None: the one that the provider names


class RsaKey(NamedTuple):
    """A public key of a provider."""

    kid: Optional[str]  # key ID
    algorithm: str  # "": any
    n: int  # modulus
    e: int  # exponent


RSA_ALGORITHMS = {  # RFC 7518 section 3.3: hash, DigestInfo prefix (RFC 8017 section 9.2, note 1)
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
    """Return True if `signature` is that of `key` over `signed`.

    The scheme is RSASSA-PKCS1-v1_5 (RFC 8017 section 8.2.2).
    """
    digest_name, prefix = RSA_ALGORITHMS[algorithm]
    size = (key.n.bit_length() + 7) // 8
    number = int.from_bytes(signature, "big")
    if len(signature) != size or number >= key.n:
        return False
    # Security: construct the expected block and compare it in full. Parsing the padding of the
    # received one let forged signatures for small exponents through (Bleichenbacher 2006).
    tail = b"\x00" + prefix + hashlib.new(digest_name, signed).digest()
    expected = b"\x00\x01" + b"\xff" * (size - len(tail) - 2) + tail
    return hmac.compare_digest(expected, pow(number, key.e, key.n).to_bytes(size, "big"))


def parse_rsa_keys(jwks: dict[str, Any]) -> list[RsaKey]:
    """Return the RSA keys of a JWK set (RFC 7517) that may verify and are safe to use.

    Raises:
        ValueError: it is not a JWK set.
    """
    if not isinstance(jwks.get("keys"), list):
        raise ValueError("expected a JWK set")
    keys = []
    for jwk in jwks["keys"]:
        if not isinstance(jwk, dict) or jwk.get("kty") != "RSA" or jwk.get("use", "sig") != "sig":
            continue
        operations = jwk.get("key_ops", ["verify"])  # section 4.3
        if not isinstance(operations, list) or "verify" not in operations:
            continue
        try:
            n = int.from_bytes(decode_base64url(str(jwk.get("n", ""))), "big")
            e = int.from_bytes(decode_base64url(str(jwk.get("e", ""))), "big")
        except ValueError:
            continue
        if MIN_RSA_BITS <= n.bit_length() <= MAX_RSA_BITS and n % 2 and e % 2 and 3 <= e < 2**64:
            keys.append(RsaKey(jwk.get("kid"), str(jwk.get("alg", "")), n, e))
    return keys


def verify_access_token(
    request: Request,
    oidc: Oidc,
    signing_keys: Callable[[Optional[str], str], tuple[str, Sequence[RsaKey]]],
    now: float,
) -> None:
    """Verify `Authorization: Bearer` with a JWT signed RS256, RS384 or RS512 (RFC 9068 section 4).

    `signing_keys(kid, algorithm)` returns the provider's issuer and its keys for such a token;
    `now` is in epoch seconds. A normal return proves that the provider issued the token, for us,
    and that it is valid now. It does not prove that its sender sent this delivery.

    Raises:
        Refusal: the token is missing, malformed, not signed by the provider, not for us or not
            valid now; and what `signing_keys` raises.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    parts = token.split(".")
    try:
        if scheme.lower() != "bearer" or len(parts) != 3 or "authorization" in request.repeated:
            raise ValueError
        header = parse_json_object(decode_base64url(parts[0]))
        claims = parse_json_object(decode_base64url(parts[1]))
        signature = decode_base64url(parts[2])
    except ValueError:
        raise Refusal("oidc", "authorization is missing, repeated or not a bearer JWT") from None
    # Security: the algorithm is one of ours, whatever the token says: "none" and HS256 with the
    # public key as secret are the classic forgeries (RFC 8725 section 3.1). Keys come from the
    # provider alone, never from the jku, x5u or jwk of the token.
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in RSA_ALGORITHMS:
        shown = describe_claim(algorithm)
        raise Refusal("oidc", f"the access token's alg is {shown}, expected RS256, RS384 or RS512")
    if "crit" in header or not isinstance(header.get("kid", ""), str):
        raise Refusal("oidc", "the access token has crit, or a kid that is not a string")
    kid = header.get("kid")
    issuer, keys = signing_keys(kid, algorithm)
    if not keys:
        shown = describe_claim(kid)
        raise Refusal("oidc", f"unknown kid: the provider has no {algorithm} key with kid {shown}")
    if len(keys) > MAX_KEYS_TRIED:
        raise Refusal(
            "oidc", f"{len(keys)} keys fit the access token, expected at most {MAX_KEYS_TRIED}"
        )
    signed = f"{parts[0]}.{parts[1]}".encode()
    if not any(is_rsa_signature(signed, signature, algorithm, key) for key in keys):
        raise Refusal("oidc", f"the access token's signature matches none of {len(keys)} keys")
    check_claims(claims, oidc, oidc.issuer or issuer, now)


def check_claims(claims: dict[str, Any], oidc: Oidc, issuer: str, now: float) -> None:
    """Check times, issuer, audience and client of a verified token (RFC 7519 section 4.1).

    Raises:
        Refusal: one of them is missing or not as expected.
    """
    for name, default in (("exp", None), ("nbf", now)):
        value = claims.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e12:
            raise Refusal("oidc", f"the access token's {name} is missing or not a time")
        seconds = now - value if name == "exp" else value - now
        if seconds > TOKEN_LEEWAY_SECONDS:
            raise Refusal("oidc", f"the access token's {name} is off by {seconds:.0f} s")
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    client_names = ("azp", "client_id", "appid", "cid")  # Keycloak, RFC 9068, Entra ID, Okta
    clients = [claims[name] for name in client_names if name in claims]
    rules = [
        ("iss (issuer)", claims.get("iss"), [claims.get("iss")], issuer),
        ("aud (audience)", audience, audiences, oidc.audience),
        ("client", clients, clients, oidc.client_id),
    ]
    for name, found, values, expected in rules:
        if expected is not None and expected not in values:
            shown = describe_claim(found)
            raise Refusal("oidc", f"the access token's {name} is {shown}, expected {expected!r}")


def describe_claim(value: Any) -> str:
    """Return a value of a token for the log: as JSON, which escapes it, and shortened."""
    return json.dumps(value)[:200]


class JwksClient:
    """The keys of an OIDC provider, fetched when they are needed and cached. Thread-safe."""

    def __init__(self, oidc: Oidc) -> None:
        self.oidc = oidc
        self.lock = threading.Lock()  # held by the thread that refreshes
        self.issuer = ""
        self.keys: Optional[list[RsaKey]] = None  # None: never obtained
        self.failure = "not asked yet"
        self.asked = float("-inf")  # monotonic seconds
        self.answered = float("-inf")

    def signing_keys(self, kid: Optional[str], algorithm: str) -> tuple[str, list[RsaKey]]:
        """Return the issuer, and the keys that a token with this kid and algorithm may have.

        Fetches them if none matches or they are old, but at most once in twice PROVIDER_SECONDS,
        failures included. Callers whose key is known do not wait for another thread's refresh.

        Raises:
            Refusal: the keys were never obtained.
        """
        if self.lock.acquire(blocking=not self._matching(kid, algorithm)):
            try:
                now = time.monotonic()
                is_old = now - self.answered > PROVIDER_KEYS_SECONDS
                is_allowed = now - self.asked >= 2 * PROVIDER_SECONDS
                if is_allowed and (is_old or not self._matching(kid, algorithm)):
                    self.asked = now
                    self._refresh()
            finally:
                self.lock.release()
        if self.keys is None:
            raise Refusal("provider", f"no keys of the OIDC provider: {self.failure}")
        return self.issuer, self._matching(kid, algorithm)

    def _matching(self, kid: Optional[str], algorithm: str) -> list[RsaKey]:
        """Return the known keys for a token with this kid (None: without one) and algorithm."""
        known = [key for key in self.keys or () if key.algorithm in ("", algorithm)]
        return [key for key in known if kid in (None, key.kid)]

    def _refresh(self) -> None:
        """Fetch the discovery document and the keys that it names; log a failure."""
        try:
            document = self._fetch(self.oidc.well_known_url)
            issuer = document.get("issuer")
            url = str(document.get("jwks_uri"))
            if not isinstance(issuer, str) or not is_provider_url(url):
                raise ValueError("the discovery document has no issuer, or no jwks_uri over https")
            self.keys = parse_rsa_keys(self._fetch(url))
            self.issuer = issuer
            self.answered = time.monotonic()
            log.info("%d OIDC keys of %s", len(self.keys), issuer)
        except (OSError, ValueError, RuntimeError, http.client.HTTPException) as error:
            self.failure = f"{self.oidc.well_known_url}: {error}"
            log.warning("no OIDC keys: %s", self.failure)

    def _fetch(self, url: str) -> dict[str, Any]:
        """Fetch a JSON object. Raises what `http_request` raises, and ValueError."""
        status, data = http_request("GET", url, {"Accept": JSON}, None, PROVIDER_SECONDS / 2)
        if status != 200 or len(data) > MAX_ANSWER_BYTES:
            limit = f"200 and at most {MAX_ANSWER_BYTES}"
            raise ValueError(f"status {status} and {len(data)} bytes, expected {limit}")
        return parse_json_object(data)


def http_request(
    method: str, url: str, headers: Mapping[str, str], body: Optional[bytes], seconds: float
) -> tuple[int, bytes]:
    """Send a request; return the status, and the body up to MAX_ANSWER_BYTES + 1.

    Returns within `seconds`. Redirects are not followed. Proxies are those of the environment
    (HTTPS_PROXY, NO_PROXY), but a loopback address is never reached through one.

    Raises:
        OSError, ValueError, http.client.HTTPException: there is no whole answer in time.
        RuntimeError: no thread can be started.
    """
    _, host = split_url(url)
    headers = {"User-Agent": f"{PROGRAM}/{VERSION}", **headers}
    request = urllib.request.Request(url, body, headers, method=method)
    opener = urllib.request.OpenerDirector()  # without the usual handlers of redirects and errors
    opener.add_handler(urllib.request.HTTPHandler())
    opener.add_handler(urllib.request.HTTPSHandler())
    opener.add_handler(urllib.request.UnknownHandler())
    if not is_loopback(host):
        opener.add_handler(urllib.request.ProxyHandler())
    deadline = time.monotonic() + seconds
    late = TimeoutError(f"no whole answer within {seconds:g} s")
    answers: list[Any] = []

    def run() -> None:
        try:
            with opener.open(request, timeout=seconds) as answer:
                data = piece = answer.read1(MAX_ANSWER_BYTES + 1)
                while piece and len(data) <= MAX_ANSWER_BYTES:
                    if time.monotonic() > deadline:
                        raise late
                    piece = answer.read1(MAX_ANSWER_BYTES + 1 - len(data))
                    data += piece
                answers.append((answer.status, data))
        except Exception as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            answers.append(reason if isinstance(reason, OSError) else error)

    # In a thread, since the look-up of a host has no timeout, and the timeout of a socket begins
    # anew with each byte: a server that drips its header would not end.
    thread = threading.Thread(target=run, name="http_request", daemon=True)
    thread.start()
    thread.join(seconds)
    result = answers[0] if answers else late
    if isinstance(result, Exception):
        raise result
    status, data = result
    return status, data


# ---- Replay protection ----------------------------------------------------------------------

_ISO_8601 = re.compile(
    r"([0-9]{4})-?([0-9]{2})-?([0-9]{2})[Tt ]"
    r"([01][0-9]|2[0-3]):?([0-5][0-9]):?([0-5][0-9]|60)"  # 60: a leap second
    r"(?:[.,]([0-9]{1,20}))? ?(?:[Zz]|([+-])([01][0-9]|2[0-3]):?([0-5][0-9])?)?(?: UTC)?"
)
_EPOCH = re.compile(r"[0-9]{9,11}(?:\.[0-9]{1,9})?|[0-9]{12,20}")


def parse_timestamp(text: str) -> Optional[float]:
    """Return the epoch seconds of the time that a sender signed, None if it is not understood.

    Central documents ISO 8601 with an offset. A fraction, `Z`, no offset (UTC), an HTTP-date, Go's
    `2016-07-12 13:14:19 +0000 UTC` and epoch s, ms, us and ns are understood too, since nobody has
    published what is on the wire.
    """
    if _EPOCH.fullmatch(text):
        digits = len(text.partition(".")[0])  # s have 9 to 11, ms 12 to 14, us 15 to 17, ns more
        return float(text) / 1000.0 ** ((digits - 9) // 3)
    match = _ISO_8601.fullmatch(text)
    if not match:
        return parse_http_date(text)
    year, month, day, hour, minute, second, fraction, sign, hours, minutes = match.groups("0")
    try:
        start = datetime(
            int(year), int(month), int(day), int(hour), int(minute), tzinfo=timezone.utc
        )
    except ValueError:
        return None
    offset = int(hours) * 3600 + int(minutes) * 60
    if sign == "-":
        offset = -offset
    return start.timestamp() + int(second) + float("0." + fraction) - offset


def parse_http_date(text: str) -> Optional[float]:
    """Return the epoch seconds of an HTTP-date (RFC 9110 section 5.6.7), None if it is not one."""
    try:
        moment = email.utils.parsedate_to_datetime(text)
        if not moment.tzinfo:
            moment = moment.replace(tzinfo=timezone.utc)
        return moment.timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


# Headers with the time that a sender signs, for the log.
SENT_AT_HEADERS = {"central": "x-central-delivery-timestamp", "new-central": "date"}


class Verified(NamedTuple):
    """What a verified signature says."""

    token_index: int  # position of the token that matched
    sent_at: Optional[float]  # the signed time in epoch seconds; None if it is not understood


def check_age(
    sent_at: Optional[float], signed_time: str, window_seconds: float, now: float
) -> None:
    """Check that a delivery was sent at most `window_seconds` ago; 0 switches the check off.

    `sent_at` and `now` are in epoch seconds; `signed_time` is what the sender wrote, for the log.

    Raises:
        Refusal: it is older, too far in the future, or its time is not understood.
    """
    if not window_seconds:
        return
    if sent_at is None:
        shown = signed_time[:80]
        advice = '"replay_window_hours": 0 accepts any time'
        raise Refusal("stale", f"its time {shown!r} is not understood; {advice}")
    age = now - sent_at
    if age > window_seconds:
        allowed = window_seconds / 3600
        raise Refusal(
            "stale", f"sent {age / 3600:.1f} hours ago, allowed are {allowed:g}; is a clock off?"
        )
    if age < -MAX_FUTURE_SECONDS:
        raise Refusal("stale", f"sent {-age / 60:.0f} minutes in the future; is a clock off?")


def short_digest(*parts: bytes) -> bytes:
    """Return 128 bits that identify the parts, joined with NUL, which no header can hold."""
    return hashlib.sha256(b"\0".join(parts)).digest()[:16]


DedupKeys = tuple[bytes, ...]  # each of them identifies a delivery; empty: nothing does


def dedup_keys(webhook_type: str, request: Request) -> DedupKeys:
    """Return the keys that identify an authentic delivery of a webhook."""
    if webhook_type in NO_DEDUP:
        return ()
    if webhook_type != "central":
        return (short_digest(request.body),)
    # Security: bytes can be moved between the signed headers, so the signature identifies the
    # delivery, not its ID. A retry that is signed anew has another signature, so its ID together
    # with the body identifies it as well.
    signature = request.headers["x-central-signature"].encode("latin-1")
    delivery_id = request.headers["x-central-delivery-id"].encode("latin-1")
    return short_digest(signature), short_digest(delivery_id, request.body)


class ReplayCache:
    """The deliveries that a webhook has accepted, so that none is accepted again.

    Thread-safe. A key is in at most one of `accepted` and `reserved`; `order` has the accepted
    deliveries, the oldest first, and forgets it beyond REMEMBERED_DELIVERIES.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.accepted: set[bytes] = set()
        self.order: collections.deque[DedupKeys] = collections.deque()
        self.reserved: set[bytes] = set()

    def reserve(self, keys: DedupKeys) -> bool:
        """Reserve the keys of a delivery that is about to be stored; False if it is a duplicate.

        Raises:
            Refusal: the same delivery is being stored at this moment.
        """
        with self.lock:
            if not self.accepted.isdisjoint(keys):
                return False
            if not self.reserved.isdisjoint(keys):
                raise Refusal("in_progress", "the same delivery is being stored at this moment")
            self.reserved.update(keys)
            return True

    def release(self, keys: DedupKeys) -> None:
        """Give up a reservation: the delivery was not stored."""
        with self.lock:
            self.reserved.difference_update(keys)

    def commit(self, keys: DedupKeys) -> None:
        """Remember a delivery that was stored."""
        with self.lock:
            self.reserved.difference_update(keys)
            if not keys or not self.accepted.isdisjoint(keys):
                return
            self.accepted.update(keys)
            self.order.append(keys)
            if len(self.order) > REMEMBERED_DELIVERIES:
                self.accepted.difference_update(self.order.popleft())

    def restore(self, keys: DedupKeys) -> bool:
        """Remember a delivery that was stored before all others; return False if it is full."""
        with self.lock:
            if self.accepted.isdisjoint(keys):
                self.accepted.update(keys)
                self.order.appendleft(keys)
            return len(self.order) < REMEMBERED_DELIVERIES


_LOG_LINE = re.compile(
    rb'\{"received_at": "([^"]*)", "webhook": ("(?:[^"\\]|\\.)*"), .*"key": "([0-9a-f.]+)"\}\r?'
)


def lines_from_end(path: str) -> Iterator[bytes]:
    """Yield the lines of a file, the last one first, without their line feeds.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = len(data)
            while end >= 0:
                start = data.rfind(b"\n", 0, end) + 1
                yield data[start:end]
                end = start - 1


def restore_replay_caches(
    path: str, caches: Mapping[str, ReplayCache], window_seconds: float, now: float
) -> None:
    """Restore replay caches, by name of their webhook, from the end of a log.

    Reads until all of them are full, or (unless `window_seconds` is 0) the lines are older than
    any delivery that would be accepted.

    Raises:
        OutputError: the log exists and cannot be read.
    """
    wanted = {json.dumps(name).encode(): cache for name, cache in caches.items()}
    oldest = b""
    if window_seconds:
        oldest = format_utc(now - window_seconds - MAX_FUTURE_SECONDS).encode()
    is_empty = True
    try:
        for line in lines_from_end(path) if wanted else ():
            is_empty = is_empty and not line
            match = _LOG_LINE.fullmatch(line)
            if not match:
                continue
            received_at, name, key = match.groups()
            if received_at < oldest:
                break
            if name in wanted:
                with contextlib.suppress(ValueError):
                    keys = tuple(bytes.fromhex(part) for part in key.decode().split("."))
                    if not wanted[name].restore(keys):
                        del wanted[name]
            if not wanted:
                break
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from None
    count = sum(len(cache.order) for cache in caches.values())
    if count or is_empty:
        log.info("%d deliveries remembered from %s", count, path)
    else:
        log.warning(
            "nothing remembered from %s, although it is not empty: duplicates of what it holds "
            "will be accepted (was a webhook renamed, or is it the log of another program?)",
            path,
        )


# ---- Output ---------------------------------------------------------------------------------


def format_utc(moment: float) -> str:
    """Write epoch seconds as ISO 8601 in UTC with milliseconds."""
    milliseconds = int(moment * 1000)
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{start}.{milliseconds % 1000:03}Z"


def render_json(delivery: Delivery) -> str:
    """Render a delivery for stdout as one line of ASCII: a JSON object and a line feed."""
    fields = {
        "received_at": format_utc(delivery.received_at),
        "webhook": delivery.webhook,
        "type": delivery.type,
        "delivery_id": delivery.delivery_id,
        "sent_at": delivery.sent_at,
    }
    body = {}
    if delivery.text is None:
        try:
            body = {"body": delivery.body.decode()}
        except UnicodeDecodeError:
            body = {"body_base64": base64.b64encode(delivery.body).decode()}
    # The alert is not serialized: its numbers, order and spelling stay as they were sent.
    alert = "null" if delivery.text is None else to_ascii_line(delivery.text)
    rest = f", {json.dumps(body)[1:-1]}" if body else ""
    line = f'{json.dumps(fields)[:-1]}, "alert": {alert}{rest}}}\n'
    return line.replace("\x7f", "\\u007f")


def render_log_line(line: str, key: Optional[str]) -> str:
    """Render a delivery for `log_file`: the line of `render_json` with the key at its end."""
    return f'{line[:-2]}, "key": {json.dumps(key)}}}\n'


_COLOURS = {
    "critical": "1;31",
    "major": "31",
    "minor": "33",
    "warning": "33",
    "info": "36",
    "close": "32",
    "closed": "32",
    "cleared": "32",
}


def render_pretty(delivery: Delivery, colour: bool) -> str:
    """Render a delivery for a person: a header line, then the alert, indented by 2."""
    payload = delivery.payload
    alert = summarize(payload)
    fields = [  # text, width, colour
        (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(delivery.received_at)), 0, "2"),
        (delivery.webhook, 0, "1"),
        (alert.severity.upper() or "-", 8, _COLOURS.get(alert.severity.lower(), "")),
        (alert.state or "-", 7, _COLOURS.get(alert.state.lower(), "")),
        (alert.name or "(no name)", 24, "1"),
        (f"{alert.place} {alert.description}".strip(), 0, ""),
    ]
    header = []
    for text, width, code in fields:
        text = escape_text(text).ljust(width)
        header.append(f"\x1b[{code}m{text}\x1b[0m" if colour and code else text)
    if delivery.text is None:
        shown = delivery.body.decode(errors="backslashreplace")
    else:
        try:
            shown = json.dumps(parse_json(delivery.text)[0], indent=2, ensure_ascii=False)
        except (ValueError, RecursionError):  # nested too deeply
            shown = delivery.text
    body = "\n".join(escape_text(line) for line in shown.split("\n"))
    return f"{'  '.join(header).rstrip()}\n{textwrap.indent(body, '  ')}\n"


class Entry:
    """A delivery on its way to stdout and the log."""

    def __init__(self, delivery: Delivery, keys: DedupKeys, shown: str, line: str) -> None:
        self.delivery = delivery
        self.keys = keys
        self.shown = shown.encode()  # for stdout
        self.log_line = render_log_line(line, delivery.key).encode()
        self.is_done = False
        self.error = ""  # why it was not stored


class LogFile:
    """The log of accepted deliveries. It is append-only: it never shrinks, no byte changes.

    If it ends with a half line, that of a failed write or of a power loss, the next write begins
    with `line_end`, so that readers see the half line as a line of its own, which is not JSON.
    """

    def __init__(self, path: str) -> None:
        """Open the file, for this process alone, and create it if it does not exist.

        Raises:
            OutputError: it cannot be opened, is not a regular file, or is in use.
        """
        self.path = path
        self.descriptor = -1
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        try:
            self.descriptor = os.open(path, flags, 0o640)
            status = os.fstat(self.descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if sys.platform != "win32":
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.line_end = b""
            if status.st_size:
                os.lseek(self.descriptor, -1, os.SEEK_END)
                self.line_end = b"" if os.read(self.descriptor, 1) == b"\n" else b"\n"
                os.fsync(self.descriptor)  # what is there will be answered with 200 as a duplicate
        except OSError as error:
            self.close()
            in_use = isinstance(error, BlockingIOError)
            reason = "another receiver writes to it" if in_use else error.strerror
            raise OutputError(f"{path}: {reason}") from None
        self.sync_folder()
        if self.line_end:
            log.warning("%s: ends with a half line, which the next write ends", path)

    def sync_folder(self) -> None:
        """Sync the folder: the name of a new file must survive a power loss too."""
        with contextlib.suppress(OSError):  # CIFS and FUSE cannot, Windows neither
            folder = os.open(os.path.dirname(self.path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def close(self) -> None:
        """Close the file, if it is open."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def has_lost_name(self) -> bool:
        """Return True if the file was moved, deleted or replaced since it was opened."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except FileNotFoundError:
            return True

    def append(self, lines: Sequence[bytes]) -> tuple[int, str]:
        """Append lines, synced; return how many are stored, and why the others are not ("")."""
        data = self.line_end + b"".join(lines)
        written = 0
        failure = ""
        try:
            while written < len(data):
                written += os.write(self.descriptor, data[written:])
        except OSError as error:
            failure = f"{self.path}: {error.strerror}"
        if not written:
            return 0, failure
        left = written - len(self.line_end)
        self.line_end = b"" if data[written - 1 : written] == b"\n" else b"\n"
        stored = 0
        for line in lines:
            if left == len(line) - 1:  # it lacks only its line feed, and must not become JSON
                self.line_end = b"#\n"
            left -= len(line)
            stored += left >= 0
        try:
            getattr(os, "fdatasync", os.fsync)(
                self.descriptor
            )  # macOS and Windows have no fdatasync
        except OSError as error:
            return 0, f"{self.path}: {error.strerror}"
        return stored, failure


class Output:
    """stdout and the log: what is accepted is written to both before it is answered.

    Many threads write. Each adds its entry to the pending ones and takes the lock; the one that
    gets it writes all that are pending, with one sync (group commit), and the others find theirs
    done. `settle` is called with each entry in the order of the log, while the lock is held.
    """

    def __init__(
        self, log_file: Optional[str], write_timeout: float, render: Callable[[Delivery], str]
    ) -> None:
        """Open the log. `write_timeout` is in seconds; `render` is for stdout.

        Raises:
            OutputError: stdout is closed, or the log cannot be opened.
        """
        self.write_timeout = write_timeout
        self.render = render
        self.settle: Callable[[Entry], None] = lambda entry: None
        self.lock = threading.Lock()
        self.pending: collections.deque[Entry] = collections.deque()
        self.error = ""  # why the last write failed
        self.started: Optional[float] = None  # monotonic seconds, while a write is under way
        self.stdout_closed = threading.Event()
        try:
            is_file = stat.S_ISREG(os.fstat(STDOUT).st_mode)
        except OSError as error:
            raise OutputError(f"stdout: {error.strerror}") from None
        self.poll = select.poll() if hasattr(select, "poll") and not is_file else None
        if self.poll:
            self.poll.register(STDOUT, select.POLLOUT)
        self.stdout_mid_line = False
        self.log_file = LogFile(log_file) if log_file else None

    def is_failing(self) -> bool:
        """Return True if the last write failed, or the present one takes too long."""
        started = self.started  # another thread may set it to None
        is_late = started is not None and time.monotonic() - started > self.write_timeout
        return bool(self.error) or is_late

    def write(self, delivery: Delivery, keys: DedupKeys) -> None:
        """Write a delivery to stdout, and then to the log, there on disk.

        Raises:
            OutputError: it is not stored. If a write hangs, it may be stored later.
        """
        deadline = time.monotonic() + self.write_timeout
        line = render_json(delivery)
        shown = line if self.render is render_json else self.render(delivery)
        entry = Entry(delivery, keys, shown, line)
        self.pending.append(entry)
        if not self.lock.acquire(timeout=self.write_timeout):
            with contextlib.suppress(ValueError):  # it is being written: its writer settles it
                self.pending.remove(entry)
                entry.error = "not written"
                self.settle(entry)
            raise OutputError(f"not written within {self.write_timeout:g} s")
        try:
            if not entry.is_done:
                self.write_pending(deadline)
        finally:
            self.lock.release()
        if entry.error:
            raise OutputError(entry.error)

    def write_pending(self, deadline: float) -> None:
        """Write all pending entries; called with the lock held."""
        batch = []
        with contextlib.suppress(IndexError):
            while True:
                batch.append(self.pending.popleft())
        self.started = time.monotonic()
        stored = 0
        failure = ""
        try:
            self.write_stdout(b"".join([entry.shown for entry in batch]), deadline)
            stored = len(batch)
            if self.log_file:
                self.reopen_log(self.log_file.path)
                stored, failure = self.log_file.append([entry.log_line for entry in batch])
        except Exception as error:
            stored = 0
            failure = str(error) if isinstance(error, OutputError) else repr(error)
        for number, entry in enumerate(batch):
            entry.error = "" if number < stored else failure
            entry.is_done = True
            self.settle(entry)
        if failure != self.error:
            if failure:
                log.error("output: %s", failure)
            else:
                log.info("output: works again")
        self.error = failure
        self.started = None

    def write_stdout(self, data: bytes, deadline: float) -> None:
        """Write to stdout; a half line that a stalled reader has taken is ended first.

        Raises:
            OutputError: its reader did not take all until `deadline` (monotonic seconds), or is gone.
        """
        # Once poll says that it is ready, a pipe takes PIPE_BUF bytes without blocking, and a
        # terminal one.
        size = len(data) + 1
        if self.poll:
            size = 1 if os.isatty(STDOUT) else select.PIPE_BUF
        left = memoryview(b"\n" + data if self.stdout_mid_line else data)
        try:
            while left:
                wait_ms = max(0, int(1000 * (deadline - time.monotonic())))
                if self.poll and not self.poll.poll(wait_ms):
                    raise OutputError(
                        f"stdout: its reader did not take all within {self.write_timeout:g} s"
                    )
                try:
                    written = os.write(STDOUT, left[:size])
                except BlockingIOError:  # shared with a program that made it non-blocking
                    time.sleep(0.01)
                    continue
                self.stdout_mid_line = left[written - 1] != ord("\n")
                left = left[written:]
        except OSError as error:
            gone = (errno.EPIPE, errno.EIO, errno.ECONNRESET) if self.poll else (errno.EPIPE,)
            if error.errno in gone:
                self.stdout_closed.set()
            raise OutputError(f"stdout: {error.strerror}") from None

    def reopen_log(self, path: Optional[str]) -> None:
        """Open the log at `path` if that is not the file that is open; called with the lock held.

        Raises:
            OutputError: it cannot be opened; the old one stays open.
        """
        if self.log_file and self.log_file.path == path and not self.log_file.has_lost_name():
            return
        if self.log_file and self.log_file.path == path:
            log.info("%s: moved, deleted or replaced, so it is opened again", path)
        new = LogFile(path) if path else None
        if self.log_file:
            self.log_file.close()
        self.log_file = new

    def reload(self, log_file: Optional[str], write_timeout: float) -> None:
        """Go on with another log and time-out, between two writes.

        Raises:
            OutputError: the log cannot be opened, or a write hangs; everything stays as it was.
        """
        if not self.lock.acquire(timeout=self.write_timeout):
            raise OutputError("the output is stuck")
        try:
            self.reopen_log(log_file)
            self.write_timeout = write_timeout
        finally:
            self.lock.release()


class AlertWorker:
    """Calls `handle_alert` with one delivery after the other, in a thread of its own."""

    def __init__(self, function: Callable[[Delivery], None]) -> None:
        self.function = function
        self.queue: queue.Queue[Delivery] = queue.Queue(MAX_WAITING_ALERTS)
        threading.Thread(target=self.run, name="handle_alert", daemon=True).start()

    def put(self, delivery: Delivery) -> None:
        """Add a delivery; if too many wait, pass it over and log an ERROR."""
        try:
            self.queue.put_nowait(delivery)
        except queue.Full:
            log.error("handle_alert: %d alerts wait, so one is passed over", MAX_WAITING_ALERTS)

    def run(self) -> None:
        """Call the function for ever; what it raises is logged."""
        while True:
            delivery = self.queue.get()
            try:
                self.function(delivery)
            except BaseException as error:  # SystemExit too concerns this one delivery
                log.error("handle_alert: %s: %s", type(error).__name__, error, exc_info=True)
            self.queue.task_done()

    def drain(self, seconds: float) -> None:
        """Wait until all deliveries are handled, at most `seconds`."""
        if not wait_until(lambda: not self.queue.unfinished_tasks, seconds):
            log.error("handle_alert: %d alerts were not handled", self.queue.unfinished_tasks)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition is true, at most `seconds`; return what it is then."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


class LineFormatter(logging.Formatter):
    """Time, level and message on one line, whatever a sender has written into it."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; a traceback follows on further lines if the logger is verbose."""
        message = escape_text(record.getMessage())
        line = f"{format_utc(record.created)} {record.levelname} {message}"
        if record.exc_info and log.isEnabledFor(logging.DEBUG):
            # Indented, so that no line of it can pass for a line of the log.
            for text in self.formatException(record.exc_info).split("\n"):
                line += "\n    " + escape_text(text)
        return line


class StderrHandler(logging.Handler):
    """Writes finished lines to stderr, only ever from the thread of a QueueListener.

    It takes no lock and writes past the buffer of sys.stderr, since the interpreter waits for both
    at exit, and a stalled reader of stderr must not stop the exit.
    """

    def handle(self, record: logging.LogRecord) -> bool:
        """Write a record."""
        print_error(record.getMessage())
        return True


def print_error(text: str) -> None:
    """Write a line to stderr. Ignore errors: a closed stderr must not stop the receiver."""
    data = (text + "\n").encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        while sys.stderr and data:
            data = data[os.write(STDERR, data) :]


LOG_QUEUE: queue.Queue[Any] = queue.Queue(1000)  # a stalled stderr loses lines, not deliveries


def start_logging(is_verbose: bool) -> None:
    """Send what `log` gets to stderr, through a queue: a stalled reader must not block requests."""
    logging.raiseExceptions = False  # a full queue is not reported
    handler = logging.handlers.QueueHandler(LOG_QUEUE)
    handler.setFormatter(LineFormatter())
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if is_verbose else logging.INFO)
    logging.handlers.QueueListener(LOG_QUEUE, StderrHandler()).start()


def flush_log() -> None:
    """Wait until everything is logged, for a second at most."""
    wait_until(lambda: not LOG_QUEUE.unfinished_tasks, 1)


class RateLimit:
    """Allows REJECTION_LINES_PER_SECOND events a second, and counts the others. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.second = 0
        self.count = 0

    def allows(self) -> bool:
        """Count one more event; return True if it is within the limit."""
        with self.lock:
            self.count += 1
            return self.count <= REJECTION_LINES_PER_SECOND

    def start_second(self) -> int:
        """Return how many events of a second that is over were beyond the limit."""
        with self.lock:
            second = int(time.monotonic())
            if second == self.second:
                return 0
            beyond = max(0, self.count - REJECTION_LINES_PER_SECOND)
            self.second = second
            self.count = 0
            return beyond


# ---- Configuration ----------------------------------------------------------


@dataclass(frozen=True)
class Webhook:
    """One configured sender, and what is remembered of it."""

    name: str
    type: str
    path: Optional[str]  # None: any
    tokens: tuple[str, ...]
    replay_window_seconds: float
    public_url: Optional[PublicUrl]
    api_key: Optional[ApiKey]
    oidc: Optional[Oidc]


@dataclass(frozen=True)
class Config:
    """A whole, valid configuration."""

    host: str
    port: int
    log_file: Optional[str]
    max_body_bytes: int
    request_timeout_seconds: float
    max_connections: int
    trusted_proxies: tuple[Network, ...]
    webhooks: tuple[Webhook, ...]


Network = Any


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
        and value not in RESERVED_PATHS
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
    "path": Key("a path that begins with /, no query, not " + " or ".join(RESERVED_PATHS), is_path),
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
        lambda value: isinstance(value, str) and bool(re.compile(_NAME).fullmatch(value)),
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
            log.warning(f"{path}: holds a secret, but group or others can read it (chmod 600)")

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
        return ApiKey(str(keys["header"] or "").lower(), keys["field"] or "", values)

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
            provider = Oidc(**self.section(given["oidc"], f"{where}.oidc", OIDC_KEYS))
            if not (provider.audience or provider.client_id):
                mistakes.append(
                    f"{where}.oidc: expected audience or client_id or both, found neither"
                )
        scheme = HEADER_SIGNATURES.get(kind)
        demanded = [scheme.header] if scheme else ["signature", "signature-input"]
        if kind == "central":
            names = ("signature", "service", "delivery-id", "delivery-timestamp")
            demanded = [f"x-central-{name}" for name in names]
        demanded += ["authorization"] if provider else []
        demanded += [api_key.header] if api_key and api_key.header else []
        for header in find_repeated(demanded):
            mistakes.append(f"{where}: two demands on the header {header}, which can hold only one")
        window = (
            (read["replay_window_hours"] or 0) * 3600 if kind in ("central", "new-central") else 0
        )
        path = read["path"] or (url.path if url else None)
        if path in RESERVED_PATHS:
            mistakes.append(
                f"{where}.path: expected with this public_url, since {path} is the receiver's own"
            )
        return Webhook(read["name"] or kind, kind, path, tokens, window, url, api_key, provider)


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
        parsed, twice = parse_json(text.decode("utf-8-sig"))
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
    for name in find_repeated(webhook.name for webhook in webhooks if webhook.name):
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
    proxies = tuple(ipaddress.ip_network(n) for n in ("127.0.0.0/8", "::1"))
    return Config(**web, trusted_proxies=proxies, webhooks=tuple(webhooks))


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
    header = "signature, signature-input"
    signed = "method, URL and time"
    if scheme:
        header = scheme.header
        signed = "body"
    elif webhook.type == "central":
        header = "x-central-signature"
        signed = "body + x-central-service + x-central-delivery-id + x-central-delivery-timestamp"
    demands = [f"{header} (HMAC-SHA256 over {signed})"]
    if webhook.api_key:
        api_key = webhook.api_key
        place = f"header {api_key.header}" if api_key.header else f"field {api_key.field}"
        demands.append(f"API key in {place}")
    if webhook.oidc:
        demands.append(f"OIDC access token by {webhook.oidc.well_known_url}")
    hours = webhook.replay_window_seconds / 3600
    parts = [
        f"{webhook.name}: {webhook.type} at {webhook.path or 'any path'}: {', '.join(demands)}",
        f"tokens: {len(webhook.tokens)}",
        f"at most {hours:g} h old" if hours else "of any age",
        "BODY NOT PROTECTED, unless the sender covers content-digest"
        if webhook.public_url
        else "body protected",
        "duplicates are not detected" if webhook.type in NO_DEDUP else "duplicates are detected",
    ]
    return "; ".join(parts)


# ---- Checking a delivery --------------------------------------------------------------------


class ActiveWebhook:
    """A configured webhook, and what the server keeps for it."""

    def __init__(self, config: Webhook) -> None:
        self.config = config
        self.replay_cache = ReplayCache()
        self.jwks_client = JwksClient(config.oidc) if config.oidc else None
        self.former_tokens: tuple[str, ...] = ()  # removed by reloads: for a hint in the log only
        self.old_tokens_logged: dict[int, float] = {}  # by token index; monotonic seconds


def check_signature(webhook: Webhook, request: Request, now: float) -> Verified:
    """Check the signature of a request against the tokens of a webhook.

    Raises:
        SignatureError: no token matches; then why the last one does not.
    """
    if webhook.public_url:
        return verify_message_signature(request, webhook.tokens, webhook.public_url, now)
    if webhook.type == "central":
        for name in request.repeated:
            if name.startswith("x-central-"):
                raise SignatureError(f"{name} is repeated")
    failure = SignatureError("no token is configured")
    for index, token in enumerate(webhook.tokens):
        try:
            if webhook.type == "central":
                verify_signature(request.body, request.headers, token)
                signed_time = request.headers["x-central-delivery-timestamp"]
                return Verified(index, parse_timestamp(signed_time))
            verify_header_signature(request, HEADER_SIGNATURES[webhook.type], token)
            return Verified(index, None)
        except SignatureError as error:
            failure = error
    raise failure


def check_webhook(webhook: ActiveWebhook, request: Request, now: float) -> Verified:
    """Check everything that a webhook demands of its sender: signature, API key, access token.

    Raises:
        Refusal: a check fails.
    """
    config = webhook.config
    try:
        verified = check_signature(config, request, now)
    except SignatureError as error:
        raise Refusal("signature", str(error), config.name) from None
    try:
        if config.api_key:
            check_api_key(request, config.api_key)
        if webhook.jwks_client:
            jwks_client = webhook.jwks_client
            verify_access_token(request, jwks_client.oidc, jwks_client.signing_keys, now)
    except Refusal as refusal:
        refusal.webhook = config.name
        raise
    return verified


def check_webhooks(
    webhooks: Sequence[ActiveWebhook], request: Request, now: float
) -> tuple[ActiveWebhook, Verified]:
    """Return the first webhook whose checks all pass, and what its signature says.

    Raises:
        Refusal: that of the webhook that passed the most checks.
    """
    refusals = []
    for webhook in webhooks:
        try:
            return webhook, check_webhook(webhook, request, now)
        except Refusal as refusal:
            refusals.append(refusal)
    order = ("signature", "api_key", "oidc", "provider")
    raise max(refusals, key=lambda refusal: order.index(refusal.reason))


def make_delivery(
    webhook: Webhook, request: Request, verified: Verified, keys: DedupKeys, now: float
) -> Delivery:
    """Return the delivery of an authentic request; an API key in its body is masked."""
    text = json_text(request.body)
    if text is not None and webhook.api_key and webhook.api_key.field:
        payload, _ = parse_json(text)
        payload[webhook.api_key.field] = "***"
        text = json.dumps(payload)
    delivery_id = None
    sent_at = None
    if webhook.type == "central":
        delivery_id = request.headers["x-central-delivery-id"]
        sent_at = request.headers["x-central-delivery-timestamp"]
    elif verified.sent_at is not None and abs(verified.sent_at) < 1e11:
        sent_at = format_utc(verified.sent_at)
    key = ".".join([key.hex() for key in keys]) or None
    return Delivery(now, webhook.name, webhook.type, delivery_id, sent_at, request.body, text, key)


def diagnose(request: Request, webhooks: Sequence[ActiveWebhook], now: float) -> str:
    """Return a hint why a signature was not accepted, for the log; "" without one.

    It names no secret, and costs a few signatures for each webhook.
    """
    is_classic = "x-central-signature" in request.headers
    is_new = "signature-input" in request.headers
    for webhook in webhooks:
        config = webhook.config
        if is_new and not is_classic and config.type == "central":
            return 'looks like new Central, which needs "type": "new-central"'
        if is_classic and not is_new and config.type == "new-central":
            return 'looks like classic Central, which needs "type": "central"'
        with contextlib.suppress(SignatureError):
            former = replace(config, tokens=webhook.former_tokens)
            check_signature(former, request, now)
            return "an older token would match, which a reload has removed"
        if config.public_url:
            hint = diagnose_message_signature(request, config.tokens, config.public_url, now)
            if hint:
                return hint
        if config.type == "central" and is_classic:
            scheme = HeaderSignature("x-central-signature", "", base64.b64encode)
            for token in config.tokens:
                with contextlib.suppress(SignatureError):
                    verify_header_signature(request, scheme, token)
                    return "the body alone would match: a proxy dropped the X-Central headers"
            names = ("service", "delivery-id", "delivery-timestamp")
            if not all(request.headers.get(f"x-central-{name}") for name in names):
                return "does a proxy drop these headers?"
    return "wrong token, or something was changed on the way" if is_classic or is_new else ""


# ---- HTTP parsing ---------------------------------------------------------------------------

_NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # a token of RFC 9110 section 5.6.2
_REQUEST_LINE = re.compile(rf"({_NAME}) ([!-~]+) HTTP/([0-9]\.[0-9])\r\n".encode())
_FIELD = re.compile(rf"^({_NAME}):([\t -~\x80-\xff]*)\r\n", re.MULTILINE)
_HOST = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z\-._~!$&'()*+,;=%]*)(?::[0-9]*)?"  # RFC 9110 section 7.2
)
_ABSOLUTE_FORM = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://([^/?#]+)/?((?<=/).*|\?.*)?")
_CHUNK_EXTENSION = (
    rf'[ \t]*;[ \t]*{_NAME}(?:[ \t]*=[ \t]*(?:{_NAME}|"(?:[\t !#-\[\]-~]|\\[\t -~])*"))?'
)
_CHUNK_LINE = re.compile(rf"([0-9A-Fa-f]{{1,16}})(?:{_CHUNK_EXTENSION})*\r\n".encode())


def parse_request_line(line: bytes) -> tuple[str, str, Optional[str], str]:
    """Return method, path, query and version of a request line (RFC 9112 section 3).

    Raises:
        Refusal: malformed, version.
    """
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise Refusal("malformed", diagnose_request_line(line))
    method, target, version = match[1].decode(), match[2].decode(), match[3].decode()
    if version not in ("1.0", "1.1"):
        raise Refusal("version", f"HTTP/{version}, expected HTTP/1.0 or HTTP/1.1")
    if not target.startswith("/"):  # section 3.2.2: the absolute form must be accepted
        absolute = _ABSOLUTE_FORM.fullmatch(target)
        if not absolute or not _HOST.fullmatch(absolute[1]):
            raise Refusal("malformed", "the target is neither a path nor an absolute URL")
        target = "/" + (absolute[2] or "")
    if "#" in target:
        raise Refusal("malformed", "the target has a fragment (#)")
    path, mark, query = target.partition("?")
    return method, path, query if mark else None, f"HTTP/{version}"


def diagnose_request_line(line: bytes) -> str:
    """Say what a malformed request line seems to be."""
    if line.startswith(b"\x16\x03"):
        return "this is TLS, on a port for plain HTTP: use http://, or put the proxy in front"
    if line.startswith((b"PROXY ", b"\0\r\nQUIT\n")):
        return "this is the PROXY protocol: switch it off at the proxy"
    return "the request line is malformed"


def parse_fields(fields: bytes) -> tuple[dict[str, str], frozenset[str]]:
    """Parse header fields, each ended with CRLF, into values by lower-case name.

    Also return the names that are repeated; their values are joined with ", ".

    Raises:
        Refusal: malformed, headers_too_large.
    """
    text = fields.decode("latin-1")
    found = _FIELD.findall(text)
    # Security: nothing but text and whole line ends. Bare CR or LF, NUL, folded lines and white
    # space before the colon are read differently by different programs: that is how requests are
    # smuggled past a proxy.
    if len(found) != text.count("\n"):
        raise Refusal(
            "malformed",
            "a header field is malformed: its name, a control character, or a line without CRLF",
        )
    if len(found) > MAX_HEADER_FIELDS:
        raise Refusal("headers_too_large", f"more than {MAX_HEADER_FIELDS} header fields")
    lines = [(name.lower(), value.strip(" \t")) for name, value in found]
    values = dict(lines)
    repeated = find_repeated(name for name, _ in lines) if len(values) < len(lines) else []
    for name in repeated:
        values[name] = ", ".join(value for other, value in lines if other == name)
    return values, frozenset(repeated)


def parse_body_length(request: Request, max_body_bytes: int) -> Optional[int]:
    """Return the length of the body in bytes, None if it is chunked (RFC 9112 section 6).

    Raises:
        Refusal: malformed, coding, no_length, body_too_large.
    """
    length = request.headers.get("content-length")
    coding = request.headers.get("transfer-encoding")
    if coding is not None:
        codings = {part.strip().lower() for part in coding.split(",")}
        is_repeated = codings <= {"chunked", ""} and coding.lower() != "chunked"
        if length is not None or request.version == "HTTP/1.0" or is_repeated:
            raise Refusal(
                "malformed", "Transfer-Encoding repeated, with Content-Length, or in HTTP/1.0"
            )
        if codings != {"chunked"}:
            raise Refusal("coding", f"Transfer-Encoding is {coding[:40]!r}, expected chunked")
        return None
    if length is None:
        if request.method == "POST":
            raise Refusal("no_length", "neither Content-Length nor Transfer-Encoding")
        return 0
    # Security: ASCII digits alone. int() also takes "+10", "1_0" and the digits of other scripts,
    # where a proxy may see another length.
    if not (length.isascii() and length.isdigit()):
        raise Refusal("malformed", "Content-Length is not one number")
    size = int(length.lstrip("0")[:20] or "0")  # Python refuses very long numbers
    if size > max_body_bytes:
        raise Refusal("body_too_large", f"Content-Length is above max_body_bytes, {max_body_bytes}")
    return size


# ---- HTTP server ----------------------------------------------------------------------------


class DeadlineReader(io.RawIOBase):
    """The receiving half of a connection: each read gets the time that is left to a deadline."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        """`deadline` is in monotonic seconds, and may be changed at any time."""
        super().__init__()
        self.connection = connection
        self.deadline = deadline

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive what has arrived, or wait for it.

        Raises:
            Refusal: timeout. The clock decides, so that a sender that drips cannot win.
        """
        left = self.deadline - time.monotonic()
        try:
            if left > 0:
                self.connection.settimeout(left)
                return self.connection.recv_into(buffer)
        except socket.timeout:
            pass
        raise Refusal("timeout", "the request was not complete in time")


class WebhookHandler(BaseHTTPRequestHandler):
    """One connection: reads requests strictly and answers them, one after the other.

    Overridden of the base: `handle_one_request` and `parse_request`, since the base parses
    leniently and with the email package; `setup`, for a deadline over a whole request.
    """

    server: WebhookServer
    rfile: io.BufferedReader

    def setup(self) -> None:
        """Read through a DeadlineReader. The first request is timed from the connection's start."""
        super().setup()
        deadline = time.monotonic() + self.server.config.request_timeout_seconds
        self.reader = DeadlineReader(self.connection, deadline)
        self.rfile = io.BufferedReader(self.reader, 16 * 1024)
        self.is_first = True

    def handle_one_request(self) -> None:
        """Read one request, call `do_POST`, `do_GET` or `do_HEAD`, or refuse it."""
        self.parsed = EMPTY_REQUEST
        self.webhooks: Sequence[ActiveWebhook] = ()
        try:
            self.wait_for_request()
            if self.close_connection:
                return
            self.parse_request()
            self.webhooks = self.server.route(self.parsed)
            self.read_body()
            getattr(self, f"do_{self.parsed.method}")()
        except Refusal as refusal:
            self.refuse(refusal)
        except OSError:  # the sender is gone, or does not read its answer
            self.close_connection = True
        finally:
            self.server.idle.add(self.connection)

    def wait_for_request(self) -> None:
        """Wait for the first byte of a request; set `close_connection` if none comes.

        An empty line before it is passed over (RFC 9112 section 2.2).
        """
        self.close_connection = False
        try:
            start = self.rfile.peek(1)[:1]
            while start == b"\r":
                if self.rfile.read(2) != b"\r\n":
                    raise Refusal("malformed", "a carriage return before the request")
                start = self.rfile.peek(1)[:1]
        except Refusal as refusal:
            if refusal.reason != "timeout" or self.is_first:
                raise
            start = b""
        if not start:
            self.close_connection = True
            return
        self.server.idle.discard(self.connection)
        if not self.is_first:
            timeout = self.server.config.request_timeout_seconds
            self.reader.deadline = time.monotonic() + timeout
        self.is_first = False

    def read_line(self, limit: int, reason: str) -> bytes:
        """Read a line with its CRLF.

        Raises:
            Refusal: `reason` if it is longer than `limit` bytes; malformed, timeout.
        """
        line = self.rfile.readline(limit + 2)
        if line.endswith(b"\r\n"):
            return line
        if line.startswith((b"\x16\x03", b"\0\r\nQUIT")):
            raise Refusal("malformed", diagnose_request_line(line))
        if line.endswith(b"\n"):
            raise Refusal("malformed", "a line ends without CR")
        if len(line) == limit + 2:
            raise Refusal(reason, f"a line is above {limit} bytes")
        raise Refusal("malformed", "the connection ended within the request")

    def parse_request(self) -> bool:
        """Read and parse the request line and the header (RFC 9112).

        Raises:
            Refusal: malformed, version, target_too_long, headers_too_large, timeout.
        """
        if self.rfile.peek(1)[:1] in (b"\x16", b"\0"):  # neither will end its line
            raise Refusal("malformed", diagnose_request_line(self.rfile.peek(7)))
        line = self.read_line(MAX_REQUEST_LINE_BYTES, "target_too_long")
        method, path, query, version = parse_request_line(line)
        self.command = method
        self.path = path
        self.request_version = version
        fields = bytearray()
        while True:
            left = MAX_HEADER_BYTES - len(fields)
            line = self.read_line(max(left, 0), "headers_too_large")
            if line == b"\r\n":
                break
            fields += line
        headers, repeated = parse_fields(bytes(fields))
        self.headers = headers  # type: ignore[assignment]  # by lower-case name
        self.parsed = Request(method, path, query, version, headers, repeated)
        host = headers.get("host")
        is_missing = host is None and version == "HTTP/1.1"
        if is_missing or "host" in repeated or not _HOST.fullmatch(host or ""):
            raise Refusal("malformed", "Host is missing, malformed or repeated")
        self.body_length = parse_body_length(self.parsed, self.server.config.max_body_bytes)
        return True

    def read_body(self) -> None:
        """Read the body of the request, after a 100 Continue if the sender waits for it.

        Raises:
            Refusal: malformed, body_too_large, headers_too_large, timeout.
        """
        expect = self.headers.get("expect", "").lower()
        is_http11 = self.request_version == "HTTP/1.1"
        if expect == "100-continue" and is_http11 and self.body_length != 0:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.body_length is None:
            self.parsed.body = self.read_chunked()
        else:
            self.parsed.body = self.read_exactly(self.body_length)

    def read_exactly(self, length: int) -> bytes:
        """Read `length` bytes. Raises Refusal: malformed, timeout."""
        data = self.rfile.read(length) if length else b""
        if len(data) < length:
            raise Refusal("malformed", "the connection ended within the request")
        return data

    def read_chunked(self) -> bytes:
        """Read and decode a chunked body (RFC 9112 section 7.1); trailers are checked and dropped.

        Raises:
            Refusal: malformed, body_too_large, headers_too_large, timeout.
        """
        limit = self.server.config.max_body_bytes
        body = bytearray()
        while True:
            match = _CHUNK_LINE.fullmatch(self.read_line(MAX_CHUNK_LINE_BYTES, "malformed"))
            if not match:
                raise Refusal("malformed", "the size of a chunk is malformed")
            size = int(match[1], 16)
            if not size:
                break
            if len(body) + size > limit:
                raise Refusal("body_too_large", f"the body is above max_body_bytes, {limit}")
            body += self.read_exactly(size)
            if self.read_exactly(2) != b"\r\n":
                raise Refusal("malformed", "a chunk is longer than its size")
        trailers = bytearray()
        while True:
            line = self.read_line(MAX_REQUEST_LINE_BYTES, "malformed")
            if line == b"\r\n":
                break
            trailers += line
            if len(trailers) > MAX_HEADER_BYTES:
                raise Refusal("headers_too_large", "the trailer fields are too large")
        parse_fields(bytes(trailers))
        return bytes(body)

    def do_POST(self) -> None:
        """Handle a delivery: verify, check that it is recent and new, store, answer.

        Raises:
            Refusal: it is not accepted. Nothing is lost: the sender may send it again.
        """
        server = self.server
        request = self.parsed
        now = time.time()
        webhook, verified = check_webhooks(self.webhooks, request, now)
        self.webhooks = (webhook,)
        config = webhook.config
        signed_time = self.headers.get(SENT_AT_HEADERS.get(config.type, ""), "")
        check_age(verified.sent_at, signed_time, config.replay_window_seconds, now)
        server.log_old_token(webhook, verified.token_index)
        keys = dedup_keys(config.type, request)
        if not webhook.replay_cache.reserve(keys):
            server.metrics.count(config.name, "duplicate", len(request.body))
            self.reply(200, {"status": "duplicate"})
            return
        try:
            delivery = make_delivery(config, request, verified, keys, now)
        except BaseException:
            webhook.replay_cache.release(keys)
            raise
        try:
            server.output.write(delivery, keys)  # commits or releases the keys: settle
        except OutputError as error:
            raise Refusal("output", str(error)) from None
        server.metrics.count(config.name, "accepted", len(request.body))
        if delivery.text is None:
            self.report_not_json(config)
        self.reply(200, {"status": "ok"})

    def report_not_json(self, webhook: Webhook) -> None:
        """Count and log a body that was stored although it is not JSON."""
        body = self.parsed.body
        found = guess_format(body)
        if webhook.type == "ip-fabric" and found.startswith("XML"):
            return
        self.server.metrics.count_not_json(webhook.name)
        if self.server.rejections.allows():
            size = len(body)
            log.warning("%r: stored %d bytes that are not JSON: %s", webhook.name, size, found)

    def do_GET(self) -> None:
        """Answer /health or /metrics."""
        server = self.server
        if self.path == "/metrics":
            names = [webhook.config.name for webhook in server.webhooks]
            text = server.metrics.render(names, server.count_in_flight())
            self.send(200, text, "text/plain; version=0.0.4; charset=utf-8")
        elif server.output.is_failing() or server.is_stopping:
            self.reply(503, {"error": "unavailable"})
        else:
            self.reply(200, {"status": "ok"})

    do_HEAD = do_GET

    def reply(self, status: int, answer: dict[str, str], *headers: str) -> None:
        """Answer with JSON."""
        self.send(status, json.dumps(answer).encode(), JSON, *headers)

    def send(self, status: int, body: bytes, content_type: str, *headers: str) -> None:
        """Send an answer in one piece, and decide whether the connection goes on.

        Raises:
            OSError: the sender is gone, or does not read its answer in time.
        """
        server = self.server
        request = self.parsed
        options = request.headers.get("connection", "").lower().split(",")
        options = [option.strip() for option in options]
        is_refusal = status >= 400 and status != 401
        self.close_connection = (
            is_refusal
            or "close" in options
            or (request.version == "HTTP/1.0" and "keep-alive" not in options)
            or server.is_stopping
            or server.is_full()
        )
        lines = [
            f"HTTP/1.1 {status} {self.responses[status][0]}",
            f"Date: {self.date_time_string()}",
            f"Content-Type: {content_type}",
            f"Content-Length: {len(body)}",
            f"Connection: {'close' if self.close_connection else 'keep-alive'}",
            *headers,
        ]
        head = "\r\n".join([*lines, "", ""]).encode()
        self.connection.settimeout(server.config.request_timeout_seconds)
        self.wfile.write(head if request.method == "HEAD" else head + body)
        self.reader.deadline = time.monotonic() + KEEP_ALIVE_SECONDS
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%d to %s: %s", status, self.peer(), body[:100].decode())
        if is_refusal or (self.close_connection and server.is_stopping):
            self.linger()

    def refuse(self, refusal: Refusal) -> None:
        """Log, count and answer a refusal."""
        server = self.server
        request = self.parsed
        status = REFUSALS[refusal.reason]
        name = refusal.webhook
        if not name and len(self.webhooks) == 1:
            name = self.webhooks[0].config.name
        server.metrics.count(name, refusal.reason, len(request.body))
        if server.rejections.allows():
            hint = ""
            if refusal.reason == "signature":
                hint = diagnose(request, self.webhooks, time.time())
            shown = f" for {name!r}" if name else ""
            more = f" ({hint})" if hint else ""
            text = f"{status} to {self.peer()}{shown}: {refusal.reason}: {refusal}{more}"
            log.warning("%s", text)
        headers = []
        if status == 401:
            needs_token = any(webhook.config.oidc for webhook in self.webhooks)
            scheme = "Bearer" if needs_token else "HMAC-SHA256"
            headers = [f'WWW-Authenticate: {scheme} realm="central webhook"']
        elif status == 405:
            allowed = "GET, HEAD" if request.path in RESERVED_PATHS else "POST"
            headers = [f"Allow: {allowed}"]
        elif status == 503:
            headers = ["Retry-After: 1"]
        with contextlib.suppress(OSError):  # the sender is gone
            self.reply(status, {"error": ERRORS[status]}, *headers)

    def linger(self) -> None:
        """Read and drop what still comes, for a while.

        To close a connection that has unread data resets it, and the sender loses the answer.
        """
        self.server.idle.add(self.connection)
        with contextlib.suppress(OSError, Refusal):
            self.connection.shutdown(socket.SHUT_WR)
            self.reader.deadline = time.monotonic() + LINGER_SECONDS
            while self.rfile.read1(1 << 16):
                pass

    def peer(self) -> str:
        """Return who sent the request: the last of X-Forwarded-For if a trusted proxy did."""
        address = str(self.client_address[0]) if self.client_address else ""
        if address and not is_trusted(address, self.server.config.trusted_proxies):
            return address
        forwarded = self.parsed.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
        return parse_forwarded_address(forwarded) or address or "localhost"


def is_trusted(address: str, networks: Sequence[Network]) -> bool:
    """Return True if an IP address, IPv4 mapped into IPv6 included, is in one of the networks."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return any(parsed in network for network in networks)


def parse_forwarded_address(text: str) -> str:
    """Return the address of `a`, `a:port`, `[v6]` or `[v6]:port`; "" if it is none of these."""
    match = re.fullmatch(r"\[([^\]]+)\](?::[0-9]+)?|([0-9.]+)(?::[0-9]+)?|([0-9A-Fa-f:.]+)", text)
    if not match:
        return ""
    try:
        return str(ipaddress.ip_address(match[1] or match[2] or match[3]))
    except ValueError:
        return ""


def listen_on(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError if the address cannot be bound."""
    if host == "localhost":
        host = "127.0.0.1"
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # "::" stands for IPv4 as well
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, backlog=LISTEN_QUEUE, dualstack_ipv6=both)


class WebhookServer(ThreadingHTTPServer):
    """Serves each connection in a thread, and reuses the threads.

    At most `max_connections` are open at once; more wait in the listen queue. `connections` holds
    the open ones and `idle` those of them that wait for a request or for their end.
    """

    daemon_threads = True

    def __init__(self, config: Config, output: Output, listener: socket.socket) -> None:
        """Serve on a listening socket; `handle_alert` is used as it is set now."""
        super().__init__(listener.getsockname(), WebhookHandler, bind_and_activate=False)
        self.socket.close()  # the base made one, but its way to bind looks up the host's name
        self.socket = listener
        self.socket.setblocking(False)
        if listener.family in (socket.AF_INET, socket.AF_INET6):  # accepted ones inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.config = config
        self.webhooks = tuple(ActiveWebhook(webhook) for webhook in config.webhooks)
        self.output = output
        self.output.settle = self.settle
        self.alert_worker = AlertWorker(handle_alert) if handle_alert else None
        self.metrics = Metrics()
        self.rejections = RateLimit()
        self.is_stopping = False
        self.connections: set[socket.socket] = set()
        self.idle: set[socket.socket] = set()
        self.changed = threading.Condition()  # guards `connections`
        self.accepted: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread_count = 0
        # What the main thread waits for: numbers of signals, or None if stdout is gone.
        self.events: queue.SimpleQueue[Optional[int]] = queue.SimpleQueue()

    def is_full(self) -> bool:
        """Return True if another connection would have to wait."""
        return len(self.connections) >= self.config.max_connections

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection, as soon as there is a place for it.

        Raises:
            OSError: there is none for now; the caller tries again.
        """
        with self.changed:
            if not self.changed.wait_for(lambda: not self.is_full(), 0.1):
                raise BlockingIOError("max_connections are open")
        try:
            connection, address = super().get_request()
        except BlockingIOError:
            raise
        except OSError as error:  # no more descriptors, mostly
            if self.rejections.allows():
                log.error("cannot accept a connection: %s", error.strerror)
            time.sleep(0.1)
            raise
        self.idle.add(connection)
        with self.changed:
            self.connections.add(connection)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand a connection to a thread; there are as many as there were connections at once."""
        self.accepted.put((request, client_address))
        self.add_threads()

    def add_threads(self) -> None:
        """Start threads until there is one for each connection."""
        with contextlib.suppress(RuntimeError):  # no more threads now: service_actions tries again
            while self.thread_count < len(self.connections):
                threading.Thread(target=self.process_requests, daemon=True).start()
                self.thread_count += 1

    def process_requests(self) -> None:
        """Serve one connection after the other, for ever; runs in a thread of its own."""
        while True:
            self.process_request_thread(*self.accepted.get())

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, and make its place free."""
        super().shutdown_request(request)
        self.idle.discard(request)
        with self.changed:
            self.connections.discard(request)
            self.changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a bug of ours: no input of a sender may get here."""
        log.error("internal error: %r", sys.exc_info()[1], exc_info=True)

    def service_actions(self) -> None:
        """Do what is due several times a second; `serve_forever` calls this."""
        self.add_threads()
        beyond = self.rejections.start_second()
        if beyond:
            log.warning("%d more rejections within a second", beyond)
        if self.output.stdout_closed.is_set() and not self.is_stopping:
            self.events.put(None)

    def count_in_flight(self) -> int:
        """Return how many requests are being handled."""
        return max(0, len(self.connections) - len(self.idle))

    def route(self, request: Request) -> Sequence[ActiveWebhook]:
        """Return the webhooks that a request may be for; none for a path of our own.

        Raises:
            Refusal: not_found, method.
        """
        path = request.path
        is_reserved = path in RESERVED_PATHS
        webhooks = []
        if not is_reserved:
            webhooks = [one for one in self.webhooks if one.config.path in (None, path)]
            if not webhooks:
                raise Refusal("not_found", f"no webhook at {path[:200]!r}")
        if request.method not in (("GET", "HEAD") if is_reserved else ("POST",)):
            raise Refusal("method", f"{request.method[:20]} on {path[:200]!r}")
        return webhooks

    def settle(self, entry: Entry) -> None:
        """Remember a delivery that was stored and hand it to `handle_alert`, or give it up."""
        delivery = entry.delivery
        for webhook in self.webhooks:
            if webhook.config.name == delivery.webhook:
                if entry.error:
                    webhook.replay_cache.release(entry.keys)
                else:
                    webhook.replay_cache.commit(entry.keys)
        if self.alert_worker and not entry.error:
            self.alert_worker.put(delivery)

    def log_old_token(self, webhook: ActiveWebhook, token_index: int) -> None:
        """Log that a token other than the first is still in use, at most once a minute."""
        if not token_index:
            return
        now = time.monotonic()
        if now - webhook.old_tokens_logged.get(token_index, -1e9) > 60:
            webhook.old_tokens_logged[token_index] = now
            count = len(webhook.config.tokens)
            name = webhook.config.name
            log.info("webhook %r: token %d of %d still matches", name, token_index + 1, count)

    def restore(self, webhooks: Sequence[ActiveWebhook]) -> None:
        """Restore the replay caches of webhooks from the log. Raises OutputError."""
        log_file = self.output.log_file
        caches = {
            webhook.config.name: webhook.replay_cache
            for webhook in webhooks
            if webhook.config.type not in NO_DEDUP
        }
        if log_file and caches:
            windows = [webhook.config.replay_window_seconds for webhook in webhooks]
            window = max(windows) if all(windows) else 0
            restore_replay_caches(log_file.path, caches, window, time.time())

    def reload(self, config: Config) -> None:
        """Swap in a new configuration, between two writes; what is remembered stays.

        Raises:
            OutputError: its log cannot be used; the old configuration stays whole.
        """
        if (config.host, config.port) != (self.config.host, self.config.port):
            log.warning("host and port change with a restart only")
        is_same_log = config.log_file == self.config.log_file
        self.output.reload(config.log_file, config.request_timeout_seconds)
        before = {(one.config.name, one.config.type): one for one in self.webhooks}
        webhooks = []
        unknown = []
        for found in config.webhooks:
            webhook = ActiveWebhook(found)
            old = before.get((found.name, found.type))
            if old:
                webhook.replay_cache = old.replay_cache
                former = [*old.config.tokens, *old.former_tokens]
                former = [token for token in former if token not in found.tokens]
                webhook.former_tokens = tuple(former[:4])
                if found.oidc == old.config.oidc:
                    webhook.jwks_client = old.jwks_client
            if not old or not is_same_log:
                unknown.append(webhook)
            webhooks.append(webhook)
        self.restore(unknown)
        self.config = replace(config, host=self.config.host, port=self.config.port)
        self.webhooks = tuple(webhooks)

    def stop(self) -> None:
        """Take nothing new, finish the requests in flight, then what `handle_alert` has to do."""
        deadline = time.monotonic() + DRAIN_SECONDS
        self.is_stopping = True
        self.shutdown()
        with contextlib.suppress(OSError):  # those in the listen queue think they are connected
            while True:
                self.process_request(*self.get_request())
        self.server_close()
        self.wait_until_closed(DRAIN_QUIET_SECONDS)
        for connection in list(self.idle):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        self.wait_until_closed(deadline - time.monotonic())
        if self.alert_worker:
            self.alert_worker.drain(DRAIN_SECONDS)

    def wait_until_closed(self, seconds: float) -> None:
        """Wait until all connections are closed, at most `seconds`."""
        with self.changed:
            self.changed.wait_for(lambda: not self.connections, seconds)


# ---- Metrics --------------------------------------------------------------------------------


class Metrics:
    """Counters in the text format of Prometheus; labels are names of ours. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.results: collections.Counter[tuple[str, str]] = collections.Counter()
        self.not_json: collections.Counter[str] = collections.Counter()
        self.last_accepted: dict[str, float] = {}
        self.body_bytes = 0

    def count(self, webhook: str, result: str, body_bytes: int) -> None:
        """Count a request; `webhook` is "" if it belongs to none."""
        with self.lock:
            self.results[webhook, result] += 1
            self.body_bytes += body_bytes
            if result == "accepted":
                self.last_accepted[webhook] = time.time()

    def count_not_json(self, webhook: str) -> None:
        """Count an accepted delivery whose body is not JSON."""
        with self.lock:
            self.not_json[webhook] += 1

    def render(self, webhooks: Sequence[str], in_flight: int) -> bytes:
        """Return the text; all series of the named webhooks exist."""
        with self.lock:
            results = self.results.copy()
            not_json = self.not_json.copy()
            last_accepted = self.last_accepted.copy()
        for pair in itertools.product(["", *webhooks], [*REFUSALS, "accepted", "duplicate"]):
            results.setdefault(pair, 0)
        for name in webhooks:
            not_json.setdefault(name, 0)
            last_accepted.setdefault(name, 0.0)

        def label(name: str) -> str:
            return json.dumps(name, ensure_ascii=False)  # it quotes and escapes as Prometheus does

        lines: list[str] = []

        def add(metric: str, kind: str, about: str, samples: Iterable[str]) -> None:
            name = f"central_webhook_{metric}"
            lines.extend((f"# HELP {name} {about}", f"# TYPE {name} {kind}"))
            lines.extend(f"{name}{sample}" for sample in samples)

        add(
            "deliveries_total",
            "counter",
            "Requests by webhook (empty: none of those configured) and result.",
            [
                f'{{webhook={label(name)},result="{result}"}} {count}'
                for (name, result), count in sorted(results.items())
            ],
        )
        add(
            "last_accepted_timestamp_seconds",
            "gauge",
            "Time of the last accepted delivery, 0 before the first.",
            [f"{{webhook={label(name)}}} {at:.3f}" for name, at in sorted(last_accepted.items())],
        )
        add(
            "not_json_total",
            "counter",
            "Accepted deliveries whose body is not JSON.",
            [f"{{webhook={label(name)}}} {count}" for name, count in sorted(not_json.items())],
        )
        add("body_bytes_total", "counter", "Bytes of bodies received.", [f" {self.body_bytes}"])
        add("requests_in_flight", "gauge", "Requests being handled.", [f" {in_flight}"])
        return ("\n".join(lines) + "\n").encode()


# ---- Signals and systemd --------------------------------------------------------------------

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
RELOAD_SIGNALS = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()  # Windows has none


def notify(*lines: str) -> None:
    """Tell systemd about our state, if it asks for it (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract name
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
            messenger.setblocking(False)
            messenger.sendto("\n".join(lines).encode(), address)
    except OSError as error:
        log.warning("NOTIFY_SOCKET: %s", error.strerror)


def inherited_socket() -> Optional[socket.socket]:
    """Return the listening socket that systemd has passed (sd_listen_fds(3)), None without one.

    Raises:
        OSError: there is more than one, or it does not listen.
    """
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        advice = "expected one: use a single ListenStream= line"
        raise OSError(errno.EINVAL, f"LISTEN_FDS: {count} inherited sockets, {advice}")
    inherited = socket.socket(fileno=3)
    if not inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise OSError(errno.EINVAL, "LISTEN_FDS: the inherited socket does not listen")
    return inherited


def reload_config(server: WebhookServer, path: str) -> None:
    """Load the configuration and swap it in, or keep the old one and log the errors."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        config = load_config(path)
        server.reload(config)
        names = ", ".join(webhook.name for webhook in config.webhooks)
        log.info("configuration reloaded: %s", names)
    except (ConfigError, OutputError) as error:
        for text in error.args:
            log.error("configuration not reloaded, the old one stays: %s: %s", path, text)
    except Exception as bug:  # must not stop a receiver that works
        log.error("configuration not reloaded: internal error: %r", bug, exc_info=True)
    notify("READY=1")


def serve(server: WebhookServer, path: str) -> int:
    """Serve until a signal says stop, or stdout is gone; return the exit code."""
    stops = []

    def on_signal(number: int, frame: Any) -> None:
        if number in STOP_SIGNALS:
            stops.append(number)
        if len(stops) > 1:
            os._exit(EX_CANNOT_SERVE if server.output.stdout_closed.is_set() else 0)
        server.events.put(number)

    for number in (*STOP_SIGNALS, *RELOAD_SIGNALS):
        signal.signal(number, on_signal)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    notify("READY=1")
    while True:
        try:
            # Not for ever: a signal that arrives just before it waits would not wake it up.
            event = server.events.get(timeout=0.5)
        except queue.Empty:
            continue
        if event not in RELOAD_SIGNALS:
            break
        reload_config(server, path)
    notify("STOPPING=1")
    server.stop()
    if server.output.stdout_closed.is_set():
        log.error("stopped: nobody reads stdout any more")
        return EX_CANNOT_SERVE
    log.info("stopped, %d requests unanswered", server.count_in_flight())
    return 0


def stay_on_one_processor() -> None:
    """Run on one processor, a random one of those allowed.

    One thread at a time runs Python, and handing the interpreter lock to another processor costs
    1.4 to 1.7 times the CPU: 11 context switches a delivery instead of 2.
    """
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    if has_lock and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # not allowed: then it is slower
            os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})


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
    """Return the headers and the body of a sample alert, signed with the first token."""
    times = {"timestamp": int(now), "time": format_utc(now)}
    payload = {**json.loads(SAMPLES)[webhook.type], **times, "sample": number}
    headers = {"content-type": JSON, "date": email.utils.formatdate(now, usegmt=True)}
    if webhook.api_key and webhook.api_key.header:
        headers[webhook.api_key.header] = webhook.api_key.values[0]
    elif webhook.api_key:
        payload[webhook.api_key.field] = webhook.api_key.values[0]
    body = json.dumps(payload).encode()
    token = webhook.tokens[0]
    if webhook.public_url:
        components = '("@method" "@target-uri" "@authority" "@scheme" "@path" "date")'
        text = f"sig1={components};created={int(now)}"
        covered = StructuredField(text).parse_dictionary()["sig1"]
        request = Request("POST", "", query, "HTTP/1.1", headers, frozenset())
        base = signature_base(request, covered, webhook.public_url.spellings[0])
        headers["signature-input"] = text
        headers["signature"] = "sig1=" + sign_base(token.encode(), base).decode()
    elif webhook.type == "central":
        delivery_id = f"sample-{int(now * 1000)}-{number}"
        timestamp = format_utc(now)
        headers["x-central-service"] = "Alerts"
        headers["x-central-delivery-id"] = delivery_id
        headers["x-central-delivery-timestamp"] = timestamp
        signed = body + f"Alerts{delivery_id}{timestamp}".encode()
        digest = hmac.digest(token.encode(), signed, "sha256")
        headers["x-central-signature"] = base64.b64encode(digest).decode()
    else:
        scheme = HEADER_SIGNATURES[webhook.type]
        digest = hmac.digest(token.encode(), body, "sha256")
        headers[scheme.header] = scheme.prefix + scheme.encode(digest).decode()
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
    url = url or f"http://{format_host(host)}:{config.port}{matching[0].path or '/centralwebhook'}"
    headers, body = sign_sample(matching[0], url.partition("?")[2] or None, 1, time.time())
    for line in header_lines:
        name_part, colon, value = line.partition(":")
        if not colon or not re.compile(_NAME).fullmatch(name_part) or _UNSAFE.search(value):
            return fail("--header: expected 'Name: value'", EX_USAGE)
        headers[name_part.lower()] = value.strip()
    started = time.monotonic()
    try:
        status, data = http_request("POST", url, headers, body, SAMPLE_SECONDS)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return fail(f"{url}: {error or type(error).__name__}", EX_CANNOT_SERVE)
    answer = escape_text(data[:500].decode(errors="replace").strip())
    print(f"{status} {answer} {1000 * (time.monotonic() - started):.0f} ms")
    return 0 if status == 200 else EX_CANNOT_SERVE


def run_demo(render: Callable[[Delivery], str]) -> int:
    """Start a receiver on a free port, send it signed samples and a forged one, show the answers."""
    settings = b"""{
        "webclient_info": {"host": "localhost", "port": 0},
        "central_info": {"webhook": {"name": "demo", "token": "%b"}}
    }"""
    config = read_config(settings % base64.b64encode(os.urandom(15)))
    output = Output(None, config.request_timeout_seconds, render)
    server = WebhookServer(config, output, listen_on(config.host, config.port))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/centralwebhook"
    print_error(f"a receiver with a throw-away token listens on {url}")
    passed = True
    for number in range(1, 5):
        headers, body = sign_sample(config.webhooks[0], None, number, time.time())
        kind = f"signed alert {number}"
        expected = 200
        if number == 4:
            kind = "forged alert, one word of its body changed"
            expected = 401
            body = body.replace(b"Critical", b"Harmless")
        status, data = http_request("POST", url, headers, body, SAMPLE_SECONDS)
        flush_log()
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
    flush_log()
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


def choose_render(output_format: str) -> Callable[[Delivery], str]:
    """Return how stdout shows a delivery."""
    is_terminal = os.isatty(STDOUT)
    if output_format == "json" or (output_format == "auto" and not is_terminal):
        return render_json
    has_colour = is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return functools.partial(render_pretty, colour=has_colour)


def start(config: Config, path: str, render: Callable[[Delivery], str]) -> int:
    """Open the outputs, bind, restore the replay caches, and serve until told to stop."""
    function = handle_alert.func if isinstance(handle_alert, functools.partial) else handle_alert
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )
    if function is not None and (is_async or not callable(function)):
        found = "a coroutine function, which would never run" if is_async else repr(function)
        return fail(f"handle_alert: expected a function, found {found}", EX_CANNOT_SERVE)
    for number in STOP_SIGNALS:  # until it serves
        signal.signal(number, lambda number, frame: os._exit(0))
    for number in RELOAD_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "win32":
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    stay_on_one_processor()
    output = Output(config.log_file, config.request_timeout_seconds, render)
    try:
        listener = inherited_socket() or listen_on(config.host, config.port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        reason = reason.partition(" (")[0]  # it repeats the address
        return fail(f"{config.host} port {config.port}: {reason}", EX_CANNOT_SERVE)
    server = WebhookServer(config, output, listener)
    server.restore(server.webhooks)
    address: Any = server.server_address
    shown = os.fsdecode(address) if isinstance(address, (str, bytes)) else "unknown"
    if isinstance(address, tuple):
        host, port = address[:2]
        shown = f"{host} port {port} (http://{format_host(host)}:{port})"
    webhooks = ", ".join(
        f"{one.name} ({one.type}, {one.path or 'any path'})" for one in config.webhooks
    )
    log_file = f", {config.log_file}" if config.log_file else ""
    log.info(
        "%s %s listens on %s; webhooks: %s; output: stdout%s",
        PROGRAM,
        VERSION,
        shown,
        webhooks,
        log_file,
    )
    return serve(server, path)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the program; return its exit code: 0 stopped on request, 1 cannot serve, 2 usage, 78 configuration."""
    options = parse_arguments(argv)
    threading.stack_size(4 << 20)  # bytes; see the README
    start_logging(options.verbose)
    try:
        if options.demo:
            return run_demo(choose_render(options.format))
        config = load_config(options.input)
        if options.send_sample is not None:
            return send_sample(config, options.send_sample, options.webhook, options.header)
        if options.check_config:
            return check_config(config)
        return start(
            config,
            options.input,
            choose_render(options.format),
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
        flush_log()


if __name__ == "__main__":
    sys.exit(main())
