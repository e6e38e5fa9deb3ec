"""Words that chains are made of, in two halves: what is trained on names nothing that is tested."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from recipes_peft.errors import UserError

__all__ = ["HALVES", "Fact", "Lexicon", "Scene", "half_of", "lexicon"]

HALVES = ("train", "test")
T = TypeVar("T")


@dataclass(frozen=True)
class Scene:
    """A list that is kept somewhere: where, what it is called, what may stand on it."""

    place: str
    listed: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A sentence of a passage and the question that its value answers."""

    sentence: str
    question: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Lexicon:
    """One half of all words.

    Raises:
        UserError: too little is left of a kind of word.
    """

    foreign: tuple[str, ...]
    names: tuple[str, ...]
    scenes: tuple[Scene, ...]
    stems: tuple[str, ...]
    things: tuple[str, ...]
    places: tuple[str, ...]
    facts: tuple[Fact, ...]

    def __post_init__(self) -> None:
        least = {
            "foreign": 8, "names": 6, "scenes": 2, "stems": 4, "things": 4, "places": 4, "facts": 4,
        }  # fmt: skip
        for kind, count in least.items():
            if len(getattr(self, kind)) < count:
                raise UserError(
                    f"the lexicon has {len(getattr(self, kind))} {kind} left, {count} are needed;"
                    " the rest stands in the data that are tested: add words to lexicons.py"
                )

    def words(self) -> set[str]:
        """Give all words that are of this half alone."""
        found = {*self.foreign, *self.names, *self.stems, *self.things, *self.places}
        found |= {item for scene in self.scenes for item in scene.items}
        return found | {value for fact in self.facts for value in fact.values}


def half_of(text: str) -> str:
    """Give the half that a text belongs to, by a checksum."""
    return HALVES[int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 2]


def lexicon(half: str, seed: int = 0, avoid: Iterable[str] = ()) -> Lexicon:
    """Give one half of the words; the halves of one seed share none.

    With `avoid`, texts that are tested beside them, words that occur there are left out.

    Raises:
        ValueError: there is no such half.
    """
    if half not in HALVES:
        raise ValueError(f"half is {half!r}; choose from {', '.join(HALVES)}")
    everything = "\n".join(avoid).lower()

    def part(words: Sequence[str], kind: str) -> tuple[str, ...]:
        mixed = sorted(words)
        random.Random(f"{seed} {kind}").shuffle(mixed)
        ours = mixed[HALVES.index(half) :: 2]
        return tuple(word for word in ours if word.lower() not in everything)

    chosen = part([scene.place for scene in _SCENES], "scenes")
    scenes = (scene for scene in _SCENES if scene.place in chosen)
    kept = [(s, tuple(i for i in s.items if i.lower() not in everything)) for s in scenes]
    facts = [Fact(*told, part(values, told[1])) for told, values in _FACTS.items()]
    return Lexicon(
        part(_FOREIGN, "foreign"),
        part(_NAMES, "names"),
        tuple(Scene(s.place, s.listed, items) for s, items in kept if len(items) > 6),
        part(_STEMS, "stems"),
        part(_THINGS, "things"),
        part(_PLACES, "places"),
        # one value is told, one asked for, and one is left if the question comes again
        tuple(fact for fact in facts if len(fact.values) > 2),
    )


