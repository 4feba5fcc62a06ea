#!/usr/bin/env python3
"""Receive webhook alerts of HPE Aruba Networking Central, verify them, store them, then answer.

    python3 central_webhook_client.py -i=input_info.json

One file, Python 3.9 or newer, standard library only. It runs behind an HTTPS reverse proxy
(nginx/centralwebhook.conf). A delivery is one POST. `WebhookHandler.handle_one_request` does
step 1, `do_POST` steps 2 to 5:

    1. read     well-formed HTTP, a known path, the raw body   parse_request, route, read_body
    2. verify   signature, API key, access token               authenticate
    3. check    recent, and not accepted before                check_age, ReplayCache.reserve
    4. store    stdout, then log_file, synced to the disk;     Output.write
                `handle_alert` gets it afterwards
    5. answer   200                                            WebhookHandler.reply

The sections (`grep '^# ----'` prints this map):

    Constants and limits
    Errors
    Verify a signature of classic Central: the part to copy
    Your own code
    Requests
    Signatures of the other senders, API key
    JSON
    URLs and HTTP client
    HTTP message signatures (RFC 9421)
    OIDC access tokens
    Replay protection
    Output
    Logging
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
import concurrent.futures
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
import math
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
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Optional, Sequence

if sys.platform != "win32":
    import fcntl
    import resource

# ---- Constants and limits -------------------------------------------------------------------

VERSION = "1.0.0"
PROGRAM = "central_webhook_client.py"
EXIT_FAILURE = 1
EXIT_USAGE = 2  # as argparse
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h
STDOUT = 1  # file descriptors
STDERR = 2
JSON_TYPE = "application/json"
RESERVED_PATHS = ("/health", "/metrics")
FIELD_NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # what RFC 9110 section 5.6.2 calls a token

MAX_REQUEST_LINE_BYTES = 8 * 1024  # nginx's own limit
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADER_FIELDS = 100
MAX_CHUNK_LINE_BYTES = 256  # the size of a chunk and its extensions
KEEP_ALIVE_SECONDS = 75.0  # above nginx's 60, so that nginx closes first
LISTEN_QUEUE = 1024  # connections; the 5 of socketserver lose most of a burst
LINGER_SECONDS = 2.0  # a refused sender is read from this long, so that it can read the answer
DRAIN_SECONDS = 10.0  # after SIGTERM: for requests in flight, and for `handle_alert`
DRAIN_QUIET_SECONDS = 0.5  # after SIGTERM: idle connections stay open, a request may be coming
MAX_FUTURE_SECONDS = 15 * 60  # the clock of a sender may be this much ahead
REMEMBERED_DELIVERIES = 100_000  # for each webhook
MAX_WAITING_ALERTS = 10_000  # for `handle_alert`
MAX_WARNINGS_PER_SECOND = 10
MAX_SIGNATURE_FIELD_BYTES = 8 * 1024  # Signature and Signature-Input, each
MAX_LABELS = 4  # signatures tried in one Signature header
MAX_COMPONENTS = 32  # covered by one of them
THREAD_STACK_BYTES = 4 * 1024 * 1024  # parsing nested JSON recurses; Python 3.13 needs 1.5 MiB
SAMPLE_TIMEOUT_SECONDS = 30.0  # for the answer to --send-sample
PROVIDER_TIMEOUT_SECONDS = 2.5  # for each of the two answers of an OIDC provider
PROVIDER_RETRY_SECONDS = 10.0  # at least, between two refreshes
MAX_ANSWER_BYTES = 512 * 1024  # of a provider, or to a sample
PROVIDER_KEYS_MAX_AGE_SECONDS = 3600.0  # then keys are fetched again, in case one was withdrawn
MAX_KEYS_TRIED = 16
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 16384
ACCESS_TOKEN_LEEWAY_SECONDS = 60

# ---- Errors ---------------------------------------------------------------------------------

STATUS_BY_REASON = {  # reason, in the log and the metrics: status
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
log = logging.getLogger("central_webhook_client")


class Refusal(Exception):
    """A request is not accepted. The detail is for the log, never for the sender."""

    def __init__(self, reason: str, detail: str) -> None:
        """Set the reason, a key of STATUS_BY_REASON."""
        super().__init__(detail)
        self.reason = reason
        self.webhook_name = ""  # of the webhook that it is meant for, if that is known


class OutputError(Exception):
    """A delivery could not be written; the message says where and why."""


class ConfigError(Exception):
    """The configuration is wrong; `args` has one message for each error."""


class StartError(Exception):
    """The receiver cannot start; the message says why."""


# ---- Verify a signature of classic Central: the part to copy --------------------------------
# Needs base64, hmac and typing. Source: Central's "Webhooks" help page and the vendor's sample.


class SignatureError(Exception):
    """The sender did not prove that it knows the token. The message holds no secret."""


def verify_signature(body: bytes, headers: Mapping[str, str], token: str) -> None:
    """Verify that a delivery of classic Central was signed with `token`; call it for each token.

    `body` is the raw body, as received. `headers` maps names such as X-Central-Signature, in any
    case, to values decoded as ISO-8859-1, as http.server does. A normal return proves that the
    sender knows the token. It does not prove that the delivery is new or recent. A replay can
    move bytes from one header to the next, since nothing separates the signed values: to detect
    it, remember the signature, not the delivery ID.

    Raises:
        SignatureError: a header is missing, empty or repeated, or the signature does not match.
        TypeError: the token is not a str.
        ValueError: the token is empty, so that anybody could sign.
    """
    if not isinstance(token, str):
        raise TypeError("token: expected one str")
    if not token:
        raise ValueError("token: expected a str that is not empty")
    fields = [(name.lower(), value) for name, value in headers.items()]
    parts = []
    for part in ("signature", "service", "delivery-id", "delivery-timestamp"):
        values = [value for name, value in fields if name == f"x-central-{part}"]
        if len(values) != 1 or not values[0]:
            raise SignatureError(f"x-central-{part} is missing, empty or repeated")
        parts.append(values[0])
    try:
        signature, service, delivery_id, timestamp = [part.encode("latin-1") for part in parts]
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
    """One accepted delivery: verified, and recent and new as far as its type can tell."""

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
        """The body as Python objects, parsed at each use; None if it is not JSON or too deep."""
        try:
            return None if self.text is None else parse_json(self.text)[0]
        except ValueError:
            return None


def post_to_slack(delivery: Delivery) -> None:
    """Post an alert to the incoming webhook whose URL is in the environment variable CHAT_URL.

    An example, for Slack and Mattermost. Set `handle_alert = post_to_slack` to use it.
    """
    alert = summarize(delivery.payload)
    state = alert.state.upper()  # it tells the all-clear from the alarm
    text = f"{state} {alert.severity}: {alert.name} {alert.device} {alert.description}"
    text = html.escape(f"[{delivery.webhook}] {text}", quote=False)
    message = {"text": text.replace("@", "@\u200b")}  # @channel would call everybody
    headers = {"Content-Type": JSON_TYPE}
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
    device: str
    site: str
    description: str


def summarize(payload: Any) -> Summary:
    """Summarize an alert of any sender; `payload` is parsed JSON of any type."""
    alert = payload if isinstance(payload, dict) else {}
    sources = [alert]
    # Classic Central has an object, new Central and Juniper Mist arrays of objects.
    for name in ("details", "impactedEntities", "events", "additionalDetails"):
        nested = alert.get(name)
        if isinstance(nested, list) and nested:
            nested = nested[0]
        if isinstance(nested, dict):
            sources.append(nested)

    def find(*names: str) -> str:  # by name, and for each name the outer object first
        for name in names:
            for source in sources:
                value = source.get(name)
                if isinstance(value, list) and value:
                    value = value[0]
                if isinstance(value, (str, int)) and value != "":
                    return str(value)
        return ""

    name = find("alert_type", "name", "event", "type", "text")
    if "topic" in alert and isinstance(alert.get("events"), list):
        name = f"{find('topic')} {find('type')} ({len(alert['events'])} events)"
    return Summary(
        severity=find("severity"),
        state=find("state", "status"),
        name=name,
        device=find("device_id", "serial", "deviceSerial", "device_name", "mac", "deviceType"),
        site=find("site", "siteName", "siteId", "site_name", "site_id"),
        description=find("description", "summary", "reason"),
    )


# ---- Requests -------------------------------------------------------------------------------


@dataclass
class Request:
    """An HTTP request, not yet trusted. Text is ISO-8859-1; the body is read after the headers."""

    method: str
    path: str
    query: Optional[str]  # what follows "?"; None without "?"
    version: str
    headers: dict[str, str]  # by lower-case name; repeated ones joined with ", " (RFC 9110, 5.3)
    repeated: frozenset[str]  # names that occurred more than once
    body: bytes = b""


EMPTY_REQUEST = Request("", "", None, "HTTP/1.1", {}, frozenset())  # while none has been read


class Verified(NamedTuple):
    """What a verified signature says."""

    token_index: int  # position of the token that matched
    sent_time: Optional[float]  # the signed time in epoch seconds; None if it is not understood


# ---- Signatures of the other senders, API key -----------------------------------------------


class HeaderSignature(NamedTuple):
    """How a sender signs the body with HMAC-SHA256 into one header."""

    header: str  # lower case
    prefix: str
    encode: Callable[[bytes], bytes]

    def sign(self, body: bytes, token: str) -> bytes:
        """Return the value of the header."""
        digest = hmac.digest(token.encode(), body, "sha256")
        return self.prefix.encode() + self.encode(digest)


HEADER_SIGNATURES = {  # to add a sender of this kind, add a row
    "ip-fabric": HeaderSignature("x-ipf-signature", "", binascii.hexlify),
    "mist": HeaderSignature("x-mist-signature-v2", "", binascii.hexlify),
    "bracken": HeaderSignature("authorization", "HMACSHA256 ", base64.b64encode),
    "entrupy": HeaderSignature("entrupy-signature", "SHA256:", base64.b64encode),
}
# For samples and a hint alone: `verify_signature` checks it.
CENTRAL_SIGNATURE = HeaderSignature("x-central-signature", "", base64.b64encode)
TYPES = ("central", "new-central", *HEADER_SIGNATURES)
NO_DEDUP = ("bracken", "entrupy")  # nothing in them tells a replay from a recurring event


def verify_header_signature(request: Request, scheme: HeaderSignature, token: str) -> None:
    """Verify that the body was signed with `token`, as `verify_signature` does."""
    received = request.headers.get(scheme.header, "").encode("latin-1")
    if not received or scheme.header in request.repeated:
        raise SignatureError(f"{scheme.header} is missing, empty or repeated")
    if not hmac.compare_digest(scheme.sign(request.body, token), received):
        raise SignatureError(f"{scheme.header} does not match")


class ApiKey(NamedTuple):
    """A shared secret demanded besides the signature, in a header or in a field of the body."""

    header: str  # its name in lower case; "" if the key is in a field
    field: str  # the name of a top-level field of the JSON body; "" if the key is in a header
    values: tuple[str, ...]  # all are valid


def check_api_key(request: Request, api_key: ApiKey) -> None:
    """Check the API key. Raises Refusal: it is missing, empty, repeated or wrong."""
    if api_key.header:
        place = f"the header {api_key.header!r}"
        is_repeated = api_key.header in request.repeated
        value = request.headers.get(api_key.header, "").encode("latin-1")
        candidates = [value, value.partition(b" ")[2].lstrip(b" ")]  # bare, or after a scheme word
    else:
        place = f"the field {api_key.field!r}"
        try:
            payload, repeated = parse_json(request.body.decode("utf-8-sig"))
        except ValueError:
            raise Refusal("api_key", f"{place} is missing: no JSON, or too deep") from None
        is_repeated = api_key.field in repeated
        text = payload.get(api_key.field) if isinstance(payload, dict) else None
        candidates = [text.encode(errors="replace") if isinstance(text, str) else b""]
    if is_repeated or not candidates[0]:
        raise Refusal("api_key", f"{place} is missing, empty or repeated")
    if not is_any_equal([valid.encode() for valid in api_key.values], candidates):
        raise Refusal("api_key", f"{place} holds another key")


def is_any_equal(expected: Iterable[bytes], received: Iterable[bytes]) -> bool:
    """Return True if one of the received values is one of the expected ones."""
    pairs = itertools.product(expected, received)
    # Security: a list, so that all pairs are compared: the time does not tell which one is equal.
    return any([hmac.compare_digest(valid, value) for valid, value in pairs])


# ---- JSON -----------------------------------------------------------------------------------

# Control characters, and those that reorder, hide or break text: bidi controls, zero-width
# characters, line separators, surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Numbers stay text: this only has to find out whether a text is JSON.
_VALIDATOR = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse_constant)


def find_repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, sorted."""
    return sorted(name for name, count in collections.Counter(names).items() if count > 1)


