"""The tensor work. Imported only inside a command's body: torch and its family take seconds to load."""
