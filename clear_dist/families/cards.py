"""The table of all cards: a new family is a folder beside this file and a row here. Nothing here imports torch."""

from clear_dist.cards.card import Cards
from clear_dist.families.flux import card as flux

CARDS = Cards(cards=(flux.CARD,), default=flux.FLUX_DEV)