def parse_json(text: str) -> tuple[Any, list[str]]:
    """Parse JSON; return the value, and the keys that are repeated in one of its objects.

    Numbers that Python cannot hold (10,000 digits, 1e999) become strings. Raises ValueError: the
    text is not JSON (NaN and Infinity are not), or is nested too deeply.
    """
    repeated: list[str] = []

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            repeated.extend(find_repeated(name for name, _ in pairs))
        return value

    try:
        value = json.loads(
            text,
            object_pairs_hook=to_object,
            parse_int=lambda digits: int(digits) if len(digits) < 4000 else digits,
            parse_float=lambda digits: float(digits) if math.isfinite(float(digits)) else digits,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, repeated


def json_text(body: bytes) -> Optional[str]:
    """Return the body as text if it is JSON in UTF-8 (RFC 8259), without a BOM; else None."""
    try:
        text = body.decode("utf-8-sig")
        _VALIDATOR.decode(text)
        return text
    except (ValueError, RecursionError):
        return None


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError for everything else, a repeated key included."""
    value, repeated = parse_json(data.decode())
    if repeated or not isinstance(value, dict):
        raise ValueError("expected a JSON object, each key once")
    return value


def _escape(match: re.Match[str]) -> str:
    """Escape what was found as JSON does, and DEL too."""
    return json.dumps(match[0])[1:-1].replace("\x7f", "\\u007f")


def to_ascii_line(text: str) -> str:
    """Put a JSON text on one line of ASCII; numbers, order and spelling stay."""
    if not text.isascii() or "\x7f" in text:
        text = re.sub("[\x7f-\U0010ffff]+", _escape, text)
    return text.replace("\n", " ").replace("\r", " ").replace("\t", " ")


def escape_text(text: str) -> str:
    r"""Escape what could move a cursor, reorder text or begin a line, as JSON does: \u202e."""
    return _UNSAFE.sub(_escape, text)


_FORMATS = (  # beginning of a body that is not JSON, and what the body seems to be
    (rb"\s*\Z", "empty"),
    (rb"\x1f\x8b", "gzip: the sender must not compress"),
    (rb"\s*<", "XML or HTML"),
    (rb"\s*[\w.%+\-\[\]]+=[^{\[]", "a form: choose JSON as the content type at the sender"),
    (rb'\s*[{\["]', "almost JSON: truncated, nested too deeply, or with NaN, comments or the like"),
    (rb"", "plain text, or not UTF-8"),
)


def guess_format(body: bytes) -> str:
    """Say what a body that is not JSON seems to be, for the log."""
    return next(name for beginning, name in _FORMATS if re.match(beginning, body))


# ---- URLs and HTTP client -------------------------------------------------------------------


def split_url(url: str) -> tuple[urllib.parse.SplitResult, str]:
    """Split an http or https URL; return its host in lower case as well. Raises ValueError."""
    parts = urllib.parse.urlsplit(url)
    is_ascii = re.fullmatch("https?://[!-~]+", url, re.IGNORECASE)
    if not is_ascii or not parts.hostname or parts.port == 0 or "@" in parts.netloc or "#" in url:
        raise ValueError("expected an http or https URL in ASCII without user and fragment")
    return parts, parts.hostname


def format_host(host: str) -> str:
    """Return a host as it is written in a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def without_port(authority: str) -> str:
    """Return the host of an authority, as it is written there."""
    return re.sub(":[0-9]*$", "", authority)


def is_loopback(host: str) -> bool:
    """Return True if a host name or address is this machine's own."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


# RuntimeError: no thread can be started.
HTTP_ERRORS = (OSError, ValueError, RuntimeError, http.client.HTTPException)


def http_request(
    method: str, url: str, headers: Mapping[str, str], body: Optional[bytes], timeout: float
) -> tuple[int, bytes]:
    """Send a request; return the status, and the body up to MAX_ANSWER_BYTES + 1.

    Returns within `timeout` seconds. Redirects are not followed. Proxies are those of the
    environment (HTTPS_PROXY, NO_PROXY), but a loopback address is never reached through one.

    Raises HTTP_ERRORS: no complete answer arrived in time.
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
    deadline = time.monotonic() + timeout
    result: concurrent.futures.Future[tuple[int, bytes]] = concurrent.futures.Future()

    def run() -> None:
        try:
            with opener.open(request, timeout=timeout) as answer:
                data = b""
                while piece := answer.read1(MAX_ANSWER_BYTES + 1 - len(data)):
                    data += piece
                    if time.monotonic() > deadline:
                        return
                if answer.length and len(data) <= MAX_ANSWER_BYTES:
                    raise http.client.IncompleteRead(data, answer.length)
                result.set_result((answer.status, data))
        except urllib.error.URLError as error:
            result.set_exception(error.reason if isinstance(error.reason, OSError) else error)
        except Exception as error:
            result.set_exception(error)

    # In a thread, since the look-up of a host has no timeout, and the timeout of a socket begins
    # anew with each byte: a server that drips its header would not end.
    threading.Thread(target=run, name="http_request", daemon=True).start()
    try:
        return result.result(timeout)
    except concurrent.futures.TimeoutError:
        raise TimeoutError(f"no whole answer within {timeout:g} s") from None


# ---- HTTP message signatures (RFC 9421) -----------------------------------------------------


class Item(NamedTuple):
    """A member of a structured field: an item or an inner list (RFC 8941 section 3)."""

    value: Any  # an int, a str, or the items of an inner list; None: another type
    text: str  # canonical, without the parameters
    parameters: Mapping[str, Item] = {}

    def __str__(self) -> str:  # canonical as well: RFC 8941 section 4.1
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
_KEY = "[a-z*][a-z0-9_.*-]*"  # 4.2.3.3


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
        """Parse `key=member, key, ...` (4.2.2); a repeated key is an error (RFC 9421 section 4)."""
        members: dict[str, Item] = {}
        while True:
            key = self.scan(_KEY)
            if key in members:
                raise SignatureError(f"{key[:40]!r} is repeated in a structured field")
            if not self.scan("=?"):
                member = Item(None, "?1")
            elif self.text.startswith("(", self.position):
                member = self.parse_inner_list()
            else:
                member = self.parse_bare_item()
            members[key] = self.parse_parameters(member)
            self.scan("[ \t]*")
            if self.position == len(self.text):
                return members
            self.scan(",[ \t]*")

    def parse_inner_list(self) -> Item:
        """Parse `(item item ...)` (4.2.1.2)."""
        self.scan(r"\( *")
        items = []
        while not self.scan(r"\)?"):
            items.append(self.parse_parameters(self.parse_bare_item()))
            self.scan(r" +|(?=\))")
        return Item(items, f"({' '.join(map(str, items))})")

    def parse_bare_item(self) -> Item:
        """Parse a string, number, token, Boolean or bytes, which stay encoded (4.2.3.1)."""
        text = self.scan(_BARE_ITEM)
        if text[0] == '"':
            return Item(re.sub(r"\\(.)", r"\1", text[1:-1]), text)
        if text[0] not in "-0123456789":
            return Item(None, text)
        if "." in text:
            return Item(None, str(float(text) or 0.0))  # exact: it has at most 15 digits
        return Item(int(text), str(int(text)))

    def parse_parameters(self, item: Item) -> Item:
        """Parse `;key=value;key...` of an item (4.2.3.2); if a key is repeated, the last wins."""
        parameters = {}
        while self.scan("(?:; *)?"):
            key = self.scan(_KEY)
            parameters[key] = self.parse_bare_item() if self.scan("=?") else Item(None, "?1")
        return item._replace(parameters=parameters)


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


def parse_public_url(url: Any) -> PublicUrl:
    """Parse the URL as typed into Central. Raises ValueError, see `split_url`.

    Signers differ on whether they normalize it (scheme and host in lower case, no default port,
    "/" for an empty path), and may do so in `@authority` but not in `@target-uri`.
    """
    parts, _ = split_url(parse_text(url))
    typed = parts.netloc
    normalized = without_port(typed).lower()
    if parts.port not in (None, {"http": 80, "https": 443}[parts.scheme]):
        normalized += f":{parts.port}"
    # For HTTPS://A.com:443: HTTPS, https; A.com:443, a.com:443, a.com; "", "/".
    schemes = [url.partition(":")[0], parts.scheme]
    authorities = [typed, typed.lower(), normalized]
    paths = [parts.path, parts.path or "/"]
    origins = [f"{schemes[0]}://{typed}", *(f"{parts.scheme}://{name}" for name in authorities[1:])]
    targets = [origin + path for origin in origins for path in paths]
    spellings = map(UrlParts._make, itertools.product(targets, schemes, authorities, paths))
    return PublicUrl(paths[-1], tuple(dict.fromkeys(spellings)))  # each once, in this order


def signature_base(request: Request, covered: Item, url: UrlParts) -> bytes:
    """Return the bytes to sign (RFC 9421 section 2.5): a line for each component, and `covered`."""
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
            component = str(item)[:80]
            raise SignatureError(f"the covered component {component} is missing or not supported")
        lines.append(f"{item}: {values[item.value]}")
    return "\n".join([*lines, f'"@signature-params": {covered}']).encode("latin-1")


# RFC 9421 section 2.3. Other parameters are part of the base, so they are accepted.
_PARAMETERS = {"created": int, "expires": int, "nonce": str, "alg": str, "keyid": str, "tag": str}


def check_coverage(covered: Item, now: float) -> None:
    """Check what a signature covers and claims, at epoch seconds `now`. Raises SignatureError."""
    items = covered.value
    if not isinstance(items, list) or not all(isinstance(item.value, str) for item in items):
        raise SignatureError("a member of signature-input is not a list of strings")
    names = {item.value for item in items}
    if len(items) > MAX_COMPONENTS or len(names) < len(items):
        raise SignatureError(f"more than {MAX_COMPONENTS} components are covered, or one twice")
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
    has_target = "@target-uri" in names or {"@authority", "@path"} <= names
    has_time = "date" in names or "created" in parameters
    if "@method" not in names or not has_target or not has_time:
        expected = "@method, @target-uri (or @authority and @path), and date (or created)"
        raise SignatureError(f"the signature does not cover all of {expected}")


def check_content_digest(request: Request) -> None:
    """Check each sha-256 and sha-512 of Content-Digest (RFC 9530). Raises SignatureError."""
    digests = StructuredField(request.headers["content-digest"]).parse_dictionary()
    known = [name for name in ("sha-256", "sha-512") if name in digests]
    if not known:
        raise SignatureError("content-digest has neither sha-256 nor sha-512")
    for name in known:
        digest = hashlib.new(name.replace("-", ""), request.body).digest()
        if digests[name].text != f":{base64.b64encode(digest).decode()}:":
            raise SignatureError(f"the {name} of content-digest does not match the body")


def hmac_keys(token: str) -> list[bytes]:
    """Return the keys that a token may stand for: the vendor does not say if hex is decoded."""
    keys = [token.encode()]
    if re.fullmatch(r"(?:[0-9a-fA-F]{2})+", token):
        keys.append(bytes.fromhex(token))
    return keys


def sign_base(key: bytes, base: bytes) -> bytes:
    """Return the hmac-sha256 signature of a base, encoded as in a structured field."""
    return b":%b:" % base64.b64encode(hmac.digest(key, base, "sha256"))


def is_message_signature(received: bytes, keys: Iterable[bytes], bases: Iterable[bytes]) -> bool:
    """Return True if `received` is the signature of one of the bases with one of the keys."""
    pairs = itertools.product(keys, bases)
    return is_any_equal([sign_base(key, base) for key, base in pairs], [received])


def parse_message_signatures(request: Request) -> list[tuple[Item, bytes]]:
    """Return what each signature covers, and the signature as encoded. Raises SignatureError."""
    fields = []
    for name in ("signature-input", "signature"):
        text = request.headers.get(name, "")
        if not text or len(text) > MAX_SIGNATURE_FIELD_BYTES:
            problem = f"missing, empty or above {MAX_SIGNATURE_FIELD_BYTES} bytes"
            raise SignatureError(f"{name} is {problem}")
        members = StructuredField(text).parse_dictionary()
        if len(members) > MAX_LABELS:
            raise SignatureError(f"{name} has more than {MAX_LABELS} labels")
        fields.append(members)
    inputs, signatures = fields
    labels = [label for label in inputs if label in signatures]
    return [(inputs[label], signatures[label].text.encode()) for label in labels]


def verify_message_signature(
    request: Request, tokens: Sequence[str], url: PublicUrl, now: float
) -> Verified:
    """Verify an hmac-sha256 signature over an HTTP message (RFC 9421) as new Central makes it.

    `now` is in epoch seconds. A normal return proves that the sender knows the token and signed
    the method, the URL and the time. It proves nothing of the body unless the signature covers
    content-digest.

    Raises SignatureError: no signature is valid; it says what is wrong with the last one.
    """
    failure = SignatureError("no label is in both signature-input and signature")
    for covered, received in parse_message_signatures(request):
        try:
            check_coverage(covered, now)
            bases = {signature_base(request, covered, spelling) for spelling in url.spellings}
            matches = [is_message_signature(received, hmac_keys(token), bases) for token in tokens]
            if not any(matches):
                raise SignatureError("signature does not match")
            if any(item.value == "content-digest" for item in covered.value):
                check_content_digest(request)
            created = covered.parameters.get("created")
            sent_time = created.value if created else parse_http_date(request.headers["date"])
            return Verified(matches.index(True), sent_time)
        except SignatureError as error:  # a bad one beside a good one does no harm: section 7.2.6
            failure = error
    raise failure


def diagnose_message_signature(
    request: Request, tokens: Sequence[str], url: PublicUrl, now: float
) -> str:
    """Return a hint why a signature does not match, for the log alone; "" without one.

    Tries the ways in which signers deviate from RFC 9421, since nobody has published what new
    Central really signs. Costs some dozens of HMACs for each label and token. Raises nothing.
    """
    try:
        signatures = parse_message_signatures(request)
    except SignatureError:
        return ""
    typed = url.spellings[0].target
    path = url.spellings[0].path
    _, scheme, authority, _ = url.spellings[-1]
    host = request.headers.get("host", "")
    keys = [key for token in tokens for key in hmac_keys(token)]
    decoded = []
    for token in tokens:
        with contextlib.suppress(ValueError):
            decoded.append(base64.b64decode(token, validate=True))
    lower = (b'"@method": POST', b'"@method": post')
    no_at = (b'\n"@signature-params": ', b'\n"signature-params": ')
    no_end = (b'\n"@signature-params": .*', b"")
    deviations = [  # name, URL, what to replace in the signature base, keys
        ("", typed, [], keys),  # the signature is right, and something else is wrong
        ("the method in lower case", typed, [lower], keys),
        ('"signature-params" without @', typed, [no_at], keys),
        ('the method in lower case and "signature-params" without @', typed, [lower, no_at], keys),
        ('no line "@signature-params"', typed, [no_end], keys),
        ("http instead of https", f"http://{authority}{path}", [], keys),
        ("the received Host as authority", f"{scheme}://{host}{path}", [], keys),
        ("the received Host without its port", f"{scheme}://{without_port(host)}{path}", [], keys),
        ("the token decoded from base64", typed, [], decoded),
    ]
    for covered, received in signatures:
        for name, text, replacements, tried_keys in deviations:
            with contextlib.suppress(SignatureError, ValueError):  # ValueError: Host is malformed
                check_coverage(covered, now)
                spellings = parse_public_url(text).spellings
                bases = {signature_base(request, covered, spelling) for spelling in spellings}
                for pattern, replacement in replacements:
                    bases = {re.sub(pattern, replacement, base) for base in bases}
                if is_message_signature(received, tried_keys, bases):
                    return f"would match with {name}" if name else ""
    if host and without_port(host).lower() != without_port(authority):
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
    """Return True if `signature` is that of `key` over `signed` (RFC 8017 section 8.2.2)."""
    digest_name, prefix = RSA_ALGORITHMS[algorithm]
    size = (key.n.bit_length() + 7) // 8
    number = int.from_bytes(signature, "big")
    if len(signature) != size or number >= key.n:
        return False
    # Security: construct the expected block and compare it in full. Parsing the padding of the
    # received one let forged signatures for small exponents through (Bleichenbacher 2006).
    rest_of_line = b"\x00" + prefix + hashlib.new(digest_name, signed).digest()
    expected = b"\x00\x01" + b"\xff" * (size - len(rest_of_line) - 2) + rest_of_line
    return hmac.compare_digest(expected, pow(number, key.e, key.n).to_bytes(size, "big"))


def parse_rsa_keys(jwks: dict[str, Any]) -> list[RsaKey]:
    """Return the safe RSA keys of a JWK set (RFC 7517) that may verify. Raises ValueError."""
    if not isinstance(jwks.get("keys"), list):
        raise ValueError("expected a JWK set")
    rsa_keys = []
    for jwk in jwks["keys"]:
        if not isinstance(jwk, dict) or jwk.get("kty") != "RSA" or jwk.get("use", "sig") != "sig":
            continue
        operations = jwk.get("key_ops", ["verify"])  # section 4.3
        if not isinstance(operations, list) or "verify" not in operations:
            continue
        with contextlib.suppress(ValueError):
            n = int.from_bytes(decode_base64url(str(jwk.get("n", ""))), "big")
            e = int.from_bytes(decode_base64url(str(jwk.get("e", ""))), "big")
            is_safe_size = MIN_RSA_BITS <= n.bit_length() <= MAX_RSA_BITS
            if is_safe_size and n % 2 and e % 2 and 3 <= e < 2**64:
                rsa_keys.append(RsaKey(jwk.get("kid"), str(jwk.get("alg") or ""), n, e))
    return rsa_keys


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

    Raises Refusal: one of these is not proved; and what `signing_keys` raises.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    signed, _, encoded_signature = token.lstrip(" ").rpartition(".")
    try:
        if scheme.lower() != "bearer" or "authorization" in request.repeated:
            raise ValueError
        encoded_header, encoded_claims = signed.split(".")
        header = parse_json_object(decode_base64url(encoded_header))
        claims = parse_json_object(decode_base64url(encoded_claims))
        signature = decode_base64url(encoded_signature)
    except ValueError:
        raise Refusal("oidc", "authorization is missing, repeated or not a bearer JWT") from None
    # Security: the algorithm is one of ours, whatever the token says: "none" and HS256 with the
    # public key as secret are the classic forgeries (RFC 8725 section 3.1). Keys come from the
    # provider alone, never from the jku, x5u or jwk of the token.
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in RSA_ALGORITHMS:
        claim = describe_claim(algorithm)
        raise Refusal("oidc", f"the access token's alg is {claim}, expected RS256, RS384 or RS512")
    if "crit" in header or not isinstance(header.get("kid", ""), str):
        raise Refusal("oidc", "the access token has crit, or a kid that is not a string")
    kid = header.get("kid")
    issuer, rsa_keys = signing_keys(kid, algorithm)
    if not rsa_keys:
        claim = describe_claim(kid)
        raise Refusal("oidc", f"unknown kid: the provider has no {algorithm} key with kid {claim}")
    if len(rsa_keys) > MAX_KEYS_TRIED:
        problem = f"{len(rsa_keys)} keys fit the access token, expected at most {MAX_KEYS_TRIED}"
        raise Refusal("oidc", problem)
    if not any(is_rsa_signature(signed.encode(), signature, algorithm, key) for key in rsa_keys):
        raise Refusal("oidc", f"the access token's signature matches none of {len(rsa_keys)} keys")
    check_claims(claims, oidc, oidc.issuer or issuer, now)


def check_claims(claims: dict[str, Any], oidc: Oidc, issuer: str, now: float) -> None:
    """Check the times, issuer, audience and client of a verified token. Raises Refusal."""
    times: dict[str, Any] = {"exp": claims.get("exp"), "nbf": claims.get("nbf", now)}
    for name, value in times.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e12:
            raise Refusal("oidc", f"the access token's {name} is missing or not a time")
    if now - times["exp"] > ACCESS_TOKEN_LEEWAY_SECONDS:
        raise Refusal("oidc", f"the access token's exp was {now - times['exp']:.0f} s ago")
    if times["nbf"] - now > ACCESS_TOKEN_LEEWAY_SECONDS:
        raise Refusal("oidc", f"the access token's nbf is {times['nbf'] - now:.0f} s ahead")
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    client_names = ("azp", "client_id", "appid", "cid")  # Keycloak, RFC 9068, Entra ID, Okta
    clients = [claims[name] for name in client_names if name in claims]
    rules = [  # name, what was found, its values, which of them is expected (None: any)
        ("iss (issuer)", claims.get("iss"), [claims.get("iss")], issuer),
        ("aud (audience)", audience, audiences, oidc.audience),
        ("client", clients, clients, oidc.client_id),
    ]
    for name, claim, values, expected in rules:
        if expected is not None and expected not in values:
            found = describe_claim(claim)
            raise Refusal("oidc", f"the access token's {name} is {found}, expected {expected!r}")


def describe_claim(value: Any) -> str:
    """Return a value of a token for the log: as JSON, which escapes it, and shortened."""
    return json.dumps(value)[:200]


class JwksClient:
    """The keys of an OIDC provider, fetched when they are needed and cached. Thread-safe."""

    def __init__(self, oidc: Oidc) -> None:
        self.oidc = oidc
        self.lock = threading.Lock()  # held by the thread that refreshes
        self.issuer = ""
        self.rsa_keys: Optional[list[RsaKey]] = None  # None: never obtained
        self.failure = "not asked yet"
        self.attempted_at = float("-inf")  # monotonic seconds
        self.refreshed_at = float("-inf")

    def signing_keys(self, kid: Optional[str], algorithm: str) -> tuple[str, list[RsaKey]]:
        """Return the issuer, and the keys that a token with this kid and algorithm may have.

        Raises Refusal: no keys were ever obtained.
        """
        is_known = bool(self._matching(kid, algorithm))
        # With a known key, do not wait while another thread refreshes.
        if self.lock.acquire(blocking=not is_known):
            try:
                self._refresh_if_due(kid, algorithm)
            finally:
                self.lock.release()
        if self.rsa_keys is None:
            raise Refusal("provider", f"no keys of the OIDC provider: {self.failure}")
        return self.issuer, self._matching(kid, algorithm)

    def _matching(self, kid: Optional[str], algorithm: str) -> list[RsaKey]:
        """Return the known keys for a token with this kid (None: without one) and algorithm."""
        known = [key for key in self.rsa_keys or () if key.algorithm in ("", algorithm)]
        return [key for key in known if kid in (None, key.kid)]

    def _refresh_if_due(self, kid: Optional[str], algorithm: str) -> None:
        """Fetch the keys if none matches or they are old, but not too often; log a failure."""
        now = time.monotonic()
        is_old = now - self.refreshed_at > PROVIDER_KEYS_MAX_AGE_SECONDS
        is_too_soon = now - self.attempted_at < PROVIDER_RETRY_SECONDS
        if is_too_soon or (self._matching(kid, algorithm) and not is_old):
            return
        self.attempted_at = now
        try:
            document = self._fetch(self.oidc.well_known_url)
            try:
                issuer = parse_text(document.get("issuer"))
                url = parse_provider_url(document.get("jwks_uri"))
            except ValueError:
                raise ValueError("the document has no issuer, or no jwks_uri over https") from None
            self.rsa_keys = parse_rsa_keys(self._fetch(url))
            self.issuer = issuer
            self.refreshed_at = time.monotonic()
            log.info("%d OIDC keys of %s", len(self.rsa_keys), issuer)
        except HTTP_ERRORS as error:
            self.failure = f"{self.oidc.well_known_url}: {error}"
            log.warning("no OIDC keys: %s", self.failure)

    def _fetch(self, url: str) -> dict[str, Any]:
        """Fetch a JSON object. Raises what `http_request` raises, and ValueError."""
        status, data = http_request(
            "GET", url, {"Accept": JSON_TYPE}, None, PROVIDER_TIMEOUT_SECONDS
        )
        if status != 200 or len(data) > MAX_ANSWER_BYTES:
            raise ValueError(
                f"status {status}, {len(data)} bytes; expected 200, up to {MAX_ANSWER_BYTES}"
            )
        return parse_json_object(data)


# ---- Replay protection ----------------------------------------------------------------------

_ISO_8601 = re.compile(
    r"([0-9]{4})-?([0-9]{2})-?([0-9]{2})[Tt ]"
    r"([01][0-9]|2[0-3]):?([0-5][0-9]):?([0-5][0-9]|60)"  # 60: a leap second
    r"(?:[.,]([0-9]{1,20}))?"
    r" ?(?:[Zz]|UTC|([+-])([01][0-9]|2[0-3])(?::?([0-5][0-9]))?(?: [A-Z0-9+-]{3,5})?)?"
)
_EPOCH = re.compile(r"[0-9]{9,11}(?:\.[0-9]{1,9})?|[0-9]{12,20}")


def parse_timestamp(text: str) -> Optional[float]:
    """Return the epoch seconds of the time that a sender signed, None if it is not understood.

    Central documents ISO 8601 with an offset, but nobody has published what is on the wire: no
    offset (UTC), HTTP-dates, Go's `2016-07-12 13:14:19 +0000 UTC` and epochs are understood too.
    """
    if _EPOCH.fullmatch(text):
        digits = len(text.partition(".")[0])  # s have 9 to 11, ms 12 to 14, us 15 to 17, ns more
        return float(text) / 1000.0 ** ((digits - 9) // 3)
    match = _ISO_8601.fullmatch(text)
    if not match:
        return parse_http_date(text)
    year, month, day, hour, minute, second, fraction, sign, hours, minutes = match.groups()
    offset = f"{sign or '+'}{hours or '00'}:{minutes or '00'}"
    try:
        start = datetime.fromisoformat(f"{year}-{month}-{day}T{hour}:{minute}{offset}")
    except ValueError:
        return None
    return start.timestamp() + int(second) + float(f"0.{fraction or 0}")


def parse_http_date(text: str) -> Optional[float]:
    """Return the epoch seconds of an HTTP-date (RFC 9110 section 5.6.7), None if it is not one."""
    try:
        moment = email.utils.parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


# Types that sign a time, and the header that has it.
SENT_AT_HEADERS = {"central": "x-central-delivery-timestamp", "new-central": "date"}


def check_age(
    sent_time: Optional[float], sent_at_text: str, window_seconds: float, now: float
) -> None:
    """Check that a delivery was sent at most `window_seconds` ago; 0 switches the check off.

    Times are in epoch seconds; `sent_at_text` is what the sender wrote. Raises Refusal.
    """
    if not window_seconds:
        return
    if sent_time is None:
        advice = '"replay_window_hours": 0 accepts any time'
        raise Refusal("stale", f"its time {sent_at_text[:80]!r} is not understood; {advice}")
    age = now - sent_time
    if age > window_seconds:
        allowed = f"the limit is {window_seconds / 3600:g}"
        raise Refusal(
            "stale", f"sent {age / 3600:.1f} hours ago, {allowed} hours: is a clock wrong?"
        )
    if -age > MAX_FUTURE_SECONDS:
        raise Refusal("stale", f"sent {-age / 60:.0f} minutes in the future: is a clock wrong?")


DedupKeys = tuple[bytes, ...]  # each identifies a delivery; empty: the type has none


def short_digest(*parts: bytes) -> bytes:
    """Return 128 bits that identify the parts, joined with NUL, which no header can hold."""
    return hashlib.sha256(b"\0".join(parts)).digest()[:16]


def make_dedup_keys(webhook_type: str, request: Request) -> DedupKeys:
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
    """The deliveries that a webhook has accepted, so that none is accepted again. Thread-safe.

    A key is in at most one of `accepted` and `reserved`. `order` has the accepted deliveries, the
    oldest first; the oldest is forgotten beyond REMEMBERED_DELIVERIES.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.accepted: set[bytes] = set()
        self.order: collections.deque[DedupKeys] = collections.deque()
        self.reserved: set[bytes] = set()

    def reserve(self, dedup_keys: DedupKeys) -> bool:
        """Reserve the keys of a delivery that is about to be stored; False if it is a duplicate."""
        with self.lock:
            if not self.accepted.isdisjoint(dedup_keys):
                return False
            if not self.reserved.isdisjoint(dedup_keys):
                raise Refusal("in_progress", "the same delivery is being stored at this moment")
            self.reserved.update(dedup_keys)
            return True

    def release(self, dedup_keys: DedupKeys) -> None:
        """Give up a reservation: the delivery was not stored."""
        with self.lock:
            self.reserved.difference_update(dedup_keys)

    def commit(self, dedup_keys: DedupKeys) -> None:
        """Remember a delivery that was stored."""
        with self.lock:
            self.reserved.difference_update(dedup_keys)
            if dedup_keys and self.accepted.isdisjoint(dedup_keys):
                self.accepted.update(dedup_keys)
                self.order.append(dedup_keys)
            if len(self.order) > REMEMBERED_DELIVERIES:
                self.accepted.difference_update(self.order.popleft())

    def restore(self, dedup_keys: DedupKeys) -> bool:
        """Remember a delivery stored before all others; return False if the cache is full."""
        with self.lock:
            if self.accepted.isdisjoint(dedup_keys):
                self.accepted.update(dedup_keys)
                self.order.appendleft(dedup_keys)
            return len(self.order) < REMEMBERED_DELIVERIES


_LOG_FILE_LINE = re.compile(  # when, which webhook, its dedup keys
    rb'\{"received_at": "([^"]*)", "webhook": ("(?:[^"\\]|\\.)*"), .*'
    rb'"key": "([0-9a-f]{32}(?:\.[0-9a-f]{32})*)"\}\r?'
)


def lines_from_end(path: str) -> Iterable[bytes]:
    """Yield the lines of a file, the last one first, without their line feeds."""
    with open(path, "rb") as file:  # not mmap: SIGBUS if the file shrinks meanwhile
        position = file.seek(0, os.SEEK_END)
        pieces: list[bytes] = []  # of the line whose beginning was not read yet, the last one first
        while position:
            size = min(position, 1 << 18)
            position -= size
            file.seek(position)
            rest_of_line, *lines = file.read(size).split(b"\n")
            if lines:
                yield lines.pop() + b"".join(reversed(pieces))
                yield from reversed(lines)
                pieces = []
            pieces.append(rest_of_line)
        yield b"".join(reversed(pieces))


def restore_replay_caches(path: str, caches: Mapping[str, ReplayCache], oldest: float) -> None:
    """Restore replay caches, by name of their webhook, from the end of a log file.

    Reads until all are full or a line was received before `oldest` (epoch seconds), but at most
    4 * REMEMBERED_DELIVERIES lines, which takes about a second. Raises OutputError.
    """
    wanted = {json.dumps(name).encode(): cache for name, cache in caches.items()}
    oldest_text = format_utc(oldest).encode()
    has_lines = False  # recent ones, or some of another program
    try:
        for line in itertools.islice(lines_from_end(path), 4 * REMEMBERED_DELIVERIES):
            match = _LOG_FILE_LINE.fullmatch(line)
            if match and match[1] < oldest_text:
                break
            has_lines = has_lines or bool(line)
            if match and match[2] in wanted:
                dedup_keys = tuple(bytes.fromhex(part) for part in match[3].decode().split("."))
                if not wanted[match[2]].restore(dedup_keys):
                    del wanted[match[2]]
            if not wanted:
                break
    except OSError as error:
        raise OutputError(f"webclient_info.log_file: {path}: {error.strerror}") from None
    count = sum(len(cache.order) for cache in caches.values())
    if count or not has_lines:
        log.info("%d deliveries remembered from %s", count, path)
    else:
        advice = "was a webhook renamed, or is it the log of another program?"
        log.warning("nothing remembered from %s, which is not empty: %s", path, advice)


# ---- Output ---------------------------------------------------------------------------------


def format_utc(moment: float) -> str:
    """Write epoch seconds as ISO 8601 in UTC with milliseconds."""
    return datetime.fromtimestamp(moment, timezone.utc).isoformat("T", "milliseconds")[:-6] + "Z"


def render_json(delivery: Delivery) -> str:
    """Render a delivery for stdout as one line of ASCII: a JSON object and a line feed."""
    fields = {
        "received_at": format_utc(delivery.received_at),
        "webhook": delivery.webhook,
        "type": delivery.type,
        "delivery_id": delivery.delivery_id,
        "sent_at": delivery.sent_at,
    }
    if delivery.text is None:
        fields["alert"] = None
        try:
            fields["body"] = delivery.body.decode()
        except UnicodeDecodeError:
            fields["body_base64"] = base64.b64encode(delivery.body).decode()
    line = json.dumps(fields).replace("\x7f", "\\u007f")
    if delivery.text is not None:  # not serialised: numbers, order and spelling stay as sent
        line = f'{line[:-1]}, "alert": {to_ascii_line(delivery.text)}}}'
    return line + "\n"


_COLOURS = {"critical": "1;31", "major": "31", "minor": "33", "warning": "33", "info": "36"}
_COLOURS.update({"close": "32", "closed": "32", "cleared": "32"})


def render_pretty(delivery: Delivery, colour: bool) -> str:
    """Render a delivery for a person: a header line, then the alert, indented by 2."""
    payload = delivery.payload
    alert = summarize(payload)
    moment = datetime.fromtimestamp(delivery.received_at).isoformat(" ", "seconds")
    place = [f"[{text}]" for text in (alert.device, alert.site) if text]
    fields = [
        moment,
        delivery.webhook,
        f"{alert.severity.upper() or '-':8}",
        f"{alert.state or '-':7}",
        f"{alert.name or '(no name)':24}",
        " ".join([*place, alert.description]),
    ]
    header = escape_text("  ".join(fields).rstrip())
    if colour:
        code = _COLOURS.get(alert.state.lower()) or _COLOURS.get(alert.severity.lower(), "1")
        header = f"\x1b[{code}m{header}\x1b[0m"
    text = delivery.text or delivery.body.decode(errors="backslashreplace")
    if payload is not None:
        with contextlib.suppress(RecursionError):
            text = json.dumps(payload, indent=2, ensure_ascii=False)
    body = "\n".join(escape_text(line) for line in text.split("\n"))
    return f"{header}\n{textwrap.indent(body, '  ')}\n"


@dataclass
class Entry:
    """A delivery on its way to stdout and the log file."""

    delivery: Delivery
    dedup_keys: DedupKeys
    replay_cache: ReplayCache
    stdout_line: bytes
    json_line: str
    error: str = "not written"  # why it is not stored; "" if it is

    def log_file_line(self) -> bytes:
        """Return the line for the log file: that of stdout with the key."""
        return f'{self.json_line[:-2]}, "key": {json.dumps(self.delivery.key)}}}\n'.encode()


class Batch:
    """Entries that are written together, by the thread of the first one."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.written = threading.Event()


def open_log_file(path: str) -> int:
    """Open a log file for appending. Raises OutputError, also if it is not a regular file."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags, 0o640)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    except OSError as error:
        raise OutputError(f"webclient_info.log_file: {path}: {error.strerror}") from None


sync_file = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class LogFile:
    """The file of accepted deliveries. It is append-only: it never shrinks, no byte changes.

    A failed write or a power loss may leave a half line. The next write begins with a line feed, so
    that readers see the half line as a line of its own, which is not JSON.
    """

    def __init__(self, path: str) -> None:
        """Open the file, for this process alone. Raises OutputError if that is not possible."""
        self.path = path
        self.descriptor = open_log_file(path)
        try:
            if sys.platform != "win32":
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sync_file(self.descriptor)  # its lines are duplicates from now on, answered with 200
        except OSError as error:
            os.close(self.descriptor)
            in_use = isinstance(error, BlockingIOError)
            reason = "another receiver writes to it" if in_use else error.strerror
            raise OutputError(f"webclient_info.log_file: {path}: {reason}") from None
        with contextlib.suppress(OSError):  # CIFS, FUSE and Windows cannot sync a folder
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)  # the name of a new file must survive a power loss too
            finally:
                os.close(folder)

    def ends_mid_line(self) -> bool:
        """Return True if the last line has no line feed."""
        if not os.lseek(self.descriptor, 0, os.SEEK_END):
            return False
        os.lseek(self.descriptor, -1, os.SEEK_END)
        return os.read(self.descriptor, 1) != b"\n"

    def append(self, lines: Sequence[bytes]) -> tuple[int, str]:
        """Append lines, synced; return how many are stored, and why the others are not ("")."""
        separator = b"\n" if self.ends_mid_line() else b""
        data = separator + b"".join(lines)
        written = 0
        failure = ""
        try:
            while written < len(data):
                written += os.write(self.descriptor, data[written:])
        except OSError as error:
            failure = f"{self.path}: {error.strerror}"
        # + 1: a line that lacks only its line feed is stored, since the next write begins with one.
        stored = data.count(b"\n", len(separator), written + 1)
        try:
            sync_file(self.descriptor)
        except OSError as error:
            return 0, f"{self.path}: {error.strerror}"
        return stored, failure


class Output:
    """stdout and the log file: what is accepted is written to both before it is answered.

    Many threads write. What arrives while a batch is being written forms the next batch, which has
    one sync (group commit). Replay caches and `handle_alert` get what is stored, in order.
    """

    def __init__(
        self,
        log_file: Optional[str],
        write_timeout: float,
        render: Callable[[Delivery], str],
        alert_worker: Optional[AlertWorker] = None,
    ) -> None:
        """Open the log file; `render` is for stdout. Raises OutputError, and OSError: no stdout."""
        self.write_timeout = write_timeout  # seconds
        self.render = render
        self.alert_worker = alert_worker
        self.lock = threading.Lock()  # for `batch`
        self.batch = Batch()  # the next one
        self.write_lock = threading.Lock()
        self.error = ""  # why the last write failed
        self.write_deadline = math.inf  # monotonic seconds, of the write that is under way
        self.stdout_closed = False
        self.stdout_mid_line = False
        self.max_write_bytes: Optional[int] = None  # bytes of stdout
        self.poll: Optional[select.poll] = None
        is_file = stat.S_ISREG(os.fstat(STDOUT).st_mode)
        if hasattr(select, "poll") and not is_file:
            self.poll = select.poll()
            self.poll.register(STDOUT, select.POLLOUT)
            # Once it is ready, a pipe takes PIPE_BUF bytes without blocking, a terminal one byte.
            self.max_write_bytes = 1 if os.isatty(STDOUT) else select.PIPE_BUF
        self.log_file = LogFile(log_file) if log_file else None

    def is_failing(self) -> bool:
        """Return True if the last write failed, or the present one takes too long."""
        return bool(self.error) or time.monotonic() > self.write_deadline

    def render_entry(
        self, delivery: Delivery, dedup_keys: DedupKeys, replay_cache: ReplayCache
    ) -> Entry:
        """Return a delivery, rendered for `write`."""
        line = render_json(delivery)
        stdout_text = line if self.render is render_json else self.render(delivery)
        return Entry(delivery, dedup_keys, replay_cache, stdout_text.encode(), line)

    def write(self, entry: Entry) -> None:
        """Write a delivery to stdout, then to the log file, synced; then commit its keys.

        Raises OutputError if it is not stored. If a write hangs, it may be stored later.
        """
        with self.lock:
            batch = self.batch
            is_first = not batch.entries
            batch.entries.append(entry)
        if is_first:
            self.write_batch(batch)
        elif not batch.written.wait(self.write_timeout):
            raise OutputError(f"not written within {self.write_timeout:g} s")
        if entry.error:
            raise OutputError(entry.error)

    def write_batch(self, batch: Batch) -> None:
        """Write a batch as soon as the one before it is written, and settle its entries."""
        stored = 0
        failure = f"not written within {self.write_timeout:g} s"
        has_lock = self.write_lock.acquire(timeout=self.write_timeout)
        with self.lock:  # until here others joined: the longer the wait, the larger the batch
            self.batch = Batch()
        try:
            if has_lock:
                stored, failure = self.write_entries(batch.entries)
            for entry in batch.entries[:stored]:
                entry.error = ""
                entry.replay_cache.commit(entry.dedup_keys)
                if self.alert_worker:
                    self.alert_worker.put(entry.delivery)
            for entry in batch.entries[stored:]:
                entry.error = failure
                entry.replay_cache.release(entry.dedup_keys)
        finally:
            if has_lock:
                self.write_lock.release()
            batch.written.set()

    def write_entries(self, entries: Sequence[Entry]) -> tuple[int, str]:
        """Write entries; return how many are stored, and why the others are not ("")."""
        stored = 0
        failure = ""
        self.write_deadline = time.monotonic() + self.write_timeout
        try:
            self.write_stdout(b"".join([entry.stdout_line for entry in entries]))
            if self.log_file:
                self.use_log_file(self.log_file.path)
                stored, failure = self.log_file.append([entry.log_file_line() for entry in entries])
            else:
                stored = len(entries)
        except Exception as error:
            failure = str(error) or type(error).__name__
        self.write_deadline = math.inf
        if failure and failure != self.error:
            log.error("output: %s", failure)
        elif self.error and not failure:
            log.info("output: works again")
        self.error = failure
        return stored, failure

    def write_stdout(self, data: bytes) -> None:
        """Write to stdout. Raises OutputError: its reader is gone, or has not taken all in time."""
        # A half line that a stalled reader has taken is ended first.
        remaining = memoryview(b"\n" + data if self.stdout_mid_line else data)
        try:
            while remaining:
                wait_ms = max(0, int(1000 * (self.write_deadline - time.monotonic())))
                if self.poll and not self.poll.poll(wait_ms):
                    raise OutputError(f"stdout: not read within {self.write_timeout:g} s")
                written = os.write(STDOUT, remaining[: self.max_write_bytes])
                self.stdout_mid_line = remaining[written - 1] != ord("\n")
                remaining = remaining[written:]
        except OSError as error:
            gone = (errno.EPIPE, errno.EIO, errno.ECONNRESET) if self.poll else (errno.EPIPE,)
            self.stdout_closed = self.stdout_closed or error.errno in gone
            raise OutputError(f"stdout: {error.strerror}") from None

    def use_log_file(self, path: Optional[str]) -> None:
        """Open the log file at `path` unless it is open. Raises OutputError; the old one stays."""
        old = self.log_file
        if old and path:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(path), os.fstat(old.descriptor)):
                    old.path = path
                    return
        self.log_file = LogFile(path) if path else None
        if old:
            os.close(old.descriptor)
            if old.path == path:
                log.info("%s: moved, deleted or replaced, so it was opened again", path)

    def reload(self, log_file: Optional[str], write_timeout: float) -> None:
        """Change the log file and the time-out. Raises OutputError; then nothing has changed."""
        if not self.write_lock.acquire(timeout=self.write_timeout):
            raise OutputError("the output is stuck")
        try:
            self.use_log_file(log_file)
            self.write_timeout = write_timeout
        finally:
            self.write_lock.release()


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

    def drain(self) -> None:
        """Wait until all deliveries are handled, at most DRAIN_SECONDS."""
        if not wait_until(lambda: not self.queue.unfinished_tasks, DRAIN_SECONDS):
            log.error("handle_alert: %d alerts were not handled", self.queue.unfinished_tasks)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition is true, at most `seconds`; return what it is then."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


# ---- Logging --------------------------------------------------------------------------------


class LineFormatter(logging.Formatter):
    """Time, level and message on one line; a traceback follows if the logger is verbose."""

    def format(self, record: logging.LogRecord) -> str:
        lines = [f"{format_utc(record.created)} {record.levelname} {record.getMessage()}"]
        if record.exc_info and log.isEnabledFor(logging.DEBUG):
            lines += self.formatException(record.exc_info).split("\n")
        # Indented, so that no line of a traceback can pass for a line of the log.
        return "\n    ".join(escape_text(line) for line in lines)


class StderrListener(logging.handlers.QueueListener):
    """Writes finished lines to stderr, in a thread of its own.

    It has no handler and writes past the buffer of sys.stderr: the interpreter waits for the locks
    of both at exit, and a stalled reader of stderr must not stop the exit.
    """

    def handle(self, record: logging.LogRecord) -> None:
        print_error(record.getMessage())


def print_error(text: str) -> None:
    """Write a line to stderr. Ignore errors: a closed stderr must not stop the receiver."""
    data = (text + "\n").encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        while sys.stderr and data:
            data = data[os.write(STDERR, data) :]


STDERR_QUEUE: queue.Queue[Any] = queue.Queue(1000)  # a stalled stderr loses lines, not deliveries


def start_logging(is_verbose: bool) -> None:
    """Send what `log` gets to stderr, through a queue: a stalled reader must not block requests."""
    logging.raiseExceptions = False  # a full queue is not reported
    handler = logging.handlers.QueueHandler(STDERR_QUEUE)
    handler.setFormatter(LineFormatter())
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if is_verbose else logging.INFO)
    StderrListener(STDERR_QUEUE).start()


def flush_stderr() -> None:
    """Wait until everything is logged, for a second at most."""
    wait_until(lambda: not STDERR_QUEUE.unfinished_tasks, 1)


class LogLimiter:
    """Lets MAX_WARNINGS_PER_SECOND lines a second pass, and counts the others. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.second = 0
        self.lines = 0  # in this second

    def allows(self) -> bool:
        """Count one more line; return True if it is within the limit."""
        with self.lock:
            self.lines += 1
            return self.lines <= MAX_WARNINGS_PER_SECOND

    def take_suppressed(self) -> int:
        """If a second is over, start the next one; return how many lines were suppressed."""
        with self.lock:
            second = int(time.monotonic())
            if second == self.second:
                return 0
            suppressed = self.lines - MAX_WARNINGS_PER_SECOND
            self.second = second
            self.lines = 0
            return max(0, suppressed)


# ---- Configuration --------------------------------------------------------------------------


@dataclass(frozen=True)
class WebhookSettings:
    """One configured sender."""

    name: str
    type: str
    path: Optional[str]  # None: any
    tokens: tuple[str, ...]  # all are valid
    token_file: Optional[str]  # that they came from
    replay_window_seconds: float  # 0: the age is not checked
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
    trusted_proxies: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]
    webhook_settings: tuple[WebhookSettings, ...]


def parse_text(value: Any, pattern: str = ".+") -> str:
    """Accept a string that matches, without white space around it or control characters."""
    is_clean = isinstance(value, str) and value == value.strip() and not _UNSAFE.search(value)
    if not is_clean or not re.fullmatch(pattern, value):
        raise ValueError
    return str(value)


def number_parser(low: float, high: float, types: Any = (int, float)) -> Callable[[Any], Any]:
    """Return a function that accepts numbers within bounds; true and false are not numbers."""

    def parse(value: Any) -> Any:
        if not isinstance(value, types) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError
        return value

    return parse


def parse_port(value: Any) -> Any:
    """Accept a port, as a number or as its digits."""
    is_digits = isinstance(value, str) and re.fullmatch("[0-9]{1,5}", value)
    return number_parser(0, 65535, int)(int(value) if is_digits else value)


def parse_host(value: Any) -> str:
    """Accept an address, or a host name that resolves."""
    host = parse_text(value)
    if re.search(r"[/\[\]]|^[^:]*:[^:]*$", host):
        raise ValueError("no scheme, brackets or port belong here")
    socket.getaddrinfo(host, None)
    return host


def parse_networks(value: Any) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """Accept an array of addresses and networks."""
    if not isinstance(value, list):
        raise ValueError
    return tuple(ipaddress.ip_network(parse_text(text)) for text in value)


def parse_provider_url(value: Any) -> str:
    """Accept an https URL, or an http URL of this machine."""
    parts, host = split_url(parse_text(value))
    if parts.scheme != "https" and not is_loopback(host):
        raise ValueError
    return str(value)


_PLACEHOLDER = re.compile(  # what templates and examples have where a secret belongs
    r"[$%#]?[<\[({].*[>\])}][s#]?|\$[a-z_][\w:]*|%\w+%|@+\w+@+|__\w+__|[.*?_-]+"
    r"|(?:replace|insert|paste|add|enter|put)[-_ ](?:me|this|it|with|your|the|token)(?![a-z]).*"
    r"|change[-_ ]?(?:me|this|it)(?![a-z]).*|replace[-_ ]?(?:me|this|it)|to-?do|tbd|fixme|x{3,}"
    r"|(?:your|my|the|insert|enter|put|paste|add)[_ ].*[_ ]here"
    r"|your[_ ](?:[a-z0-9]+[_ ])*(?:token|secret|key|password)(?:[_ ][a-z0-9]+)*",
    re.IGNORECASE | re.ASCII,
)


def describe_type(value: Any) -> str:
    """Say what a value is that must not be shown."""
    if value in (None, "", []):
        return "nothing"
    names: dict[Any, str] = {dict: "an object", list: "an array", str: "a string"}
    return names.get(type(value), "another type")


def parse_secrets(value: Any) -> tuple[str, ...]:
    """Accept a secret or an array of secrets; a ValueError says what was found instead."""
    secrets = value if isinstance(value, list) else [value]
    problems = []
    for index, secret in enumerate(secrets):
        where = f"[{index}]: " if len(secrets) > 1 else ""
        if not isinstance(secret, str) or not secret:
            problems.append(where + describe_type(secret))
        elif secret != secret.strip():
            problems.append(f"{where}white space around it")
        elif _PLACEHOLDER.fullmatch(secret):
            problems.append(f"{where}a placeholder")
        elif _UNSAFE.search(secret):
            problems.append(f"{where}a control or invisible character, or text that is not UTF-8")
    if problems or not secrets:
        raise ValueError(", ".join(problems) or "nothing")
    return tuple(secrets)


def parse_token_path(value: Any) -> str:
    """Accept the path of a file of tokens; `${VARIABLE}` is expanded."""
    try:
        return re.sub(r"\$\{(\w+)\}", lambda match: os.environ[match[1]], parse_text(value))
    except KeyError as error:
        raise ValueError(f"the variable {error.args[0]} is not set") from None


def load_tokens(path: str) -> tuple[str, ...]:
    """Load the tokens of a file, one a line; a line that begins with # is a comment."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = file.read(1024 * 1024).split("\n")
    except OSError as error:
        # Security: do not show the path; it may be a token, put there by mistake.
        raise ValueError(f"none that can be read: {error.strerror}") from None
    return parse_secrets([line for line in lines if line and not line.startswith("#")])


REQUIRED = object()  # as a default


class Option(NamedTuple):
    """A key of the configuration."""

    expected: str
    parse: Callable[[Any], Any] = lambda value: value  # may raise OSError or ValueError
    default: Any = None
    is_secret: bool = False  # then the ValueError of `parse` says what was found
    options: Optional[Mapping[str, Any]] = None  # those of an object


TEXT_OPTION = Option("a printable string that is not empty", parse_text)
PATH_OPTION = Option(r"a path (in JSON, \\ stands for one backslash)", parse_text)
SECRETS_OPTION = Option("a secret or an array of secrets", parse_secrets, is_secret=True)
TOKEN_FILE_OPTION = Option("a file of tokens, relative to this file", load_tokens, is_secret=True)
LOOPBACK_NETWORKS = parse_networks(["127.0.0.0/8", "::1"])
API_KEY_OPTIONS = {
    "header": Option("the name of a header", lambda text: parse_text(text, FIELD_NAME)),
    "field": TEXT_OPTION,
    "value": SECRETS_OPTION._replace(default=REQUIRED),
}
OIDC_OPTIONS = {
    "well_known_url": Option("an https URL, or http on this machine", parse_provider_url, REQUIRED),
    "audience": TEXT_OPTION,
    "client_id": TEXT_OPTION,
    "issuer": TEXT_OPTION,
}
WEBHOOK_OPTIONS = {
    "name": TEXT_OPTION,
    "type": Option(f"one of {TYPES}", lambda text: parse_text(text, "|".join(TYPES)), "central"),
    "path": Option("a path like /hook, no query", lambda text: parse_text(text, r"/[!-\"$->@-~]*")),
    "token": SECRETS_OPTION,
    "token_file": PATH_OPTION._replace(parse=parse_token_path, is_secret=True),
    "replay_window_hours": Option("a number from 0 to 87600", number_parser(0, 87600), 48),
    "public_url": Option("the URL as typed into Central", parse_public_url),
    "api_key": Option("an object", options=API_KEY_OPTIONS),
    "oidc": Option("an object", options=OIDC_OPTIONS),
}
WEBCLIENT_OPTIONS = {
    "host": Option("an address, or a host name that resolves", parse_host, REQUIRED),
    "port": Option("a port from 0 to 65535", parse_port, REQUIRED),
    "log_file": PATH_OPTION,
    "max_body_bytes": Option("a whole number from 1 to 2^30", number_parser(1, 2**30, int), 2**20),
    "request_timeout_seconds": Option("a number from 0.1 to 3600", number_parser(0.1, 3600), 10),
    "max_connections": Option("a whole number from 1 to 65535", number_parser(1, 65535, int), 256),
    "trusted_proxies": Option(
        "an array of addresses and networks", parse_networks, LOOPBACK_NETWORKS
    ),
}
CENTRAL_OPTIONS = {"webhook": Option("an object or an array of objects")}
ALTERNATIVES = (("token", "token_file"), ("header", "field"))  # one of each pair is given
TOP_OPTIONS = {
    "webclient_info": Option("an object", default=REQUIRED, options=WEBCLIENT_OPTIONS),
    "central_info": Option("an object", default=REQUIRED, options=CENTRAL_OPTIONS),
}


def parse_option(value: Any, where: str, option: Option, errors: list[str]) -> Any:
    """Return the value of a key as parsed; if it is wrong, None, and a line in `errors`."""
    if option.options:
        return parse_options(value, where, option.options, errors)
    try:
        return option.parse(value)
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        if option.is_secret:
            found = found or describe_type(value)
        else:
            is_plain = isinstance(value, (str, int, float))
            value_text = json.dumps(value)[:100] if is_plain else describe_type(value)
            found = f"{value_text}: {found}".rstrip(": ")
        errors.append(f"{where}: expected {option.expected}, found {found}")
        return None


def parse_options(
    raw: Any, where: str, options: Mapping[str, Option], errors: list[str]
) -> dict[str, Any]:
    """Return the value of each option, None if it is wrong; {} if `raw` is not an object."""
    if not isinstance(raw, dict):
        errors.append(f"{where or 'the file'}: expected an object, found {describe_type(raw)}")
        return {}
    prefix = f"{where}." if where else ""
    for name in sorted(raw.keys() - options.keys()):
        nearest = difflib.get_close_matches(name, options, 1, 0.0)[0]
        errors.append(f"{prefix}{name}: unknown key, the nearest known one is {nearest!r}")
    for first, second in ALTERNATIVES:
        count = (first in raw) + (second in raw)
        if first in options and count != 1:
            given = "both" if count else "neither"
            errors.append(f"{prefix}{first}: expected {first} or {second}, found {given}")
    values = {}
    for name, option in options.items():
        values[name] = option.default
        if name in raw or option.default is REQUIRED:
            # A required key that is missing fails as null does: no parser takes None.
            values[name] = parse_option(raw.get(name), prefix + name, option, errors)
    return values


_CENTRAL_PARTS = ("signature", "service", "delivery-id", "delivery-timestamp")
SIGNATURE_HEADERS = {  # by type: no other check can use them
    "central": [f"x-central-{part}" for part in _CENTRAL_PARTS],
    "new-central": ["signature", "signature-input"],
    **{name: [scheme.header] for name, scheme in HEADER_SIGNATURES.items()},
}


def load_webhook(raw: Any, where: str, folder: str, errors: list[str]) -> Optional[WebhookSettings]:
    """Load one webhook, and its `token_file`, relative to `folder`; None if there are errors."""
    errors_before = len(errors)
    values = parse_options(raw, where, WEBHOOK_OPTIONS, errors)
    if not values:
        return None
    tokens = values["token"]
    token_file = None
    if values["token_file"] and "token" not in raw:
        token_file = os.path.join(folder, values["token_file"])
        tokens = parse_option(token_file, f"{where}.token_file", TOKEN_FILE_OPTION, errors)
    webhook_type = values["type"]
    public_url = values["public_url"]
    if webhook_type and (webhook_type == "new-central") != ("public_url" in raw):
        errors.append(f"{where}.public_url: expected with type new-central, and only there")
    path = values["path"] or (public_url.path if public_url else None)
    if path in RESERVED_PATHS:
        errors.append(f'{where}.path: expected none of {RESERVED_PATHS}, found "{path}"')
    headers = list(SIGNATURE_HEADERS.get(webhook_type, ()))
    api_key = None
    if values["api_key"]:
        given = values["api_key"]
        api_key = ApiKey((given["header"] or "").lower(), given["field"] or "", given["value"])
        headers.extend([api_key.header] if api_key.header else [])
    oidc = None
    if values["oidc"]:
        oidc = Oidc(**values["oidc"])
        if not raw["oidc"].keys() & {"audience", "client_id"}:
            errors.append(f"{where}.oidc: expected audience or client_id or both, found neither")
        headers.append("authorization")
    for header in find_repeated(headers):
        errors.append(f"{where}: expected one check for each header, found two of {header}")
    if len(errors) > errors_before:
        return None
    window = 3600 * values["replay_window_hours"]
    return WebhookSettings(
        name=values["name"] or webhook_type,
        type=webhook_type,
        path=path,
        tokens=tokens,
        token_file=token_file,
        replay_window_seconds=window if webhook_type in SENT_AT_HEADERS else 0,
        public_url=public_url,
        api_key=api_key,
        oidc=oidc,
    )


def load_webhooks(raw: Any, folder: str, errors: list[str]) -> tuple[WebhookSettings, ...]:
    """Load the webhooks: one object, or an array of objects that can be told apart."""
    where = "central_info.webhook"
    items = {where: raw}
    if raw and isinstance(raw, list):
        items = {f"{where}[{index}]": item for index, item in enumerate(raw)}
    loaded = {}  # those without errors, by place
    names = []
    for place, item in items.items():
        settings = load_webhook(item, place, folder, errors)
        if settings:
            loaded[place] = settings
        if isinstance(item, dict):
            names.append(item.get("name"))
            if "name" not in item and len(items) > 1:
                errors.append(f"{place}.name: expected a name, since there are several webhooks")
    for name in find_repeated(name for name in names if name and isinstance(name, str)):
        errors.append(f"{where}: expected different names, found {json.dumps(name)} repeated")
    for (other_place, other), (place, settings) in itertools.combinations(loaded.items(), 2):
        is_same_path = None in (other.path, settings.path) or other.path == settings.path
        has_same_token = not set(other.tokens).isdisjoint(settings.tokens)
        if settings.type == other.type and is_same_path and has_same_token:
            errors.append(f"{place}: expected another path or token, found that of {other_place}")
    return tuple(loaded.values())


def diagnose_json(error: json.JSONDecodeError) -> str:
    """Say where a text is not JSON, and which common mistake it is."""
    text = error.doc
    character = text[error.pos : error.pos + 1]
    line = text.split("\n")[error.lineno - 1]
    problem = error.msg[0].lower() + error.msg[1:]
    is_last_comma = character in ("}", "]") and text[: error.pos].rstrip().endswith(",")
    if is_last_comma or "trailing comma" in error.msg:  # Python 3.13 names it
        error = json.JSONDecodeError("", text, text.rfind(",", 0, error.pos + 1))
        problem = "a comma after the last entry"
    elif character in ("/", "#"):
        problem = "a comment, which JSON does not have"
    elif character == "'":
        problem = "single quotes, where JSON has double quotes"
    elif "escape" in error.msg:
        problem = r"a single backslash: write \\ or, in a path, /"
    elif character.isspace() and character not in "\r\n\t ":
        problem = (
            f"a space that JSON does not have (U+{ord(character):04X}), perhaps a no-break space"
        )
    elif re.search("[\u2018-\u201f\u00ab\u00bb]", line):
        problem = "typographic quotes, where JSON has plain double quotes"
    elif re.search("control|Unterminated", error.msg):
        problem = "a string that does not end on its line: is a closing quote missing?"
    return f"line {error.lineno} column {error.colno}: not JSON: {problem}"


def read_config(data: bytes, folder: str = "") -> Config:
    """Read a configuration, and the token files that it names, relative to `folder`.

    Raises ConfigError: one argument for each error.
    """
    if b"\0" in data:
        raise ConfigError("expected UTF-8, found UTF-16: save the file as UTF-8")
    try:
        parsed, repeated = parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"line {line}: not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(diagnose_json(error)) from None
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}") from None
    errors = [f"{name}: the key is repeated" for name in repeated]
    top = parse_options(parsed, "", TOP_OPTIONS, errors)
    central = top.get("central_info")
    webhooks = load_webhooks(central["webhook"], folder, errors) if central else ()
    if errors:
        raise ConfigError(*errors)
    webclient = top["webclient_info"]
    if webclient["log_file"]:
        webclient["log_file"] = os.path.join(folder, webclient["log_file"])
    return Config(**webclient, webhook_settings=webhooks)


def load_config(path: str) -> Config:
    """Load a configuration; warn if others can read its secrets. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            config = read_config(file.read(), os.path.dirname(path))
        secret_files = {settings.token_file or path for settings in config.webhook_settings}
        secret_files.update(path for settings in config.webhook_settings if settings.api_key)
        for name in sorted(secret_files):
            warn_if_readable(name)
        return config
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None


def warn_if_readable(path: str) -> None:
    """Warn if others than its owner can read a file with secrets."""
    if os.name != "posix" or not os.stat(path).st_mode & (stat.S_IRGRP | stat.S_IROTH):
        return
    real_path = os.path.realpath(path)
    # Those of containers and of systemd, where the operator does not set permissions.
    for folder in ("/run/secrets", os.environ.get("CREDENTIALS_DIRECTORY")):
        if folder and real_path.startswith(os.path.realpath(folder) + os.sep):
            return
    log.warning("%s: holds a secret, but its group or others can read it: chmod 600", path)


def describe_webhook(settings: WebhookSettings) -> str:
    """Describe a webhook in one line, without its secrets."""
    details = [settings.type, settings.path or "any path", f"tokens: {len(settings.tokens)}"]
    if settings.public_url:
        details.append("body not protected, unless the sender covers content-digest")
    return f"{settings.name} ({', '.join(details)})"


# ---- Checking a delivery --------------------------------------------------------------------


class Webhook:
    """A configured webhook, and what the server keeps for it."""

    def __init__(self, settings: WebhookSettings) -> None:
        self.settings = settings
        self.replay_cache = ReplayCache()
        self.jwks_client = JwksClient(settings.oidc) if settings.oidc else None
        self.removed_tokens: tuple[str, ...] = ()  # removed by reloads: for a hint in the log only
        self.old_tokens_logged: dict[int, float] = {}  # by token index; monotonic seconds


def verify_any_token(settings: WebhookSettings, request: Request, now: float) -> Verified:
    """Check the signature of a request. Raises SignatureError: why the last token fails."""
    if settings.public_url:
        return verify_message_signature(request, settings.tokens, settings.public_url, now)
    if settings.type == "central":
        for name in request.repeated:  # `verify_signature` gets their values joined
            if name.startswith("x-central-"):
                raise SignatureError(f"{name} is repeated")
    failure = SignatureError("no token is configured")
    for index, token in enumerate(settings.tokens):
        try:
            if settings.type == "central":
                verify_signature(request.body, request.headers, token)
                sent_at_text = request.headers["x-central-delivery-timestamp"]
                return Verified(index, parse_timestamp(sent_at_text))
            verify_header_signature(request, HEADER_SIGNATURES[settings.type], token)
            return Verified(index, None)
        except SignatureError as error:
            failure = error
    raise failure


def authenticate_as(webhook: Webhook, request: Request, now: float) -> Verified:
    """Check all that a webhook demands: signature, API key, access token. Raises Refusal."""
    try:
        verified = verify_any_token(webhook.settings, request, now)
    except SignatureError as error:
        raise Refusal("signature", str(error)) from None
    if webhook.settings.api_key:
        check_api_key(request, webhook.settings.api_key)
    if webhook.jwks_client:
        jwks_client = webhook.jwks_client
        verify_access_token(request, jwks_client.oidc, jwks_client.signing_keys, now)
    return verified


def authenticate(
    webhooks: Sequence[Webhook], request: Request, now: float
) -> tuple[Webhook, Verified]:
    """Return the first webhook whose checks all pass, and what its signature says.

    Raises the Refusal of the webhook that passed the most checks.
    """
    checks = ("signature", "api_key", "oidc", "provider")  # in their order
    furthest = (-1, 0)
    failure = Refusal("signature", "no webhook is configured")
    for webhook in webhooks:
        try:
            return webhook, authenticate_as(webhook, request, now)
        except Refusal as refusal:
            # If two fail at the same check, prefer the one with more of its headers there.
            headers = request.headers.keys() & SIGNATURE_HEADERS[webhook.settings.type]
            progress = (checks.index(refusal.reason), len(headers))
            if progress > furthest:
                furthest = progress
                failure = refusal
                failure.webhook_name = webhook.settings.name
    raise failure


def make_delivery(
    settings: WebhookSettings,
    request: Request,
    verified: Verified,
    dedup_keys: DedupKeys,
    now: float,
) -> Delivery:
    """Return the delivery of an authentic request; an API key in its body is masked."""
    text = json_text(request.body)
    if text is not None and settings.api_key and settings.api_key.field:
        payload, _ = parse_json(text)
        payload[settings.api_key.field] = "***"
        text = json.dumps(payload)
    delivery_id = None
    sent_at = None
    if settings.type == "central":
        delivery_id = request.headers["x-central-delivery-id"]
        sent_at = request.headers["x-central-delivery-timestamp"]
    elif verified.sent_time is not None and 0 <= verified.sent_time < 1e11:
        sent_at = format_utc(verified.sent_time)
    key = ".".join([digest.hex() for digest in dedup_keys]) or None
    return Delivery(
        now, settings.name, settings.type, delivery_id, sent_at, request.body, text, key
    )


def diagnose(request: Request, webhooks: Sequence[Webhook], now: float) -> str:
    """Return a hint why a signature was not accepted, for the log alone; "" without one.

    It names no secret, and costs a few signatures for each webhook.
    """
    is_classic = "x-central-signature" in request.headers
    is_new = "signature-input" in request.headers
    types = {webhook.settings.type for webhook in webhooks}
    if is_new and not is_classic and "new-central" not in types:
        return 'looks like new Central, which needs "type": "new-central"'
    if is_classic and not is_new and "central" not in types:
        return 'looks like classic Central, which needs "type": "central"'
    for webhook in webhooks:
        settings = webhook.settings
        with contextlib.suppress(SignatureError):
            verify_any_token(replace(settings, tokens=webhook.removed_tokens), request, now)
            return "an older token would match, which a reload has removed"
        if settings.public_url:
            hint = diagnose_message_signature(request, settings.tokens, settings.public_url, now)
            if hint:
                return hint
        for token in settings.tokens if settings.type == "central" else ():
            with contextlib.suppress(SignatureError):
                verify_header_signature(request, CENTRAL_SIGNATURE, token)
                return "the body alone would match: a proxy dropped the X-Central headers"
    return ""


# ---- HTTP parsing ---------------------------------------------------------------------------

_REQUEST_LINE = re.compile(rf"{FIELD_NAME} [!-~]+ HTTP/[0-9]\.[0-9]\r\n".encode())
_FIELD = re.compile(rf"({FIELD_NAME}):([\t -~\x80-\xff]*)\r\n")
_HOST = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z\-._~!$&'()*+,;=%]*)(?::[0-9]*)?"  # RFC 9110 section 7.2
)
_ABSOLUTE_FORM = re.compile(  # the rest begins with "/" or "?", or is empty
    r"[A-Za-z][A-Za-z0-9+.\-]*://(?P<authority>[^/?#]+)(?P<rest>(?:[/?].*)?)"
)
_CHUNK_EXTENSION = (
    rf'[ \t]*;[ \t]*{FIELD_NAME}(?:[ \t]*=[ \t]*(?:{FIELD_NAME}|"(?:[\t !#-\[\]-~]|\\[\t -~])*"))?'
)
_CHUNK_LINE = re.compile(rf"([0-9A-Fa-f]{{1,16}})(?:{_CHUNK_EXTENSION})*\r\n".encode())


