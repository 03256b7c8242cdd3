"""An artifact's signature: Ed25519 over the digests of all its files, for those whose artifacts pass strange hands.

The digests in the manifest detect damage. Who can write the folder can write them anew, but not the signature, which
needs the private key. `cryptography` makes and checks it; it is imported only where one is asked for.
"""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invariclip.errors import InputError, MissingExtraError, SignatureError
from invariclip.files import sha256_file, write_atomically
from invariclip.records import read_bounded, read_sealed_json, sealed_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "signature.json"
REQUIRED = "INVARICLIP_REQUIRE_SIGNATURE"
"""The environment variable that names a file of public keys: every artifact that the process reads must be signed by
one of them. Child processes inherit it."""
_SCHEMA_VERSION = 1
_MAX_BYTES = 4 << 20
_MAX_KEY_BYTES = 64 << 10
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


def digests(folder: Path, names: set[str]) -> dict[str, str]:
    """The sha256 of each file, by its path below `folder`; a name may be a folder, whose files are taken then.

    Raises:
        SignatureError: A link leads out of the folder.
    """
    root = folder.resolve()
    found = {}
    for name in sorted(names):
        path = folder / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if not file.is_file():
                continue
            if not file.resolve().is_relative_to(root):
                raise SignatureError(f"{file}: leads out of the artifact's folder, and cannot be signed with it")
            found[file.relative_to(folder).as_posix()] = sha256_file(file)
    return found


def sign(folder: Path, files: Mapping[str, str], key: Ed25519PrivateKey) -> None:
    """Writes signature.json into an artifact.

    Args:
        folder: The artifact.
        files: What is signed, see `digests`.
        key: Ed25519's private half.
    """
    plain = {
        "schema_version": _SCHEMA_VERSION,
        "algorithm": "Ed25519",
        "public_key": key.public_key().public_bytes_raw().hex(),
        "files": dict(files),
        "signature": base64.b64encode(key.sign(_message(files))).decode(),
    }
    write_atomically(folder / SIGNATURE, sealed_json(plain))


def require_signed(folder: Path, files: Mapping[str, str], public_keys: str | os.PathLike[str]) -> None:
    """Refuses an artifact that none of these keys has signed as it is.

    Args:
        folder: The artifact.
        files: Every file that may be read from it, as it is now, see `digests`.
        public_keys: A PEM file with one public key or more.

    Raises:
        SignatureError: There is no signature, it is of another key, it does not fit, or a file was added, changed or
            removed since.
        InputError: The file of keys cannot be read, or holds no Ed25519 key.
        MissingExtraError: `cryptography` is not installed.
    """
    keys = read_public_keys(Path(public_keys))
    path = folder / SIGNATURE
    if not path.is_file():
        raise SignatureError(f"{folder}: is not signed, and a signature is required; `invariclip sign` makes one")
    plain = read_sealed_json(
        path, "a signature", schema=_SCHEMA_VERSION, remedy="sign again", max_bytes=_MAX_BYTES, error=SignatureError
    )
    signed, text, named = plain.get("files"), plain.get("signature"), plain.get("public_key")
    if not isinstance(signed, dict) or not isinstance(text, str) or plain.get("algorithm") != "Ed25519":
        raise SignatureError(f"{path}: is not a signature that `invariclip sign` writes; sign again")
    key = next((key for key in keys if key.public_bytes_raw().hex() == named), None)
    if key is None:
        raise SignatureError(
            f"{folder}: is signed by the key {str(named)[:16]}…, which {os.fspath(public_keys)} does not hold; "
            f"it holds: {', '.join(key.public_bytes_raw().hex()[:16] + '…' for key in keys)}"
        )
    _require_fits(key, text, signed, path)
    for name in sorted({*signed, *files}):
        if signed.get(name) != files.get(name):
            change = "added" if name not in signed else "removed" if name not in files else "changed"
            raise SignatureError(
                f"{folder}: {name} was {change} after the artifact was signed; sign again if that was you, "
                "else take the artifact from its source again"
            )


def read_private_key(path: Path, password: str | None = None) -> Ed25519PrivateKey:
    """Ed25519's private half from a PEM file.

    Args:
        path: The file.
        password: What it is encrypted with, if it is.

    Raises:
        InputError: It cannot be read, is no such key, or the password is missing or wrong.
        MissingExtraError: `cryptography` is not installed.
    """
    keys, serialization = _library()
    content = read_bounded(path, "a private key", _MAX_KEY_BYTES)
    try:
        key = serialization.load_pem_private_key(content, password.encode() if password else None)
    except (ValueError, TypeError) as error:  # TypeError: a password is missing, or one was given for nothing
        raise InputError(f"{path}: no private key in PEM ({error}); `invariclip sign --new-key` makes one") from error
    if not isinstance(key, keys.Ed25519PrivateKey):
        raise InputError(f"{path}: is no Ed25519 key; `invariclip sign --new-key` makes one")
    found: Ed25519PrivateKey = key
    return found


def read_public_keys(path: Path) -> list[Ed25519PublicKey]:
    """Every Ed25519 public key of a PEM file.

    Raises:
        InputError: It cannot be read, or holds another kind of key, or none.
        MissingExtraError: `cryptography` is not installed.
    """
    keys, serialization = _library()
    found = []
    for block in _PEM.findall(read_bounded(path, "a file of public keys", _MAX_KEY_BYTES)):
        try:
            key = serialization.load_pem_public_key(block)
        except ValueError as error:
            raise InputError(f"{path}: holds a public key that cannot be read ({error})") from error
        if not isinstance(key, keys.Ed25519PublicKey):
            raise InputError(f"{path}: holds a key that is not Ed25519; `invariclip sign --new-key` makes a pair")
        found.append(key)
    if not found:
        raise InputError(f"{path}: holds no public key in PEM; `invariclip sign --new-key` writes KEY.pub.pem")
    return found


def write_new_key(path: Path, password: str | None = None) -> Path:
    """Makes a pair: the private half at `path`, for its owner alone, and the public half beside it.

    Args:
        path: NAME.pem.
        password: To encrypt the private half with; None leaves it open.

    Returns:
        The file of the public half, NAME.pub.pem.

    Raises:
        InputError: One of the files exists, or cannot be written.
        MissingExtraError: `cryptography` is not installed.
    """
    keys, serialization = _library()
    public = path.with_suffix(".pub.pem")
    for file in (path, public):
        if file.exists():
            raise InputError(f"{file}: is there already; a key is never overwritten, name another")
    key = keys.Ed25519PrivateKey.generate()
    cipher = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    content = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cipher)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    write_atomically(public, key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return public


def _require_fits(key: Ed25519PublicKey, text: str, signed: Mapping[str, str], path: Path) -> None:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(base64.b64decode(text, validate=True), _message(signed))
    except (InvalidSignature, ValueError) as error:
        raise SignatureError(f"{path}: the signature does not fit what it lists; take the artifact again") from error


def _message(files: Mapping[str, str]) -> bytes:
    """What is signed: the names and digests in one order and one spelling, behind what they are."""
    return b"invariclip artifact signature 1\n" + json.dumps(files, sort_keys=True).encode()


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise MissingExtraError('signatures need cryptography: pip install "invariclip[sign]"') from error
    return ed25519, serialization
