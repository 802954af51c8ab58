"""lm-eval's view of our model: ``simple_evaluate(SharedPrefixLM(model, tokenizer), tasks=[...])``.

The same log-likelihoods as lm-eval's ``HFLM`` (a test compares them), but a question's context runs once for all
its options, and finished sequences leave the batch while others still decode.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval import utils as lm_eval_utils  # type: ignore[import-untyped]
from lm_eval.api.instance import Instance  # type: ignore[import-untyped]
from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]
from lm_eval.models.utils import (  # type: ignore[import-untyped]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from components.artifacts import StageError
from components.corpus.special_tokens import END_OF_TEXT, TURN_END
from components.measures.inference import ChatTokenizer, OptionScore, greedy_tokens, option_scores
from model import SmallThinkerForCausalLM

_DEFAULT_NEW_TOKENS = 256

TokenRequest = tuple[Any, list[int], list[int]]


def end_ids(tokenizer: ChatTokenizer) -> list[int]:
    """Ids at which an answer ends."""
    ids = {tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, END_OF_TEXT)} | {
        tokenizer.eos_token_id
    }
    return sorted(index for index in ids if index is not None and index >= 0)


class SharedPrefixLM(TemplateLM):  # type: ignore[misc]  # lm-eval carries no types
    """Batched scoring of one SmallThinker model for lm-eval.

    Args:
        model: in evaluation mode.
        tokenizer: with the chat template.
        batch_size: sequences held at once.
    """

    def __init__(
        self, model: SmallThinkerForCausalLM, tokenizer: ChatTokenizer, batch_size: int = 128
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._stop_ids = end_ids(tokenizer)

    @property
    def eot_token_id(self) -> int:
        """Id of ``<|endoftext|>``, which also opens texts without a context."""
        if self.tokenizer.eos_token_id is None:
            raise StageError("the tokenizer has no eos_token; evaluation needs one to open texts")
        return self.tokenizer.eos_token_id

    @property
    def max_length(self) -> int:
        """Tokens that the model may see."""
        return int(self.model.config.max_position_embeddings)

    @property
    def tokenizer_name(self) -> str:
        """Part of lm-eval's cache keys."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens written in the text (the chat template's) become their ids."""
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text, ready for the assistant's turn."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of (anything, context ids, continuation ids), equal contexts run once."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_request, context, _continuation) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(index)
        bar = tqdm(total=len(requests), desc="log-likelihoods", file=sys.stderr, disable=disable_tqdm or None)
        with bar:
            scored = option_scores(
                self.model,
                [list(context) for context in groups],
                [[requests[index][2] for index in members] for members in groups.values()],
                self.batch_size,
                self.max_length,
                progress=bar.update,
            )
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for members, scores in zip(groups.values(), scored, strict=True):
            for index, score in zip(members, scores, strict=True):
                answers[index] = (score.logprob, score.is_greedy)
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats, in windows that each token is scored in once."""
        answers = []
        for request in tqdm(requests, desc="rolling", file=sys.stderr, disable=disable_tqdm or None):
            (text,) = request.args
            windows = map(
                lm_eval_utils.make_disjoint_window,
                lm_eval_utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
            pairs = [(list(context), list(continuation)) for context, continuation in windows]
            scores: Iterable[list[OptionScore]] = option_scores(
                self.model,
                [context for context, _ in pairs],
                [[continuation] for _, continuation in pairs],
                min(self.batch_size, 8),  # whole windows of logits are held
                self.max_length,
            )
            answers.append(sum(score.logprob for (score,) in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answers[-1])
        return answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to the stop strings.

        Raises:
            StageError: a task asks for sampling; ``backend="hf"`` can do that.
        """
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        bar = tqdm(total=len(requests), desc="generation", file=sys.stderr, disable=disable_tqdm or None)
        with bar:
            for members in groups.values():
                settings = normalize_gen_kwargs(requests[members[0]].args[1], _DEFAULT_NEW_TOKENS)
                if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
                    raise StageError(
                        f"the task {requests[members[0]].task_name} samples with temperature "
                        f"{settings.get('temperature')}; use evaluate.backend = 'hf' for it"
                    )
                stops = handle_stop_sequences(settings.get("until"), eos=None)
                tokens = greedy_tokens(
                    self.model,
                    [self.tok_encode(requests[index].args[0]) for index in members],
                    settings["max_gen_toks"],
                    self._stop_ids,
                    self.batch_size,
                    self.max_length,
                    is_finished=self._stop_rule(stops),
                    progress=bar.update,
                )
                for index, generated in zip(members, tokens, strict=True):
                    text = self.tokenizer.decode(generated, skip_special_tokens=True)
                    answers[index] = postprocess_generated_text(text, stops, None)
                    self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    def _stop_rule(self, stops: Sequence[str]) -> Any:
        """True once the text of the last tokens holds a stop string (each token is at least one byte)."""
        wanted = [stop for stop in stops if stop]
        reach = max((len(stop.encode()) for stop in wanted), default=0)
        if not wanted:
            return None

        def is_finished(tokens: list[int]) -> bool:
            tail = self.tokenizer.decode(tokens[-reach - 1 :], skip_special_tokens=False)
            return any(stop in tail for stop in wanted)

        return is_finished
