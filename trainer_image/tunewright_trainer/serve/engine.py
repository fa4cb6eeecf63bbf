"""The model and its adapters, owned by one thread that gives every running request one step in turn.

Nothing else touches the model: requests, loads and unloads are handed to the thread, so no lock guards a forward pass, no load meets one, and a
long answer does not keep short ones waiting.
"""

import copy
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from tunewright_trainer.serve.decoding import Decoding, context_of, decoding
from tunewright_trainer.serve.protocol import ApiError, Options
from tunewright_trainer.serve.text import TextStream

log = logging.getLogger(__name__)

MAX_RUNNING: Final = 8  # requests that hold a key-value cache at a time
MAX_WAITING: Final = 64  # more are refused: they would time out before their turn

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """New text; the last piece has a finish_reason, or an error. ``tokens`` counts the answer so far."""

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass
class Served:
    """A model id: the base itself, or an adapter (``adapter`` is its name, never used twice, in PEFT's wrapper ``peft``) with its own chat template."""

    id: str
    template: str
    version: str = ""
    uri: str = ""
    adapter: str | None = None
    peft: Any = None
    running: int = 0

    @property
    def virtual_tokens(self) -> int:
        """Tokens of prompt learning, which stand before every text."""
        config = self.peft.peft_config[self.adapter] if self.peft is not None else None
        return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0


@dataclass
class Request:
    """One generation. ``emit`` is called in the engine's thread with each piece; ``cancelled`` is looked at before each step."""

    served: Served
    prompt: Sequence[int]
    options: Options
    stop_ids: frozenset[int]
    emit: Callable[[Piece], None]
    cancelled: bool = False
    steps: Iterator[None] = field(init=False)


