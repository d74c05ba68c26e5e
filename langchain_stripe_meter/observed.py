"""What LangChain's events say: the facts of a run at its start, and what the model call came to at its end.

Everything here is about LangChain's shapes, and nothing about Stripe's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from functools import lru_cache
from typing import Any, Self

from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.runnables.config import var_child_runnable_config

from langchain_stripe_meter.core.customers import Facts
from langchain_stripe_meter.core.runs import merged
from langchain_stripe_meter.core.usage import Usage, beside_text, text_of, usage_from_metadata, usage_from_token_usage
from langchain_stripe_meter.core.values import valueclass
from langchain_stripe_meter.errors import UsageError

_AUTH_USER = "langgraph_auth_user"
_SERVER_KEYS = frozenset(("langgraph_auth_user_id", "langgraph_request_id", _AUTH_USER))
_SERVER_MARK = "langgraph_api_version"
_RUNTIME = "__pregel_runtime"
CLIENT_RUN = "__stripe_meter_client"
"""Where a run's metadata and configurable say that a client sent its config. (LangGraph keeps keys that begin so out of
checkpoints, and LangServe out of what it tells clients.)"""


class ClientRun(str):
    """What an application says of a run whose config a client sent: the user whom it authenticated (``{}`` for nobody),
    what was ``named`` of that user when it said so (None for nobody), and the session.

    No client can say it: JSON makes plain text, never this class. As text it holds nothing, so that traces and events,
    which write metadata out, show nobody.
    """

    user: Any
    session: str | None
    named: Mapping[str, Any] | None

    def __new__(cls, user: Any = None, session: str | None = None, named: Mapping[str, Any] | None = None) -> Self:
        made = super().__new__(cls, "client")
        made.user, made.session, made.named = {} if user is None else user, session, named
        return made


def surrounding_run() -> Any:
    """The id of the run around the present code, or None.

    LangChain starts some nested runs as roots (top-level fallbacks, explicit callbacks inside a run); the child
    manager that it keeps in this context variable still knows their parent.
    """
    config = var_child_runnable_config.get()
    return getattr(config.get("callbacks"), "parent_run_id", None) if config else None


def facts_of(own: Mapping[str, Any] | None, now: int) -> Facts:
    """Who could pay for the run with metadata ``own`` that starts ``now``, as far as LangChain and LangGraph know."""
    config = var_child_runnable_config.get()
    metadata = merged(config.get("metadata"), own) if config else own or {}
    configurable = (config.get("configurable") if config else None) or {}
    if not configurable and CLIENT_RUN not in metadata and _SERVER_MARK not in metadata:
        return Facts(metadata, now=now)  # an application's own run, with nothing further to look for
    marks = [place[CLIENT_RUN] for place in (metadata, configurable) if CLIENT_RUN in place]
    said = next((mark for mark in marks if isinstance(mark, ClientRun)), None)
    return Facts(
        metadata=metadata if said is None else {**metadata, "thread_id": said.session},
        auth_user=_authenticated(configurable.get(_AUTH_USER)) if said is None else said.user,
        context=getattr(configurable.get(_RUNTIME), "context", None),
        on_server=bool(marks) or _on_server(metadata, configurable),
        named=None if said is None else said.named,
        configurable={key: value for key, value in configurable.items() if isinstance(value, str)},
        now=now,
    )


def surrounding_user() -> Any:
    """The user whom the agent server authenticated, as a step that starts here finds them around it, or None."""
    config = var_child_runnable_config.get()
    configurable = config.get("configurable") if config else None
    return _authenticated(configurable.get(_AUTH_USER)) if configurable else None


def _on_server(metadata: Mapping[str, Any], configurable: Mapping[str, Any]) -> bool:
    """Whether an agent server runs this: it marks every run, even one without authentication."""
    return _SERVER_MARK in metadata or not _SERVER_KEYS.isdisjoint(configurable)


def _authenticated(user: Any) -> Any:
    """The user in the configurable, if the agent server put it there.

    That is an object with an ``identity``, whatever the server's own auth handler returned. What a client can put
    there, through whichever server, is JSON, and so never an object.
    """
    return user if hasattr(user, "identity") else None


@valueclass
class Observed:
    """What the end of a model call says. ``usage`` is None where nothing was reported, ``doubt`` where the report
    contradicts itself; ``output`` is what came back; ``partial`` marks a call that broke off, so that its report may
    fall short of what was produced."""

    usage: Usage | None = None
    doubt: str | None = None
    model: str | None = None
    cached: bool = False
    partial: bool = False
    output: Sequence[BaseMessage | str] = field(default=(), repr=False)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to bill. An answer without content still cost its prompt; a failure did not."""
        if self.usage is not None or self.doubt is not None:
            return False
        return not any(_has_content(item) for item in self.output) if self.partial else not self.output


