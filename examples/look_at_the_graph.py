"""Look at what quarot does to a model: the graph after any pass, the plan, the report.

    python examples/look_at_the_graph.py

The model is one feed-forward block, small enough to read the whole graph.
"""

import torch
from rich import print as rich_print
from torch import Tensor, nn
from torch.nn import functional as F

import quarot_fx


class FeedForward(nn.Module):
    """``x + down(silu(gate(norm(x))) * up(norm(x)))``, between an embedding and a head."""

    def __init__(self, vocabulary: int = 32, width: int = 64, hidden: int = 176) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm, self.last_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [batch, tokens, vocabulary]."""
        x = self.embedding(ids)
        normed = self.norm(x)
        x = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return self.head(self.last_norm(x))


def main() -> None:
    """Print the graph at two stages, the plan and the report."""
    torch.manual_seed(0)
    model, ids = FeedForward().eval(), torch.arange(8)[None]

    print("After `rotate`: an equal model in rotated bases. Norms are lengths, gains are in the weights, and the one")
    print("transform that runs online stands before `down`, because nothing can be rotated through silu(gate) * up.\n")
    rotated = quarot_fx.rewrite(model, ids, stop_after="rotate")
    rotated.print_readable()
    difference = (rotated(ids)[0] - model(ids)).norm() / model(ids).norm()
    print(f"relative difference of the logits: {difference:.0e}\n")

    print("The plan is data. It says where each transform is, and why:\n")
    plan = rotated.quarot.plan
    for transform in plan.online:
        print(f"  {transform.rotation} before {transform.where}, because of {transform.why}")
    for site in plan.sites:
        print(f"  {site.name}: {site.rotated}")
    print(f"  ... {len(plan.to_json())} characters of JSON\n")

    print("All passes, each checked against the stage before:\n")
    rich_print(quarot_fx.explain(model, ids, check=True))


if __name__ == "__main__":
    main()
