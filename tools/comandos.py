"""Commands that a user types: /reiniciar and /ayuda, also as /reset, /help and /ajuda.

A team adds its own in a plugin, without touching this file:

    from tools import Context, Message, hookimpl

    @hookimpl
    def incoming_message(message: Message, context: Context) -> str | None:
        '''Answer /horario.'''
        return "De lunes a viernes de 9 a 18 h." if message.text.strip().lower() == "/horario" else None

    def ayuda(context: Context) -> list[str]:
        '''Lines for /ayuda.'''
        return ["*/horario* para saber cuándo abrimos"]

A message that begins with / waits for no others, and is answered without the model where a plugin answers it. The
opt-out words (BAJA, STOP, ALTA…) are the core's. The texts are in `textos.toml`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator

from tools import Context, Message, hookimpl
from tools._textos import texto


@hookimpl
def incoming_message(message: Message, context: Context) -> str | None:
    """What a command answers; None for any other message."""
    palabra = message.text.strip().lower()
    if palabra not in COMANDOS:
        return None
    comando, idioma = COMANDOS[palabra]
    return comando(message, context, idioma or context.language)


def reiniciar(message: Message, context: Context, idioma: str) -> str:
    """Leave the conversation: the next one is told nothing from before this message."""
    context.query("SELECT forget_thread(:usuario, :sid)", usuario=context.address, sid=message.sid)
    return texto("reiniciado", idioma)


def mostrar_ayuda(message: Message, context: Context, idioma: str) -> str:
    """Say what may be typed, with the lines of the other plugins."""
    return "\n".join([texto("ayuda", idioma), *(f"• {linea}" for linea in lineas(context))])


def lineas(context: Context) -> Iterator[str]:
    """What the function `ayuda` of each plugin in `tools/` has to add."""
    for nombre in sorted(nombre for nombre in sys.modules if re.fullmatch(r"tools\.[a-z]\w*", nombre)):
        ayuda = getattr(sys.modules[nombre], "ayuda", None)
        try:
            yield from ayuda(context) if ayuda else ()
        except Exception as error:  # one plugin's settings are no reason to leave a user without help
            context.log.warning("⚠️ ayuda in %s failed: %s", nombre, error)


COMANDOS: dict[str, tuple[Callable[[Message, Context, str], str], str | None]] = {
    "/reiniciar": (reiniciar, None),
    "/reset": (reiniciar, None),
    "/ayuda": (mostrar_ayuda, None),
    "/help": (mostrar_ayuda, "en"),
    "/ajuda": (mostrar_ayuda, "pt"),
}