def observe(response: LLMResult | None, run_id: Any = None, *, partial: bool = False) -> Observed:
    """Read the result of the model call ``run_id``, which may be ``partial`` or missing after an error.

    With n > 1 every generation repeats the usage of the whole call, so the first one counts.
    """
    output: list[BaseMessage | str] = []
    for prompt in response.generations if response else ():
        output += [one.message if isinstance(one, ChatGeneration) else one.text for one in prompt]
    if response is None or not output:
        return Observed(partial=partial)
    first = None if isinstance(output[0], str) else output[0]
    report: Any = getattr(first, "usage_metadata", None)
    model = _model(response, first)
    if not isinstance(report, Mapping | None):
        doubt = f"The model's class reported usage_metadata as {type(report).__name__}, not as counts by name."
        return Observed(None, doubt, model, False, partial, output)
    cached = first is not None and _is_cached(response, first, report, run_id)
    try:
        usage = usage_from_metadata(report)
        if usage is None and first is not None and (usage := _final_usage(first)) is not None:
            partial = False
        usage = usage or usage_from_token_usage((response.llm_output or {}).get("token_usage"))
        return Observed(usage, None, model, cached, partial, output)
    except UsageError as error:
        return Observed(None, str(error), model, cached, partial, output)


def observe_decision(outputs: Any) -> Observed | None:
    """Read what a decision model answered (``langchain_core.decisions``, of newer versions); None if it is none."""
    if not hasattr(outputs, "answers"):
        return None
    output, model = [str(outputs.answers)], getattr(outputs, "model", None)
    try:
        return Observed(usage_from_metadata(getattr(outputs, "usage", None)), None, model, output=output)
    except UsageError as error:
        return Observed(None, str(error), model, output=output)


def _is_cached(response: LLMResult, message: BaseMessage, report: Mapping[str, Any] | None, run_id: Any) -> bool:
    """Whether this is an answer from LangChain's own cache, whose mark is a cost of exactly 0.

    In memory, such an answer is one object for the call that paid for it and for all that find it: the mark may be on
    it before the end of the former is told. Only that one has what its model said beside the answer, or an answer that
    LangChain named after the run, for want of a name. (Or pieces of it were streamed, which the run knows.)
    """
    cost = (report or {}).get("total_cost")
    is_marked = type(cost) is int and cost == 0
    return is_marked and response.llm_output is None and str(run_id) not in (message.id or "")


def _final_usage(message: BaseMessage) -> Usage | None:
    """Structured output that failed to parse after being paid for (ChatOpenAI): the answer was whole, and so is its
    report, although LangChain tells an error."""
    body = (message.response_metadata or {}).get("body")
    return usage_from_token_usage(body.get("usage")) if isinstance(body, Mapping) else None


def _model(response: LLMResult, message: BaseMessage | None) -> str | None:
    said = (message.response_metadata if message is not None else None) or {}
    name = said.get("model_name") or said.get("model") or (response.llm_output or {}).get("model_name")
    return _once(str(name)) if name else None


@lru_cache(maxsize=1024)
def _once(name: str) -> str:
    """``name`` without repetition: LangChain joins what two pieces of a stream say, and some gateways say it twice."""
    length = (name + name).find(name, 1)  # where a text first finds itself again when it is repeated
    return name[:length] if length > 3 else name


def _has_content(item: BaseMessage | str) -> bool:
    if isinstance(item, str):
        return bool(item)
    calls = getattr(item, "tool_calls", None) or getattr(item, "invalid_tool_calls", None)
    return bool(item.content or calls or beside_text(item))


def requested_model(facts: Facts, params: Mapping[str, Any]) -> str | None:
    """The model that was asked for, for results that do not name theirs. On a server, metadata may be the client's."""
    traced, own = facts.metadata.get("ls_model_name"), params.get("model") or params.get("model_name")
    name = (own or traced) if facts.on_server else (traced or own)
    return str(name) if name else None


def piece_of(token: Any, message: Any) -> str:
    """What a streamed piece adds to the output: text, thoughts, and the calls of tools. ``message`` is its own."""
    text = token if isinstance(token, str) else text_of(token)
    if message is None:
        return text
    if message.additional_kwargs or type(message.content) is list:
        text += beside_text(message)
    for call in getattr(message, "tool_call_chunks", None) or ():
        text += (call.get("name") or "") + (call.get("args") or "")
    return text


def piece_of_event(event: Mapping[str, Any]) -> str:
    """What an event of a stream adds to the output: text, thoughts, and the arguments of a tool's call."""
    delta = event.get("delta") or {}
    return str(delta.get("text") or delta.get("reasoning") or delta.get("args") or "")


def as_running_total(observed: Observed, told: int, report: Any) -> Observed:
    """``observed``, whose usage is LangChain's sum of reports that were running totals, by the last ``report`` alone;
    ``told`` is the sum of their inputs."""
    if observed.usage is None or observed.usage.input != told:  # this client did not add them up
        return observed
    try:
        return replace(observed, usage=usage_from_metadata(report))
    except UsageError as error:
        return replace(observed, usage=None, doubt=str(error))


def received(report: Any, pieces: Sequence[str]) -> Observed:
    """A call whose end says nothing, as far as it is known: what its provider ``report``ed early, and what came."""
    output = ["".join(pieces)]
    try:
        return Observed(usage_from_metadata(report), partial=True, output=output)
    except UsageError as error:
        return Observed(None, str(error), partial=True, output=output)
