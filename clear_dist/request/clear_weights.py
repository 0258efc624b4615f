"""The CLEAR checkpoint of a request, and whether it fits the model."""

import os
from pathlib import Path

from clear_dist import demo
from clear_dist.cards import clear
from clear_dist.cards.card import Cards, Published
from clear_dist.cards.folder import ModelFacts
from clear_dist.cards.headers import read_shapes
from clear_dist.cards.hub_name import HubFile
from clear_dist.options import Refusal, Window, nearest_word, shortened

HUB_FORM = "owner/name:file.safetensors, or owner/name@revision:file.safetensors"


def find_checkpoint(
    word: str, window: Window | None, model: ModelFacts, cards: Cards, factor: int | None = None
) -> str | None:
    """The checkpoint of `--clear-weights`: a file, or on the hub a `HubFile`'s name; None: the model's own weights.

    `window` and `factor`, that of down-sampled keys, None: the checkpoint's. Raises a Refusal for a missing or damaged
    checkpoint, another model's, window's or factor's.
    """
    found = None
    if word != "none":
        found = _automatic(window, factor, model) if word == "auto" else _given(word, window, factor, model, cards)
    if factor not in (None, has := down_factor(window, found)):
        which = "with --window full" if window == "full" else f"of {found}" if found else f"of {model.name} without any"
        raise Refusal(f"--down-factor must be that of the CLEAR weights, {has} {which}, got {factor}; nearest: {has}")
    if found is None:
        return None
    if word != "auto":  # for a choice of ours the user gets a note instead
        clear.refuse_other_radius(found, window)
    if os.path.exists(found):
        shapes = read_shapes(Path(found))
        factor = clear.down_factor_of(shapes, found)
        if model.shape is not None:
            expected = model.shape.clear_tensors(factor)
            other = cards.made_for(shapes, factor, but=model.card)
            if other is not None and expected.keys() != shapes.keys():
                raise _for_another(found, other.id, model)
            if model.is_demo and expected.keys() != shapes.keys() == demo.first_version(expected):
                raise _for_another(found, "the first version of the embedded model", model)
            clear.require_same_tensors(expected, shapes, found)
    return found


def down_factor(window: Window | None, checkpoint: str | None) -> int:
    """Factor of a checkpoint's down-sampled keys, 1 without or with a full window; on the hub by name only."""
    if window == "full" or checkpoint is None:
        return 1
    if os.path.exists(checkpoint):
        return clear.down_factor_of(read_shapes(Path(checkpoint)), checkpoint)
    return clear.named_down_factor(checkpoint) or 1


def _automatic(window: Window | None, factor: int | None, model: ModelFacts) -> str | None:
    if window == "full":
        return None
    if model.is_demo:
        return _checkpoint_in(demo.WEIGHTS, window or demo.WINDOW, factor or 1)
    if model.folder is None:
        published = None if model.card is None else model.card.clear
        return None if published is None else _published(published, window, factor or 1)
    return _checkpoint_in(model.folder, window, factor)


def _published(published: Published, window: Window | None, factor: int) -> str:
    file = _named(window or published.radius, factor)
    if file not in published.files:
        fitting = [name for name in published.files if clear.named_down_factor(name) == factor]
        if not fitting:
            factors = sorted({clear.named_down_factor(name) or 1 for name in published.files})
            rule = f"--down-factor must be one of {', '.join(map(str, factors))}, which {published.repository} has"
            raise Refusal(f"{rule}, got {factor}; nearest: {min(factors, key=lambda each: abs(each - factor))}")
        radii = sorted({clear.radius_of(name) or 0 for name in fitting})
        nearest = min(radii, key=lambda radius: abs(radius - int(window or radius)))
        pooled = f" with --down-factor {factor}" * (factor > 1)
        raise Refusal(
            f"--window must be one of {', '.join(map(str, radii))}, which {published.repository} has weights for"
            f"{pooled}, got {window}; nearest: {nearest}, or --clear-weights FILE"
        )
    return str(HubFile(published.repository, None, file))


def _given(word: str, window: Window | None, factor: int | None, model: ModelFacts, cards: Cards) -> str:
    path = Path(word).expanduser()
    if os.path.exists(path):  # a Path raises for a name that is too long
        return _local(path, window, factor)
    if ":" not in word and path.suffix in (".safetensors", *clear.PICKLED):
        named = (HubFile(each.repository, None, path.name) for each in cards.published if path.name in each.files)
        raise Refusal(f"--clear-weights: there is no {shortened(str(path))}; nearest: {next(named, 'auto')}")
    likely = (model.card and model.card.clear) or next(iter(cards.published), None)
    radius = likely.radius if likely is not None and window in (None, "full") else window
    found = HubFile.of(word, default="" if radius in (None, "full") else _named(radius, factor or 1))
    if found is not None:
        return _on_the_hub(found, model, cards)
    if ":" in word:
        raise Refusal(f"--clear-weights on the hub must be {HUB_FORM}, got {shortened(word)!r}; nearest: auto")
    raise Refusal(
        "--clear-weights must be auto, none, a safetensors file, a folder, or on the hub owner/name:file; "
        f"there is no {shortened(str(path))}; nearest: auto"
    )


def _local(path: Path, window: Window | None, factor: int | None) -> str:
    if os.path.isfile(path):
        return str(path)
    if found := _checkpoint_in(path, window, factor):
        return found
    for file in sorted(path.glob("clear_local_*")):
        clear.refuse_pickled(file)
    raise Refusal(f"--clear-weights: {path} holds no clear_local_<radius>.safetensors; nearest: none")


def _on_the_hub(found: HubFile, model: ModelFacts, cards: Cards) -> str:
    clear.refuse_pickled(found.file)
    if not found.file.endswith(".safetensors"):
        raise Refusal(f"--clear-weights on the hub must be {HUB_FORM}, got {shortened(str(found))!r}; nearest: auto")
    for card in cards.cards:
        if card.clear is not None and found.repository == card.clear.repository and model.card not in (None, card):
            raise _for_another(str(found), card.hub_models[0].id, model)
    for each in cards.published:
        if (found.repository, found.revision) == (each.repository, None) and found.file not in each.files:
            raise Refusal(
                f"{each.repository} has {', '.join(each.files)}, got {shortened(found.file)}; "
                f"nearest: {nearest_word(found.file, each.files)}"
            )
    return str(found)


def _for_another(checkpoint: str, its_model: str, model: ModelFacts) -> Refusal:
    return Refusal(
        f"--clear-weights must be for {model.name}, got {checkpoint}, which is for {its_model}; nearest: "
        "--clear-weights none"
    )


def _named(radius: Window, factor: int) -> str:
    return f"clear_local_{radius}{f'_down_{factor}' * (factor > 1)}.safetensors"


def _checkpoint_in(folder: Path, window: Window | None, factor: int | None) -> str | None:
    """The folder's checkpoint for the window and the factor; without one the narrowest, which is the fastest."""
    files = [file for file in folder.iterdir() if clear.radius_of(file.name) and file.is_file()]
    fitting = [file for file in files if clear.radius_of(file.name) == window] or files
    fitting = [file for file in fitting if clear.named_down_factor(file.name) == factor] or fitting
    fitting.sort(key=lambda file: (clear.named_down_factor(file.name), clear.radius_of(file.name)))
    return str(fitting[0]) if fitting else None
