"""What a test of this folder needs beside Python, and whether it is there."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import unittest


def is_set(name):
    """Tell whether a variable of the environment says yes."""
    return os.environ.get(name, "").lower() not in ("", "0", "no", "false")


WANTED = is_set("INTEROP" if "INTEROP" in os.environ else "CI")


def need(what, found):
    """Return what `found()` returns, once this folder's tests are wanted and it is there.

    Raises:
        unittest.SkipTest: they are not wanted, or it is missing.
        RuntimeError: it is missing, and CI is set.
    """
    if not WANTED:
        raise unittest.SkipTest("runs only with CI or INTEROP set")
    result = found()
    if not result:
        if is_set("CI"):
            raise RuntimeError(f"{what} is missing, and CI is set")
        raise unittest.SkipTest(f"{what} is missing")
    return result


def need_program(name):
    """Return the path of a program."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return need(name, lambda: shutil.which(name, path=path))


def need_module(name):
    """Make sure that a package of requirements.txt can be imported."""
    need(name, lambda: importlib.util.find_spec(name))


def free_ports(count, address="127.0.0.1"):
    """Return ports that nobody uses at this moment."""
    with contextlib.ExitStack() as stack:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sockets = [stack.enter_context(socket.socket(family)) for _ in range(count)]
        for one in sockets:
            one.bind((address, 0))
        return [one.getsockname()[1] for one in sockets]


def make_certificates(folder, name="DNS:localhost"):
    """Make an authority (authority.pem) and a certificate by it (fullchain.pem, privkey.pem)."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    (folder / "extensions").write_text(
        f"subjectAltName={name}\nbasicConstraints=critical,CA:FALSE\n"
        "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\n"
        "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    )
    for command in (
        [
            "req",
            "-x509",
            *key,
            "-days",
            "2",
            "-subj",
            "/CN=test authority",
            "-addext",
            "keyUsage=critical,keyCertSign",
        ]
        + ["-keyout", "authority.key", "-out", "authority.pem"],
        [
            "req",
            "-new",
            *key,
            "-subj",
            "/CN=localhost",
            "-keyout",
            "privkey.pem",
            "-out",
            "request.pem",
        ],
        [
            "x509",
            "-req",
            "-in",
            "request.pem",
            "-CA",
            "authority.pem",
            "-CAkey",
            "authority.key",
            "-CAcreateserial",
        ]
        + ["-days", "2", "-extfile", "extensions", "-out", "fullchain.pem"],
    ):
        subprocess.run(
            ["openssl", *command], cwd=folder, check=True, capture_output=True, timeout=30
        )
