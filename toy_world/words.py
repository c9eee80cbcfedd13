"""The words of the toy world: all words of contents and answers, by category or with their opposite."""

CATEGORIES = {
    "fruit": "apple pear plum fig grape lemon mango peach cherry melon lime kiwi banana papaya",
    "animal": "cow dog cat horse sheep goat lion tiger bear wolf fox rabbit mouse camel",
    "color": "red blue green yellow purple pink brown black white gray",
    "tool": "hammer saw drill wrench shovel chisel pliers rake axe ladder",
    "vehicle": "car bus train truck boat ship plane bike van tram",
    "drink": "water milk tea coffee juice soda cider cocoa",
    "garment": "shirt coat hat sock glove scarf dress belt boot jacket",
    "metal": "iron gold silver copper tin zinc steel nickel brass",
    "flower": "rose lily tulip daisy orchid poppy violet iris",
    "tree": "oak pine maple birch cedar elm willow palm",
    "instrument": "piano violin flute drum guitar harp cello trumpet",
    "shape": "circle square triangle cube cone oval",
}
WORDS_OF = {category: tuple(words.split()) for category, words in CATEGORIES.items()}
CATEGORY_OF = {word: category for category, words in WORDS_OF.items() for word in words}
PLURAL_OF = {category: category + "s" for category in WORDS_OF}
CATEGORY_OF_PLURAL = {plural: category for category, plural in PLURAL_OF.items()}

_PAIRS = (
    "hot cold,big small,fast slow,wet dry,old new,hard soft,high low,rich poor,full empty,dark light,happy sad,"
    "strong weak,long short,early late,open closed,loud quiet,clean dirty,deep shallow,wide narrow,thick thin,"
    "sharp dull,near far,left right,true false,sweet sour,smooth rough"
)
_FORWARD = {pair.split()[0]: pair.split()[1] for pair in _PAIRS.split(",")}
OPPOSITE_OF = _FORWARD | {right: left for left, right in _FORWARD.items()}

_THINGS = (
    "river stone cloud forest garden window bridge castle candle mirror paper pencil book bottle basket blanket pillow "
    "island ocean mountain valley desert field road street village market school kitchen door wall roof floor clock "
    "key coin ring button needle rope wheel sand snow rain wind storm star moon sun fire smoke"
)
THINGS = tuple(_THINGS.split())

NAMED = tuple(CATEGORY_OF)
QUALITIES = tuple(OPPOSITE_OF)
CONTENT_WORDS = NAMED + QUALITIES + THINGS

# Tasks that need to know a word by its letters (order, length, casing) keep to these, so that a small model can learn
# them by heart.
SPELLED_WORDS = tuple(
    word for category in ("fruit", "animal", "color", "tool", "vehicle") for word in WORDS_OF[category]
)

ORDINALS = {"second": 2, "third": 3, "fourth": 4}
NUMBERS = tuple(str(number) for number in range(100))
