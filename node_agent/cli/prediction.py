"""How dirty rates and predictions are shown, and a prediction beside its outcome."""

from __future__ import annotations

from migrator.figures import DirtyRate, LinkOrigin, LinkSpeed, Prediction
from migrator.model import Migration, MigrationMode, MigrationState
from node_agent.cli.output import facts, size, table
from node_agent.resources import DryRun

_ORIGINS = {
    LinkOrigin.MIGRATIONS: "measured by migrations",
    LinkOrigin.INTERFACE: "by its interface",
    LinkOrigin.PROBE: "measured now",
    LinkOrigin.FIRST_PASS: "measured by its first iteration",
}

_TOLD_SHARE = 0.95
"""What doesn't become smaller than this goes as it is."""
_DIFFERS_SHARE = 0.1
"""Less is of no account, and the sample's chance."""


def dirty_rate_text(rate: DirtyRate) -> str:
    """For people: the rate, the working set and its curve."""
    memory = _memory(rate.memory_in_use_bytes, rate.zero_share, rate.packed_share)
    dirtied = _dirtied(rate.packed_share, rate.dirtied_packed_share)
    pairs = [
        ("domain", f"{rate.domain} on {rate.node}"),
        ("sampled", f"{rate.seconds:.1f} s"),
        ("dirty rate", f"{rate.pages_per_s:.0f} pages/s, {size(rate.bytes_per_s)}/s{dirtied}"),
        ("working set", f"{size(rate.working_set_bytes)} in {rate.seconds:.1f} s"),
        ("memory in use", memory),
    ]
    rows = [(f"{point.seconds:.1f} s", size(point.bytes)) for point in rate.curve]
    return facts(pairs) + "\n\n" + table(("WITHIN", "DIRTIED AT LEAST ONCE"), rows)


def dry_run_text(name: str, result: DryRun) -> str:
    """For people: the refusals, and the prediction."""
    if result.refused:
        refused = "\n".join(f"  - {reason}" for reason in result.refused)
        text = f"domain {name} can't be migrated:\n{refused}"
    else:
        text = f"domain {name} can be migrated to {result.destination}"
    if result.engine is not None:
        why = f" ({result.engine_reason})" if result.engine_reason else ""
        text += f"\nengine: {result.engine}{why}"
    if result.remark:
        text += f"\nmind: {result.remark}"
    if result.prediction is not None:
        text += "\n\n" + prediction_text(result.prediction)
    elif result.prediction_unknown:
        text += f"\nit can't be predicted: {result.prediction_unknown}"
    return text


def prediction_text(prediction: Prediction) -> str:
    """For people: what is expected, then what it was made from."""
    verdict = "yes" if prediction.converges else "no"
    if prediction.post_copy:
        verdict = "no, what is left follows the guest (post-copy)"
    pairs = [
        ("converges", f"{verdict}: {prediction.reason}"),
        ("total", f"{prediction.total_s:.2f} s"),
        ("to send", f"{size(prediction.bytes_sent)} in {prediction.iterations} iterations"),
        ("blackout", f"{prediction.blackout_ms:.1f} ms"),
        *made_from(prediction),
    ]
    return facts(pairs)


def made_from(prediction: Prediction) -> list[tuple[str, str]]:
    """The figures behind a prediction."""
    memory = _memory(prediction.memory_in_use_bytes, prediction.zero_share, prediction.packed_share)
    dirtied = _dirtied(prediction.packed_share, prediction.dirtied_packed_share)
    dirty = f"{size(prediction.dirty_rate_bytes_per_s)}/s, {prediction.dirty_rate_origin}{dirtied}"
    return [
        ("memory in use", memory),
        ("dirty rate", dirty),
        ("link", _link(prediction.link)),
    ]


def _memory(in_use_bytes: int, zero_share: float, packed_share: float) -> str:
    text = f"{size(in_use_bytes)}, {zero_share:.0%} of it zeros"
    return text if packed_share > _TOLD_SHARE else f"{text}; the rest packs to {packed_share:.0%}"


def _dirtied(packed_share: float, dirtied_packed_share: float | None) -> str:
    """Only where it isn't as the rest of memory."""
    if dirtied_packed_share is None or abs(dirtied_packed_share - packed_share) < _DIFFERS_SHARE:
        return ""
    return f"; what is dirtied packs to {dirtied_packed_share:.0%}"


def _link(link: LinkSpeed) -> str:
    detail = f" ({link.detail})" if link.detail else ""
    return f"{size(link.bytes_per_s)}/s, {_ORIGINS[link.origin]}{detail}"


def comparison(migration: Migration, prediction: Prediction) -> str:
    """A prediction beside what came of it."""
    done = bool(migration.ended)
    total, blackout = migration.total_s, migration.blackout_ms
    sent = size(migration.progress.bytes_sent)
    rows = [
        ("converges", "yes" if prediction.converges else "no", _converged(migration)),
        ("total", f"{prediction.total_s:.2f} s", "-" if total is None else f"{total:.2f} s"),
        ("sent", size(prediction.bytes_sent), sent if done else "-"),
        ("iterations", str(prediction.iterations), str(len(migration.iterations)) if done else "-"),
        (
            "blackout",
            f"{prediction.blackout_ms:.1f} ms",
            "-" if blackout is None else f"{blackout:.1f} ms",
        ),
    ]
    text = table(("FIGURE", "PREDICTED", "OUTCOME"), rows)
    return text + "\n\nthe prediction was made from\n" + facts(made_from(prediction))


def _converged(migration: Migration) -> str:
    """What pre-copy came to; "-" where the migration ended before that was known."""
    noted = {phase.name for phase in migration.timeline}
    if "post-copy" in noted and migration.request.mode is not MigrationMode.POSTCOPY:
        return "no"
    if "decision: switch_over" in noted or migration.state is MigrationState.COMPLETED:
        return "yes"
    if "decision: give_up" in noted:
        return "no"
    return "-" if migration.ended else migration.state.value
