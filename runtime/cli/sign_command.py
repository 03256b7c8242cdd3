"""`invariclip sign`: a signature over all files of an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from invariclip.artifact.folder import sign_artifact
from invariclip.artifact.signature import SIGNATURE, read_private_key, write_new_key
from invariclip.cli.options import JSON
from invariclip.console import emit_json, say
from invariclip.errors import InputError


@click.command()
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="The private key, Ed25519 in PEM.")
@click.option("--new-key", type=click.Path(path_type=Path),
              help="Make a pair of keys: NAME.pem for you alone, and NAME.pub.pem to hand out.")  # fmt: skip
@click.option("--key-password", envvar="INVARICLIP_KEY_PASSWORD",
              help="Of an encrypted key; an environment variable keeps it off the process list.",
              show_envvar=True)  # fmt: skip
@JSON
def sign(
    artifact: Path | None, key: Path | None, new_key: Path | None, key_password: str | None, as_json: bool
) -> None:  # fmt: skip
    """Sign an artifact as it is; `--require-signature NAME.pub.pem` then refuses every other one.

    Sign again after `tune`, `engines` or an export has changed the folder.
    """
    if key is not None and new_key is not None:
        raise InputError("give --key or --new-key, not both")
    if new_key is None and (artifact is None or key is None):
        raise InputError("sign needs an artifact and --key KEY.pem; `invariclip sign --new-key KEY.pem` makes a pair")
    said: dict[str, str | int] = {}
    if new_key is not None:
        public = write_new_key(new_key, key_password)
        said = {"private_key": str(new_key), "public_key": str(public)}
    if artifact is not None:
        count = sign_artifact(artifact, read_private_key(key or new_key or Path(), key_password))
        said |= {"signature": str(artifact / SIGNATURE), "files": count}
    if as_json:
        emit_json(said)
        return
    if new_key is not None:
        say(f"{new_key}: the private key; keep it where artifacts are made\n{said['public_key']}: the public key; "
            "give it to those who load them")  # fmt: skip
    if artifact is not None:
        say(f"{artifact / SIGNATURE}: {said['files']} files signed")
