"""Sign the root hash of a disk, for kernels that open only disks which somebody vouches for.

The signature is what `DM_VERITY_VERIFY_ROOTHASH_SIG` and IPE take: PKCS#7 in DER, detached, without
certificates and attributes, over the root hash as lower-case hex text. Source: Linux
`drivers/md/dm-verity-verify-sig.c`, `Documentation/admin-guide/device-mapper/verity.rst`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import BuildError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

__all__ = ["SIGNATURE_TYPE", "RootHashSigner"]

SIGNATURE_TYPE = "application/pkcs7-signature"


class RootHashSigner:
    """A private key with its certificate.

    Args:
        key: PEM file, RSA or elliptic curve, without a passphrase.
        certificate: PEM file.

    Raises:
        BuildError: a file that cannot be read, is something else, or does not belong to the other.
    """

    def __init__(self, key: Path, certificate: Path) -> None:
        # Imported here: nearly no disk is signed.
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec, rsa
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from cryptography.x509 import load_pem_x509_certificate

        try:
            private = load_pem_private_key(_read(key), None)
        except TypeError as error:
            raise BuildError("a key with a passphrase cannot be used", path=key) from error
        except (ValueError, UnsupportedAlgorithm):
            # Its text may show a part of the key.
            raise BuildError("is no private key in PEM", path=key) from None
        if not isinstance(private, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
            raise BuildError("key", path=key, expected="RSA or elliptic curve")
        try:
            self._certificate = load_pem_x509_certificate(_read(certificate))
        except ValueError as error:
            raise BuildError("is no certificate in PEM", path=certificate) from error
        if self._certificate.public_key() != private.public_key():
            raise BuildError("the certificate is not that of the key", path=certificate)
        self._key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey = private

    def sign(self, root: bytes) -> bytes:
        """Return the signature of a root hash, in DER."""
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import Encoding
        from cryptography.hazmat.primitives.serialization.pkcs7 import (
            PKCS7Options,
            PKCS7SignatureBuilder,
        )

        builder = PKCS7SignatureBuilder().set_data(root.hex().encode())
        builder = builder.add_signer(self._certificate, self._key, SHA256())
        options = [
            PKCS7Options.DetachedSignature,
            PKCS7Options.Binary,
            PKCS7Options.NoAttributes,
            PKCS7Options.NoCerts,
        ]
        return builder.sign(Encoding.DER, options)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BuildError(f"cannot be read ({error.strerror})", path=path) from error
