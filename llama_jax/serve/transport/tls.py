"""TLS from the files that the command line names."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from sharding.errors import UserError


class TlsError(UserError):
    """A certificate or a key cannot be used; the message names the flag and the file."""


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """The files of a server's certificate, all in PEM format.

    Attributes:
      certificate: the certificate, and those of its issuers after it.
      key: the private key; None if it is in the same file.
      password: of the key, if it is encrypted.
      client_authorities: if given, clients need a certificate that one of these has issued.
    """

    certificate: Path
    key: Path | None = None
    password: str | None = None
    client_authorities: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Loads the files.

        Raises:
          TlsError: a file cannot be read or used.
        """
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        _check_file("--ssl-certfile", self.certificate)
        if self.key is not None:
            _check_file("--ssl-keyfile", self.key)
        key_flag, key = (
            ("--ssl-certfile", self.certificate)
            if self.key is None
            else ("--ssl-keyfile", self.key)
        )
        asked = False

        def password() -> str:  # without it, OpenSSL would ask on the terminal
            nonlocal asked
            asked = True
            return self.password or ""

        try:
            context.load_cert_chain(self.certificate, self.key, password)
        except (ssl.SSLError, OSError, ValueError) as error:
            if asked:
                raise TlsError(
                    f"{key_flag} {key} is encrypted, and --ssl-keyfile-password does not decrypt "
                    "it."
                ) from error
            if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
                raise TlsError(
                    f"{key_flag} {key} is not the key of --ssl-certfile {self.certificate}."
                ) from error
            raise TlsError(
                f"--ssl-certfile {self.certificate} and {key_flag} {key} cannot be used: they must "
                "hold a certificate and its private key in PEM format."
            ) from error
        if self.client_authorities is not None:
            _check_file("--ssl-ca-certs", self.client_authorities)
            try:
                context.load_verify_locations(self.client_authorities)
            except (ssl.SSLError, OSError) as error:
                raise TlsError(
                    f"--ssl-ca-certs {self.client_authorities} has no certificate in PEM format."
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _check_file(flag: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise TlsError(f"{flag} {path} cannot be read: {error.strerror}.") from error
