"""The texts that Open-Sora Plan v1.3 puts around a prompt. Blanks and newlines reach the tokenizer as they stand."""

POSITIVE_PROMPT = "\n    high quality, high aesthetic, {}\n    "

NEGATIVE_PROMPT = (
    "\n    nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, \n    low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry.\n    "
)

REFINER_SYSTEM = "You are a caption refiner."

REFINER_TEMPLATE = (
    'Refine the sentence: "{}" to contain subject description, action, scene description. '
    "(Optional: camera language, light and shadow, atmosphere) and conceive some additional actions to make the "
    "sentence more dynamic. Make sure it is a fluent sentence, not nonsense."
)

# What the original's sampling script sends: quotes that belong to its source code, and blanks, stand between the
# sentences. The refiner was trained on REFINER_TEMPLATE.
SAMPLING_REFINER_TEMPLATE = (
    '\nRefine the sentence: "{}" to contain subject description, action, scene description. '
    '" "(Optional: camera language, light and shadow, atmosphere) and conceive some additional actions to make the '
    'sentence more dynamic. " "Make sure it is a fluent sentence, not nonsense.\n'
)


def positive(prompt: str) -> str:
    """The prompt as it is encoded. No cleaning, no lower case: those belong to training."""
    return POSITIVE_PROMPT.format(prompt)


def refiner_messages(prompt: str, template: str = SAMPLING_REFINER_TEMPLATE) -> list[dict[str, str]]:
    """Chat messages that ask the refiner language model for a richer prompt."""
    return [{"role": "system", "content": REFINER_SYSTEM}, {"role": "user", "content": template.format(prompt)}]
