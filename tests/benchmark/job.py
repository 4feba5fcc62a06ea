"""What every peer of the benchmark does with a delivery: the receiver's job, without its niceties.

It leaves out what the receiver does in addition (age, strict HTTP, metrics, several tokens),
and it puts the body into its line as it came: a peer is measured at its best.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import hmac
import json
import os
import threading
import time

TOKEN = "webhook-secret-token"
PATH = "/centralwebhook"
REMEMBERED_DELIVERIES = 100_000


class Job:
    """Verifies, remembers and writes deliveries. A class because it holds the memory."""

    def __init__(self):
        self.lock = threading.Lock()
        self.seen = set()
        self.order = collections.deque()

    def take(self, body, headers):
        """Take one delivery; return the status and the answer. `headers.get` finds by lower-case
        name.
        """
        signature = headers.get("x-central-signature", "").encode("latin-1")
        service = headers.get("x-central-service", "")
        delivery_id = headers.get("x-central-delivery-id", "")
        timestamp = headers.get("x-central-delivery-timestamp", "")
        signed = body + (service + delivery_id + timestamp).encode("latin-1")
        expected = base64.b64encode(hmac.digest(TOKEN.encode(), signed, "sha256"))
        if not hmac.compare_digest(expected, signature):
            return 401, {"error": "unauthorized"}
        keys = (signature, hashlib.sha256(delivery_id.encode("latin-1") + b"\0" + body).digest())
        with self.lock:
            if not self.seen.isdisjoint(keys):
                return 200, {"status": "duplicate"}
            self.seen.update(keys)
            self.order.append(keys)
            if len(self.order) > REMEMBERED_DELIVERIES:
                self.seen.difference_update(self.order.popleft())
        try:
            text = body.decode()
            json.loads(text)
        except ValueError:
            text = "null"
        line = (
            f'{{"received_at": "{time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}", '
            f'"webhook": "noc", "type": "central", "delivery_id": {json.dumps(delivery_id)}, '
            f'"sent_at": {json.dumps(timestamp)}, "alert": {text}}}\n'
        )
        os.write(1, line.encode())
        return 200, {"status": "ok"}
