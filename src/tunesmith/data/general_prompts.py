"""Prompts of many kinds, for letting a model answer what it could before it is tuned on one thing."""

from __future__ import annotations

FORMS = (
    "Explain {} to a beginner in a few sentences.",
    "What are the most important facts about {}?",
    "Write a short story of one paragraph in which {} matters.",
    "Give three practical tips to do with {}.",
    "What is commonly misunderstood about {}?",
    "Write two questions about {} and answer them.",
    "Describe {} in one sentence.",
    "Compare {} today with fifty years ago.",
)
TOPICS = (
    "the water cycle", "a healthy breakfast", "the French Revolution", "photosynthesis", "saving money",
    "learning a language", "the solar system", "good sleep", "the printing press", "supply and demand",
    "a job interview", "gravity", "the Roman Empire", "growing tomatoes", "chess", "the human heart",
    "renewable energy", "a long train journey", "friendship", "probability", "volcanoes", "baking bread",
    "the internet", "public libraries", "jazz music", "the immune system", "moving to a new city", "bees",
    "fractions", "the Silk Road", "a rainy day", "electric cars", "first aid", "novels", "the Moon", "teamwork",
    "a bicycle", "oceans", "time management", "the invention of writing", "winter", "a small garden",
    "public speaking", "dinosaurs", "maps", "a birthday party", "computer viruses", "the seasons",
)  # fmt: skip


def general_prompts() -> list[str]:
    """Every form with every topic: 384 prompts, always the same and in the same order."""
    return [form.format(topic) for topic in TOPICS for form in FORMS]
