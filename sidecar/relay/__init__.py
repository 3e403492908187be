"""The data path, in relay processes: process -> handler -> request body, pricing, images, response -> events."""
