"""Sampling: numbers that are none are one line, greedy or not, and never an answer."""

import numpy as np
import pytest

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.tokenizer import TextTokenizer, write_chatml_tokenizer
from lfm_edge.errors import LfmEdgeError
from lfm_edge.session.generation import Chat, generate
from lfm_edge.session.sampling import Sampling
from lfm_edge.session.session import Session
from lfm_edge.session.state import StateSpec
from tests.helpers import hf_config

OVERFLOWN = {
    "all NaN": np.full(300, np.nan, np.float32),
    "one NaN": np.where(np.arange(300) == 299, np.nan, 0).astype(np.float32),
    "one infinity": np.where(np.arange(300) == 5, np.inf, 0).astype(np.float32),
    "nothing but -infinity": np.full(300, -np.inf, np.float32),
}


class Says(Session):
    """A session that gives the same logits at each step."""

    def __init__(self, logits):
        config = ModelConfig.from_dict(hf_config().to_dict())
        super().__init__(StateSpec.of(config, 64), config.vocab_size, 64)
        self.logits = logits

    def _step(self, tokens):
        return self.logits


@pytest.mark.parametrize("logits", OVERFLOWN.values(), ids=OVERFLOWN)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_are_one_line_that_says_what_to_do(logits, temperature):
    with pytest.raises(LfmEdgeError, match=r"^the logits are not finite.*--compute-dtype, such as float32$"):
        list(generate(Says(logits), [1], max_tokens=4, sampling=Sampling(temperature)))


def test_tokens_that_are_ruled_out_are_no_fault():
    logits = np.where(np.arange(300) == 5, 1.0, -np.inf).astype(np.float32)

    for sampling in (Sampling(), Sampling(0.7), Sampling(0.7, top_k=3), Sampling(0.7, top_p=0.5, min_p=0.1)):
        assert sampling.next_token(logits, set(), np.random.default_rng(0)) == 5


def test_a_seed_that_is_none_is_one_line_and_takes_nothing():
    session = Says(np.zeros(300, np.float32))

    with pytest.raises(LfmEdgeError, match="must be at least 0"):
        generate(session, [1], max_tokens=4, seed=-1)
    assert session.position == 0


def test_chat_is_as_before_after_logits_that_are_not_finite(tmp_path):
    write_chatml_tokenizer(tmp_path, 300)
    chat = Chat(Says(OVERFLOWN["one NaN"]), TextTokenizer(tmp_path), [7])

    with pytest.raises(LfmEdgeError, match="not finite"):
        "".join(chat.answer("hi", max_tokens=4))
    assert chat.messages == []
