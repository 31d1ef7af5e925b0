"""Everything this package raises on purpose.

    QlipError
    ├── RecipeError             the recipe or the command line is wrong            exit 2
    ├── AdapterNotFoundError    no adapter of that name is installed               exit 2
    ├── BitsError               a bit width or a bit plan cannot be used           exit 2
    ├── ArtefactError           a file is missing, damaged or not what it claims   exit 3
    │   └── ForeignFormatError  the file is sound, but of another format
    ├── IncompatibleModelError  the file is sound but belongs to another model     exit 4
    ├── HostError               an installed package is missing or too old         exit 4
    └── GateFailedError         a comparison does not meet a stated gate           exit 5

A message says where, what was found, what was expected and what to do.
"""


class QlipError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class RecipeError(QlipError):
    """A recipe, or the command line, is wrong."""

    exit_code = 2


class AdapterNotFoundError(QlipError):
    """No installed adapter has the asked name."""

    exit_code = 2


class BitsError(QlipError, ValueError):
    """A bit width or a bit plan cannot be used here."""

    exit_code = 2


class ArtefactError(QlipError):
    """A file is missing, damaged, or not what it claims to be."""

    exit_code = 3


class ForeignFormatError(ArtefactError):
    """A sound file, but of another format than its reader's."""


class IncompatibleModelError(QlipError):
    """A sound artefact that belongs to another model than the one at hand."""

    exit_code = 4


class HostError(QlipError):
    """A package this work needs is missing or too old."""

    exit_code = 4


class GateFailedError(QlipError):
    """A comparison does not meet a gate that was stated for it."""

    exit_code = 5


INSTALL_HINT = "pip install 'qlip-plugins[diffusers]' (in a clone: pip install '.[diffusers]')"
EVALUATION_HINT = "pip install 'qlip-plugins[evaluation]' (in a clone: pip install '.[evaluation]')"
