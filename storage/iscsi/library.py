"""libiscsi by ctypes: the functions that a session needs, declared once.

Only functions that libiscsi.so.7 (1.15) and later export; no structure of the library is read.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

from migrator.errors import StorageError

SONAMES: Final = tuple(f"libiscsi.so.{number}" for number in (11, 10, 9, 8, 7))

SESSION_NORMAL: Final = 2
HEADER_DIGEST_NONE: Final = 0
STATUS_GOOD: Final = 0
STATUS_CHECK_CONDITION: Final = 0x02
STATUS_BUSY: Final = 0x08
STATUS_RESERVATION_CONFLICT: Final = 0x18
XFER_NONE: Final = 0
XFER_READ: Final = 1
XFER_WRITE: Final = 2

Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
"""void cb(struct iscsi_context *, int status, void *command_data, void *private_data)"""


class Data(ctypes.Structure):
    """struct iscsi_data"""

    _fields_ = (("size", ctypes.c_size_t), ("data", ctypes.c_char_p))


_P, _I, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
_FUNCTIONS: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "iscsi_create_context": (_P, (_S,)),
    "iscsi_destroy_context": (_I, (_P,)),
    "iscsi_set_targetname": (_I, (_P, _S)),
    "iscsi_set_session_type": (_I, (_P, _I)),
    "iscsi_set_header_digest": (_I, (_P, _I)),
    "iscsi_set_initiator_username_pwd": (_I, (_P, _S, _S)),
    "iscsi_set_isid_en": (_I, (_P, ctypes.c_uint32, ctypes.c_uint32)),
    "iscsi_set_noautoreconnect": (None, (_P, _I)),
    "iscsi_full_connect_async": (_I, (_P, _S, _I, Callback, _P)),
    "iscsi_logout_async": (_I, (_P, Callback, _P)),
    "iscsi_scsi_command_async": (_I, (_P, _I, _P, Callback, ctypes.POINTER(Data), _P)),
    "iscsi_get_fd": (_I, (_P,)),
    "iscsi_which_events": (_I, (_P,)),
    "iscsi_service": (_I, (_P, _I)),
    "iscsi_get_error": (_S, (_P,)),
    "scsi_create_task": (_P, (_I, _S, _I, _I)),
    "scsi_task_add_data_in_buffer": (_I, (_P, _I, _S)),
    "scsi_free_scsi_task": (None, (_P,)),
}


@functools.cache
def load() -> Any:
    """The library, its functions declared. StorageError if this host hasn't got it."""
    for name in SONAMES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        for function, (result, arguments) in _FUNCTIONS.items():
            declared = getattr(library, function)
            declared.restype, declared.argtypes = result, arguments
        return library
    raise StorageError(
        "this host has no libiscsi, which iSCSI pools need: install it (Debian: libiscsi7 and, for"
        " QEMU, qemu-block-extra)"
    )