def parse_request_line(line: bytes) -> tuple[str, str, Optional[str], str]:
    """Return method, path, query and version (RFC 9112 section 3). Raises Refusal."""
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        detail = "the request line is malformed"
        if line.startswith((b"PROXY ", b"\0")):  # "\0" begins the rest of a binary header
            detail = "this is the PROXY protocol: switch it off at the proxy"
        raise Refusal("malformed", detail)
    method, target, version = match[0].decode().split()
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise Refusal("version", f"{version}, expected HTTP/1.0 or HTTP/1.1")
    if not target.startswith("/"):  # section 3.2.2: the absolute form must be accepted
        absolute = _ABSOLUTE_FORM.fullmatch(target)
        if not absolute or not _HOST.fullmatch(absolute["authority"]):
            raise Refusal("malformed", "the target is neither a path nor an absolute URL")
        target = "/" + absolute["rest"].removeprefix("/")
    if "#" in target:
        raise Refusal("malformed", "the target has a fragment (#)")
    path, mark, query = target.partition("?")
    return method, path, query if mark else None, version


def parse_fields(lines: Iterable[bytes]) -> tuple[dict[str, str], frozenset[str]]:
    """Return values by lower-case name, repeated ones joined with ", ", and the repeated names."""
    values: dict[str, str] = {}
    repeated = set()
    for line in lines:
        match = _FIELD.fullmatch(line.decode("latin-1"))
        # Security: nothing but text and a whole line end. Bare CR or LF, NUL, folded lines and
        # white space before the colon are read differently by different programs: that is how
        # requests are smuggled past a proxy.
        if not match:
            detail = "its name, a control character, or a line without CRLF"
            raise Refusal("malformed", f"a header field is malformed: {detail}")
        name = match[1].lower()
        value = match[2].strip(" \t")
        if name in values:
            repeated.add(name)
            value = f"{values[name]}, {value}"
        values[name] = value
    return values, frozenset(repeated)


