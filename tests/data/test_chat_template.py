"""Chat templates: sandbox and time limit."""

from __future__ import annotations

import threading
import time

import pytest
from transformers import PreTrainedTokenizerFast

from fastpref.data import chat_template
from fastpref.data.formats import TextGroup

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
QUESTION = [{"role": "user", "content": "tea"}]
GROUP = TextGroup(QUESTION, ([{"role": "assistant", "content": "or coffee"}],))


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    templated = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    templated.chat_template, templated.name_or_path = template, "org/its-name"
    return templated


def test_a_template_that_does_not_end_is_stopped_and_named(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.1)
    begun = time.process_time()
    message = r"^the template of org/its-name takes more than 0\.1 seconds of CPU time"
    with pytest.raises(TimeoutError, match=message):
        chat_template.render(GROUP, with_template(tokenizer, ENDLESS))
    assert time.process_time() - begun < 5


def test_the_limit_ends_with_the_template(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.1)
    assert chat_template.render(GROUP, tokenizer)[1].endswith("or coffee<|im_end|>\n")
    begun = time.process_time()
    while time.process_time() - begun < 0.3:  # no signal may arrive after the block
        pass


def test_other_threads_render_without_a_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    texts: list[list[str]] = []
    thread = threading.Thread(target=lambda: texts.append(chat_template.render(GROUP, tokenizer)))
    thread.start()
    thread.join()
    assert texts == [chat_template.render(GROUP, tokenizer)]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_reaches_neither_python_nor_files(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    with pytest.raises(Exception, match=r"unsafe|not safe|no loader"):
        chat_template.render(GROUP, with_template(tokenizer, template))
