"""Answers of a model, sampled in batches with transformers or vLLM; finished batches are kept."""

import random
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..basics.checkpoints import readable
from ..basics.parts import Parts
from ..basics.reading import is_file
from .chats import rendered

Request = TypeVar("Request")
Answers = Callable[[list[Request], int], tuple[list[dict[str, Any]], int]]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the most probable token.
        top_p: smallest set of tokens with this probability; 1 is off.
        top_k: number of most probable tokens to draw from; 0 is off.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_token_ids: list[int]

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is off)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not valid:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a value {expected}.")


class Backend(Protocol):
    """What answers prompts, ``batch_size`` at a time."""

    sampling: Sampling
    batch_size: int

    def answers(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """Token ids of an answer to each prompt, up to and including the token that ended it.

        Args:
            prompts: token ids of each prompt.
            seed: the same one gives the same answers.
        """


def batches_by_length(requests: Iterable[Request], length: Callable[[Request], int], size: int) -> list[list[Request]]:
    """Batches of at most ``size`` requests, longest first, so that they need little padding."""
    ordered = sorted(requests, key=lambda request: -length(request))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def answer_batches(
    batches: Sequence[list[Request]],
    finished: set[int],
    answers: Answers[Request],
    parts: Parts,
    seed: int,
    what: str,
    rank: int = 0,
    processes: int = 1,
) -> None:
    """Answer this process's share of the unfinished batches and append each to ``parts``.

    The longest batch comes first, so that too little memory shows at once. The others are mixed, so
    that the estimated time is honest and processes get equal shares. A batch's random numbers
    depend on ``seed`` and its own number alone.

    Args:
        batches: requests in the order of `batches_by_length`.
        finished: numbers of the batches in ``parts`` before any process began to write.
        answers: takes a batch and a seed; returns results and the number of generated tokens.
        rank: number of this process among ``processes``.
    """
    others = list(range(1, len(batches)))
    random.Random(0).shuffle(others)
    own = [number for number in [0, *others][: len(batches)] if number not in finished][rank::processes]
    done = sum(len(batches[number]) for number in finished) if processes == 1 else 0
    total = done + sum(len(batches[number]) for number in own)
    tokens, started = 0, time.perf_counter()
    with (
        tqdm(total=total, initial=done, desc=what, unit=" rows", disable=rank > 0, smoothing=0) as bar,
        parts.appending(rank) as append,
    ):
        for number in own:
            begun = time.perf_counter()
            results, generated = answers(batches[number], seed * 1_000_003 + number * 4099)
            append({"batch": number, "seconds": round(time.perf_counter() - begun, 3), "results": results})
            tokens += generated
            if tokens:
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
            bar.update(len(batches[number]))


def context_length(config: PreTrainedConfig) -> float:
    """Most tokens that a model takes, prompt and answer together; infinite without a limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or float("inf")


def stop_tokens_of(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`stop_token_ids` of a model, folder or Hub id."""
    generation_config = None
    if not Path(model).is_dir():
        with suppress(OSError):  # a model need not have one
            generation_config = GenerationConfig.from_pretrained(model)
    elif is_file(Path(model, "generation_config.json")):
        with readable("model", model, "a generation configuration"):
            generation_config = GenerationConfig.from_pretrained(model)
    return stop_token_ids(tokenizer, generation_config)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """Token ids that end an answer, by generation config, tokenizer and chat template.

    Raises:
        ValueError: if there is none.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    stops = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    if tokenizer.chat_template is not None:
        # Instruct models whose eos is the end of text may well end their turns with another token.
        turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        _, shown, after = rendered(turn, tokenizer, {}).rpartition("answer")
        after = after if shown else ""
        specials = special_token_ids(tokenizer)
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        stops |= {next((i for i in ids if i in specials), None)}
    stops.discard(None)
    if wrong := [stop for stop in stops if type(stop) is not int]:
        raise ValueError(f"eos_token_id: got {wrong[0]!r} in generation_config.json, expected numbers of tokens.")
    if not stops:
        raise ValueError("eos_token: got None from tokenizer and generation_config.json, expected an end of text.")
    return sorted(stops)


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that stand for no text."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


class TransformersBackend:
    """``model.generate`` on left-padded batches; the model is in evaluation mode."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, batch_size: int
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.batch_size = batch_size
        # Any token does where the tokenizer has none: padding is masked.
        self.pad_token_id = sampling.stop_token_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        # In place of the model's own, whose top_k or repetition_penalty would be merged in.
        model.generation_config = GenerationConfig(
            do_sample=sampling.temperature > 0,
            **(drawn if sampling.temperature > 0 else {}),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sampling.stop_token_ids,
            pad_token_id=self.pad_token_id,
        )

    @torch.inference_mode()
    def answers(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        input_ids = torch.tensor([[self.pad_token_id] * (longest - len(p)) + p for p in prompts])
        attention_mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        torch.manual_seed(seed)
        device = self.model.device
        output = self.model.generate(input_ids.to(device), attention_mask=attention_mask.to(device))
        return [until_stop(ids, self.sampling.stop_token_ids) for ids in output[:, longest:].tolist()]


def until_stop(ids: list[int], stop_token_ids: list[int]) -> list[int]:
    """``ids`` up to and including the first token that ends an answer; the rest is padding."""
    return ids[: position_of_first(ids, stop_token_ids) + 1]


def position_of_first(ids: list[int], wanted: Collection[int]) -> int:
    """Position of the first ``wanted`` token in ``ids``; ``len(ids)`` if there is none."""
    return next((position for position, token in enumerate(ids) if token in wanted), len(ids))


def text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an answer, without special tokens and otherwise as it was written."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class VLLMBackend:
    """Answers by an installed vLLM; written from its documentation, and never run by the authors.

    Raises:
        ModuleNotFoundError: if vLLM is not installed.
    """

    def __init__(self, model: str, dtype: str, sampling: Sampling, batch_size: int) -> None:
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "backend: got 'vllm', which is not installed. Run `pip install 'peft-caft[vllm]'`, or leave --backend out."
            ) from error
        self.llm: Any = LLM(model=model, dtype=dtype, generation_config="vllm")  # not the model's top_k and the like
        self.sampling = sampling
        self.batch_size = batch_size

    def answers(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                top_k=self.sampling.top_k or -1,
                max_tokens=self.sampling.max_new_tokens,
                stop_token_ids=self.sampling.stop_token_ids,
                seed=seed + index,
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
        return [until_stop(list(output.outputs[0].token_ids), self.sampling.stop_token_ids) for output in outputs]