def parse_body_length(request: Request, max_body_bytes: int) -> Optional[int]:
    """Return the length in bytes, None if it is chunked (RFC 9112 section 6). Raises Refusal."""
    length = request.headers.get("content-length")
    coding = request.headers.get("transfer-encoding")
    if coding is not None:
        if length is not None or request.version == "HTTP/1.0":
            raise Refusal("malformed", "Transfer-Encoding with Content-Length, or in HTTP/1.0")
        codings = [name.strip().lower() for name in coding.split(",")]
        if not set(codings) <= {"chunked", ""}:
            raise Refusal("coding", f"Transfer-Encoding is {coding[:40]!r}, expected chunked")
        if codings != ["chunked"]:
            raise Refusal("malformed", "Transfer-Encoding has an empty or repeated coding")
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
    """Receives from a connection until a deadline, however slowly the bytes arrive."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        super().__init__()
        self.connection = connection
        self.deadline = deadline  # monotonic seconds; it may be changed at any time

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive what has arrived, or wait for it. Raises Refusal: timeout."""
        remaining = self.deadline - time.monotonic()
        try:
            if remaining > 0:
                self.connection.settimeout(remaining)
                return self.connection.recv_into(buffer)
        except socket.timeout:
            pass
        raise Refusal("timeout", "the request was not complete in time")


