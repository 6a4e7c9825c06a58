"""The iscsi driver: a LUN a volume, fenced by reservations and by whom the target admits."""

from storage.iscsi.driver import IscsiPool
from storage.iscsi.making import make_iscsi_pool

__all__ = ["IscsiPool", "make_iscsi_pool"]
