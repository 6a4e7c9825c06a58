"""What an engine says, in its session's words. Pure."""

from __future__ import annotations

from migrator import engine_messages as m
from migrator.session import vocabulary as v


def told_by(message: m.FromEngine) -> v.Event | None:
    """The same in the session's words; None: it tells the session nothing, or needs more. Pure."""
    match message:
        case m.Report():
            return v.EngineReported(
                bytes_sent=message.bytes_sent,
                remaining_bytes=message.remaining_bytes,
                throughput_bytes_per_s=message.throughput_bytes_per_s,
            )
        case m.PassDone():
            return v.PassFinished(report=message.report)
        case m.DisksDeactivated():
            return v.DisksDeactivated(seconds=message.seconds, at_s=message.at_s)
        case m.ChannelBroken():
            return v.ChannelNoted(broken=True, detail=message.reason)
        case m.ChannelRestored():
            return v.ChannelNoted(broken=False, detail=f"after {message.broken_s:.2f} s")
        case m.PostCopyArmed():
            return v.PagesMissing()
        case m.PostCopyDone():
            return v.PagesComplete(
                seconds=message.seconds,
                pages=message.pages,
                faults=message.faults,
                fault_ms_median=message.fault_ms_median,
                fault_ms_max=message.fault_ms_max,
                packed_ratio=message.packed_ratio,
            )
        case m.EngineFailed():
            return v.EngineLost(reason=message.reason)
        case _:
            return None
