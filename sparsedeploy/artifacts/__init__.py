"""What an exported folder is: its description, how it is opened, the small files it carries."""
