"""Chat templates: programs inside a checkpoint that turn a message into the text that the model reads.

A template may ask for today's date (Llama 3.2, Granite). Its prompts, and with them every result, would then be others
each day. So the date is always the same, `TEMPLATE_DATE`. A template may also run for ever, or fill the memory. So each
is tried once in a process of its own, with limits, before it is used.
"""

from __future__ import annotations

import datetime
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from wpjax.errors import CheckpointError

TEMPLATE_DATE = datetime.datetime(2024, 7, 26, 12)
"""What every chat template takes for now; Llama's templates name this day where they are not told another."""

_TRIAL = Path(__file__).with_name("template_trial.py")
_SECONDS = 60  # for the trial as a whole; its own limit is on the time of the processor


def template_date(tokenizer: Any) -> str:
    """The date that stands in a tokenizer's prompts, as YYYY-MM-DD; empty if its template does not ask for one.

    Args:
        tokenizer: a tokenizer of the library transformers.
    """
    asks = "strftime_now" in json.dumps(getattr(tokenizer, "chat_template", None) or "", default=str)
    return TEMPLATE_DATE.date().isoformat() if asks else ""


def render(tokenizer: Any, text: str) -> str:
    """The text that the model reads for one message of a user.

    It is the chat template, filled in up to where the answer begins. Without a template it is the message itself.

    Args:
        tokenizer: a tokenizer of the library transformers.
        text: the message.

    Raises:
        CheckpointError: the chat template fails, or does not end.
    """
    if not getattr(tokenizer, "chat_template", None):
        return text
    message = [{"role": "user", "content": text}]
    try:
        template = str(tokenizer.get_chat_template())
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        _try_out(template, json.dumps(special))
        rendered = str(
            tokenizer.apply_chat_template(
                message, chat_template=_with_date(template), tokenize=False, add_generation_prompt=True
            )
        )
        rendered.encode("utf-8")  # fails on lone surrogates, which no tokenizer takes
        return rendered
    except Exception as error:  # a template is a program and may raise anything
        raise CheckpointError(
            f"{tokenizer.name_or_path}: the chat template fails ({type(error).__name__}: {error}); correct it, or "
            "remove it to use the prompts as they are"
        ) from error


def _with_date(template: str) -> str:
    """A template in which `strftime_now` gives `TEMPLATE_DATE`.

    transformers passes no functions to a template, so the function is a macro in front of it. Of the template itself
    nothing changes: Jinja drops the newline after the macro, so the template still begins on a line of its own.
    """
    if "strftime_now" not in template:
        return template
    codes = {f"%{code}": TEMPLATE_DATE.strftime(f"%{code}") for code in "aAbBdHIjmMpSUwWyYcxXDFTR"}
    codes |= {f"%-{code}": codes[f"%{code}"].lstrip("0") or "0" for code in "dHIjmMS"}
    codes |= {"%e": f"{TEMPLATE_DATE.day:2}", "%h": codes["%b"], "%f": "000000", "%z": "", "%Z": ""}
    steps = "".join(f".replace({code!r}, {value!r})" for code, value in {"%%": "\1", **codes, "\1": "%"}.items())
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{steps} }}}}{{%- endmacro %}}\n{template}"


@functools.cache
def _try_out(template: str, special: str) -> None:
    """Fill a template in once, for a short message, in a process with limits of time, memory and length.

    Args:
        template: the template.
        special: special tokens by name, as JSON.

    Raises:
        ValueError: it reaches a limit. Other errors of the template are left to its use.
    """
    if not sys.executable:
        return
    job = json.dumps({"path": sys.path, "template": _with_date(template), "special": json.loads(special)})
    try:
        code = subprocess.run(
            [sys.executable, "-I", str(_TRIAL)], input=job.encode(), capture_output=True, timeout=_SECONDS, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        code = -1
    if code:
        raise ValueError("it does not end, or takes too much memory, for one short message")
