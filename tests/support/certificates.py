"""Certificates that OpenSSL's command makes."""

import shutil
import subprocess
from pathlib import Path

import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
SUBJECT = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")


def make_certificate(folder: Path, name: str, *more: str) -> tuple[Path, Path]:
    """A self-signed certificate, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    key_options = more or ("-nodes",)
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-keyout", str(key), "-out", str(certificate), "-days", "2", *key_options, *SUBJECT),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key
