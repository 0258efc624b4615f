"""The table of all cards: a new family is a folder beside this file and a row here. Nothing here imports torch."""

from clear_dist.cards.card import Cards
from clear_dist.families.flux import card as flux
from clear_dist.families.flux import controlnet_card as flux_controlnets
from clear_dist.families.flux2 import card as flux2
from clear_dist.families.sd3 import card as sd3
from clear_dist.families.z_image import card as z_image

CARDS = Cards(
    cards=(flux.CARD, flux2.KLEIN, flux2.DEV, sd3.CARD, z_image.CARD),
    default=flux.FLUX_DEV,
    controlnets={flux.CARD.pipeline: flux_controlnets.CONTROLNETS},
)
