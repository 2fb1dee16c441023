"""OpenAI's API: completions, chats, models."""
