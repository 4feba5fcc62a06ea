"""Tests against other people's programs: nginx, an independent signer, an OIDC provider, systemd.

They need more than Python (requirements.txt; .ci/run installs all of it) and run only where the
environment variable CI or INTEROP is set, so that `python3 -m unittest` stays short; INTEROP=0
leaves them out even with CI. A part that is missing is a skip, and a failure when CI is set.
"""
