"""Twilio: single calls, limits and circuit breakers, and whole accounts read in pages."""
