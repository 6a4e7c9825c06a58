"""Post-copy: sessions joined directly, the policy of hybrid, and which pages are missing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec
import pytest

from migrator import ranges
from migrator.engine.memory import MappedRegion
from migrator.engine.missing import MissingPages, holes_of
from migrator.engine_messages import RegionLayout
from migrator.errors import EngineError
from migrator.journal_entry import entry_of, restore
from migrator.model import (
    PAGE_SIZE_BYTES,
    MigrationMode,
    MigrationRequest,
    MigrationState,
    OwnershipState,
    PassKind,
    PassReport,
    Role,
)
from migrator.policy import DecisionKind, decide
from migrator.ports import DomainEventKind
from migrator.session import messages as m
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.unit.session_pair import COMPLETED, DESTINATION, SOURCE, SessionPair

_S = MigrationState
POSTCOPY = (_S.POSTCOPY, _S.POSTCOPY)
MODES = (MigrationMode.POSTCOPY, MigrationMode.HYBRID)
LISTENING = v.EngineListening(host="10.0.0.2", port=7001, secret=b"t" * 32)


def running_there(mode: MigrationMode = MigrationMode.POSTCOPY) -> SessionPair:
    """The guest runs at the destination, and lacks pages."""
    request = MigrationRequest(destination="n2", mode=mode)
    pair = SessionPair(request, pending=lambda number: 900_000)
    assert pair.run() == POSTCOPY
    return pair


def kinds(pair: SessionPair) -> list[PassKind]:
    return [each.kind for _, each in pair.given if isinstance(each, v.RunPass)]


# --- sessions ---


def test_what_the_destination_lacks_is_still_to_go_when_its_guest_runs() -> None:
    """Both passes that only told of pages count, though the last of them left nothing pending."""
    migration = running_there().source.view()
    told = [
        each for each in migration.iterations if each.kind in (PassKind.STALE, PassKind.MISSING)
    ]
    assert len(told) == 2
    left_bytes = sum(each.pages for each in told) * PAGE_SIZE_BYTES
    assert migration.progress.remaining_bytes == left_bytes > 0


@pytest.mark.parametrize("mode", MODES)
def test_the_source_is_kept_until_the_destination_holds_every_page(mode: MigrationMode) -> None:
    pair = running_there(mode)
    first = [PassKind.FIRST] if mode is MigrationMode.HYBRID else []
    assert kinds(pair) == [*first, PassKind.STALE, PassKind.MISSING]
    assert "DestroyGuest" not in pair.commands(SOURCE)
    assert "StopEngine" not in pair.commands(SOURCE) + pair.commands(DESTINATION)
    assert pair.source.blackout_ms is not None
    pair.push(pair.destination, v.PagesComplete(seconds=1.0, pages=10))
    assert pair.run(timers=1) == COMPLETED
    assert pair.messages(DESTINATION)[-1] == "Filled"
    assert "DestroyGuest" in pair.commands(SOURCE)
    assert not pair.timers


@pytest.mark.parametrize(
    ("left_behind", "tellings"),
    [
        ((40,), 1),  # So few are told in the blackout as fast.
        ((400, 40), 2),
        ((400, 400), 2),  # The next telling would be no shorter than it pays for.
    ],
)
def test_what_is_written_while_it_is_told_is_told_before_the_pause(
    left_behind: tuple[int, ...], tellings: int
) -> None:
    """Each page that is first told in the blackout makes it longer."""
    request = MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY)
    pair = SessionPair(request, pending=lambda number: left_behind[number - 1])
    pair.told = lambda number: (1_000, *left_behind)[number - 1]
    assert pair.run() == POSTCOPY
    assert kinds(pair) == [PassKind.STALE] * tellings + [PassKind.MISSING]


def test_it_may_be_complete_before_the_guest_runs() -> None:
    request = MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY)
    pair = SessionPair(request)
    pair.run_until_state(_S.HANDOFF)
    pair.push(pair.destination, v.PagesComplete())
    assert pair.run(timers=1) == COMPLETED


def test_that_all_is_there_is_journalled_before_it_is_said() -> None:
    pair = running_there()
    pair.fail(v.Journal)
    pair.push(pair.destination, v.PagesComplete())
    pair.run()
    del pair.timers[DESTINATION, v.TimerName.FILLED]  # The runner drops what stands behind it.
    assert pair.run() == POSTCOPY
    assert "Filled" not in pair.messages(DESTINATION)
    pair.failing.clear()
    pair.run(timers=8)
    assert (pair.source.state, pair.destination.state) == COMPLETED


def test_a_dead_engine_of_the_destination_gets_a_successor_and_the_source_is_told() -> None:
    pair = running_there()
    pair.push(pair.destination, v.EngineLost(reason="killed"))
    pair.silence(v.StartEngine)
    pair.run(timers=1)
    assert pair.given[-1] == (DESTINATION, v.StartEngine(post_copy=True))
    pair.push(pair.destination, LISTENING)
    assert pair.run() == POSTCOPY
    connected = [each for _, each in pair.given if isinstance(each, v.ConnectEngine)][-1]
    assert connected == v.ConnectEngine(
        host="10.0.0.2", port=7001, secret=b"t" * 32, post_copy=True
    )


def test_a_dead_engine_of_the_source_gets_a_successor_where_the_destination_listens() -> None:
    pair = running_there()
    pair.push(pair.source, v.EngineLost(reason="killed"))
    pair.run(timers=1)
    connects = [each for _, each in pair.given if isinstance(each, v.ConnectEngine)]
    assert [each.post_copy for each in connects] == [False, True]
    assert {each.port for each in connects} == {7000}


def test_an_end_that_is_heard_before_the_resume_ends_both_sides() -> None:
    """The hypervisor dies right after `cont`: its exit may be reported before the answer is."""
    pair = SessionPair(MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY))
    pair.silence(v.ResumeGuest)
    pair.run()
    pair.push(pair.destination, v.GuestReported(kind=DomainEventKind.EXITED, at_s=pair.now_s))
    pair.push(pair.destination, v.GuestResumed(at_s=pair.now_s))
    assert pair.run() == (_S.FAILED, _S.FAILED)
    assert pair.source.error == "the guest ended right after it was resumed"
    assert "DestroyGuest" in pair.commands(SOURCE)


def test_a_prepared_that_is_known_already_disturbs_nobody() -> None:
    pair = running_there()
    before = pair.commands(SOURCE)
    pair.push(pair.destination, v.Received(message=m.Inquire()))
    assert pair.run() == POSTCOPY
    assert pair.commands(SOURCE) == before


@pytest.mark.parametrize("role", Role)
def test_a_restarted_agent_goes_on(role: Role) -> None:
    pair = running_there()
    entry = entry_of(pair.of(role), boot_id="b")
    assert entry.post_copy
    assert not entry.ended
    session = restore(entry, boot_id="b")
    if isinstance(session, SourceSession):
        pair.source = session
    else:
        pair.destination = session
    pair.push(session, v.Recover())
    pair.run(timers=2)
    assert (pair.source.state, pair.destination.state) == POSTCOPY
    assert v.StartEngine(post_copy=True) in [each for who, each in pair.given if who is role]
    pair.push(pair.destination, v.PagesComplete())
    pair.run(timers=6)
    assert (pair.source.state, pair.destination.state) == COMPLETED


def test_a_restarted_destination_that_is_full_starts_no_engine() -> None:
    pair = running_there()
    pair.destination.complete = v.PagesComplete()
    session = restore(entry_of(pair.destination, boot_id="b"), boot_id="b")
    assert isinstance(session, DestinationSession)
    pair.destination = session
    given = len(pair.given)
    pair.push(session, v.Recover())
    pair.run(timers=6)
    assert (pair.source.state, pair.destination.state) == COMPLETED
    assert not any(isinstance(each, v.StartEngine) for _, each in pair.given[given:])


def test_the_source_outlives_its_hypervisor_while_the_engine_lives() -> None:
    pair = running_there()
    pair.push(pair.source, v.GuestReported(kind=DomainEventKind.EXITED, at_s=pair.now_s))
    assert pair.run() == POSTCOPY
    pair.push(pair.destination, v.PagesComplete())
    assert pair.run(timers=2) == COMPLETED


def test_pages_that_are_nowhere_end_the_guest() -> None:
    pair = running_there()
    pair.push(pair.source, v.GuestReported(kind=DomainEventKind.EXITED, at_s=pair.now_s))
    pair.push(pair.source, v.EngineLost(reason="killed"))
    assert pair.run() == (_S.FAILED, _S.POSTCOPY), "the engine may have them all, and not be heard"
    assert pair.run(timers=4) == (_S.FAILED, _S.FAILED)
    assert "DestroyGuest" in pair.commands(DESTINATION)


def test_a_guest_that_waits_for_pages_is_told_of_until_they_come() -> None:
    """It looks well from outside, and its migration would stand still without a word."""
    pair = running_there()
    assert pair.source.view().error is None
    pair.push(pair.source, v.ChannelNoted(broken=True, detail="silence"))
    pair.run()
    assert pair.source.view().error is None, "for a moment so it looks at the end, too"
    pair.run(timers=8)
    assert pair.source.view().error == "the guest waits for pages that don't come: silence"
    pair.silence(v.ConnectEngine)
    pair.push(pair.source, v.EngineLost(reason="refused: certificate has expired"))
    pair.run(timers=8)
    assert "certificate has expired" in (pair.source.view().error or "")
    pair.push(pair.source, v.EngineConnected(pages_in_use=1, round_trip_ms=0.0))
    assert pair.run() == POSTCOPY
    assert pair.source.view().error is None
    pair.push(pair.destination, v.PagesComplete())
    pair.run(timers=6)
    assert (pair.source.state, pair.destination.state) == COMPLETED
    assert pair.source.view().error is None


def test_the_speed_that_is_shown_in_post_copy_is_that_of_its_pages() -> None:
    pair = running_there()
    reported = v.EngineReported(bytes_sent=9, remaining_bytes=9, throughput_bytes_per_s=7e6)
    pair.push(pair.source, reported)
    pair.run()
    assert pair.source.view().progress.throughput_bytes_per_s == 7e6


def test_pages_that_stop_in_the_handoff_are_told_of_once_the_guest_runs_there() -> None:
    pair = SessionPair(MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY))
    pair.run_until_state(_S.HANDOFF)
    pair.push(pair.source, v.ChannelNoted(broken=True, detail="silence"))
    assert pair.run(timers=8) == POSTCOPY
    assert "silence" in (pair.source.view().error or "")


def test_what_happens_for_hours_makes_no_endless_timeline() -> None:
    """It is kept in the store, which takes no value beyond a megabyte or two."""
    pair = running_there()
    pair.silence(v.ConnectEngine)
    before = len(pair.source.timeline)
    for number in range(3_000):
        pair.push(pair.source, v.EngineLost(reason=f"refused {number}"))
        pair.push(pair.source, v.TimerFired(name=v.TimerName.ENGINE))
        pair.push(pair.source, v.ChannelNoted(broken=bool(number % 2), detail="the link"))
    assert pair.run() == POSTCOPY
    assert len(pair.source.timeline) - before == 30
    lost = [phase for phase in pair.source.timeline if phase.name == "engine lost"]
    assert lost[-1].detail.endswith("refused 2999")
    assert lost[-1].seconds > 1.0
    channel = [phase.name for phase in pair.source.timeline if "channel" in phase.name]
    assert channel[-1] == "channel broken", "the last word is the last"


def test_a_guest_that_ends_needs_no_more_pages() -> None:
    pair = running_there()
    pair.push(pair.destination, v.GuestReported(kind=DomainEventKind.EXITED, at_s=pair.now_s))
    assert pair.run() == (_S.FAILED, _S.FAILED)
    assert "DestroyGuest" in pair.commands(SOURCE)


def test_a_record_that_moved_on_frees_the_source() -> None:
    pair = running_there()
    pair.record = msgspec.structs.replace(pair.record, owner="n3", token=3)
    pair.silence(m.Inquire)
    pair.run(timers=3)
    assert pair.source.state is _S.FAILED
    assert "n3 took the domain over" in (pair.source.error or "")


@pytest.mark.parametrize("state", [_S.HANDOFF, _S.POSTCOPY])
def test_a_removed_destination_is_given_no_page_more(state: MigrationState) -> None:
    """Also if it was removed before it could say that the guest runs there."""
    request = MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY)
    pair = SessionPair(request, pending=lambda number: 900_000)
    pair.run_until_state(state)
    pair.push(pair.source, v.PeerRemoved(reason="n2 was removed from the cluster"))
    pair.run()
    assert pair.source.state is _S.FAILED
    assert "n2 was removed from the cluster before it had every page" in (pair.source.error or "")
    assert "StopEngine" in pair.commands(SOURCE)
    assert "DestroyGuest" in pair.commands(SOURCE)
    assert pair.destination.state is not _S.COMPLETED


@pytest.mark.parametrize("told_first", [False, True])
@pytest.mark.parametrize("state", [_S.HANDOFF, _S.POSTCOPY])
def test_a_restart_forgets_no_removal(state: MigrationState, told_first: bool) -> None:
    """Nothing is heard of a removed node any more, and the agent is told of it at any moment."""
    request = MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY)
    pair = SessionPair(request, pending=lambda number: 900_000)
    if state is _S.HANDOFF:
        pair.silence(m.Running)
    pair.run()
    assert pair.source.state is state
    assert pair.record.owner == "n2"
    session = restore(entry_of(pair.source, boot_id="b"), boot_id="b")
    assert isinstance(session, SourceSession)
    pair.source = session
    pair.silence(m.Running, m.Prepared, m.Pending, m.Filled, m.Inquire, m.Commit)
    begin: list[v.Event] = [v.Recover(), v.PeerRemoved(reason="n2 was removed from the cluster")]
    if told_first:
        begin.reverse()
    else:
        pair.push(session, begin.pop(0))
        pair.run()
        assert session.state is _S.RECOVERING
    for event in begin:
        pair.push(session, event)
    pair.run(timers=6)
    assert session.state is _S.FAILED
    assert "n2 was removed from the cluster before it had every page" in (session.error or "")
    assert pair.commands(SOURCE)[-1] != "ResumeGuest"
    assert "DestroyGuest" in pair.commands(SOURCE)


def test_a_removed_source_s_pages_are_still_taken() -> None:
    """The guest is ours, and needs them. Nothing else is heard from there: the hub refuses it."""
    pair = running_there()
    pair.push(pair.destination, v.Received(message=m.Abort(reason="n1 was removed")))
    assert pair.run() == POSTCOPY
    assert "DestroyGuest" not in pair.commands(DESTINATION)


def test_an_unreadable_or_plain_record_frees_nobody() -> None:
    pair = running_there()
    assert pair.record.state is OwnershipState.RUNNING
    pair.run(timers=12)
    pair.push(pair.source, v.RecordRead(known=False))
    assert pair.run() == POSTCOPY


def test_it_can_not_be_cancelled_nor_aborted_once_the_guest_runs_there() -> None:
    pair = running_there()
    assert not pair.source.cancellable
    pair.push(pair.source, v.CancelRequested())
    pair.push(pair.source, v.Received(message=m.Aborted(reason="late")))
    pair.push(pair.destination, v.Received(message=m.Abort(reason="late")))
    assert pair.run() == POSTCOPY


def test_a_fault_before_the_handoff_still_resumes_the_source() -> None:
    request = MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY)
    pair = SessionPair(request)
    pair.run_until_state(_S.SWITCHOVER)
    pair.push(pair.source, v.CancelRequested())
    assert pair.run() == (_S.CANCELLED, _S.CANCELLED)


# --- the policy ---


def passed(pages: int, pending: int) -> PassReport:
    return PassReport(
        number=1,
        kind=PassKind.FIRST,
        seconds=1.0,
        pages=pages,
        bytes_sent=pages * PAGE_SIZE_BYTES,
        pending_pages=pending,
    )


@pytest.mark.parametrize(
    ("pending", "kind"),
    [
        (10, DecisionKind.SWITCH_OVER),
        (4_000, DecisionKind.ITERATE),
        (6_000, DecisionKind.POST_COPY),
        (10_000, DecisionKind.POST_COPY),
    ],
)
def test_hybrid_goes_on_only_while_a_pass_pays(pending: int, kind: DecisionKind) -> None:
    assert decide([passed(10_000, pending)], 50, MigrationMode.HYBRID).kind is kind


def test_hybrid_never_gives_up() -> None:
    passes = [passed(10_000, 4_900)] * 40
    assert decide(passes, 50, MigrationMode.HYBRID).kind is DecisionKind.POST_COPY
    assert decide(passes, 50, MigrationMode.PRECOPY).kind is DecisionKind.GIVE_UP


# --- missing pages ---


@pytest.fixture
def region() -> Iterator[MappedRegion]:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 1024 * PAGE_SIZE_BYTES)
    layout = RegionLayout(name="ram", size_bytes=1024 * PAGE_SIZE_BYTES, page_size_bytes=4096)
    yield MappedRegion(0, fd, layout)
    os.close(fd)


def pages(*pairs: tuple[int, int]) -> ranges.Ranges:
    return ranges.from_pairs(pairs) * PAGE_SIZE_BYTES


def test_each_missing_page_is_asked_for_once_from_the_last_fault_on(region: MappedRegion) -> None:
    missing = MissingPages([region])
    missing.add(0, pages((0, 4), (100, 110), (900, 903)))
    missing.add(0, pages((102, 104)))
    assert missing.left_pages == 17
    missing.move_to(0, 101 * PAGE_SIZE_BYTES)
    asked = []
    while (found := missing.ask(4)) is not None:
        asked.append((found[1] // PAGE_SIZE_BYTES).tolist())
    assert asked[0] == [[101, 105]]
    assert sum(end - start for each in asked for start, end in each) == 17
    missing.forget_asked()
    assert missing.ask(1) is not None
    assert missing.is_missing(0, 0)
    missing.filled(0, 0, 1024 * PAGE_SIZE_BYTES)
    assert missing.left_pages == 0
    assert not missing.is_missing(0, 0)
    assert missing.ask(1) is None


def test_a_successor_takes_every_hole_for_missing_until_it_hears_better(
    region: MappedRegion,
) -> None:
    os.pwrite(region.fd, b"x" * PAGE_SIZE_BYTES, 5 * PAGE_SIZE_BYTES)
    assert (holes_of(region) // PAGE_SIZE_BYTES).tolist() == [[0, 5], [6, 1024]]
    missing = MissingPages([region])
    missing.add(0, holes_of(region))
    assert missing.left_pages == 1023
    missing.keep(0, pages((4, 7)))
    assert missing.left_pages == 2


def test_huge_pages_are_refused(region: MappedRegion) -> None:
    region.layout = msgspec.structs.replace(region.layout, page_size_bytes=2 * 1024**2)
    with pytest.raises(EngineError, match="huge pages"):
        MissingPages([region])
