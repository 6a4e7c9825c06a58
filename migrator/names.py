"""How things may be called, and the base of every value that a user may write."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

END: Final = r"$(?!\n)"
"""Where a pattern's text ends. `$` alone also stands before a line break that is the last."""

_NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?" + END
_VOLUME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,126}" + END
_MAC_PATTERN: Final = r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}" + END

Name = Annotated[
    str,
    msgspec.Meta(
        pattern=_NAME_PATTERN,
        description="1 to 40 lower-case letters, digits and hyphens; no hyphen at either end",
    ),
]
FileName = Annotated[
    str,
    msgspec.Meta(
        pattern=_VOLUME_PATTERN,
        description="1 to 127 letters, digits, '.', '_' and '-'; begins with a letter or digit",
    ),
]
MacAddress = Annotated[
    str,
    msgspec.Meta(pattern=_MAC_PATTERN, description="six lower-case hexadecimal bytes, aa:bb:..."),
]


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every immutable value that a user may write: an unknown field is an error."""
