"""`kubectl sms`: one command-line program."""
