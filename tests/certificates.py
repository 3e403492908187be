"""Certificates of authorities made up for a test, and servers' TLS contexts with them."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates; its own is the PEM file `pem`, without the extensions that Python 3.13 wants by default."""

    def __init__(self, folder: Path, name: str = "a private authority") -> None:
        self._folder, self._name, self._key = folder, _name(name), ec.generate_private_key(ec.SECP256R1())
        own = _start(self._name, self._name, self._key.public_key(), (-1, 1))
        own = own.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.pem = folder / f"{name.replace(' ', '-')}.pem"
        self.pem.write_bytes(own.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(self, host: str = "127.0.0.1", days: tuple[float, float] = (-1, 1)) -> tuple[Path, Path]:
        """Files of a certificate for `host`, valid from and to so many days from now, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        start = _start(_name(host), self._name, key.public_key(), days)
        signed = start.add_extension(x509.SubjectAlternativeName([name]), critical=False)
        of = self._folder / f"{host}-{days[0]}-{days[1]}.crt"
        of.write_bytes(signed.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        private = of.with_suffix(".key")
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        private.write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
        return of, private

    def context(self, host: str = "127.0.0.1", days: tuple[float, float] = (-1, 1)) -> ssl.SSLContext:
        """A server's context with a new certificate."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*self.issue(host, days))
        return context

    def trust(self) -> ssl.SSLContext:
        """A client's context that trusts it alone, with its missing extensions."""
        context = ssl.create_default_context(cafile=str(self.pem))
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _start(subject: x509.Name, issuer: x509.Name, key: Any, days: tuple[float, float]) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    start = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
    return start.not_valid_before(now + days[0] * DAY).not_valid_after(now + days[1] * DAY)
