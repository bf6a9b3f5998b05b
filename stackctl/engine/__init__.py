"""The tensor work. Imported only inside a command's body: torch and its family take seconds to load."""

import os

# Threads of OpenMP that spin while they wait for one another cost little on an idle machine and nearly everything on
# a shared one: decision 15 has the figures. Read by libgomp when torch loads it, so it has to stand here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