class WebhookHandler(BaseHTTPRequestHandler):
    """One connection: reads requests strictly and answers them, one after the other.

    Overridden of the base: `handle_one_request` and `parse_request`, since the base parses
    leniently and with the email package; `setup`, for a deadline over a whole request. `parsed` is
    the request: `request`, in the base, is the socket.
    """

    server: WebhookServer
    rfile: io.BufferedReader

    def setup(self) -> None:
        """Read through a DeadlineReader; the time of the first request starts now."""
        super().setup()
        deadline = time.monotonic() + self.server.config.request_timeout_seconds
        self.reader = DeadlineReader(self.connection, deadline)
        self.rfile = io.BufferedReader(self.reader, 16 * 1024)
        self.is_first = True

    def handle_one_request(self) -> None:
        """Read one request, call `do_POST`, `do_GET` or `do_HEAD`, or refuse it."""
        server = self.server
        self.parsed = EMPTY_REQUEST
        self.webhooks: Sequence[Webhook] = ()
        self.close_connection = True
        try:
            if not self.wait_for_request():
                return
            self.parse_request()
            length = parse_body_length(self.parsed, server.config.max_body_bytes)
            self.webhooks = server.route(self.parsed)
            self.read_body(length)
            getattr(self, f"do_{self.parsed.method}")()  # `route` lets GET, HEAD and POST pass
        except Refusal as refusal:
            self.refuse(refusal)
        except OSError:  # the sender is gone, or does not read its answer
            self.close_connection = True
        finally:
            server.idle.add(self.connection)  # until the first byte of the next request

    def wait_for_request(self) -> bool:
        """Wait for the first byte of a request; return False if none comes."""
        try:
            while self.rfile.peek(1)[:1] == b"\r":  # RFC 9112 section 2.2: pass over empty lines
                if self.read_exactly(2) != b"\r\n":
                    raise Refusal("malformed", "a bare CR before the request line")
            if not self.rfile.peek(1):
                return False
        except Refusal as refusal:
            if refusal.reason == "timeout" and not self.is_first:  # idle for too long
                return False
            raise
        self.server.idle.discard(self.connection)
        if not self.is_first:  # the time of the first one runs since the connection was opened
            self.reader.deadline = time.monotonic() + self.server.config.request_timeout_seconds
        self.is_first = False
        return True

    def parse_request(self) -> bool:
        """Read and parse the request line and the header (RFC 9112). Raises Refusal."""
        if self.rfile.peek(1)[:1] == b"\x16":  # no line end may follow
            detail = "this is TLS, on a port for plain HTTP: use http://, or put the proxy in front"
            raise Refusal("malformed", detail)
        line = self.read_line(MAX_REQUEST_LINE_BYTES, "target_too_long")
        request_line = parse_request_line(line)
        self.parsed = Request(*request_line, *parse_fields(self.field_lines()))
        host = self.parsed.headers.get("host")
        is_missing = host is None and self.parsed.version == "HTTP/1.1"
        if is_missing or "host" in self.parsed.repeated or not _HOST.fullmatch(host or ""):
            raise Refusal("malformed", "Host is missing, malformed or repeated")
        return True

    def read_line(self, limit: int, reason: str) -> bytes:
        """Read a line; its CRLF stays. Raises Refusal: malformed, timeout, `reason` if too long."""
        line = self.rfile.readline(limit + len(b"\r\n"))
        if line.endswith(b"\r\n"):
            return line
        if len(line) > limit:
            raise Refusal(reason, f"a line is above {limit} bytes")
        if line.endswith(b"\n"):
            raise Refusal("malformed", "a line ends without CR")
        raise Refusal("malformed", "the connection ended within the request")

    def field_lines(self) -> Iterable[bytes]:
        """Yield the lines of header or trailer fields; read the empty line after them as well."""
        size = 0
        for _ in range(MAX_HEADER_FIELDS + 1):
            line = self.read_line(MAX_HEADER_BYTES, "headers_too_large")
            if line == b"\r\n":
                return
            size += len(line)
            if size > MAX_HEADER_BYTES:
                raise Refusal("headers_too_large", f"the header is above {MAX_HEADER_BYTES} bytes")
            yield line
        raise Refusal("headers_too_large", f"more than {MAX_HEADER_FIELDS} header fields")

    def read_body(self, length: Optional[int]) -> None:
        """Read the body (None: chunked), after a 100 Continue if the sender waits for it."""
        request = self.parsed
        expect = request.headers.get("expect", "").lower()
        if expect == "100-continue" and request.version == "HTTP/1.1" and length != 0:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.body = self.read_chunked() if length is None else self.read_exactly(length)

    def read_exactly(self, length: int) -> bytes:
        """Read `length` bytes. Raises Refusal: malformed, timeout."""
        data = self.rfile.read(length)
        if len(data) < length:
            raise Refusal("malformed", "the connection ended within the request")
        return data

    def read_chunked(self) -> bytes:
        """Read a chunked body (RFC 9112 section 7.1); its trailers are checked and dropped."""
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
        parse_fields(self.field_lines())
        return bytes(body)

    def do_POST(self) -> None:
        """Handle a delivery: verify, check that it is recent and new, store, answer.

        Raises Refusal if it is not accepted. Nothing is lost: the sender may send it again.
        """
        server = self.server
        request = self.parsed
        now = time.time()
        webhook, verified = authenticate(self.webhooks, request, now)
        self.webhooks = (webhook,)
        settings = webhook.settings
        sent_at_text = request.headers.get(SENT_AT_HEADERS.get(settings.type, ""), "")
        check_age(verified.sent_time, sent_at_text, settings.replay_window_seconds, now)
        server.log_old_token(webhook, verified.token_index)
        dedup_keys = make_dedup_keys(settings.type, request)
        delivery = make_delivery(settings, request, verified, dedup_keys, now)
        entry = server.output.render_entry(delivery, dedup_keys, webhook.replay_cache)
        if not webhook.replay_cache.reserve(dedup_keys):
            server.metrics.count(settings.name, "duplicate", len(request.body))
            self.reply(200, b'{"status": "duplicate"}')
            return
        try:  # it commits or releases the reservation, perhaps after our 503
            server.output.write(entry)
        except OutputError as error:
            raise Refusal("output", str(error)) from None
        server.metrics.count(settings.name, "accepted", len(request.body))
        if delivery.text is None:
            self.report_not_json(settings)
        self.reply(200, b'{"status": "ok"}')

    def report_not_json(self, settings: WebhookSettings) -> None:
        """Count and log a body that was stored although it is not JSON."""
        guess = guess_format(self.parsed.body)
        if settings.type == "ip-fabric" and guess.startswith("XML"):
            return
        self.server.metrics.count_not_json(settings.name)
        if self.server.log_limiter.allows():
            size = len(self.parsed.body)
            log.warning("%r: stored %d bytes that are not JSON: %s", settings.name, size, guess)

    def do_GET(self) -> None:
        """Answer /health or /metrics."""
        server = self.server
        if self.parsed.path == "/metrics":
            text = server.metrics.render(server.count_in_flight())
            self.reply(200, text, "text/plain; version=0.0.4; charset=utf-8")
        elif server.output.is_failing() or server.is_stopping:
            self.reply(503, b'{"error": "service unavailable"}')
        else:
            self.reply(200, b'{"status": "ok"}')

    do_HEAD = do_GET

    def reply(
        self, status: int, body: bytes, content_type: str = JSON_TYPE, extra_header: str = ""
    ) -> None:
        """Answer in one piece; decide whether the connection goes on. `extra_header` has a CRLF."""
        server = self.server
        request = self.parsed
        connection = request.headers.get("connection", "").lower()
        options = [option.strip() for option in connection.split(",")]
        must_close = status >= 400 and status != 401  # after a 401 the connection is in step
        needs_linger = must_close and status != 408  # who was too slow gets no more time
        self.close_connection = (
            must_close
            or "close" in options
            or (request.version == "HTTP/1.0" and "keep-alive" not in options)
            or server.is_stopping
            or not server.has_room()
        )
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            f"Date: {server.date}\r\n"
            f"Content-Type: {content_type}\r\n"
            f"Content-Length: {len(body)}\r\n"
            f"Connection: {'close' if self.close_connection else 'keep-alive'}\r\n"
            f"{extra_header}\r\n"
        ).encode()
        self.connection.settimeout(server.config.request_timeout_seconds)  # for the whole answer
        self.wfile.write(head if request.method == "HEAD" else head + body)
        self.reader.deadline = time.monotonic() + KEEP_ALIVE_SECONDS
        log.debug("%d to %s: %s", status, self.client_address, body[:100])
        if needs_linger or (self.close_connection and server.is_stopping):
            self.linger()

    def refuse(self, refusal: Refusal) -> None:
        """Log, count and answer a refusal."""
        server = self.server
        request = self.parsed
        status = STATUS_BY_REASON[refusal.reason]
        name = refusal.webhook_name
        if not name and len(self.webhooks) == 1:
            name = self.webhooks[0].settings.name
        server.metrics.count(name, refusal.reason, len(request.body))
        if server.log_limiter.allows():
            receiver = f" for {name!r}" if name else ""
            text = f"{status} to {self.sender_address()}{receiver}: {refusal.reason}: {refusal}"
            if refusal.reason == "signature":
                hint = diagnose(request, self.webhooks, time.time())
                text += f" ({hint})" if hint else ""
            log.warning("%s", text)
        extra_header = "Retry-After: 1\r\n" if status == 503 else ""
        if status == 401:
            needs_token = any(webhook.settings.oidc for webhook in self.webhooks)
            scheme = "Bearer" if needs_token else "HMAC-SHA256"
            extra_header = f'WWW-Authenticate: {scheme} realm="central webhook"\r\n'
        elif status == 405:
            allowed = "GET, HEAD" if request.path in RESERVED_PATHS else "POST"
            extra_header = f"Allow: {allowed}\r\n"
        with contextlib.suppress(OSError):  # the sender is gone
            answer = {"error": HTTPStatus(status).phrase.lower()}
            self.reply(status, json.dumps(answer).encode(), JSON_TYPE, extra_header)

    def linger(self) -> None:
        """Read and drop what comes for a while: closing with unread data loses the answer."""
        self.server.idle.add(self.connection)
        with contextlib.suppress(OSError, Refusal):
            self.connection.shutdown(socket.SHUT_WR)
            self.reader.deadline = time.monotonic() + LINGER_SECONDS
            while self.rfile.read1(1 << 16):
                pass

    def sender_address(self) -> str:
        """Return the sender: the last address of X-Forwarded-For if the peer is trusted."""
        is_tcp = isinstance(self.client_address, tuple)  # a Unix socket has a path
        address = str(self.client_address[0]) if is_tcp else ""
        if address:
            parsed = ipaddress.ip_address(address.partition("%")[0])
            parsed = getattr(parsed, "ipv4_mapped", None) or parsed
            if not any(parsed in network for network in self.server.config.trusted_proxies):
                return address
        forwarded = self.parsed.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
        return parse_forwarded_address(forwarded) or address or "localhost"


