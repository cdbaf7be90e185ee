"""A report as text: the table that rich shows, without colours, where a string is wanted."""

from __future__ import annotations

WIDTH = 120  # characters


class Printed:
    """What has a ``__rich__``: ``str`` and ``print`` show the same."""

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=WIDTH, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()
