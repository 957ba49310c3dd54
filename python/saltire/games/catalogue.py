"""Games by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from saltire.errors import SaltireError
from saltire.games.boast import Boast
from saltire.games.dont_say_it import DontSayIt, DontSayItHard
from saltire.games.game import Game
from saltire.games.negotiation import Negotiation, NegotiationRandomValue
from saltire.games.textarena import PREFIX, TextArenaGame
from saltire.games.two_dollar import TwoDollar, TwoDollarVariableSum
from saltire.games.undercover import Undercover

GAMES: dict[str, type[Game[Any, Any]]] = {
    game.name: game
    for game in (
        DontSayIt,
        DontSayItHard,
        Negotiation,
        NegotiationRandomValue,
        TwoDollar,
        TwoDollarVariableSum,
        Undercover,
        Boast,
    )
}


def make(name: str, **options: Any) -> Game[Any, Any]:
    """The game called ``name``, or TextArena's ``textarena:ID``.

    Raises SaltireError with the nearest names or the known options.
    """
    if name.startswith(PREFIX):
        players = options.pop("players", 0)
        return TextArenaGame(name.removeprefix(PREFIX), players, options)
    if name not in GAMES:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), GAMES, n=3, cutoff=0.4)
        hint = f"Did you mean {', '.join(near)}?" if near else ""
        raise SaltireError(
            f"no game is called {name!r}. {hint} The games are {', '.join(sorted(GAMES))}, "
            f"and {PREFIX}ID for those of TextArena."
        )
    kind = GAMES[name]
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - known)
    if unknown:
        raise SaltireError(
            f"{name} has no option {unknown[0]!r}; its options are {', '.join(sorted(known))}."
        )
    return kind(**options)
