"""The users' tokens of the API: which end soon, and which have ended. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from node_agent.doctor.findings import Finding, fine, warning
from node_agent.trust.certificates import moment
from node_agent.trust.records import TokenEnd, User, is_brief, token_end


def check_user_tokens(users: Sequence[User], now_s: float) -> Iterator[Finding]:
    """Nothing where there are no tokens. One that is made for hours is nobody's worry."""
    tokens = [(user.name, token) for user in users for token in user.tokens]
    wrong = False
    for user, token in tokens:
        until_s = token.expires_at_s
        end = token_end(token.created_at_s, until_s, now_s)
        if until_s is None or is_brief(token.created_at_s, until_s) or end is TokenEnd.FAR:
            continue
        wrong = True
        name, label = f"token of user {user}", f" ({token.label})" if token.label else ""
        remove = f"ferry user token {user} --rm {token.id}"
        if end is TokenEnd.SOON:
            detail = f"{token.id}{label} holds until {moment(until_s)}, and is refused after that"
            yield warning(name, detail, f"ferry user token {user} makes another; then {remove}")
        else:
            detail = f"{token.id}{label} held until {moment(until_s)}, and is refused"
            yield warning(name, detail, f"{remove}, once nobody uses it")
    if tokens and not wrong:
        yield fine("users' tokens", "none has ended, none ends soon")
