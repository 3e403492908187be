"""The data path, in relay processes of its own: process -> handler -> (inlining, admission, stream) -> facts."""