_FOREIGN = (
    "Abacus", "Almanac", "Anchor", "Antler", "Anvil", "Apricot", "Archipelago", "Armadillo",
    "Asteroid", "Avocado", "Balcony", "Ballad", "Bamboo", "Barometer", "Bassoon", "Beeswax",
    "Beetroot", "Bellows", "Biscuit", "Blizzard", "Bonfire", "Bramble", "Buckwheat", "Burlap",
    "Buttress", "Cactus", "Caldera", "Canyon", "Caravan", "Cardamom", "Cartwheel", "Catapult",
    "Cauldron", "Chameleon", "Chandelier", "Chestnut", "Chisel", "Cinnamon", "Citadel", "Clarinet",
    "Cobalt", "Compass", "Copper", "Coral", "Crater", "Cricket", "Cucumber", "Cymbal", "Dahlia",
    "Dragonfly", "Driftwood", "Dromedary", "Dulcimer", "Dynamo", "Eclipse", "Emerald", "Falcon",
    "Ferret", "Fiddle", "Firefly", "Flamingo", "Flannel", "Furnace", "Garnet", "Gazelle", "Geyser",
    "Ginger", "Glacier", "Gondola", "Granite", "Gravel", "Hammock", "Harpoon", "Hazel", "Hedgehog",
    "Heron", "Hornet", "Hourglass", "Iguana", "Igloo", "Jackdaw", "Jasmine", "Juniper", "Kettle",
    "Kingfisher", "Lagoon", "Lantern", "Lavender", "Lichen", "Lighthouse", "Limestone", "Lobster",
    "Locket", "Magnet", "Magpie", "Mallet", "Mammoth", "Mandolin", "Marigold", "Marmot", "Meadow",
    "Meteor", "Millet", "Monsoon", "Mosaic", "Mulberry", "Nettle", "Nutmeg", "Oboe", "Obsidian",
    "Octopus", "Orchid", "Otter", "Paprika", "Parsnip", "Pebble", "Pelican", "Pendulum", "Pewter",
    "Pigment", "Pinecone", "Porcupine", "Pulley", "Quartz", "Quiver", "Raccoon", "Radish",
    "Rhubarb", "Saffron", "Sandstone", "Sapphire", "Scarab", "Sextant", "Sparrow", "Sturgeon",
    "Tangerine", "Teapot", "Thimble", "Thistle", "Toucan", "Tundra", "Turnip", "Turquoise",
    "Velvet", "Vinegar", "Walnut", "Walrus", "Wasp", "Windmill", "Yarrow", "Zeppelin",
)  # fmt: skip
_NAMES = (
    "Aurelio", "Benedikta", "Birgit", "Caspian", "Dagny", "Dmitri", "Eluned", "Ferenc", "Fiametta",
    "Gudrun", "Hamish", "Ilse", "Ingmar", "Isidro", "Jolanta", "Kaveh", "Ljubica", "Lorcan",
    "Malvina", "Mirela", "Nadeem", "Nikolai", "Oswin", "Ottilie", "Petronella", "Quillan",
    "Radoslav", "Rosalba", "Saoirse", "Solveig", "Stellan", "Tamsin", "Tiberiu", "Ulrika", "Vasile",
    "Wilhelmina", "Xanthe", "Yevgenia", "Zbigniew", "Zuzana",
)  # fmt: skip
_STEMS = (
    "amber", "brisk", "cedar", "delta", "ember", "fjord", "gravel", "harbor", "ivory", "jigsaw",
    "kelp", "ledger", "mango", "nickel", "olive", "pepper", "quill", "rivet", "saddle", "timber",
    "umber", "vessel", "willow", "yonder", "zephyr", "cobble", "dapple", "fennel", "gimlet",
    "heath",
)  # fmt: skip
_THINGS = (
    "acorns", "bolts", "bricks", "candles", "coins", "corks", "eggs", "figs", "hinges", "jars",
    "kites", "lemons", "marbles", "mugs", "nails", "olives", "onions", "pebbles", "pegs", "plums",
    "postcards", "ribbons", "screws", "seeds", "shells", "spoons", "stamps", "tiles", "tulips",
    "whistles",
)  # fmt: skip
_PLACES = (
    "Arnholm", "Brackwater", "Caldbeck", "Dunmarrow", "Eskford", "Fallowby", "Glenhurst", "Harlowe",
    "Inverlay", "Kestrelby", "Larkmoor", "Millbrae", "Netherby", "Orrington", "Pellgate",
    "Quarnford", "Ravensholt", "Silverdeep", "Thornwick", "Ullsby", "Vantmoor", "Westerlea",
    "Yarnbrook", "Zennerby",
)  # fmt: skip
_SCENES = (
    Scene(
        "boatyard", "repair list",
        ("rudder", "mast", "keel", "capstan", "bilge pump", "tiller", "winch", "anchor chain"),
    ),
    Scene(
        "seed bank", "seed catalogue",
        ("emmer wheat", "teff", "amaranth", "sorghum", "black oats", "einkorn", "spelt", "quinoa"),
    ),
    Scene(
        "observatory", "observing plan",
        ("Vega", "Altair", "Deneb", "Rigel", "Capella", "Antares", "Spica", "Arcturus"),
    ),
    Scene(
        "cheese cellar", "tasting card",
        ("gouda", "pecorino", "comte", "stilton", "halloumi", "gruyere", "manchego", "taleggio"),
    ),
    Scene(
        "map room", "loan register",
        ("harbour chart", "soil survey", "star atlas", "tide table", "town plan", "globe",
         "rail map", "portolan"),
    ),
    Scene(
        "workshop", "tool board",
        ("spokeshave", "mortise gauge", "bradawl", "hacksaw", "spirit level", "plumb line",
         "rasp", "clamp"),
    ),
    Scene(
        "aviary", "ring book",
        ("siskin", "linnet", "goldfinch", "waxwing", "redpoll", "hoopoe", "bunting", "nuthatch"),
    ),
    Scene(
        "dye house", "colour ledger",
        ("madder", "woad", "weld", "cochineal", "indigo", "annatto", "logwood", "safflower"),
    ),
    Scene(
        "quarry", "shipping list",
        ("slate", "basalt", "travertine", "gneiss", "porphyry", "marl", "dolerite", "onyx"),
    ),
    Scene(
        "puppet theatre", "season bill",
        ("The Clockmaker", "The Salt Road", "Three Ferrymen", "The Glass Hare", "Night Mail",
         "The Ninth Bell", "Winter Market", "The Tin Crown"),
    ),
    Scene(
        "orchard", "harvest sheet",
        ("quince", "damson", "medlar", "russet", "greengage", "mirabelle", "perry pear",
         "cobnut"),
    ),
    Scene(
        "ferry office", "cargo note",
        ("tarpaulin", "rope coils", "lamp oil", "flour sacks", "copper wire", "paint drums",
         "canvas", "grain"),
    ),
)  # fmt: skip
_FACTS: Mapping[tuple[str, str], tuple[str, ...]] = {
    (
        "The {kind} of {place} was opened in {value}.",
        "In which year was the {kind} of {place} opened?",
    ): ("1814", "1827", "1839", "1846", "1853", "1868", "1871", "1885", "1892", "1906"),
    ("It was designed by {value}.", "Who designed it?"): (
        "Ansgar Holt", "Beatrix Lund", "Clement Avery", "Drusilla Page", "Edmund Sorrel",
        "Freya Nansen", "Gideon Marsh", "Honora Pike", "Ivor Blythe", "Judith Crane",
    ),
    ("Its walls are made of {value}.", "What are its walls made of?"): (
        "red brick", "flint", "rammed earth", "larch boards", "grey stone", "white marble",
        "black slate", "oak beams", "cast iron", "pale clay",
    ),
    ("The roof is covered with {value}.", "What is the roof covered with?"): (
        "reed thatch", "copper plates", "cedar shingles", "zinc sheets", "moss", "lead tiles",
        "birch bark", "green glass", "pine planks", "straw",
    ),
    ("On the first floor there is {value}.", "What is there on the first floor?"): (
        "a weaving room", "a reading hall", "a chapel", "a print shop", "a bakery",
        "a music school", "a post office", "an armoury", "a fencing hall", "a tea room",
    ),
    ("Every autumn it holds {value}.", "What does it hold every autumn?"): (
        "an onion fair", "a kite race", "a chess congress", "a lantern walk", "a book sale",
        "a cider feast", "a choir week", "a poetry night", "a horse market", "a clock show",
    ),
}  # fmt: skip