def parse_forwarded_address(text: str) -> str:
    """Return the address of `a`, `a:port`, `[v6]` or `[v6]:port`; "" if it is none of these."""
    match = re.fullmatch(
        r"\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9.]+)(?::[0-9]+)?|([0-9A-Fa-f:.]+)", text
    )
    try:
        return str(ipaddress.ip_address(match[1] or match[2] or match[3])) if match else ""
    except ValueError:
        return ""


def listen_on(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises StartError if the address cannot be bound."""
    if host == "localhost":
        host = "127.0.0.1"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        dualstack = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # "::": IPv4 too
        return socket.create_server(
            address, family=family, backlog=LISTEN_QUEUE, dualstack_ipv6=dualstack
        )
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # it repeats the address
        is_host = not port or error.errno == errno.EADDRNOTAVAIL
        where = "webclient_info.host" if is_host else "webclient_info.port"
        raise StartError(f"{where}: {host} port {port}: {reason}") from None


class WebhookServer(ThreadingHTTPServer):
    """Serves each connection in a thread; threads are reused, and as many as were needed at once.

    At most `max_connections` are open; more wait in the listen queue. `connections` holds the open
    ones and `idle` those of them that wait for a request or for their end.
    """

    def __init__(self, config: Config, output: Output, listener: socket.socket) -> None:
        super().__init__(listener.getsockname(), WebhookHandler, bind_and_activate=False)
        self.socket.close()  # the base made one; its `server_bind` would look up the host's name
        self.socket = listener
        self.socket.setblocking(False)
        if listener.family in (socket.AF_INET, socket.AF_INET6):  # accepted sockets inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.config = config
        self.webhooks = tuple(Webhook(settings) for settings in config.webhook_settings)
        self.output = output
        self.metrics = Metrics(settings.name for settings in config.webhook_settings)
        self.log_limiter = LogLimiter()
        self.is_stopping = False
        self.date = email.utils.formatdate(usegmt=True)  # service_actions refreshes it
        self.connections: set[socket.socket] = set()
        self.idle: set[socket.socket] = set()
        self.connection_closed = threading.Condition()  # notified when a connection was closed
        self.accepted_connections: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread_count = 0
        # What the main thread waits for: numbers of signals, or None if stdout is gone.
        self.events: queue.SimpleQueue[Optional[int]] = queue.SimpleQueue()

    def has_room(self) -> bool:
        """Return True if another connection need not wait."""
        return len(self.connections) < self.config.max_connections

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. Raises OSError without a place for it: `serve_forever` retries."""
        with self.connection_closed:
            if not self.connection_closed.wait_for(self.has_room, 0.1):
                raise BlockingIOError("max_connections are open")
        try:
            connection, address = super().get_request()
        except OSError as error:
            if not isinstance(error, BlockingIOError):  # no more descriptors, mostly
                if self.log_limiter.allows():
                    log.error("cannot accept a connection: %s", error.strerror)
                time.sleep(0.1)
            raise
        self.idle.add(connection)
        self.connections.add(connection)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand a connection to a thread; `service_actions`, called next, starts one if needed."""
        self.accepted_connections.put((request, client_address))

    def serve_connections(self) -> None:
        """Serve one connection after the other, for ever; runs in a thread of its own."""
        while True:
            self.process_request_thread(*self.accepted_connections.get())

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, and make its place free."""
        super().shutdown_request(request)
        self.idle.discard(request)
        self.connections.discard(request)
        with self.connection_closed:
            self.connection_closed.notify()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a bug of ours: no input of a sender may get here."""
        log.error("internal error: %r", sys.exc_info()[1], exc_info=True)

    def service_actions(self) -> None:
        """Do what is due after each connection, and every poll interval of `serve_forever`."""
        self.date = email.utils.formatdate(usegmt=True)
        with contextlib.suppress(RuntimeError):  # no more threads now: it tries again
            while self.thread_count < len(self.connections):
                threading.Thread(target=self.serve_connections, daemon=True).start()
                self.thread_count += 1
        suppressed = self.log_limiter.take_suppressed()
        if suppressed:
            log.warning("%d more warnings within a second", suppressed)
        if self.output.stdout_closed and not self.is_stopping:
            self.events.put(None)

    def count_in_flight(self) -> int:
        """Return how many requests are being handled."""
        return max(0, len(self.connections) - len(self.idle))

    def route(self, request: Request) -> Sequence[Webhook]:
        """Return the webhooks that a request may be for; none for a path of the receiver itself."""
        path = request.path
        is_reserved = path in RESERVED_PATHS
        webhooks = [webhook for webhook in self.webhooks if webhook.settings.path in (None, path)]
        if not webhooks and not is_reserved:
            raise Refusal("not_found", f"no webhook at {path[:200]!r}")
        if request.method not in (("GET", "HEAD") if is_reserved else ("POST",)):
            raise Refusal("method", f"{request.method[:20]} on {path[:200]!r}")
        return [] if is_reserved else webhooks

    def log_old_token(self, webhook: Webhook, token_index: int) -> None:
        """Log that a token other than the first is still in use, at most once a minute."""
        now = time.monotonic()
        if token_index and now - webhook.old_tokens_logged.get(token_index, -math.inf) > 60:
            webhook.old_tokens_logged[token_index] = now
            position = f"{token_index + 1} of {len(webhook.settings.tokens)}"
            log.info("webhook %r: token %s still matches", webhook.settings.name, position)

    def restore_caches(self, webhooks: Iterable[Webhook], path: Optional[str]) -> None:
        """Restore the replay caches of webhooks from a log file. Raises OutputError."""
        webhooks = [webhook for webhook in webhooks if webhook.settings.type not in NO_DEDUP]
        if webhooks and path:
            caches = {webhook.settings.name: webhook.replay_cache for webhook in webhooks}
            windows = [webhook.settings.replay_window_seconds for webhook in webhooks]
            oldest = time.time() - max(windows) - MAX_FUTURE_SECONDS if all(windows) else 0.0
            restore_replay_caches(path, caches, oldest)

    def reload(self, config: Config) -> None:
        """Swap in a new configuration; what is remembered stays.

        Raises OutputError if its log file cannot be used; the old configuration stays whole.
        """
        if (config.host, config.port) != (self.config.host, self.config.port):
            log.warning("host and port change with a restart only")
        before = {webhook.settings.name: webhook for webhook in self.webhooks}
        webhooks = tuple(Webhook(settings) for settings in config.webhook_settings)
        unknown = []  # whose caches lack lines of the log file
        for webhook in webhooks:
            window = webhook.settings.replay_window_seconds
            old = before.get(webhook.settings.name)
            if old and old.settings.type != webhook.settings.type:
                old = None  # another sender took its name
            if old:
                webhook.replay_cache = old.replay_cache
                tokens = [*old.settings.tokens, *old.removed_tokens]
                removed = [token for token in tokens if token not in webhook.settings.tokens]
                webhook.removed_tokens = tuple(removed[:4])
                if webhook.settings.oidc == old.settings.oidc:
                    webhook.jwks_client = old.jwks_client
            has_same_window = old and old.settings.replay_window_seconds == window
            if not has_same_window or config.log_file != self.config.log_file:
                unknown.append(webhook)
        self.output.reload(config.log_file, config.request_timeout_seconds)
        try:
            self.restore_caches(unknown, config.log_file)
        except OutputError:
            self.output.reload(self.config.log_file, self.config.request_timeout_seconds)
            raise
        self.metrics.add_webhooks(settings.name for settings in config.webhook_settings)
        self.config = replace(config, host=self.config.host, port=self.config.port)
        self.webhooks = webhooks

    def stop(self) -> None:
        """Accept nothing new, finish the requests in flight, then let `handle_alert` finish."""
        deadline = time.monotonic() + DRAIN_SECONDS
        self.is_stopping = True
        self.shutdown()
        quiet_deadline = time.monotonic() + DRAIN_QUIET_SECONDS
        # Clients in the listen queue consider themselves connected; others may come for ever.
        with contextlib.suppress(OSError):
            while time.monotonic() < quiet_deadline:
                self.process_request(*self.get_request())
                self.service_actions()
        self.server_close()
        wait_until(lambda: not self.connections, DRAIN_QUIET_SECONDS)
        for connection in list(self.idle):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        wait_until(lambda: not self.connections, deadline - time.monotonic())
        if self.output.alert_worker:
            self.output.alert_worker.drain()


# ---- Metrics --------------------------------------------------------------------------------

METRICS = {  # name: type, help
    "deliveries_total": ("counter", "Requests by webhook (empty: none is known) and result."),
    "last_accepted_timestamp_seconds": ("gauge", "Time of the last accepted delivery, 0: none."),
    "not_json_total": ("counter", "Accepted deliveries whose body is not JSON."),
    "body_bytes_total": ("counter", "Bytes of bodies received."),
    "requests_in_flight": ("gauge", "Requests being handled."),
}
METRIC_LABELS = ("webhook", "result")


class Metrics:
    """Metrics in the text format of Prometheus; no label comes from a sender. Thread-safe."""

    def __init__(self, webhook_names: Iterable[str]) -> None:
        self.lock = threading.Lock()
        # By metric and the values of its labels, the first ones of METRIC_LABELS.
        self.values: dict[tuple[str, ...], float] = {("body_bytes_total",): 0}
        self.add_webhooks(webhook_names)

    def add_webhooks(self, webhook_names: Iterable[str]) -> None:
        """Set the series of webhooks to 0 that do not exist yet."""
        with self.lock:
            for name in ("", *webhook_names):
                for result in (*STATUS_BY_REASON, "accepted", "duplicate"):
                    self.values.setdefault(("deliveries_total", name, result), 0)
                if name:
                    self.values.setdefault(("last_accepted_timestamp_seconds", name), 0)
                    self.values.setdefault(("not_json_total", name), 0)

    def count(self, webhook_name: str, result: str, body_bytes: int) -> None:
        """Count a request; `webhook_name` is "" if it belongs to none."""
        with self.lock:
            self.values["deliveries_total", webhook_name, result] += 1
            self.values[("body_bytes_total",)] += body_bytes
            if result == "accepted":
                self.values["last_accepted_timestamp_seconds", webhook_name] = round(time.time(), 3)

    def count_not_json(self, webhook_name: str) -> None:
        """Count an accepted delivery whose body is not JSON."""
        with self.lock:
            self.values["not_json_total", webhook_name] += 1

    def render(self, in_flight: int) -> bytes:
        """Return all metrics as text."""
        with self.lock:
            values = {**self.values, ("requests_in_flight",): in_flight}
        lines = []
        for metric, (metric_type, about) in METRICS.items():
            name = f"central_webhook_{metric}"
            lines.extend([f"# HELP {name} {about}", f"# TYPE {name} {metric_type}"])
            for series in sorted(series for series in values if series[0] == metric):
                labels = [  # Prometheus quotes and escapes as JSON does
                    f"{label}={json.dumps(text, ensure_ascii=False)}"
                    for label, text in zip(METRIC_LABELS, series[1:])
                ]
                label_text = f"{{{','.join(labels)}}}" if labels else ""
                lines.append(f"{name}{label_text} {values[series]}")
        return ("\n".join(lines) + "\n").encode()


# ---- Signals and systemd --------------------------------------------------------------------

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
RELOAD_SIGNALS = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()  # Windows has none


def notify(*lines: str) -> None:
    """Report our state to systemd, if it asks for it (sd_notify(3))."""
    address = re.sub("^@", "\0", os.environ.get("NOTIFY_SOCKET", ""))  # @: an abstract name
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
            messenger.setblocking(False)
            messenger.sendto("\n".join(lines).encode(), address)
    except OSError as error:
        log.warning("NOTIFY_SOCKET: %s", error.strerror)


def inherited_socket() -> Optional[socket.socket]:
    """Return the socket that systemd has passed, if any (sd_listen_fds(3)). Raises StartError."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise StartError(f"LISTEN_FDS: expected 1, found {count}: use a single ListenStream= line")
    try:
        inherited = socket.socket(fileno=3)
        if inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return inherited
    except OSError as error:
        raise StartError(f"LISTEN_FDS: descriptor 3: {error.strerror}") from None
    raise StartError("LISTEN_FDS: the inherited socket does not listen")


def reload_config(server: WebhookServer, path: str) -> None:
    """Load the configuration and swap it in, or keep the old one and log the errors."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        config = load_config(path)
        server.reload(config)
        names = ", ".join(settings.name for settings in config.webhook_settings)
        log.info("configuration reloaded: %s", names)
    except (ConfigError, OutputError) as error:
        for text in error.args:
            log.error("configuration not reloaded, the old one stays: %s: %s", path, text)
    except Exception as bug:  # must not stop a receiver that works
        log.error("configuration not reloaded: internal error: %r", bug, exc_info=True)
    notify("READY=1")


def serve(server: WebhookServer, path: str) -> int:
    """Serve until a signal says stop, or stdout is gone; return the exit code."""
    stop_signals = []

    def on_signal(number: int, frame: Any) -> None:
        if number in STOP_SIGNALS:
            stop_signals.append(number)
        if len(stop_signals) > 1:
            os._exit(EXIT_FAILURE if server.output.stdout_closed else 0)
        server.events.put(number)

    for number in (*STOP_SIGNALS, *RELOAD_SIGNALS):
        signal.signal(number, on_signal)
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    notify("READY=1")
    while True:
        with contextlib.suppress(queue.Empty):
            # With a time-out, since a signal just before `get` would not wake it up.
            event = server.events.get(timeout=0.5)
            if event not in RELOAD_SIGNALS:
                break
            reload_config(server, path)
    notify("STOPPING=1")
    server.stop()
    if server.output.stdout_closed:
        log.error("stopped: nobody reads stdout any more")
        return EXIT_FAILURE
    log.info("stopped; %d requests were cut off", server.count_in_flight())
    return 0


def stay_on_one_processor() -> None:
    """Run on one processor, a random one of those allowed.

    One thread at a time runs Python, and handing the interpreter lock to another processor costs
    1.4 to 1.7 times the CPU: 11 context switches a delivery instead of 2.
    """
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    if has_gil and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # not allowed: then it is slower
            os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})


# ---- Command line ---------------------------------------------------------------------------

SAMPLE = {  # as classic Central sends it; the samples of all other types have the same body
    "id": "AWsample0001",
    "alert_type": "AP disconnected",
    "state": "Open",
    "severity": "Critical",
    "description": "AP sample-ap-1 disconnected",
    "device_id": "CNSAMPLE01",
    "details": {"hostname": "sample-ap-1", "serial": "CNSAMPLE01", "site": "Sample site"},
    "text": "This is a sample, sent with --send-sample",
}


def sign_sample(settings: WebhookSettings, url: str, number: int) -> tuple[dict[str, str], bytes]:
    """Return the headers and the body of a sample alert for `url`, signed with the first token."""
    now = time.time()
    payload = {**SAMPLE, "timestamp": int(now), "time": format_utc(now), "sample": number}
    headers = {"content-type": JSON_TYPE, "date": email.utils.formatdate(now, usegmt=True)}
    if settings.api_key and settings.api_key.header:
        headers[settings.api_key.header] = settings.api_key.values[0].encode().decode("latin-1")
    elif settings.api_key:
        payload[settings.api_key.field] = settings.api_key.values[0]
    body = json.dumps(payload).encode()
    token = settings.tokens[0]
    if settings.public_url:
        components = '"@method" "@target-uri" "@authority" "@scheme" "@path" "date"'
        text = f"sig1=({components});created={int(now)}"
        covered = StructuredField(text).parse_dictionary()["sig1"]
        _, mark, query = url.partition("?")
        request = Request("POST", "", query if mark else None, "HTTP/1.1", headers, frozenset())
        base = signature_base(request, covered, settings.public_url.spellings[0])
        headers["signature-input"] = text
        headers["signature"] = "sig1=" + sign_base(token.encode(), base).decode()
    elif settings.type == "central":
        signed_headers = {
            "x-central-service": "Alerts",
            "x-central-delivery-id": f"sample-{int(now * 1000)}-{number}",
            "x-central-delivery-timestamp": format_utc(now),
        }
        headers.update(signed_headers)
        signed = body + "".join(signed_headers.values()).encode()
        headers["x-central-signature"] = CENTRAL_SIGNATURE.sign(signed, token).decode()
    else:
        scheme = HEADER_SIGNATURES[settings.type]
        headers[scheme.header] = scheme.sign(body, token).decode()
    return headers, body


def send_sample(config: Config, url: str, name: Optional[str], header_lines: Sequence[str]) -> int:
    """Send a signed sample to `url` ("": the configured address) and print what comes back."""
    matches = [settings for settings in config.webhook_settings if name in (None, settings.name)]
    if len(matches) != 1:
        names = ", ".join(settings.name for settings in config.webhook_settings)
        return fail(f"--webhook: expected one of {names}", EXIT_USAGE)
    settings = matches[0]
    if not url and not config.port:
        return fail("--send-sample: expected a URL, since port 0 is any free port", EXIT_USAGE)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    url = url or f"http://{format_host(host)}:{config.port}{settings.path or '/centralwebhook'}"
    try:
        split_url(url)
    except ValueError as error:
        return fail(f"--send-sample: {error}", EXIT_USAGE)
    headers, body = sign_sample(settings, url, 1)
    for line in header_lines:
        field_name, colon, value = line.partition(":")
        if not colon or not re.fullmatch(FIELD_NAME, field_name) or _UNSAFE.search(value):
            return fail("--header: expected 'Name: value'", EXIT_USAGE)
        headers[field_name.lower()] = value.strip()
    started = time.monotonic()
    try:
        status, data = http_request("POST", url, headers, body, SAMPLE_TIMEOUT_SECONDS)
    except HTTP_ERRORS as error:
        return fail(f"{url}: {str(error) or type(error).__name__}", EXIT_FAILURE)
    milliseconds = 1000 * (time.monotonic() - started)
    print_line(f"{status} {data[:500].decode(errors='replace').strip()} {milliseconds:.0f} ms")
    return 0 if status == 200 else EXIT_FAILURE


def run_demo(render: Callable[[Delivery], str]) -> int:
    """Start a receiver on a free port, send it samples and a forged one, show the answers."""
    example = {
        "webclient_info": {"host": "localhost", "port": 0},
        "central_info": {"webhook": {"name": "demo", "token": os.urandom(15).hex()}},
    }
    check_handle_alert()
    config = read_config(json.dumps(example).encode())
    output = Output(None, config.request_timeout_seconds, render)
    server = WebhookServer(config, output, listen_on(config.host, config.port))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/centralwebhook"
    print_error(f"a receiver with a throw-away token listens on {url}")
    statuses = []
    for number in range(1, 5):
        headers, body = sign_sample(config.webhook_settings[0], url, number)
        title = f"signed alert {number}"
        if number == 4:
            title = "forged alert, one word of its body changed"
            body = body.replace(b"Critical", b"Harmless")
        try:
            status, answer = http_request("POST", url, headers, body, SAMPLE_TIMEOUT_SECONDS)
        except HTTP_ERRORS as error:
            return fail(f"{url}: {error}", EXIT_FAILURE)
        flush_stderr()
        print_error(f"{title}: {status} {answer.decode()}")
        statuses.append(status)
    return 0 if statuses == [200, 200, 200, 401] else EXIT_FAILURE


def check_config(config: Config) -> int:
    """Say what a start would do, and check that it could. Raises OutputError, StartError."""
    log_file = config.log_file or "none, so a 200 is only as safe as what reads stdout"
    lines = [f"host: {config.host}; port: {config.port}", f"log_file: {log_file}"]
    for line in (*lines, *map(describe_webhook, config.webhook_settings)):
        print_line(line)
    check_handle_alert()
    listen_on(config.host, 0).close()
    if config.log_file:
        is_new = not os.path.lexists(config.log_file)
        os.close(open_log_file(config.log_file))
        if is_new:
            os.unlink(config.log_file)
    return 0


def print_line(text: str) -> None:
    """Write a line to stdout, in ASCII, past its buffer. Raises OSError."""
    os.write(STDOUT, (escape_text(text) + "\n").encode("ascii", "backslashreplace"))


def fail(message: str, code: int) -> int:
    """Say in one line why the program ends, after what was logged before; return its exit code."""
    flush_stderr()
    print_error(f"{PROGRAM}: error: {escape_text(message)}")
    return code


def parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line; exits with 2 on wrong usage."""
    parser = argparse.ArgumentParser(PROGRAM, description="Receive alerts of HPE Aruba Central.")
    add = parser.add_argument
    add("-i", "--input", metavar="FILE", help="the configuration, see input_info.json.example")
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("-t", "--check-config", action="store_true", help="check the configuration and exit")
    sample = "send a signed sample alert to URL (default: the configured address) and exit"
    mode("--send-sample", nargs="?", const="", metavar="URL", help=sample)
    mode("--demo", action="store_true", help="show the receiver at work; needs no configuration")
    add("--webhook", metavar="NAME", help="the webhook of the sample, if there are several")
    header = "a header to add to the sample, for example an access token"
    add("--header", metavar="'NAME: VALUE'", action="append", default=[], help=header)
    formats = "format of stdout; auto: pretty on a terminal, otherwise JSON Lines"
    add("--format", choices=("auto", "pretty", "json"), default="auto", help=formats)
    add("-v", "--verbose", action="store_true", help="log more")
    add("--version", action="version", version=f"{PROGRAM} {VERSION}")
    options = parser.parse_args(argv)
    if bool(options.input) == options.demo:
        parser.error("expected either -i FILE or --demo")
    if options.send_sample is None and (options.webhook or options.header):
        parser.error("--webhook and --header need --send-sample")
    return options


def choose_render(output_format: str) -> Callable[[Delivery], str]:
    """Return how stdout shows a delivery."""
    is_terminal = os.isatty(STDOUT)
    if output_format == "json" or (output_format == "auto" and not is_terminal):
        return render_json
    has_colour = is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return functools.partial(render_pretty, colour=has_colour)


def check_handle_alert() -> None:
    """Check that `handle_alert` is None or a function that runs when called. Raises StartError."""
    tests = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
    call = getattr(handle_alert, "__call__", None)  # noqa: B004
    never_runs = any(test(handle_alert) or test(call) for test in tests)
    if never_runs or not (handle_alert is None or callable(handle_alert)):
        expected = "a function that is neither async nor a generator"
        raise StartError(f"handle_alert: expected {expected}, found {handle_alert!r}")


def start(config: Config, path: str, render: Callable[[Delivery], str]) -> int:
    """Open the outputs, bind, restore the replay caches, serve. Raises OutputError, StartError."""
    check_handle_alert()
    for number in STOP_SIGNALS:  # until `serve` handles them
        signal.signal(number, lambda number, frame: os._exit(0))
    for number in RELOAD_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "win32":
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    stay_on_one_processor()
    alert_worker = AlertWorker(handle_alert) if handle_alert else None
    output = Output(config.log_file, config.request_timeout_seconds, render, alert_worker)
    listener = inherited_socket() or listen_on(config.host, config.port)
    server = WebhookServer(config, output, listener)
    server.restore_caches(server.webhooks, config.log_file)
    address: Any = listener.getsockname()
    place = f"{address}"
    if isinstance(address, tuple):
        place = f"{address[0]} port {address[1]} (http://{format_host(address[0])}:{address[1]})"
    webhooks = ", ".join(map(describe_webhook, config.webhook_settings))
    outputs = f"stdout, {config.log_file}" if config.log_file else "stdout"
    text = "%s %s listens on %s; webhooks: %s; output: %s"
    log.info(text, PROGRAM, VERSION, place, webhooks, outputs)
    return serve(server, path)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the program; return its exit code."""
    options = parse_arguments(argv)
    threading.stack_size(THREAD_STACK_BYTES)
    start_logging(options.verbose)
    try:
        if options.demo:
            return run_demo(choose_render(options.format))
        config = load_config(options.input)
        if options.send_sample is not None:
            return send_sample(config, options.send_sample, options.webhook, options.header)
        if options.check_config:
            return check_config(config)
        return start(config, options.input, choose_render(options.format))
    except ConfigError as error:
        for text in error.args:
            fail(f"{options.input}: {text}", EXIT_CONFIG)
        return EXIT_CONFIG
    except (OutputError, StartError) as error:
        return fail(str(error), EXIT_FAILURE)
    except OSError as error:
        return fail(f"stdout: {error.strerror or error}", EXIT_FAILURE)
    except KeyboardInterrupt:
        return EXIT_FAILURE if options.send_sample is not None else 0
    finally:
        flush_stderr()


if __name__ == "__main__":
    sys.exit(main())
