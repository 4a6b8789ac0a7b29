"""A plugin that the processes of the tests find by its entry point: two tools, one of them with side effects."""

import os
from pathlib import Path
from typing import Any

from tools import Context, hookimpl


def note(context: Context, what: str) -> None:
    """Write a line to the file that the test reads; what is written stays, whatever becomes of the process."""
    with Path(os.environ["HILO_NOTES"]).open("a") as file:
        file.write(f"{context.address} {what}\n")


def consultar_cupo(context: Context, curso: str) -> str:
    """Dice cuántos lugares quedan en un curso."""
    note(context, f"consultar_cupo {curso}")
    context.send("Reviso los lugares…")
    return f"Quedan 7 lugares en {curso}."


def inscribir(context: Context, curso: str) -> str:
    """Inscribe al usuario en un curso."""
    note(context, f"inscribir {curso}")
    return f"Inscrito en {curso}."


@hookimpl
def register_tools(register: Any) -> None:
    register(consultar_cupo)
    register(inscribir, side_effects=True)
