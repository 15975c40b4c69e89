"""A program that fills in one chat template with limits of time, memory and length; `templates` starts it.

It reads the template from the standard input, as JSON, and exits with code 1 if a limit is reached. It imports nothing
of the package, so that it starts quickly.
"""

from __future__ import annotations

import json
import re
import sys
from typing import NoReturn

CPU_SECONDS = 2
MEMORY = 2**30
LENGTH = 10**6


def main() -> None:
    """Try the template on the standard input. An error of the template itself is no concern here: code 0."""
    job = json.loads(sys.stdin.read())
    sys.path[:] = job["path"]
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        return
    _limit()
    # As transformers makes it, but for what changes no length: the tag {% generation %} only marks text.
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False)
    env.globals["raise_exception"] = _raise
    template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", job["template"])
    message = [{"role": "user", "content": "Why is the sky blue?"}]
    try:
        filled = env.from_string(template).generate(
            messages=message, tools=None, documents=None, add_generation_prompt=True, **job["special"]
        )
        n = 0
        for part in filled:
            n += len(part)
            if n > LENGTH:
                sys.exit(1)
    except MemoryError:
        sys.exit(1)
    except Exception:
        return


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _limit() -> None:
    """Bound the process's time and memory, where the system can."""
    try:
        import resource
    except ImportError:  # Windows; the caller's own limit of time holds
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    main()
