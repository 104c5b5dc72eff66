"""Images in chats: a model's processor and front part turn them into rows of the language model's input.

The language model inside such a model is computed as every other one is. Torch and transformers only.
"""
