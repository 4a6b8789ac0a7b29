"""Shows "typing…" while an answer is being made, and the user's message as read.

Once a turn, while the assistant answers, and after all other plugins: a command, which is answered at once, shows
nothing.
"""

from __future__ import annotations

from tools import Context, Message, hookimpl


@hookimpl(trylast=True)
def incoming_message(message: Message, context: Context) -> None:
    """Show it for the last message of the turn; the message itself is left to the assistant."""
    if context.mode == "bot" and context.turn and message.sid == context.turn[-1].sid:
        context.show_typing(message)