class Engine:
    """``network`` is a transformers model on its device, causal or with an encoder; ``tokenizer`` belongs to it and to every adapter."""

    def __init__(self, network: Any, tokenizer: Any, base: Served) -> None:
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.base = base
        self.context = context_of(network, tokenizer)
        self.adapters: dict[str, Served] = {}
        # All LoRA adapters, over one skeleton of the base; any other adapter has a wrapper and a skeleton of its own. Skeletons share the base's weights.
        self._loras: Any = None
        self._active: Served | None = None
        self._numbers = itertools.count(1)
        self._work: queue.SimpleQueue[Request | Callable[[], None] | None] = queue.SimpleQueue()
        self._retired: list[Served] = []
        self._open = 0
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # What other threads call.

    @property
    def alive(self) -> bool:
        """Whether requests are being worked on."""
        return self._thread.is_alive()

    @property
    def open_requests(self) -> int:
        """Requests accepted and not finished."""
        return self._open

    def room(self, prompt: int) -> int:
        """Tokens that an answer to a prompt of so many may have; below 1 where the prompt itself is too long."""
        if self.network.config.is_encoder_decoder:
            return self.context if prompt <= self.context else 0
        return self.context - prompt

    def find(self, model: str) -> Served:
        """The model of an id; `ApiError` 404."""
        served = self.base if model == self.base.id else self.adapters.get(model)
        if served is None:
            raise ApiError(404, f"the model {model} does not exist", param="model", code="model_not_found")
        return served

    def submit(self, request: Request) -> None:
        """Begin a generation; `ApiError` 503 where too many wait already."""
        with self._guard:
            if self._open >= MAX_RUNNING + MAX_WAITING:
                raise ApiError(503, "too many requests are waiting; try again later", code="overloaded")
            self._open += 1
        self._work.put(request)

    def load(self, name: str, folder: Path, *, version: str, uri: str, template: str) -> None:
        """Serve an adapter under ``name``, in place of the one before; requests that run on that one finish on it. Raises what PEFT raises."""
        self._do(lambda: self._load(name, folder, version=version, uri=uri, template=template))

    def unload(self, name: str) -> None:
        """Serve an adapter no longer; `ApiError` 404 where there is none."""
        self._do(lambda: self._unload(name))

    def close(self) -> None:
        """End the thread; requests that still run get no more pieces."""
        self._work.put(None)
        self._thread.join()

    def _do(self, action: Callable[[], T]) -> T:
        """The result of an action in the engine's thread."""
        future: Future[T] = Future()

        def act() -> None:
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)

        self._work.put(act)
        return future.result()

    # What the engine's thread does.

    def _run(self) -> None:
        running: list[Request] = []
        waiting: list[Request] = []
        with torch.inference_mode():
            while True:
                while not self._work.empty() or not (running or waiting):
                    work = self._work.get()
                    if work is None:
                        return
                    if isinstance(work, Request):
                        waiting += self._accepted(work)
                    else:
                        work()
                while waiting and len(running) < MAX_RUNNING:
                    running.append(waiting.pop(0))
                running = [request for request in running if self._advance(request)]
                self._drop_retired()

    def _accepted(self, request: Request) -> list[Request]:
        """The request, held to the adapter that its id means now: the one it was found with may have been replaced or unloaded meanwhile."""
        request.steps = self._generate(request)
        try:
            request.served = self.find(request.served.id)
        except ApiError as error:
            request.emit(Piece(error=error))
            self._close_one()
            return []
        request.served.running += 1
        return [request]

    def _close_one(self) -> None:
        with self._guard:
            self._open -= 1

    def _advance(self, request: Request) -> bool:
        """One step of a request; returns whether there are more."""
        try:
            if not request.cancelled:
                next(request.steps)
                return True
        except StopIteration:
            pass
        except Exception as error:
            log.exception("a generation failed")
            request.emit(Piece(error=error))
        request.served.running -= 1
        self._close_one()
        return False

    def _generate(self, request: Request) -> Iterator[None]:
        """The steps of a generation: the prompt in chunks, then a token each."""
        options = request.options
        under_way = self._decoding(request.served)
        pick = Sampler(options, self.network.device)
        text = TextStream(self.tokenizer, options.stops)
        logits = torch.empty(0)
        parts = under_way.read(request.prompt)
        while (part := self._next(request.served, parts)) is not None:
            logits = part
            yield
        room = self.room(len(request.prompt)) - request.served.virtual_tokens
        most = min(room, options.max_tokens or room)
        for count in range(1, most + 1):
            token = pick(logits)
            if token in request.stop_ids:
                request.emit(Piece(text.rest(), count, "stop"))
                return
            shown = text.add(token)
            if text.stopped:
                request.emit(Piece(shown, count, "stop"))
                return
            if count == most:
                break
            if shown:
                request.emit(Piece(shown, count))
            self._network(request.served)
            logits = under_way.go_on(token)
            yield
        request.emit(Piece(shown + text.rest(), most, "length"))

    def _decoding(self, served: Served) -> Decoding:
        """A new generation by a model."""
        return decoding(self._network(served), begin=partial(self._begin, served))

    def _next(self, served: Served, parts: Iterator[torch.Tensor]) -> torch.Tensor | None:
        """Read the next part of a prompt with the model asked for; None when all is read."""
        self._network(served)
        return next(parts, None)

    def _network(self, served: Served) -> Any:
        """The base with the model's adapter at work in it."""
        if served.peft is None:
            return self.network
        if self._active is not served:
            served.peft.set_adapter(served.adapter)
            self._active = served
        return served.peft.get_base_model()

    def _begin(self, served: Served, cache: Any) -> Any:
        """The cache with which a text begins: of prompt learning it holds the virtual tokens."""
        if not served.virtual_tokens:
            return cache
        prompt = served.peft.get_prompt(batch_size=1)
        if not isinstance(prompt, torch.Tensor):  # keys and values, of prefix tuning
            return prompt
        self._network(served)(inputs_embeds=prompt.to(self.network.dtype), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def _load(self, name: str, folder: Path, *, version: str, uri: str, template: str) -> None:
        from peft import PeftConfig, PeftModel, PeftType

        adapter = f"a{next(self._numbers)}"
        served = Served(id=name, template=template, version=version, uri=uri, adapter=adapter)
        shared = PeftConfig.from_pretrained(folder).peft_type == PeftType.LORA
        with torch.inference_mode(mode=False):  # weights made inside would be unusable outside
            if shared and self._loras is not None:
                self._loras.load_adapter(folder, adapter)
                served.peft = self._loras
            else:
                served.peft = PeftModel.from_pretrained(skeleton(self.network), folder, adapter_name=adapter)
                self._loras = served.peft if shared else self._loras
        served.peft.eval()
        self._active = None  # loading may have switched
        try:
            self._probe(served)
        except Exception:
            self._delete(served)
            raise
        self._retire(self.adapters.get(name))
        self.adapters[name] = served
        log.info("serving %s %s", name, version)

    def _probe(self, served: Served) -> None:
        """One step must give numbers."""
        if served.virtual_tokens and self.network.config.is_encoder_decoder:
            raise ValueError("prompt learning is not served over an encoder-decoder")
        logits = self._next(served, self._decoding(served).read([self.tokenizer.eos_token_id or 0]))
        assert logits is not None
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the adapter gives no finite logits")

    def _unload(self, name: str) -> None:
        if name not in self.adapters:
            raise ApiError(404, f"the adapter {name} is not loaded", param="lora_name", code="model_not_found")
        self._retire(self.adapters.pop(name))
        log.info("no longer serving %s", name)

    def _retire(self, served: Served | None) -> None:
        if served is not None:
            self._retired.append(served)

    def _drop_retired(self) -> None:
        for served in [served for served in self._retired if not served.running]:
            self._retired.remove(served)
            self._delete(served)

    def _delete(self, served: Served) -> None:
        if served.peft is not None and served.peft is self._loras:
            served.peft.delete_adapter(served.adapter)
            self._active = None  # deleting the active one switches to another
        served.peft = None


def skeleton(network: Any) -> Any:
    """The same model with layers of its own, for an adapter to be put into, over the same weights."""
    shared = {id(tensor): tensor for tensor in itertools.chain(network.parameters(), network.buffers())}
    return copy.deepcopy(network, shared)


class Sampler:
    """Picks tokens: the likeliest at temperature 0, else by nucleus sampling (Holtzman et al. 2020) from a generator of the request's own."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self._temperature = options.temperature
        self._top_p = options.top_p
        self._random = torch.Generator(device=device)
        if options.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(options.seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """The token for ``logits`` [vocabulary]."""
        if self._temperature == 0:
            return int(logits.argmax())
        likely, tokens = torch.softmax(logits / self._temperature, dim=-1).sort(descending=True)
        before = likely.cumsum(dim=-1) - likely
        likely = torch.where(before < self._top_p, likely, 0.0)  # the first one is always within
        return int(tokens[torch.multinomial(likely, 1, generator=self._random)])
