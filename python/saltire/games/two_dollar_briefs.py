"""The secret instructions of Two Dollar: what the rules enforce, and what they only ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Brief:
    """One set of secret instructions.

    share: the least part of the total to get, in percent; most_words: before the action;
    largest_concession: in cents, from one own proposal to the next; deadline: accept a deal in the
    first half of the match. Without any of them the brief only colours the talk.
    """

    name: str
    words: str
    share: int | None = None
    most_words: int | None = None
    largest_concession: int | None = None
    deadline: bool = False

    def text(self, total: int, turns: int) -> str:
        """The instructions as the player reads them; total in cents."""
        least = (self.share or 0) * total // 100
        return self.words.format(
            least=f"${least // 100}.{least % 100:02}",
            words=self.most_words,
            concession=self.largest_concession,
            turns=turns // 2,
        )


_LEAST = "Get as much as you can. Less than {least} is worthless to you, so do not settle there."

BRIEFS: tuple[Brief, ...] = (
    Brief("quarter", _LEAST, share=25),
    Brief("two-fifths", _LEAST, share=40),
    Brief("half", _LEAST, share=50),
    Brief("two-thirds", _LEAST, share=65),
    Brief("four-fifths", _LEAST, share=80),
    Brief(
        "terse",
        "Say next to nothing: at most {words} words before your action. Let the amount speak.",
        most_words=15,
    ),
    Brief(
        "stubborn",
        "Keep the pressure up. When you lower a demand, lower it by {concession} cent at a time.",
        largest_concession=1,
    ),
    Brief(
        "deadline",
        "You have to leave early: accept a deal within the first {turns} moves of the match.",
        deadline=True,
    ),
    Brief("again", "You will meet this player again, so no deal today is no disaster for you."),
    Brief("fighter", "Your name is for never leaving a cent on the table. Live up to it."),
    Brief("partner", "You will depend on this player for years. Do well, and give no offence."),
    Brief("kind", "The other player has had a dreadful month and hides it. Still, do well."),
    Brief("storyteller", "Invent the most convincing story you can for why you need the money."),
    Brief("public", "You are known for being fair, and what you say will be repeated in public."),
    Brief("recorded", "Everything may be recorded. Say only what you could read in the paper."),
    Brief("wary", "The other player has deceived everyone so far. Stay polite and trust nothing."),
    Brief("plain", "Get as large a part of the money as you can."),
)
