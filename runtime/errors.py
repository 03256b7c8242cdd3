"""Everything this library raises on purpose: what went wrong, how to fix it, the valid options, in one line."""

from __future__ import annotations

_HEAD, _TAIL = 1200, 400
"""Characters of a message that are kept: what it quotes of a file may be of any length."""


class InvariclipError(Exception):
    """Root of all errors a user can cause or mend; the command line prints it as one line.

    Attributes:
        exit_code: What the command exits with: 2 for wrong usage or input, 1 for a failed check.
    """

    exit_code = 2

    def __str__(self) -> str:
        """The message in one line of bounded length."""
        line = " ".join(super().__str__().splitlines())
        return line if len(line) <= _HEAD + _TAIL else f"{line[:_HEAD]} … {line[-_TAIL:]}"


class InputError(InvariclipError):
    """An image, text, folder or table that the caller gave cannot be used."""


class ImageSizeError(InputError):
    """An image has more pixels than may be decoded, or would have after the resize."""


class NotApplicableError(InputError):
    """An image has not what an intervention changes, such as a background apart from the rest."""


class ArtifactError(InvariclipError):
    """An exported artifact is incomplete, damaged, unsafe or of an unknown schema."""


class CheckpointError(InvariclipError):
    """A checkpoint is missing, unreadable or belongs to another model."""


class ProjectionError(InvariclipError):
    """A projection is damaged, degenerate, or its width is not the checkpoint's."""


class SemanticsError(InvariclipError):
    """Learned templates are damaged, or belong to another checkpoint or projection."""


class SignatureError(InvariclipError):
    """A signature is required, and the artifact has none, another key's, or has changed since."""


class SiteError(InvariclipError):
    """A site is damaged, impossible, or was measured in another embedding space."""


class MissingExtraError(InvariclipError):
    """A command needs an optional dependency that is not installed."""


class DeviceError(InvariclipError):
    """A GPU, its driver or its library is missing, too old or known to be wrong, or it failed at work."""


class ContractError(InvariclipError):
    """The exported graph does not answer like its reference within the stated bounds."""

    exit_code = 1


class ProfileError(InvariclipError):
    """A machine profile is damaged, of another machine, or of an artifact that has changed since."""


class TuningInterruptedError(InvariclipError):
    """`tune` was stopped by hand; nothing was written."""

    exit_code = 130


class TruncatedTextWarning(UserWarning):
    """A text was longer than the tower's context_length and was cut."""


class SkippedFilesWarning(UserWarning):
    """Folders or files below a folder of images could not be taken."""


class ScaledImageWarning(UserWarning):
    """An image's numbers do not say what range they are of; one was assumed."""


class UnprovedBackendWarning(UserWarning):
    """An artifact runs in an engine that its contract was never checked on."""


class ProfileWarning(UserWarning):
    """A machine profile lies beside the artifact and cannot be used; the safe default is taken."""


class UntrueVariantWarning(UserWarning):
    """A variant does not answer on this machine as its parity record says; it is not picked."""


class FewKindsWarning(UserWarning):
    """The images of a site show too few kinds of things to tell the site from its contents."""


class LeftOutWarning(UserWarning):
    """A variant that was asked for did not keep the contract, and is not in the artifact."""


class FewImagesWarning(UserWarning):
    """The contract saw too few images to promise its level on others."""


class FewConnectionsWarning(UserWarning):
    """The file descriptors of this process allow fewer connections than the server would keep."""


class NoTracesWarning(UserWarning):
    """The environment asks for traces, and none can be sent."""


class KernelCacheWarning(UserWarning):
    """Kernels that were compiled for a GPU cannot be kept, and are compiled again at the next start."""
