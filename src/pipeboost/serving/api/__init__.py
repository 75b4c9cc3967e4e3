"""The HTTP side of the server: OpenAI's wire format, what it refuses, who may do what.

Start with `app`; `images` and `videos` answer, `fields` and `forms` read what comes, `calls` checks it by the model.
"""
