"""Topics and templates of the general prompts. A template is used with the topics of its own group only."""

TOPICS = {
    "science": (
        "photosynthesis", "gravity", "plate tectonics", "the water cycle", "DNA", "black holes", "vaccines",
        "electricity", "magnetism", "evolution", "the solar system", "volcanoes", "earthquakes", "the human heart",
        "the nervous system", "antibiotics", "climate", "ocean tides", "rainbows", "lightning", "atoms",
        "chemical bonds", "enzymes", "sound waves", "lasers", "the Moon", "comets", "bacteria", "fungi", "coral reefs",
    ),
    "history": (
        "the Roman Empire", "the Silk Road", "the printing press", "the Industrial Revolution", "ancient Egypt",
        "the Renaissance", "the French Revolution", "the Space Race", "the Black Death", "the Vikings",
        "the Great Wall of China", "the steam engine", "the Inca Empire", "the Magna Carta", "the Ottoman Empire",
        "the invention of writing", "the Berlin Wall", "the Suez Canal", "the Olympic Games", "the telegraph",
    ),
    "technology": (
        "recursion", "binary search", "hash tables", "databases", "encryption", "machine learning", "the internet",
        "version control", "operating systems", "neural networks", "unit tests", "regular expressions", "compilers",
        "batteries", "solar panels", "3D printing", "satellites", "search engines", "linked lists", "sorting",
        "object-oriented programming", "web browsers", "computer memory", "robots", "QR codes", "touch screens",
    ),
    "food": (
        "tomato soup", "pancakes", "vegetable curry", "sourdough bread", "fried rice", "apple pie", "lentil salad",
        "homemade pizza", "chocolate cake", "green tea", "an omelette", "mushroom risotto", "hummus", "guacamole",
        "banana bread", "roasted potatoes", "a fruit smoothie", "pumpkin soup", "dumplings", "lemonade",
    ),
    "places": (
        "Japan", "Iceland", "Morocco", "Peru", "Canada", "Italy", "Kenya", "New Zealand", "India", "Portugal",
        "Norway", "Vietnam", "Greece", "Mexico", "Egypt", "Scotland", "Brazil", "Thailand", "Switzerland", "Chile",
    ),
    "health": (
        "sleep", "stretching", "back pain", "stress", "hydration", "running", "a balanced diet", "meditation",
        "eye strain", "headaches", "sunburn", "the common cold", "walking", "breathing exercises", "vitamin D",
        "swimming", "good posture", "allergies",
    ),
    "everyday": (
        "learning a language", "saving money", "a job interview", "growing herbs indoors", "moving to a new city",
        "cleaning a kitchen", "choosing a bicycle", "planning a birthday party", "reading more books",
        "managing time", "writing a thank-you note", "adopting a dog", "repairing a leaking tap", "public speaking",
        "organising a bookshelf", "working from home", "a weekly shopping list", "teaching a child to swim",
        "photographing a sunset", "recycling",
    ),
    "stories": (
        "a lighthouse", "a lost key", "a talking cat", "the first snow", "an old clock", "a small robot",
        "a train journey", "a hidden garden", "two rivals", "a letter from the future", "a dragon who likes books",
        "a thunderstorm", "an empty museum", "a fisherman", "a broken violin", "the last bus", "a mountain village",
        "a paper boat", "a night without stars", "a kind stranger",
    ),
}  # fmt: skip

EXPLAIN = (
    "Explain {topic} to a beginner.",
    "What are the most important things to know about {topic}?",
    "List five facts about {topic}.",
    "Give a short summary of {topic} in three sentences.",
    "Explain {topic} to a ten-year-old child.",
    "Write a short quiz with three questions and answers about {topic}.",
    "Why does {topic} matter?",
)
ADVICE = (
    "Give me five tips about {topic}.",
    "I need help with {topic}. Where should I start?",
    "What are common mistakes people make about {topic}?",
    "Write a short, friendly email to a colleague about {topic}.",
    "Make a simple checklist for {topic}.",
)
TEMPLATES = {
    "science": (
        *EXPLAIN,
        "What is a common misunderstanding about {topic}?",
        "Who discovered or first explained {topic}?",
    ),
    "history": (
        *EXPLAIN,
        "Write a timeline of {topic} with five dates.",
        "What did {topic} change for ordinary people?",
    ),
    "technology": (
        *EXPLAIN,
        "What are the advantages and disadvantages of {topic}?",
        "Describe {topic} with an everyday analogy.",
    ),
    "food": (
        "Give me a simple recipe for {topic}.",
        "What ingredients do I need for {topic}?",
        "How can I make {topic} healthier?",
        "What goes well with {topic}?",
        "Write a short restaurant description of {topic}.",
        "How long does it take to make {topic}, and what are the steps?",
        "What is the history of {topic}?",
    ),
    "places": (
        "Plan a three-day trip to {topic}.",
        "What should I pack for a trip to {topic}?",
        "Name five foods to try in {topic}.",
        "What is the best time of the year to visit {topic}?",
        "Write a postcard from {topic}.",
        "List five facts about {topic}.",
        "Describe the landscape of {topic} in one paragraph.",
    ),
    "health": (*ADVICE, "Explain to a beginner what is known about {topic}.", "List five facts about {topic}."),
    "everyday": (*ADVICE, "Write a short dialogue between two friends about {topic}."),
    "stories": (
        "Write a short story about {topic}.",
        "Write a four-line poem about {topic}.",
        "Write the first paragraph of a novel about {topic}.",
        "Suggest three titles for a story about {topic}.",
        "Write a haiku about {topic}.",
        "Describe {topic} in three sentences, using all five senses.",
        "Write a dialogue of six lines about {topic}.",
    ),
}
COMPARED = ("science", "history", "technology", "food", "places")
COMPARE = (
    "Compare {topic} and {other}.",
    "What do {topic} and {other} have in common, and how do they differ?",
)
MODULE_TEMPLATES = (
    "What is the Python module `{module}` for?",
    "Give a short example of how to use the Python module `{module}`.",
    "When would I use Python's `{module}` module? Explain with one example.",
)
