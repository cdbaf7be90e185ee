"""The matrices that balance keys in a checkpoint: its options only name them."""

from __future__ import annotations

from quarot_fx.balance import Balance, KeyBalance, KeyBalances
from quarot_fx.checkpoint.damage import damaged
from quarot_fx.checkpoint.manifest import Balanced, Manifest
from quarot_fx.checkpoint.shards import ShardReader, ShardWriter
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import NotABalanceError


def write_balances(config: QuarotConfig, writer: ShardWriter) -> tuple[Balanced, ...]:
    """Write the balances that a config names, if it does."""
    if config.key_balance is None:
        return ()
    return tuple(
        Balanced(one.where, one.balance, writer.add(one.balance, Balance.parse(one.balance).matrices()))
        for one in KeyBalances.known(config.key_balance)
    )


def read_balances(manifest: Manifest, reader: ShardReader, folder: str) -> None:
    """Make the balances of a checkpoint known to the process, by the name that its options have for them.

    Raises:
        CheckpointFormatError: matrices balance nothing, or are others than they are called; or the options name others.
    """
    layers = []
    for one in manifest.balances:
        try:
            balance = Balance.of_matrices(reader.read(one.tensor))
        except NotABalanceError as error:
            raise damaged(folder, f"{one.balance} is no balance: {error}") from error
        if str(balance) != one.balance:
            raise damaged(folder, f"the matrices of {one.balance} are those of {balance}")
        layers.append(KeyBalance(one.where, one.balance))
    name, named = KeyBalances(layers).name if layers else None, manifest.options.get("key_balance")
    if name != named:
        raise damaged(folder, f"its options name the balances {named!r}, and it holds {name!r}")
