"""One file per job that a user asks for; the only floor that knows every step."""
