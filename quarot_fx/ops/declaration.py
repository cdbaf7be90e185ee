"""One op, one declaration: schema, reference, fake, input generator, tolerance and providers, stated together.

Passes insert ``torch.ops.quarot.*`` nodes; every op has a reference in plain PyTorch, so a rewritten graph
runs anywhere. Parity tests of every provider come from the declaration (vLLM's IR ops showed how well that
works). The kernel is registered as ``CompositeExplicitAutograd``, so no tracer decomposes the op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

LIBRARY = torch.library.Library("quarot", "DEF")
DECLARATIONS: dict[str, OpDeclaration] = {}
_PROVIDER_LIBRARIES: dict[str, torch.library.Library] = {}  # by namespace; registrations live as long as these
HALF_TOLERANCE = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # one unit in the last place


@dataclass(frozen=True)
class Provider:
    """An implementation of an op for some devices, dtypes and shapes.

    Attributes:
        reason_against: takes the op's arguments, fake tensors too, and says why the provider cannot run them; ``None``
            if it can.
        implementation: takes the op's arguments and returns what the reference does, within the op's tolerance.
        prepare: takes the op's arguments, fake tensors, and makes what every run needs besides them, before any run:
            nothing that outlives a run may be made while a CUDA graph is recorded.
    """

    reason_against: Callable[..., str | None]
    implementation: Callable[..., Any]
    prepare: Callable[..., None] | None = None


@dataclass(frozen=True)
class OpDeclaration:
    """A ``quarot::`` op.

    Attributes:
        schema: the op's signature in torch's schema language, without the namespace. An op that appends to a cache
            writes what it names ``Tensor(a!)`` in place; all others are functional.
        reference: the op in plain PyTorch; it defines what the op means.
        fake: shapes and dtypes of the result, from fake tensors.
        inputs: yields argument tuples, made from a seeded generator, that cover the op's corner cases.
        tolerance: error allowed to a provider against the reference, relative to the largest magnitude in the
            result, by the result's dtype; a dtype that is not named must agree exactly.
        code_flips: fraction of a provider's codes that may be the neighbour of the reference's: a number that lies
            between two codes falls to either side when it is computed in another order.
        is_traceable: the reference calls functional operators of ATen only, so that a compiler may fuse these.
        providers: by name. Packages that provide implementations add themselves.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    inputs: Callable[[torch.Generator], Iterator[tuple[Any, ...]]]
    tolerance: Mapping[torch.dtype, float] = field(default_factory=dict)
    code_flips: float = 0.0
    is_traceable: bool = True
    providers: dict[str, Provider] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The op's name, as in ``torch.ops.quarot.<name>``."""
        return self.schema.partition("(")[0]

    @property
    def written(self) -> tuple[int, ...]:
        """The places of the arguments that the op writes in place."""
        parameters = enumerate(self.overload._schema.arguments)
        return tuple(place for place, one in parameters if one.alias_info is not None and one.alias_info.is_write)

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The callable to insert into a graph."""
        return getattr(torch.ops.quarot, self.name).default

    def overload_of(self, provider: str) -> torch._ops.OpOverload:
        """The callable ``torch.ops.quarot_<provider>.<name>``, which one provider runs, whatever its arguments are."""
        namespace = f"quarot_{provider}"
        if not hasattr(getattr(torch.ops, namespace), self.name):
            library = _PROVIDER_LIBRARIES.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
            _register(library, self.schema, self.providers[provider].implementation, self.fake)
        return getattr(getattr(torch.ops, namespace), self.name).default


def declaration_of(target: Any) -> OpDeclaration | None:
    """Return the declaration of one of our ops, ``torch.ops.quarot.<name>``, and ``None`` for any other callable."""
    is_ours = isinstance(target, torch._ops.OpOverload) and target.namespace == LIBRARY.ns
    return DECLARATIONS.get(target._opname) if is_ours else None


def reference_of(target: Any) -> Any:
    """Return the op that runs the reference of one that was given to a provider, and any other callable as it is."""
    is_given = isinstance(target, torch._ops.OpOverload) and target.namespace.startswith("quarot_")
    return DECLARATIONS[target._opname].overload if is_given else target


def declare(declaration: OpDeclaration) -> torch._ops.OpOverload:
    """Register an op with torch and return the overload that graphs call."""
    _register(LIBRARY, declaration.schema, declaration.reference, declaration.fake)
    DECLARATIONS[declaration.name] = declaration
    return declaration.overload


def _register(
    library: torch.library.Library, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
