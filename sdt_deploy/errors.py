"""Every error that sdt-deploy raises on purpose.

::

    SdtDeployError
    ├── ConfigError             a configuration contradicts itself
    ├── CheckpointError         weights or their description cannot be used
    ├── BundleError
    │   ├── BundleFormatError       not a bundle, or of a version this release cannot read
    │   └── BundleIntegrityError    a file is missing, altered or lies outside the bundle
    ├── ExportError             a graph could not be exported
    │   ├── VerificationError       an exported graph disagrees with the PyTorch model
    │   └── BuildError              an engine could not be built from a graph
    ├── TrainingError           a distillation cannot go on
    ├── InputError              ids, lengths or texts that cannot be run
    ├── BackendError            an engine failed
    │   └── MissingProviderError    the engine lacks the execution provider that was asked for
    ├── RunCancelledError       a run was cancelled by its caller
    │   └── DeadlineExceededError   a run did not end in time
    ├── MissingExtraError       an optional dependency is not installed
    └── OutputError             a target exists already, or cannot be written

All of them are the user's to mend: the CLI prints the message and ends with exit code 2. Anything
else that escapes is a bug in sdt-deploy.
"""


class SdtDeployError(Exception):
    """Root of every error that sdt-deploy raises on purpose."""


class ConfigError(SdtDeployError, ValueError):
    """A configuration value is out of range or contradicts another one."""


class CheckpointError(SdtDeployError):
    """A checkpoint is missing, incomplete or of a layout that is not supported."""


class BundleError(SdtDeployError):
    """A bundle cannot be used."""


class BundleFormatError(BundleError):
    """The directory is no bundle, or its format version is not one this release reads."""


class BundleIntegrityError(BundleError):
    """A file of the bundle is missing, altered, or its path leads outside the bundle."""


class ExportError(SdtDeployError):
    """A graph could not be exported."""


class VerificationError(ExportError):
    """An exported graph or a bundle disagrees with the PyTorch model."""


class TrainingError(SdtDeployError):
    """A distillation cannot go on; its last checkpoint is kept."""


class BuildError(ExportError):
    """Engines could not be built; the message holds what the library said about each."""


class InputError(SdtDeployError, ValueError):
    """Token ids, lengths, masks or texts that cannot be run."""


class BackendError(SdtDeployError):
    """An engine could not be opened or failed while it ran."""


class MissingProviderError(BackendError):
    """The engine library is installed but lacks the execution provider that was asked for."""


class RunCancelledError(SdtDeployError):
    """A run was cancelled by its caller; the session can be used again."""


class DeadlineExceededError(RunCancelledError, TimeoutError):
    """A run did not end within its ``timeout_s``; the session can be used again."""


class MissingExtraError(SdtDeployError, ImportError):
    """An optional dependency is needed and not installed."""


class OutputError(SdtDeployError):
    """A target exists already, or cannot be written."""
