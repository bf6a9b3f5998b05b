"""The whole registry, which can also check itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stackctl.errors import (
    Incompatible,
    StackctlError,
)
from stackctl.registry.removing import Removals
from stackctl.registry.resolving import ResolvedMember, foundations
from stackctl.schema import (
    Adapter,
    Base,
    Removed,
    Stack,
)


class Registry(Removals):
    """A registry on disk. Nothing is kept in memory: every question reads the file that answers it."""

    def verify(
        self, only: set[str] | None = None, progress: Callable[[str], None] = lambda _: None
    ) -> tuple[int, list[dict[str, str]]]:
        """Rehash everything registered, or only the labels given.

        Returns:
            how many things were checked, and every problem found as ``{"what", "message"}``.
        """
        problems: list[dict[str, str]] = []
        checked = 0

        def attempt(what: str, check: Callable[[], Any]) -> Any:
            try:
                return check()
            except StackctlError as error:
                problems.append({"what": what, "message": error.message})
                return None

        if only is None:
            attempt("registry", self.settings)
            for name in self.names(Removed):
                attempt(name, lambda n=name: self.find_removed(n))  # type: ignore[misc]
            for kind in (Base, Stack):
                for name in self.names(kind):
                    checked += 1
                    entry = attempt(name, lambda k=kind, n=name: self._read(k, n))  # type: ignore[misc]
                    if isinstance(entry, Stack):
                        attempt(name, lambda e=entry: (list(self._pinned_members(e)), self._stack_base(e)))  # type: ignore[misc]
        for name in self.names(Adapter):
            if only is not None and not any(label.partition("@")[0] == name for label in only):
                continue
            adapter = attempt(name, lambda n=name: self._read(Adapter, n))  # type: ignore[misc]
            for version in adapter.versions if adapter else ():
                label = f"{name}@{version.version}"
                if only is None or label in only:
                    progress(label)
                    checked += 1
                    member = ResolvedMember(adapter, version, 1.0)
                    attempt(label, lambda m=member: self._verify_version(m))  # type: ignore[misc]
        return checked, problems

    def _verify_version(self, member: ResolvedMember) -> None:
        self._plan_member(member)
        self.check_digests((member,), fresh=True)
        base = self.base(member.version.base)
        if base.fingerprint != member.version.fingerprint:
            raise Incompatible(f"{member.label} was trained on another model than the base '{base.name}' now is")
        for term in foundations(member.version):
            self.resolve_adapter(term.reference)
